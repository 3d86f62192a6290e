"""Pretrain a small byte-level GPT with Prodigy+ Schedule-Free, sharded over any mesh of processes:

    torchrun --standalone --nproc-per-node 2 launch/gpt_fsdp2.py
    torchrun --standalone --nproc-per-node 8 launch/gpt_fsdp2.py --mesh replicate=2,fsdp=2,tp=2

An example application, not part of the installed packages. There is no learning rate to set, and nothing to
download: without --data it trains on the sources of Python's standard library. The same seed gives the same
batches on every mesh.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import checkpoints
import optimizers
import seeds
import torch
import torch.distributed as dist
from checkpoints import Run
from corpus import Batch, Corpus, even_windows, files_in, random_windows, read, standard_library
from export import save_model
from gpt import GPT
from interruption import Interruption
from meshes import MeshShape, device_mesh, parallelize_, parse_mesh
from optimizers import averaged, in_short, scalars
from options import Parser, duration, natural, positive, probability
from ranks import Ranks, run_script, wait_at_most
from report import Report
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.plot import OF_OPTIMIZER, Panel
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

EVALUATION_WINDOWS = 512  # windows of the held-out text

# The plots of the figure.
PANELS = (
    Panel("bits per byte in training (lower is better)", "bits_per_byte", None),
    Panel("bits per byte of the held-out text (lower is better)", "eval_bits_per_byte", None),
    *OF_OPTIMIZER,
)

MODEL = ("layers", "width", "heads", "context")
# The options that a resumed run must share with the run of its checkpoint, besides the text.
SHARED = (*MODEL, *optimizers.SHARED, "batch_size", "seed", "dropout")


def main() -> None:
    """Train, evaluate and save."""
    run_script(parse, run)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description="Pretrain a small byte-level GPT on any mesh of processes.")
    add = parser.add_argument
    mesh_help = "as replicate=2,fsdp=4,tp=2; default: fsdp over all processes"
    add("--mesh", metavar="AXIS=N,…", help=mesh_help)
    add("--data", type=Path, metavar="DIR", help="folder of text; default: Python's standard library")
    add("--pattern", default="*", metavar="GLOB", help="which files of --data to read; default: all")
    add("--layers", type=positive, default=4, help="default: %(default)s")
    add("--width", type=positive, default=128, help="default: %(default)s")
    add("--heads", type=positive, default=4, help="default: %(default)s")
    add("--context", type=positive, default=128, help="bytes in a window; default: %(default)s")
    add("--batch-size", type=positive, default=16, help="windows, of all processes; default: %(default)s")
    add("--dropout", type=probability, default=0.0, metavar="P", help="default: %(default)s")
    add("--seed", type=natural, default=1, help="default: %(default)s")
    optimizers.add_arguments(parser)
    add("--steps", type=positive, help="stop after this many; default: 1000, and no end with --minutes")
    add("--minutes", type=duration, help="stop after this much time, with that before --resume")
    add("--log-every", type=positive, default=10, metavar="STEPS", help="default: %(default)s")
    add("--eval-every", type=positive, default=100, metavar="STEPS", help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/gpt"), metavar="DIR", help="default: %(default)s")
    checkpoints.add_arguments(parser, "at the end in any case")
    args = parser.parse_args()
    optimizers.complete_(args)
    optimizers.prefer_balance_(args)  # which ends lower on GPTs: docs/research.md
    args.steps = 1000 if args.steps is None and args.minutes is None else args.steps
    return args


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """The whole run, as each process executes it."""
    started = time.monotonic()
    shape, text, model, optimizer = set_up(args, ranks)
    settings = {name: getattr(args, name) for name in SHARED} | {"data": text.summary}
    saves, before = checkpoints.resume(args, settings, model, optimizer, ranks)
    size = sum(p.numel() for p in model.parameters())
    with ranks.fail_together():
        options = vars(args) | {"mesh": shape, "data": text.summary, "parameters": size}
        silent = ranks.rank != 0
        report = Report(args.out, ranks.about() | options, silent=silent, records=before.records)
    report.say(f"{size:,} parameters on {ranks.size} processes, {shape}; {text.summary}")
    if args.steps is not None and before.step >= args.steps:
        report.say(f"It has been trained for {before.step} steps: ask for more with --steps.")

    share = Share(ranks.rank // shape.tp, shape.data_parallel)
    tokens = args.batch_size * args.context
    meter = Meter(report, ranks, tokens, started - 60 * before.minutes, args.minutes)
    steps = count(before.step) if args.steps is None else range(before.step, args.steps)
    last = stopped = False
    with Interruption() as interruption, report.bar(steps, "step") as bar:
        for step in bar:
            windows = random_windows(text.training, args.context, args.batch_size, args.seed, step)
            seeds.everything(args.seed, step, share.index)
            meter.add(take_step(model, optimizer, share.of(windows)))
            done = step + 1
            last, stopped = done == args.steps, interruption.requested()
            save = last or stopped or (args.save_every is not None and done % args.save_every == 0)
            if done % args.log_every == 0 or save:  # a checkpoint holds the whole log up to it
                with ranks.fail_together():
                    last |= meter.log(done, scalars(optimizer), bar)
            if done % args.eval_every == 0 or last:
                with meter.paused(), averaged(optimizer):
                    loss = evaluate(model, text.held_out, args, share, ranks)
                    with ranks.fail_together():
                        report_evaluation(report, done, meter.minutes(), loss)
            if save or last:
                with meter.paused(), ranks.fail_together():
                    now = Run(done, settings, report.records, minutes=meter.minutes())
                    saves.begin(now, model, optimizer)
            if last or stopped:
                break
        with ranks.fail_together():
            saves.finish()
    if stopped and not last:
        interruption.end(report, done)
    with ranks.fail_together():
        path = save_model(args.out, model, optimizer, ranks, shape_of(args))
    report.say(f"The trained model is in {path}")


def set_up(args: argparse.Namespace, ranks: Ranks) -> tuple[MeshShape, Corpus, GPT, Optimizer]:
    """The shape of the mesh, the text, the model parallelised over the mesh, and its optimiser."""
    with ranks.fail_together():
        shape = parse_mesh(args.mesh, ranks.size)
        check(args, shape)
        text = read_corpus(args).to(ranks.device)
        torch.manual_seed(args.seed)  # every process starts with the same weights
        model = build_model(args, ranks.device)
    if dist.is_initialized():
        mesh = device_mesh(shape, ranks.device)
        ranks.meshes.append(mesh)
        wait_at_most(args.timeout, mesh.get_all_groups())
        parallelize_(model, mesh)
    with ranks.fail_together():
        optimizer = build_optimizer(args, model)
    return shape, text, model, optimizer


def check(args: argparse.Namespace, shape: MeshShape) -> None:
    """Check that batch and heads can be split over the mesh.

    Raises:
        ValueError: They cannot.
    """
    if args.batch_size % shape.data_parallel:
        raise ValueError(
            f"--batch-size {args.batch_size} cannot be split evenly over the {shape.data_parallel} processes "
            f"of replicate × fsdp: choose a multiple of {shape.data_parallel}."
        )
    if args.heads % shape.tp:
        raise ValueError(
            f"--heads {args.heads} cannot be split evenly over tp={shape.tp}: choose a multiple of it."
        )


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """The arguments that build the GPT."""
    return {name: getattr(args, name) for name in MODEL}


def read_corpus(args: argparse.Namespace) -> Corpus:
    """The text that the command line chooses.

    Raises:
        OSError: A file cannot be read.
        ValueError: It is too short for a batch.
    """
    paths = standard_library() if args.data is None else files_in(args.data, args.pattern)
    text = read(paths, args.context)
    most = len(text.training) - args.context
    if args.batch_size > most:
        raise ValueError(
            f"--batch-size {args.batch_size} is more than there are windows of --context {args.context} "
            f"in the text to train on: choose at most {most}."
        )
    return text


def build_model(args: argparse.Namespace, device: torch.device) -> GPT:
    """The untrained model that the command line describes.

    Raises:
        ValueError: It cannot be built.
    """
    shape = shape_of(args)
    try:
        return GPT(**shape, dropout=args.dropout).to(device)
    except (MemoryError, RuntimeError, TypeError) as error:  # torch's, for sizes beyond memory or int64
        options = " ".join(f"--{name} {size}" for name, size in shape.items())
        raise ValueError(f"{options}: choose a smaller model: {str(error).splitlines()[0]}") from error


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> Optimizer:
    """The optimiser that the command line chooses."""
    if args.optimizer == "adamw":
        # Not foreach: with tensor parallelism the weights are on several meshes, which it cannot mix.
        return AdamW(model.parameters(), lr=args.lr, foreach=False)
    sharded = dist.is_initialized()
    optimizer_class = ShardedProdigyPlusScheduleFree if sharded else ProdigyPlusScheduleFree
    optimizer = optimizer_class(optimizers.parameters(args, model), lr=args.lr, **args.option)
    if args.option.get("fused_back_pass"):
        optimizer.fuse_backward(model)
    return optimizer


# ---------------------------------------------------------------------------------------- the steps


@dataclass(frozen=True, slots=True)
class Share:
    """The part of every batch that a process sees, the same within a ``tp`` group."""

    index: int
    count: int

    def of(self, batch: Batch) -> Batch:
        """The share of a batch."""
        inputs, targets = (part.chunk(self.count)[self.index] for part in batch)
        return inputs, targets


def take_step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> Tensor:
    """Take one training step; returns its loss."""
    optimizer.zero_grad()
    loss: Tensor = model(*batch)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, args: argparse.Namespace, share: Share, ranks: Ranks) -> float:
    """The mean loss over windows spread evenly over a text: the same windows on every mesh."""
    batches = -(-EVALUATION_WINDOWS // args.batch_size)
    windows = even_windows(text, args.context, batches * args.batch_size)
    parts = zip(*(torch.split(part, args.batch_size) for part in windows), strict=True)
    model.eval()
    losses = torch.stack([model(*share.of(batch)) for batch in parts])
    model.train()
    return ranks.sum_(losses.double().mean()).item() / ranks.size


# ---------------------------------------------------------------------------------------- the report


class Meter:
    """Averages losses and measures speed between two lines of the log.

    Args:
        report: Where the lines go.
        ranks: The processes to average over.
        tokens: The number of tokens in a step.
        started: When the run started.
        minutes: How long it may take, or None.
    """

    def __init__(
        self, report: Report, ranks: Ranks, tokens: int, started: float, minutes: float | None
    ) -> None:
        self._report = report
        self._ranks = ranks
        self._tokens = tokens
        self._started = started
        self._budget = math.inf if minutes is None else minutes
        self._losses: list[Tensor] = []
        self._since = time.monotonic()

    def minutes(self) -> float:
        """The duration of the run so far."""
        return (time.monotonic() - self._started) / 60

    def add(self, loss: Tensor) -> None:
        """Count a step and its loss."""
        self._losses.append(loss)

    def log(self, step: int, numbers: dict[str, float], bar: Any) -> bool:
        """Log the steps since the last call; returns in all processes alike whether the time is up."""
        mean = torch.stack(self._losses).double().mean()
        # One all-reduce for both. The clock of rank 0 decides.
        over = self._ranks.rank == 0 and self.minutes() >= self._budget
        total, over_somewhere = self._ranks.sum_(torch.stack([mean, torch.full_like(mean, over)])).tolist()
        loss = in_bits(total / self._ranks.size)
        speed = len(self._losses) * self._tokens / (time.monotonic() - self._since)
        self._report.log(
            "train", step=step, minutes=self.minutes(), tokens_per_second=speed, **loss, **numbers
        )
        shown = f"loss {loss['loss']:.4f}, {speed:,.0f} tokens/s, {in_short(numbers)}"
        bar.set_postfix_str(shown, refresh=False)
        self._losses.clear()
        self._since = time.monotonic()
        return bool(over_somewhere)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose duration does not count as training time."""
        before = time.monotonic()
        yield
        self._since += time.monotonic() - before


def report_evaluation(report: Report, step: int, minutes: float, loss: float) -> None:
    """Log and print the loss of the held-out text, and draw the curves so far."""
    losses = in_bits(loss)
    report.log("held out", step=step, minutes=minutes, **losses)
    report.say(f"step {step}: held-out {losses['bits_per_byte']:.4f} bits/byte")
    report.draw(PANELS)


def in_bits(loss: float) -> dict[str, float]:
    """A loss in nats, and in bits per byte: every target is a byte."""
    return {"loss": loss, "bits_per_byte": loss / math.log(2)}


if __name__ == "__main__":
    main()
