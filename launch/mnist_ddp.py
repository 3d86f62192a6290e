"""Learn MNIST with Prodigy+ Schedule-Free on several processes:

    torchrun --standalone --nproc-per-node 2 launch/mnist_ddp.py

The network and the batches are those of Schedule-Free's MNIST example; there is no learning rate to set.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mnist_data
import optimizers
import torch
import torch.distributed as dist
from files import replacing
from optimizers import step_size
from options import Parser, positive
from ranks import Ranks, start
from report import Curve, Panel, Record, Report
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

# What a resumed run must share with the run that it goes on with.
SHARED = (*optimizers.SHARED, "batch_size", "seed", "limit")


def main() -> None:
    """Train, test and save, epoch by epoch."""
    with start() as ranks:
        with ranks.together():
            args = parse()
        run(args, ranks)


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = Parser(description="Learn MNIST on several processes.")
    add = parser.add_argument
    add("--epochs", type=positive, default=3, help="default: %(default)s; the example trains for 14")
    add("--batch-size", type=positive, default=64, help="of all processes together; default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    optimizers.add_arguments(parser)
    add("--data", type=Path, metavar="DIR", help="folder of MNIST's four IDX files, plain or .gz")
    add("--out", type=Path, default=Path("runs/mnist"), metavar="DIR", help="default: %(default)s")
    resume_help = "go on from a checkpoint; default: checkpoint.pt in --out"
    add("--resume", type=Path, nargs="?", const=True, metavar="PATH", help=resume_help)
    add("--limit", type=positive, metavar="N", help="use the first N images only, for a quick trial")
    args = parser.parse_args()
    optimizers.complete(args)
    args.resume = args.out / "checkpoint.pt" if args.resume is True else args.resume
    return args


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """The whole run, in one of its processes."""
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
        done, records = resume(args.resume, net, optimizer, settings) if args.resume else (0, [])
        about = {"torch": torch.__version__, "processes": ranks.size, "device": ranks.device, **vars(args)}
        report = Report(args.out, about, silent=ranks.rank != 0, records=records)
    if done >= args.epochs:
        report.say(f"{args.resume} has been trained for {done} epochs: ask for more with --epochs.")

    sampler: DistributedSampler[int] = DistributedSampler(train, ranks.size, ranks.rank, seed=args.seed)
    batches = BatchSampler(sampler, args.batch_size // ranks.size, drop_last=False)
    # A batch is one indexing of the tensors: nothing is left for workers to do.
    loader: DataLoader[Batch] = DataLoader(train, sampler=batches, batch_size=None)

    for epoch in range(done, args.epochs):
        sampler.set_epoch(epoch)
        # Dropout differs between processes. Seeded every epoch, it needs no state in the checkpoint.
        torch.manual_seed(args.seed + epoch * ranks.size + ranks.rank)
        if isinstance(optimizer, ProdigyPlusScheduleFree):
            optimizer.train()
        train_epoch(net, optimizer, loader, report, ranks, epoch, f"epoch {epoch + 1}/{args.epochs}")

        if isinstance(optimizer, ProdigyPlusScheduleFree):
            optimizer.eval()
            report.say(f"Prodigy LR: {optimizer.metrics()[0]['d'].item():.6f}")
        loss, correct = evaluate(net, test, ranks)
        share = correct / len(test)
        report.say(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{len(test)} ({share:.2%})")
        report.log("test", step=(epoch + 1) * len(loader), epoch=epoch + 1, loss=loss, accuracy=share)
        report.draw(panels(args))

        if isinstance(optimizer, ProdigyPlusScheduleFree):
            optimizer.train()  # a checkpoint goes on from the weights of training
        if ranks.rank == 0:
            save(args.out, net, optimizer, epoch + 1, settings, report.records)


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
    """The optimiser of the command line, for the whole network."""
    if args.option.get("fused_back_pass"):
        raise ValueError(
            "--option fused_back_pass: this script wraps its network anew every epoch; see gpt_fsdp2.py."
        )
    if args.optimizer == "adamw":
        return AdamW(net.parameters(), lr=args.lr)
    its = optimizers.parameters(args, net)
    if args.muon and dist.is_initialized():
        # The processes share the matrices among them.
        return ShardedProdigyPlusScheduleFree(its, lr=args.lr, replicas=dist.group.WORLD, **args.option)
    return ProdigyPlusScheduleFree(its, lr=args.lr, **args.option)


def load_data(folder: Path, limit: int | None, device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """The training and the test set, as bytes, on the device."""
    data = mnist_data.load(folder)
    tensors = [torch.from_numpy(array[:limit]).to(device) for array in data]
    return TensorDataset(*tensors[:2]), TensorDataset(*tensors[2:])


def prepare(images: Tensor, labels: Tensor) -> Batch:
    """A batch of bytes as the network wants it."""
    return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD), labels.long()


# ------------------------------------------------------------------------------------- one epoch


def train_epoch(
    net: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Batch],
    report: Report,
    ranks: Ranks,
    epoch: int,
    title: str,
) -> None:
    """Take the steps of one epoch."""
    # Made every epoch: past its first step it groups the gradients anew, and with more than two processes
    # the grouping shows in the last bits of their sums. So a resumed run rounds as one that never stopped.
    model = net if ranks.size == 1 else DistributedDataParallel(net)
    model.train()
    losses: list[Tensor] = []
    with report.bar(loader, title) as bar:
        for number, batch in enumerate(bar, 1):
            images, labels = prepare(*batch)
            optimizer.zero_grad()
            loss = nll_loss(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
            if number % REPORT_EVERY == 0 or number == len(loader):
                mean = ranks.sum(torch.stack(losses).mean()).item() / ranks.size
                losses.clear()
                numbers = step_size(optimizer)
                at = {"step": epoch * len(loader) + number, "epoch": epoch + number / len(loader)}
                report.log("train", **at, loss=mean, **numbers)
                lr = numbers.get("d", numbers["lr"])
                bar.set_postfix_str(f"loss {mean:.4f}, lr {lr:.6f}", refresh=False)


@torch.no_grad()
def evaluate(net: nn.Module, data: TensorDataset, ranks: Ranks) -> tuple[float, int]:
    """The mean loss, and how many images are recognised, over all processes: each sees its share once."""
    net.eval()
    mine = [torch.split(tensor[ranks.rank :: ranks.size], TEST_BATCH) for tensor in data.tensors]
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch in zip(*mine, strict=True):
        images, labels = prepare(*batch)
        output = net(images)
        sums[0] += nll_loss(output, labels, reduction="sum")
        sums[1] += (output.argmax(dim=1) == labels).sum()
    loss, correct = ranks.sum(sums).tolist()
    return loss / len(data), int(correct)


def panels(args: argparse.Namespace) -> list[Panel]:
    """What to draw."""
    return [
        Panel("loss", (Curve("train", "loss", "training"), Curve("test", "loss", "test")), "log"),
        Panel("test accuracy", (Curve("test", "accuracy", "test"),)),
        *optimizers.panels(args),
    ]


# ------------------------------------------------------------------------------------- checkpoints


def save(
    folder: Path,
    net: nn.Module,
    optimizer: Optimizer,
    epoch: int,
    settings: Mapping[str, Any],
    records: list[Record],
) -> None:
    """Write what a run needs to go on, and the trained network by itself."""
    checkpoint = {
        "epoch": epoch,
        "settings": dict(settings),
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "records": records,
    }
    trained = net.state_dict()
    if isinstance(optimizer, ProdigyPlusScheduleFree):
        trained = optimizer.averaged_state_dict(net)
    for name, content in {"checkpoint.pt": checkpoint, "model.pt": trained}.items():
        with replacing(folder / name) as path:
            torch.save(content, path)


def resume(
    path: Path, net: nn.Module, optimizer: Optimizer, settings: Mapping[str, Any]
) -> tuple[int, list[Record]]:
    """Take over a checkpoint; returns the epochs it was trained for, and its records."""
    if not path.is_file():
        raise FileNotFoundError(f"--resume: there is no checkpoint {path}; leave --resume out to start anew.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["settings"]
        for name, ours in settings.items():
            if theirs[name] != ours:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"--resume: {path} was trained with {option} {theirs[name]}, not {ours}.")
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["epoch"], saved["records"]
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"--resume: {path} is not a checkpoint of this script.") from error


if __name__ == "__main__":
    main()
