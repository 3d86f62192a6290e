"""What Muon sends and computes on the matrices of Llama-3-70B, on up to 4,096 ranks, simulated.

    python benchmarks/muon_scale.py [--ranks N ...] [--out FOLDER]

One process is rank 0 of a process group that sends nothing (torch's fake one). It runs a step of the
optimiser on shards without memory (device "meta") and counts its all-to-alls and broadcasts; what every other
rank owns and sends is read off the same plan, by which all of them act.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from matplotlib.figure import Figure
from scale import LAYOUTS, fsdp_sends, parameters_of, simulated
from shapes import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

from prodigyplus.formulas import muon
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from prodigyplus_dist.orthogonalize import Orthogonalizer
from prodigyplus_dist.ownership import Block, MatrixSharding

MODEL = "Llama-3-70B"
RANKS = (8, 64, 512, 4096)
CHOSEN = ("FSDP2", "HSDP", "FSDP x TP")
HALF = 2  # bytes of a bfloat16

ASSUMED = f"""\
{MODEL}: its matrices but for the embedding and the head, in bfloat16; layouts as in [scale.md](scale.md). A
wave is what is exchanged at once: two all-to-alls. "Least" is 2 · (2P/S) · (S−1)/S, P parameters on S ranks;
in HSDP, where each copy orthogonalises its share, that of P/copies, and then what shares the results with the
other copies. The load is that of multiplications. Who has most of a wave holds the others up, so that the
longest way is the sum of these. "Bound" is what no assignment of whole matrices can beat: the most expensive
matrix, or the mean. Bytes are those that a rank sends, n(R-1)/R of a broadcast of n bytes over R ranks."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


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
    load: float  # multiplications of the rank that has most, over the mean
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

        with mock.patch.object(Orthogonalizer, "plan", noted), Watch() as watch:
            optimizer.step()
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
            watch.collectives["alltoall_base_"],
            watch.collectives["broadcast_"],
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
        loads[its.layout.ranks[block.row][block.column]] += block.size * muon.cost(its.rows, its.columns)
    return loads


def sent_in(shardings: Sequence[MatrixSharding], blocks: Sequence[Block], ranks: int) -> list[float]:
    """The bytes that every rank sends: pieces to owners, those of results back, and these to other copies."""
    sent = [0.0] * ranks
    for block in blocks:
        its = shardings[block.request]
        copies = its.layout.ranks
        owner = copies[block.row][block.column]
        for column, rank in enumerate(copies[block.row]):
            size = HALF * math.prod(its.piece_shape(block, column))
            if rank != owner:
                sent[rank] += size
                sent[owner] += size
            for row in copies:
                sent[row[column]] += size * (len(copies) - 1) / len(copies)
    return sent


HEAD = """\
| layout | ranks | waves | all-to-alls | broadcasts | sends, MB: mean | most | mean / least \
| FSDP2 sends, MB | owners' load, most / mean | longest way / mean | bound | each once |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|"""


def row(c: Cost) -> str:
    """A line of the table."""
    return (
        f"| {c.layout} | {c.ranks:,} | {c.waves} | {c.all_to_alls} | {c.broadcasts} "
        f"| {c.mean_sent / 1e6:,.1f} | {c.most_sent / 1e6:,.1f} | {c.mean_sent / c.least:.4f} "
        f"| {c.fsdp_sent / 1e6:,.0f} | {c.load:.2f} | {c.way:.2f} | {c.bound:.2f} "
        f"| {'yes' if c.once else 'no'} |"
    )


def draw(costs: Sequence[Cost], path: Path) -> None:
    """The load of the owners, and what is sent, over the ranks."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layout, colour in zip(CHOSEN, ("C0", "C1", "C2"), strict=True):
        its = [c for c in costs if c.layout == layout]
        ranks = [c.ranks for c in its]
        left.plot(ranks, [c.load for c in its], "o-", color=colour, label=layout)
        left.plot(ranks, [c.bound for c in its], ":", color=colour)
        share = [100 * c.mean_sent / c.fsdp_sent if c.fsdp_sent else math.nan for c in its]
        right.plot(ranks, share, "o-", label=layout)
    left.set(
        title="multiplications of the busiest owner\n(dotted: one matrix, or the mean)",
        ylabel="over the mean",
    )
    right.set(title="what Muon sends", ylabel="% of what FSDP2 sends", ylim=(0, None))
    left.set_yscale("log")
    every = sorted({c.ranks for c in costs})
    for axes in (left, right):
        axes.set(xlabel="ranks", xscale="log")
        axes.set_xticks(every, [f"{r:,}" for r in every])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS, metavar="N")
    parser.add_argument("--layouts", nargs="+", choices=CHOSEN, default=list(CHOSEN))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for muon_scale.md and muon_scale.png")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines: list[str] = []

    def tell(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    tell("# Muon at scale, simulated\n")
    tell(f"    {shlex.join(['python', 'benchmarks/muon_scale.py', *arguments])}\n")
    if args.out is not None:
        tell("![The load of the owners, and what is sent, over the number of ranks](muon_scale.png)\n")
    tell(f"{ASSUMED}\n\n{HEAD}")
    costs = []
    for layout in args.layouts:
        for ranks in args.ranks:
            costs.append(cost(layout, ranks))
            tell(row(costs[-1]))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "muon_scale.md").write_text("\n".join(lines) + "\n")
        draw(costs, args.out / "muon_scale.png")


if __name__ == "__main__":
    main()
