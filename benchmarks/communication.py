"""What communication costs a sharded step, over gloo: the step, and the same work with nothing sent.

    python benchmarks/communication.py [--ranks 2 4] [--rounds N] [--json FILE]

Every process has one thread and, on Linux, cores of its own, or one in turn where there are fewer cores. It
has pieces of the parameters of a small GPT-2, cut along their first dimension, and steps two optimisers of
them in turn: one as it is, and one whose all-reduces do nothing, so that everything is still computed, packed
and unpacked. All ranks wait for one another and begin a step at the same moment; its time ends when the
slowest is done. Each round times everything in the opposite order to the last.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import machine
from harness.shapes import gpt, numel
from harness.tables import HIGH, LOW, digits, head, milliseconds, parser, quantiles, ratios, row, spread
from harness.tensors import local
from harness.watching import Call, Watch
from harness.workers import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from prodigyplus.exchange import BUCKET_BYTES
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

WARM_UP = 4  # rounds, in which state is made and processes connect
BUCKETS = (BUCKET_BYTES, 4 << 20)  # the default, and one that cuts the parameters into several
# Seconds from when all are ready to when they begin: gloo's thread polls for a while after a message.
PAUSE = 0.01
START_LIMIT, ROUND_LIMIT = 180, 20  # seconds

Sent = list[tuple[int, torch.dtype]]
"""Of each all-reduce, how many elements, and of what."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds by round, each on the slowest rank."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of all threads of a process


@dataclass(frozen=True, slots=True)
class Buckets:
    """Results for one size of buckets."""

    bucket_bytes: int
    sent: list[int]  # bytes of each all-reduce of a step
    with_: Times
    without: Times
    at_once: Times  # all bytes in one all-reduce, and nothing else
    one_by_one: Times  # the all-reduces of a step, and nothing else


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results on some number of processes."""

    ranks: int
    adamw: Times
    buckets: list[Buckets]


# ---------------------------------------------------------------------------------- in a process

Step = Callable[[], Any]


class Finished:
    """A collective that has nothing left to do."""

    def wait(self) -> bool:
        """Return at once: it is done."""
        return True


def nothing(*_: Any, **__: Any) -> Finished:
    """Replaces an all-reduce."""
    return Finished()


def replaced(function: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Replace the all-reduces of the optimisers' exchange with a function."""
    return mock.patch("prodigyplus_dist.exchange.dist.all_reduce", function)


def sent_by(step: Step) -> Sent:
    """The all-reduces of a step; there must be no other collectives."""

    def noted(call: Call) -> Sent:
        assert not call.is_collective or call.name == "allreduce_", call.name
        return [(tensor.numel(), tensor.dtype) for tensor in call.args[0]] if call.is_collective else []

    with Watch(note=noted) as watch:
        step()
    return [its for sent in watch.calls for its in sent]


def bytes_of(sent: Sent) -> list[int]:
    """The bytes of each all-reduce."""
    return [count * dtype.itemsize for count, dtype in sent]


def bare(sent: Sent) -> Step:
    """All-reduces with nothing between them, each begun when the one before is done."""
    buffers = [torch.zeros(count, dtype=dtype) for count, dtype in sent]

    def call() -> None:
        for buffer in buffers:
            dist.all_reduce(buffer)

    return call


def cut(mesh: DeviceMesh) -> list[nn.Parameter]:
    """Parameters with gradients, the same at every call."""
    torch.manual_seed(0)

    def one(shape: Sequence[int], scale: float) -> Tensor:
        return distribute_tensor(torch.randn(shape).mul_(scale), mesh, [Shard(0)], src_data_rank=None)

    parameters = [nn.Parameter(one(shape, 0.02)) for shape in gpt()]
    for p in parameters:
        p.grad = one(p.shape, 1e-2)
    return parameters


def plain(mesh: DeviceMesh) -> list[nn.Parameter]:
    """The pieces of them on this rank, as plain tensors."""
    parameters = []
    for p in cut(mesh):
        assert p.grad is not None
        parameters.append(nn.Parameter(local(p).clone()))
        parameters[-1].grad = local(p.grad).clone()
    return parameters


class Stopwatch:
    """Times calls that processes make together."""

    def __init__(self) -> None:
        self._calls: list[tuple[Step, Times, bool]] = []

    def add(self, call: Step, *, sends: bool = True) -> Times:
        """Add a call to time; if it sends nothing, it is an optimiser's step without its all-reduces.

        Returns:
            Where its times go.
        """
        times = Times()
        self._calls.append((call, times, sends))
        return times

    def round(self) -> None:
        """Make each call once, in the opposite order to the last round."""
        self._calls.reverse()
        for call, times, sends in self._calls:
            start = when_all_are_ready()
            with nullcontext() if sends else replaced(nothing):
                time.sleep(max(0.0, start - time.monotonic()))
                cpu = time.process_time()
                call()
                times.wall.append(time.monotonic() - start)
                times.cpu.append(time.process_time() - cpu)

    def settle(self) -> None:
        """Replace each time by the largest over the ranks, and leave out the warm-up rounds."""
        for _, times, _ in self._calls:
            for seconds in (times.wall, times.cpu):
                most = torch.tensor(seconds[WARM_UP:], dtype=torch.float64)
                dist.all_reduce(most, dist.ReduceOp.MAX)
                seconds[:] = most.tolist()


