"""What Muon sends and computes on the matrices of Llama-3-70B, on up to 4,096 ranks, simulated.

    python benchmarks/muon_scale.py [--ranks N ...] [--out FOLDER]

One process is rank 0 of a process group that sends nothing (torch's fake one). It runs a step of the
optimiser on shards without memory (device "meta") and counts its all-to-alls and broadcasts; what every other
rank owns and sends is read off the plan, which is the same for all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from harness import charts
from harness.shapes import MODELS
from harness.tables import Page, parser
from harness.watching import Watch
from harness.workers import simulated
from scale import LAYOUTS, fsdp_sends, parameters_of

from prodigyplus.formulas import muon
from prodigyplus_dist import ShardedProdigyPlusScheduleFree, transport
from prodigyplus_dist.orthogonalize import Orthogonalizer
from prodigyplus_dist.ownership import Block, MatrixSharding

MODEL = "Llama-3-70B"
RANKS = (8, 64, 512, 4096)
CHOSEN = ("FSDP2", "HSDP", "FSDP x TP")
HALF = 2  # bytes of a bfloat16

ASSUMED = f"""\
The matrices of {MODEL} except the embedding and the head, in bfloat16; layouts as in [scale.md](scale.md).
A wave is what is exchanged at once, by two all-to-alls. "Least" is 2 · (2P/S) · (S−1)/S for P parameters on
S ranks; in HSDP, where each copy orthogonalises its share, it is that for P/copies, plus what it takes to
share the results with the other copies. The load counts multiplications. In each wave all owners wait for
the busiest, so the longest way adds up the loads of the busiest owners. "Bound" is what no assignment of
whole matrices can beat: the most expensive matrix or the mean, whichever is larger. Bytes are those that a
rank sends: n(R-1)/R in a broadcast of n bytes over R ranks."""


class Cost(NamedTuple):
    """What a step costs."""

    layout: str
    ranks: int
    waves: int
    all_to_alls: int  # of rank 0
    broadcasts: int  # of rank 0
    mean_sent: float  # bytes a rank sends
    most_sent: float
    least: float  # see ASSUMED
    fsdp_sent: float
    load: float  # multiplications of the busiest rank, over the mean
    way: float  # the longest way through the waves, over the mean
    bound: float  # see ASSUMED, over the mean
    once: bool  # whether every matrix has one owner


def cost(layout: str, ranks: int) -> Cost:
    """Run one step on shards without memory, and read off its plan what the others do."""
    weights = [w for w in MODELS[MODEL].weights() if w.kind != "vector"][1:-1]
    with simulated(ranks):
        parameters = parameters_of(weights, LAYOUTS[layout](ranks), "meta")
        optimizer = ShardedProdigyPlusScheduleFree(parameters, use_muon_pp=True)
        plans = []
        plan = Orthogonalizer.plan

        def noted(*args: Any) -> tuple[tuple[MatrixSharding, ...], list[Block]]:
            plans.append(plan(*args))
            return plans[-1]

        # It asks other ranks how many groups they have: nobody would answer, and "meta" could not hold it.
        new_group = mock.patch.object(transport, "_new_group", lambda _, its, __: dist.new_group(list(its)))
        watch = Watch(note=lambda call: call.name)
        with mock.patch.object(Orthogonalizer, "plan", noted), new_group, watch:
            optimizer.step()
        calls = Counter(watch.calls)
        loads, sent, way = [0.0] * ranks, [0.0] * ranks, 0.0
        single = 0.0
        for shardings, blocks in plans:
            its_loads = loads_of(shardings, blocks, ranks)
            way += max(its_loads)
            loads = [a + b for a, b in zip(loads, its_loads, strict=True)]
            sent = [a + b for a, b in zip(sent, sent_in(shardings, blocks, ranks), strict=True)]
            single = max(single, *(muon.cost(its.rows, its.columns) for its in shardings))
        owned = sum(block.size for _, blocks in plans for block in blocks)
        total, rows = sum(p.numel() for p in parameters), len(plans[0][0][0].layout.ranks)
        shards = ranks // rows
        mean = sum(loads) / ranks
        return Cost(
            layout,
            ranks,
            len(plans),
            calls["alltoall_base_"],
            calls["broadcast_"],
            sum(sent) / ranks,
            max(sent),
            2 * HALF * total / ranks * (shards - 1) / shards + HALF * total * (rows - 1) / ranks,
            sum(fsdp_sends(p.data) for p in parameters),
            max(loads) / mean,
            way / mean,
            max(single, mean) / mean,
            owned == len(weights) and all(len(blocks) == len(shardings) for shardings, blocks in plans),
        )


def loads_of(shardings: Sequence[MatrixSharding], blocks: Sequence[Block], ranks: int) -> list[float]:
    """The multiplications of every rank."""
    loads = [0.0] * ranks
    for block in blocks:
        its = shardings[block.request]
        loads[its.layout.ranks[block.copy][block.piece]] += block.size * muon.cost(its.rows, its.columns)
    return loads


def sent_in(shardings: Sequence[MatrixSharding], blocks: Sequence[Block], ranks: int) -> list[float]:
    """The bytes that every rank sends: pieces to owners, results back, and these to other copies."""
    sent = [0.0] * ranks
    for block in blocks:
        its = shardings[block.request]
        copies = its.layout.ranks
        owner = copies[block.copy][block.piece]
        for column, rank in enumerate(copies[block.copy]):
            size = HALF * math.prod(its.piece_shape(block, column))
            if rank != owner:
                sent[rank] += size
                sent[owner] += size
            for row in copies:
                sent[row[column]] += size * (len(copies) - 1) / len(copies)
    return sent


COLUMNS = """\
layout | ranks: | waves: | all-to-alls: | broadcasts: | sends, MB: mean: | most: | mean / least: \
| FSDP2 sends, MB: | owners' load, most / mean: | longest way / mean: | bound: | each once"""


