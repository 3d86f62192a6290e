"""What a rank does while Muon's matrices travel: the events of one step on two gloo processes, drawn.

python benchmarks/muon_trace.py --out docs
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from harness import charts
from harness.tables import head, parser, row
from harness.workers import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prodigyplus import muon_groups
from prodigyplus.engine import driver
from prodigyplus.formulas import muon
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

RANKS = 2
WARM_UP = 3
LIMIT = 600  # seconds
WIDTH, BLOCKS, VOCABULARY = 512, 12, 16384
BUCKET_BYTES = 16 << 20

MATRICES = "matrices travel"
ROWS = (MATRICES, "Newton–Schulz", "all-reduces", "elementwise parameters move", "matrices move")


class Event(NamedTuple):
    """Something that a rank did; times are in milliseconds from the start of the step."""

    row: str
    start: float
    end: float


class Trace:
    """Notes when functions of the packages run, and how long what they send is under way."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float, float]] = []

    def timed(self, row: Callable[..., str | None], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; a call is noted in the row that ``row`` gives for its arguments, if any."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if (its := row(*args)) is not None:
                self.events.append((its, start, time.perf_counter()))
            return result

        return call

    def sent(self, row: str, function: Callable[..., dist.Work]) -> Callable[..., dist.Work]:
        """An asynchronous collective, noted until it is done, whoever waits for it."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> dist.Work:
            start = time.perf_counter()
            work = function(*args, **kwargs)
            work.get_future().add_done_callback(
                lambda _: self.events.append((row, start, time.perf_counter()))
            )
            return work

        return call


def model() -> nn.Module:
    """The weights of a transformer; nobody calls it."""
    sizes = (1, 3), (1, 1), (1, 4), (4, 1)
    linear = [nn.Linear(i * WIDTH, o * WIDTH, bias=False) for _ in range(BLOCKS) for i, o in sizes]
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *linear, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1))


def step() -> tuple[list[Event], float]:
    """Take some steps; returns the events of the last one, and its milliseconds."""
    torch.manual_seed(0)
    whole = model()
    fully_shard(whole, mesh=init_device_mesh("cpu", (RANKS,)))
    groups = muon_groups(whole)
    optimizer = ShardedProdigyPlusScheduleFree(groups, bucket_bytes=BUCKET_BYTES)
    for p in whole.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(WARM_UP):
        optimizer.step()
    trace = Trace()

    def moving(running: Any, *_: Any) -> str | None:
        if not running:
            return None
        return ROWS[4] if running[0][0].is_matrix else ROWS[3]

    def finishing(under_way: Any, *_: Any) -> str | None:
        return moving(under_way[0])

    with (
        mock.patch.object(dist, "all_to_all_single", trace.sent(MATRICES, dist.all_to_all_single)),
        mock.patch.object(muon, "newton_schulz", trace.timed(lambda *_: ROWS[1], muon.newton_schulz)),
        mock.patch.object(dist, "all_reduce", trace.sent(ROWS[2], dist.all_reduce)),
        mock.patch.object(driver, "_ask", trace.timed(moving, driver._ask)),
        mock.patch.object(driver, "_run_out", trace.timed(finishing, driver._run_out)),
    ):
        dist.barrier()
        start = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
    dist.barrier()
    events = [Event(kind, 1e3 * (a - start), 1e3 * (b - start)) for kind, a, b in trace.events]
    return events, 1e3 * (end - start)


def main() -> None:
    """Run, print how much of the first exchange was used, and draw."""
    cli = parser(__doc__)
    cli.add_argument("--out", type=Path, help="folder for muon_trace.png")
    args = cli.parse_args()
    events, total = on_ranks(RANKS, step, limit=LIMIT)[0]
    by_row = {kind: sorted(e for e in events if e.row == kind) for kind in ROWS}
    first = by_row[MATRICES][0]
    print(head("what | how often: | from, of the step: | to:"))
    for kind, its in by_row.items():
        last = max(event.end for event in its)
        print(row(kind, len(its), f"{its[0].start / total:.0%}", f"{last / total:.0%}"))
    inside = [e for e in by_row[ROWS[3]] if first.start <= e.start and e.end <= by_row[ROWS[1]][0].start]
    print(
        f"\n{len(inside)} of {len(by_row[ROWS[3]])} buckets of elementwise parameters moved after the first "
        "pieces were sent and before the first matrix was orthogonalised."
    )
    if args.out is not None:
        figure, grid = charts.panels(2, 1, (9, 5))
        for axes, until in zip(grid[:, 0], (by_row[ROWS[1]][0].start * 1.2, total), strict=True):
            draw(axes, by_row, until)
        charts.save(figure, args.out / "muon_trace.png")


def draw(axes: Any, by_row: dict[str, list[Event]], until: float) -> None:
    """Draw what happened until a time, with a row for each kind of event."""
    for place, (kind, its) in enumerate(by_row.items()):
        for number, event in enumerate(its):
            # Transfers overlap, so each has a lane of its own.
            height = 0.8 / 3 if kind == MATRICES else 0.8
            lane = (number % 3 - 1) * height if kind == MATRICES else 0.0
            took = event.end - event.start
            axes.barh(place + lane, took, left=event.start, height=0.9 * height, color=f"C{place}")
    axes.set_yticks(range(len(ROWS)), ROWS)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of a step, rank 0 of two", xlim=(0, until))


if __name__ == "__main__":
    main()
