"""Train MNIST with Prodigy+ Schedule-Free under DDP:

    torchrun --standalone --nproc-per-node 2 launch/mnist_ddp.py

An example application, not part of the installed packages. The network and the batches are those of
Schedule-Free's MNIST example; there is no learning rate to set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import checkpoints
import mnist_data
import optimizers
import seeds
import torch
import torch.distributed as dist
from checkpoints import Checkpoints, Run, job
from export import save_model
from interruption import Interruption
from optimizers import averaged, in_short, scalars
from options import Parser, natural, positive
from ranks import Ranks, start, wait_at_most
from report import Report
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

Batch = tuple[Tensor, ...]

MEAN, STD = 0.1307, 0.3081
TEST_BATCH = 1000
REPORT_EVERY = 20  # steps

# The options that a resumed run must share with the run of its checkpoint.
SHARED = (*optimizers.SHARED, "batch_size", "seed", "limit")


def main() -> None:
    """Train, test and save, epoch by epoch."""
    with start() as ranks:
        with ranks.together():
            args = parse()
        wait_at_most(args.timeout)
        run(args, ranks)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description="Learn MNIST on several processes.")
    add = parser.add_argument
    add("--epochs", type=positive, default=3, help="default: %(default)s; the example trains for 14")
    add("--batch-size", type=positive, default=64, help="of all processes together; default: %(default)s")
    add("--seed", type=natural, default=1, help="default: %(default)s")
    optimizers.add_arguments(parser)
    add("--data", type=Path, metavar="DIR", help="folder of MNIST's four IDX files, plain or .gz")
    add("--out", type=Path, default=Path("runs/mnist"), metavar="DIR", help="default: %(default)s")
    checkpoints.add_arguments(parser, "at the end of every epoch too")
    add("--limit", type=positive, metavar="N", help="use the first N images only, for a quick trial")
    args = parser.parse_args()
    optimizers.complete_(args)
    return args


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """The whole run, as each process executes it."""
    settings = {name: getattr(args, name) for name in SHARED}
    with ranks.together():
        if args.batch_size % ranks.size:
            raise ValueError(
                f"--batch-size {args.batch_size} cannot be split evenly over {ranks.size} processes: choose "
                f"a multiple of {ranks.size}."
            )
        if args.data is None and ranks.local_rank == 0:
            mnist_data.fetch(mnist_data.cache_folder())
        torch.manual_seed(args.seed)
        net = network().to(ranks.device)
        optimizer = build_optimizer(args, net)
    with ranks.together():
        train, test = load_data(args.data or mnist_data.cache_folder(), args.limit, ranks.device)
        checkpoints.find(args, settings)  # report errors before --out is created
    written = Checkpoints(args, ranks)
    with ranks.together():
        saved, before = checkpoints.find(args, settings)  # again, now that no other run can write to --out
    with ranks.together():
        if not ranks.agree(before.step):
            raise ValueError("the nodes find different checkpoints: share --out among them.")
        if saved is not None:
            checkpoints.load(saved, net, optimizer, ranks)
        about = {"torch": torch.__version__, "processes": ranks.size, "device": ranks.device, **vars(args)}
        report = Report(args.out, about, silent=ranks.rank != 0, records=before.records)
    if saved is not None:
        report.say(f"Going on from {saved}")

    training = Training(args, ranks, report, net, optimizer, train)
    step, end = before.step, args.epochs * training.steps_per_epoch
    if step >= end:
        report.say(f"It has been trained for {args.epochs} epochs: ask for more with --epochs.")
    stopped = False
    with Interruption() as interruption:
        while step < end and not stopped:
            step, stopped = training.run_segment(step, interruption)
            if step % training.steps_per_epoch == 0:
                with averaged(optimizer):
                    loss, correct = evaluate(net, test, ranks)
                accuracy = correct / len(test)
                if isinstance(optimizer, ProdigyPlusScheduleFree):
                    report.say(f"Prodigy LR: {optimizer.metrics()[0]['d'].item():.6f}")
                report.say(
                    f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{len(test)} ({accuracy:.2%})"
                )
                with ranks.together():
                    report.log(
                        "test",
                        step=step,
                        epoch=step // training.steps_per_epoch,
                        loss=loss,
                        accuracy=accuracy,
                    )
                    report.draw()
            with ranks.together():
                written.begin(Run(step, settings, report.records, job()), net, optimizer)
        with ranks.together():
            written.finish()
    if stopped and step < end:
        report.say(f"Ended by {interruption.signal.name} after {step} steps: --resume goes on from there.")
        raise SystemExit(interruption.status)
    with ranks.together(), averaged(optimizer):
        path = save_model(args.out, net, optimizer, ranks, {})
    report.say(f"The trained model is in {path}")


# --------------------------------------------------------------------------------- network and data


def network() -> nn.Sequential:
    """The network of Schedule-Free's MNIST example."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
        nn.LogSoftmax(dim=1),
    )


