"""What communication costs a sharded step: the step beside the same work with nothing sent, over gloo.

    python benchmarks/communication.py [--ranks 2 4] [--rounds N] [--json FILE]

Every process has one thread and, on Linux, cores of its own, or one in turn where cores are fewer. It has
pieces of the parameters of `state_bytes.py`, cut along their first dimension, and steps two optimisers of
them in turn: one as it is, and one whose all-reduces are replaced by nothing, so that all that is computed,
packed and unpacked stays. All ranks wait for one another and begin a step at the same moment; it takes until
the slowest is done. Each round goes through all that is timed in the order opposite to the last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from state_bytes import shapes
from step_time import BUSY, HIGH, LOW, digits, quantiles, spread
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.spawn import spawn

from prodigyplus.engine.driver import BUCKET_BYTES
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

WARM_UP = 4  # rounds, in which state is made and processes find one another
BUCKETS = (BUCKET_BYTES, 4 << 20)  # the default, and one that cuts the parameters into several
# Seconds from when all are ready to when they begin: gloo's thread polls for a while after a message.
PAUSE = 0.01
START_LIMIT, ROUND_LIMIT, SILENCE_LIMIT = 180, 20, 60  # seconds

Sent = list[tuple[int, torch.dtype]]
"""Of each all-reduce, how many elements, and of what."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds by round, each on the rank where they are most."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of all threads of a process


@dataclass(frozen=True, slots=True)
class Buckets:
    """What was found for a size of buckets."""

    bucket_bytes: int
    sent: list[int]  # bytes of each all-reduce of a step
    with_: Times
    without: Times
    at_once: Times  # all bytes in one all-reduce, and nothing else
    one_by_one: Times  # the all-reduces of a step, and nothing else


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found on as many processes."""

    ranks: int
    adamw: Times
    buckets: list[Buckets]


# ---------------------------------------------------------------------------------- in a process

Step = Callable[[], Any]


class Finished:
    """A collective that has nothing left to do."""

    def wait(self) -> bool:
        """That it is done."""
        return True


def nothing(*_: Any, **__: Any) -> Finished:
    """In the place of an all-reduce."""
    return Finished()


def replaced(function: Callable[..., Any]) -> AbstractContextManager[Any]:
    """A function in the place of all-reduces, as the optimisers' exchange sees them."""
    return mock.patch("prodigyplus_dist.exchange.dist.all_reduce", function)


def sent_by(step: Step) -> Sent:
    """The all-reduces of a step; there must be no other collectives."""
    sent: Sent = []
    all_reduce = dist.all_reduce

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append((tensor.numel(), tensor.dtype))
        return all_reduce(tensor, *args, **kwargs)

    with CommDebugMode() as seen, replaced(noted):  # type: ignore[no-untyped-call]
        step()
    assert seen.get_total_counts() == len(sent), seen.get_comm_counts()
    return sent


def sends_nothing(step: Step) -> bool:
    """Whether a step whose all-reduces are replaced makes no collective."""
    with CommDebugMode() as seen, replaced(nothing):  # type: ignore[no-untyped-call]
        step()
    return not seen.get_total_counts()


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
    """Parameters, equal for all who ask, with gradients."""
    torch.manual_seed(0)

    def one(shape: Sequence[int], scale: float) -> Tensor:
        return distribute_tensor(torch.randn(shape).mul_(scale), mesh, [Shard(0)], src_data_rank=None)

    parameters = [nn.Parameter(one(shape, 0.02)) for shape in shapes()]
    for p in parameters:
        p.grad = one(p.shape, 1e-2)
    return parameters


def local(mesh: DeviceMesh) -> list[nn.Parameter]:
    """What is here of them, as plain tensors."""

    def here(tensor: Any) -> Tensor:
        return cast("Tensor", tensor.to_local()).detach().clone()

    parameters = []
    for p in cut(mesh):
        parameters.append(nn.Parameter(here(p)))
        parameters[-1].grad = here(p.grad)
    return parameters


class Stopwatch:
    """Times what processes do together."""

    def __init__(self) -> None:
        self._calls: list[tuple[Step, Times, bool]] = []

    def add(self, call: Step, *, sends: bool = True) -> Times:
        """Time a call too, of an optimiser's step without its all-reduces if it sends nothing.

        Returns:
            Where its times go.
        """
        times = Times()
        self._calls.append((call, times, sends))
        return times

    def round(self) -> None:
        """Each call once, in the order opposite to the last round's."""
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
        """Put the most of all ranks in the place of each time, and leave out the rounds that warm up."""
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