def row(c: Cost) -> list[object]:
    """A line of the table."""
    counts = [c.layout, f"{c.ranks:,}", c.waves, c.all_to_alls, c.broadcasts]
    sent = [f"{c.mean_sent / 1e6:,.1f}", f"{c.most_sent / 1e6:,.1f}", f"{c.mean_sent / c.least:.4f}"]
    loads = [f"{c.load:.2f}", f"{c.way:.2f}", f"{c.bound:.2f}"]
    return [*counts, *sent, f"{c.fsdp_sent / 1e6:,.0f}", *loads, "yes" if c.once else "no"]


def draw(costs: Sequence[Cost], path: Path) -> None:
    """The load of the owners, and what is sent, over the ranks."""
    figure, [(left, right)] = charts.panels(1, 2, (10, 4))
    for number, layout in enumerate(CHOSEN):
        its = [c for c in costs if c.layout == layout]
        ranks = [c.ranks for c in its]
        left.plot(ranks, [c.load for c in its], "o-", color=f"C{number}", label=layout)
        left.plot(ranks, [c.bound for c in its], ":", color=f"C{number}")
        share = [100 * c.mean_sent / c.fsdp_sent if c.fsdp_sent else math.nan for c in its]
        right.plot(ranks, share, "o-", label=layout)
    title = "multiplications of the busiest owner\n(dotted: one matrix, or the mean)"
    left.set(title=title, ylabel="over the mean", yscale="log")
    right.set(title="what Muon sends", ylabel="% of what FSDP2 sends", ylim=(0, None))
    for axes in (left, right):
        charts.over_ranks(axes, (c.ranks for c in costs))
    charts.save(figure, path)


def main() -> None:
    """Measure, print, and write what was asked for."""
    cli = parser(__doc__)
    cli.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS, metavar="N")
    cli.add_argument("--layouts", nargs="+", choices=CHOSEN, default=list(CHOSEN))
    cli.add_argument("--out", type=Path, metavar="FOLDER", help="for muon_scale.md and muon_scale.png")
    args = cli.parse_args()
    torch.set_num_threads(1)
    page = Page("Muon at scale, simulated", args.out)
    if args.out is not None:
        page.tell("![The load of the owners, and what is sent, over the number of ranks](muon_scale.png)\n")
    page.tell(f"{ASSUMED}\n")
    costs: list[Cost] = []

    def rows() -> Iterator[list[object]]:
        for layout in args.layouts:
            for ranks in args.ranks:
                costs.append(cost(layout, ranks))
                yield row(costs[-1])

    page.table(COLUMNS, rows())
    if args.out is not None:
        page.save("muon_scale.md")
        draw(costs, args.out / "muon_scale.png")


if __name__ == "__main__":
    main()