def build_optimizer(args: argparse.Namespace, net: nn.Module) -> Optimizer:
    """The optimiser that the command line chooses."""
    if args.option.get("fused_back_pass"):
        raise ValueError(
            "--option fused_back_pass: this script wraps its network anew every epoch; see gpt_fsdp2.py."
        )
    if args.optimizer == "adamw":
        return AdamW(net.parameters(), lr=args.lr)
    parameters = optimizers.parameters(args, net)
    if args.muon and dist.is_initialized():
        # Each process orthogonalises a part of the matrices.
        return ShardedProdigyPlusScheduleFree(
            parameters, lr=args.lr, replicas=dist.group.WORLD, **args.option
        )
    return ProdigyPlusScheduleFree(parameters, lr=args.lr, **args.option)


def load_data(folder: Path, limit: int | None, device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """The training and the test set, as bytes, on the device."""
    data = mnist_data.load(folder)
    tensors = [torch.from_numpy(array[:limit]).to(device) for array in data]
    return TensorDataset(*tensors[:2]), TensorDataset(*tensors[2:])


def prepare(images: Tensor, labels: Tensor) -> Batch:
    """Normalise a batch of bytes for the network."""
    return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD), labels.long()


# ---------------------------------------------------------------------------------------- the steps


class Training:
    """Takes the training steps, in segments that end with an epoch or where a checkpoint is due.

    Args:
        args: The options of the command line.
        ranks: The processes, each of which sees its share of every batch.
        report: Where losses are logged.
        net: The network, the same in all processes.
        optimizer: Its optimiser.
        data: The training set.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: Ranks,
        report: Report,
        net: nn.Module,
        optimizer: Optimizer,
        data: TensorDataset,
    ) -> None:
        self._args = args
        self._ranks = ranks
        self._report = report
        self._net = net
        self._optimizer = optimizer
        self._data = data
        self._sampler: DistributedSampler[int] = DistributedSampler(
            data, ranks.size, ranks.rank, seed=args.seed
        )
        self._batches = BatchSampler(self._sampler, args.batch_size // ranks.size, drop_last=False)
        self.steps_per_epoch = len(self._batches)

    def run_segment(self, step: int, interruption: Interruption) -> tuple[int, bool]:
        """Take steps from ``step`` to the end of its segment; returns the next step and whether to stop."""
        epoch, first = divmod(step, self.steps_per_epoch)
        every = self._args.save_every or self.steps_per_epoch
        self._sampler.set_epoch(epoch)
        batches = list(self._batches)[first : (first // every + 1) * every]
        # Loading a batch is one indexing operation, so workers would not help.
        loader: DataLoader[Batch] = DataLoader(self._data, sampler=batches, batch_size=None)
        # Wrapped again for every segment: DDP rebuilds its buckets after the first step, and with more than
        # two processes the bucketing changes the rounding of the sums. This way a resumed run rounds as one
        # that never stopped.
        model = self._net if self._ranks.size == 1 else DistributedDataParallel(self._net)
        model.train()
        losses: list[Tensor] = []
        last, stopped = step + len(batches), False
        with self._report.bar(loader, f"epoch {epoch + 1}/{self._args.epochs}") as bar:
            for batch in bar:
                seeds.everything(self._args.seed, step, self._ranks.rank)  # dropout differs between processes
                losses.append(take_step(model, self._optimizer, batch))
                step += 1
                stopped = interruption.requested()
                if step % self.steps_per_epoch % REPORT_EVERY == 0 or step == last or stopped:
                    mean = self._ranks.sum_(torch.stack(losses).mean()).item() / self._ranks.size
                    losses.clear()
                    numbers = scalars(self._optimizer)
                    with self._ranks.together():
                        self._report.log(
                            "train", step=step, epoch=step / self.steps_per_epoch, loss=mean, **numbers
                        )
                    bar.set_postfix_str(f"loss {mean:.4f}, {in_short(numbers)}", refresh=False)
                if stopped:
                    break
        return step, stopped


def take_step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> Tensor:
    """Take one training step; returns its loss."""
    images, labels = prepare(*batch)
    optimizer.zero_grad()
    loss = nll_loss(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(net: nn.Module, data: TensorDataset, ranks: Ranks) -> tuple[float, int]:
    """The mean loss and the number of correct predictions; each process evaluates a shard of the data."""
    net.eval()
    shard = [torch.split(tensor[ranks.rank :: ranks.size], TEST_BATCH) for tensor in data.tensors]
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch in zip(*shard, strict=True):
        images, labels = prepare(*batch)
        output = net(images)
        sums[0] += nll_loss(output, labels, reduction="sum")
        sums[1] += (output.argmax(dim=1) == labels).sum()
    loss, correct = ranks.sum_(sums).tolist()
    return loss / len(data), int(correct)


if __name__ == "__main__":
    main()
