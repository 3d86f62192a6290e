"""Train MNIST with Prodigy+ Schedule-Free under DDP:

    torchrun --standalone --nproc-per-node 2 launch/mnist_ddp.py

An example application, not part of the installed packages. The network and the batches are those of
Schedule-Free's MNIST example; there is no learning rate to set.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import checkpoints
import mnist_data
import optimizers
import seeds
import torch
import torch.distributed as dist
from checkpoints import Run
from export import save_model
from interruption import Interruption
from optimizers import averaged, in_short, scalars
from options import LARGEST, Parser, natural, positive
from ranks import Ranks, run_script
from report import Report
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.utils.data import BatchSampler, DistributedSampler, TensorDataset

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
    run_script(parse, run)


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
    train, test, model, optimizer = set_up(args, ranks)
    settings = {name: getattr(args, name) for name in SHARED}
    saves, before = checkpoints.resume(args, settings, model, optimizer, ranks)
    with ranks.fail_together():
        about = ranks.about() | vars(args)
        report = Report(args.out, about, silent=ranks.rank != 0, records=before.records)

    sampler: DistributedSampler[int] = DistributedSampler(train, ranks.size, ranks.rank, seed=args.seed)
    batches = BatchSampler(sampler, args.batch_size // ranks.size, drop_last=False)
    following = islice(endless(batches, sampler), before.step, None)
    per_epoch = len(batches)
    steps = range(before.step, min(args.epochs * per_epoch, LARGEST))
    if not steps:
        report.say(f"It has been trained for {args.epochs} epochs: ask for more with --epochs.")
    losses: list[Tensor] = []
    last = stopped = False
    with Interruption() as interruption, report.bar(steps, "step") as bar:
        for step in bar:
            seeds.everything(args.seed, step, ranks.rank)  # dropout differs between processes
            losses.append(take_step(model, optimizer, train[next(following)]))
            done = step + 1
            last, stopped = done == steps.stop, interruption.requested()
            epoch_ends = done % per_epoch == 0
            due = args.save_every is not None and done % per_epoch % args.save_every == 0
            save = epoch_ends or stopped or due
            if done % per_epoch % REPORT_EVERY == 0 or save:
                mean = ranks.sum_(torch.stack(losses).mean()).item() / ranks.size
                losses.clear()
                numbers = scalars(optimizer)
                with ranks.fail_together():
                    report.log("train", step=done, epoch=done / per_epoch, loss=mean, **numbers)
                shown = f"epoch {done / per_epoch:.1f}, loss {mean:.4f}, {in_short(numbers)}"
                bar.set_postfix_str(shown, refresh=False)
            if epoch_ends:
                with averaged(optimizer):
                    loss, correct = evaluate(model, test, ranks)
                with ranks.fail_together():
                    report_evaluation(report, optimizer, done, done // per_epoch, loss, correct, len(test))
            if save:
                with ranks.fail_together():
                    saves.begin(Run(done, settings, report.records), model, optimizer)
            if stopped:
                break
        with ranks.fail_together():
            saves.finish()
    if stopped and not last:
        interruption.end(report, done)
    with ranks.fail_together():
        path = save_model(args.out, model, optimizer, ranks, {})
    report.say(f"The trained model is in {path}")


# --------------------------------------------------------------------------------- network and data


def set_up(
    args: argparse.Namespace, ranks: Ranks
) -> tuple[TensorDataset, TensorDataset, nn.Module, Optimizer]:
    """The training and the test set, the network (under DDP, if it has several processes), its optimiser."""
    with ranks.fail_together():
        if args.batch_size % ranks.size:
            raise ValueError(
                f"--batch-size {args.batch_size} cannot be split evenly over {ranks.size} processes: choose "
                f"a multiple of {ranks.size}."
            )
        if args.data is None and ranks.local_rank == 0:
            mnist_data.fetch(mnist_data.cache_folder())
    with ranks.fail_together():
        train, test = load_data(args.data or mnist_data.cache_folder(), args.limit, ranks.device)
        torch.manual_seed(args.seed)
        model: nn.Module = network().to(ranks.device)
        optimizer = build_optimizer(args, model)
    if ranks.size > 1:
        model = DistributedDataParallel(model)
        # DDP regroups the gradients after its first backward pass, which changes the rounding of sums over
        # more than two processes. After a pass before training, a resumed run rounds as one never stopped.
        images, _ = prepare(*train[:1])
        model(images).sum().backward()
        model.zero_grad()
    return train, test, model, optimizer


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
        raise ValueError("--option fused_back_pass: this script steps after backward(); see gpt_fsdp2.py.")
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


def endless(batches: BatchSampler, sampler: DistributedSampler[int]) -> Iterator[list[int]]:
    """The batches of one epoch after the other, as indices of the data."""
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from batches


def take_step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> Tensor:
    """Take one training step; returns its loss."""
    images, labels = prepare(*batch)
    optimizer.zero_grad()
    loss = nll_loss(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset, ranks: Ranks) -> tuple[float, int]:
    """The mean loss and the number of correct predictions; each process evaluates a shard of the data."""
    model.eval()
    shard = [torch.split(tensor[ranks.rank :: ranks.size], TEST_BATCH) for tensor in data.tensors]
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch in zip(*shard, strict=True):
        images, labels = prepare(*batch)
        output = model(images)
        sums[0] += nll_loss(output, labels, reduction="sum")
        sums[1] += (output.argmax(dim=1) == labels).sum()
    model.train()
    loss, correct = ranks.sum_(sums).tolist()
    return loss / len(data), int(correct)


def report_evaluation(
    report: Report, optimizer: Optimizer, step: int, epoch: int, loss: float, correct: int, count: int
) -> None:
    """Log and print the loss and accuracy on the test set, of ``count`` images; draw the curves so far."""
    if isinstance(optimizer, ProdigyPlusScheduleFree):
        report.say(f"Prodigy LR: {optimizer.metrics()[0]['d'].item():.6f}")
    accuracy = correct / count
    report.say(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{count} ({accuracy:.2%})")
    report.log("test", step=step, epoch=epoch, loss=loss, accuracy=accuracy)
    report.draw()


if __name__ == "__main__":
    main()