def when_all_are_ready() -> float:
    """A barrier; gives a moment soon after it, the same on all ranks."""
    moment = torch.tensor(time.monotonic() + PAUSE, dtype=torch.float64)
    dist.all_reduce(moment, dist.ReduceOp.MAX)
    return moment.item()


def work(ranks: int, rounds: int) -> Outcome:
    """What one of the processes measures."""
    mesh, watch = init_device_mesh("cpu", (ranks,)), Stopwatch()
    adamw = watch.add(torch.optim.AdamW(plain(mesh), fused=True).step)
    buckets = []
    for bucket_bytes in BUCKETS:
        talks, mute = (
            ShardedProdigyPlusScheduleFree(cut(mesh), bucket_bytes=bucket_bytes).step for _ in range(2)
        )
        talks()  # the first step makes state
        with replaced(nothing):
            assert not sent_by(mute)
        sent = sent_by(talks)
        all_of_it = -(-sum(bytes_of(sent)) // torch.float64.itemsize), torch.float64
        buckets.append(
            Buckets(
                bucket_bytes,
                bytes_of(sent),
                with_=watch.add(talks),
                without=watch.add(mute, sends=False),
                at_once=watch.add(bare([all_of_it])),
                one_by_one=watch.add(bare(sent)),
            )
        )
    for _ in range(WARM_UP + rounds):
        watch.round()
    watch.settle()
    return Outcome(ranks, adamw, buckets)


# ------------------------------------------------------------------------------------------- main


SAID = f"""\
Times are medians, with the {100 * LOW:.0f}th and {100 * HIGH:.0f}th percentile where a round's are compared.

- added: the time of the step beyond that of the same work with nothing sent; CPU: the same of the time of
  processors, of all threads of a process. What is added beyond that is waiting, for messages and for the
  slowest rank at each all-reduce, where the work with nothing sent waits for it once, at its end.
- bare: the same bytes with nothing computed: in one all-reduce, and in as many as the step makes, each begun
  when the one before is done. The first is the least that communication can take; the second, what it would
  take if none of it were hidden behind computing.
"""

POLLS = """\
Where no core is to spare, gloo's thread, which polls for messages (github.com/pytorch/gloo/issues/246), takes
that of the step, for up to a time slice at each all-reduce.
"""

COLUMNS = """\
processes: | bucket, MiB: | all-reduces: | sent, kB: | AdamW, ms: | without, ms: | with, ms: \
| with ÷ without: | added, ms: | added CPU, ms: | bare, at once, ms: | bare, one by one, ms:"""


def circumstances(ranks: Sequence[int], rounds: int) -> str:
    """The text before the table."""
    cores = os.cpu_count() or 1
    said = (
        f"{numel(gpt()) / 1e6:.1f} · 10⁶ parameters in {len(gpt())} tensors, float32; {cores} cores; "
        f"torch {torch.__version__}, {platform.system()}; gloo, processes of one thread; {rounds} rounds.\n\n"
    )
    crowded = [str(count) for count in ranks if count > cores]
    if crowded:
        said += f"On {cores} cores, {' and '.join(crowded)} processes share them, and take turns.\n\n"
    return said + SAID + (f"\n{POLLS}" if 2 * max(ranks) > cores else "")


def cells(outcome: Outcome, its: Buckets) -> list[str]:
    """A line of the table."""
    steps = outcome.adamw, its.without, its.with_
    low, middle, high = quantiles(ratios(its.with_.wall, its.without.wall))
    added = (
        [a - b for a, b in zip(*pair, strict=True)]
        for pair in ((its.with_.wall, its.without.wall), (its.with_.cpu, its.without.cpu))
    )
    counts = outcome.ranks, its.bucket_bytes >> 20, len(its.sent)
    return [
        *map(str, counts),
        digits(sum(its.sent) / 1e3),
        *(milliseconds(times.wall) for times in steps),
        f"{middle:.3f} ({low:.3f}–{high:.3f})",
        *(spread([1e3 * t for t in times]) for times in (*added, its.at_once.wall, its.one_by_one.wall)),
    ]


def main() -> None:
    """Measure, and print."""
    cli = parser(__doc__)
    cli.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="processes")
    cli.add_argument("--rounds", type=int, default=60)
    cli.add_argument("--json", type=Path, metavar="FILE", help="for all figures")
    args = cli.parse_args()
    if min(args.ranks) < 2 or args.rounds < 1:
        cli.error("it takes two processes, and a round.")
    machine.warn_if_busy()
    outcomes: list[Outcome] = []
    for ranks in args.ranks:
        print(f"{time.strftime('%X')} {ranks} processes", file=sys.stderr, flush=True)
        limit = START_LIMIT + args.rounds * ROUND_LIMIT
        outcomes.append(on_ranks(ranks, work, ranks, args.rounds, limit=limit, pinned=True)[0])
        if args.json is not None:
            kept = {"rounds": args.rounds, "outcomes": [asdict(outcome) for outcome in outcomes]}
            args.json.write_text(json.dumps(kept, indent=1))
    print(circumstances(args.ranks, args.rounds))
    print(head(COLUMNS))
    for outcome in outcomes:
        for its in outcome.buckets:
            print(row(*cells(outcome, its)))


if __name__ == "__main__":
    main()