def settle_down(rank: int, ranks: int) -> None:
    """Take one thread, and cores for it and for gloo's threads.

    Else a message that wakes a process may pull it to the core of the one that sent it, and leave it there.
    """
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[rank::ranks] or {cores[rank % len(cores)]})
    torch.set_num_threads(1)


def work(rank: int, ranks: int, rounds: int, folder: str) -> None:
    """What one of the processes does; the first writes what was found."""
    settle_down(rank, ranks)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=SILENCE_LIMIT),
    )
    mesh, watch = init_device_mesh("cpu", (ranks,)), Stopwatch()
    adamw = watch.add(torch.optim.AdamW(local(mesh), fused=True).step)
    buckets = []
    for bucket_bytes in BUCKETS:
        talks, mute = (
            ShardedProdigyPlusScheduleFree(cut(mesh), bucket_bytes=bucket_bytes).step for _ in range(2)
        )
        talks()  # the first step makes state
        assert sends_nothing(mute)
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
    if rank == 0:
        (Path(folder) / "outcome").write_text(json.dumps(asdict(Outcome(ranks, adamw, buckets))))
    dist.barrier()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- main


def measure(ranks: int, rounds: int) -> Outcome:
    """Start as many processes, and wait for what they find."""
    end = time.monotonic() + START_LIMIT + rounds * ROUND_LIMIT
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(work, (ranks, rounds, folder), nprocs=ranks, join=False, daemon=True)  # type: ignore[no-untyped-call]
        try:
            while not context.join(timeout=max(0.0, end - time.monotonic())):
                if time.monotonic() >= end:
                    raise SystemExit(f"{ranks} processes were not done in time.")
        finally:
            for process in context.processes:
                process.kill()
        found = json.loads((Path(folder) / "outcome").read_text())
    buckets = [
        Buckets(its.pop("bucket_bytes"), its.pop("sent"), **{name: Times(**t) for name, t in its.items()})
        for its in found["buckets"]
    ]
    return Outcome(ranks, Times(**found["adamw"]), buckets)


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

HEAD = """\
| processes | bucket, MiB | all-reduces | sent, kB | AdamW, ms | without, ms | with, ms | with ÷ without \
| added, ms | added CPU, ms | bare, at once, ms | bare, one by one, ms |
|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


def report(outcomes: Sequence[Outcome], rounds: int) -> Iterator[str]:
    """All that is told, a line or more at a time."""
    count = sum(math.prod(shape) for shape in shapes())
    cores = os.cpu_count() or 1
    yield (
        f"{count / 1e6:.1f} · 10⁶ parameters in {len(list(shapes()))} tensors, float32; {cores} cores; "
        f"torch {torch.__version__}, {platform.system()}; gloo, processes of one thread; {rounds} rounds.\n"
    )
    crowded = [str(outcome.ranks) for outcome in outcomes if outcome.ranks > cores]
    if crowded:
        yield f"On {cores} cores, {' and '.join(crowded)} processes share them, and take turns.\n"
    yield SAID
    if any(2 * outcome.ranks > cores for outcome in outcomes):
        yield POLLS
    yield HEAD
    for outcome in outcomes:
        for its in outcome.buckets:
            steps = (outcome.adamw, its.without, its.with_)
            ratios = [a / b for a, b in zip(its.with_.wall, its.without.wall, strict=True)]
            added = [
                [a - b for a, b in zip(*pair, strict=True)]
                for pair in ((its.with_.wall, its.without.wall), (its.with_.cpu, its.without.cpu))
            ]
            cells = [
                str(outcome.ranks),
                str(its.bucket_bytes >> 20),
                str(len(its.sent)),
                digits(sum(its.sent) / 1e3),
                *(digits(1e3 * statistics.median(times.wall)) for times in steps),
                "{1:.3f} ({0:.3f}–{2:.3f})".format(*quantiles(ratios)),
                *(
                    spread([1e3 * t for t in times])
                    for times in (*added, its.at_once.wall, its.one_by_one.wall)
                ),
            ]
            yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="processes")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all figures")
    args = parser.parse_args(arguments)
    if min(args.ranks) < 2 or args.rounds < 1:
        parser.error("it takes two processes, and a round.")
    if (load := os.getloadavg()[0]) > BUSY:
        print(f"the load is {load:.1f}: times beside other work say nothing", file=sys.stderr)
    outcomes = []
    for ranks in args.ranks:
        print(f"{time.strftime('%X')} {ranks} processes", file=sys.stderr, flush=True)
        outcomes.append(measure(ranks, args.rounds))
        if args.json is not None:
            kept = {"rounds": args.rounds, "outcomes": [asdict(outcome) for outcome in outcomes]}
            args.json.write_text(json.dumps(kept, indent=1))
    for line in report(outcomes, args.rounds):
        print(line)


if __name__ == "__main__":
    main()
