"""How much the loss depends on settings and on the model: untuned, compared with AdamW over its rate.

    PYTHONPATH=. python benchmarks/sensitivity.py --out FILE.jsonl [--minutes M]
    PYTHONPATH=. python benchmarks/sensitivity.py --out FILE.jsonl --report

The first trains what the file does not have. The second prints tables: of `lr` and `d0` on tasks of quality/,
and of the width and the batch size of a byte-level GPT.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import peers, results
from quality.peers import OPTIMIZERS, Entry, Setting
from quality.runs import Run, finish
from quality.task import Scale, Task
from quality.tasks import TASKS
from quality.variants import FEW

FACTORS: dict[str, dict[str, Any]] = {"lr=⅓": {"lr": 1 / 3}, "lr=3": {"lr": 3.0}}
STARTS: dict[str, dict[str, Any]] = {f"d0={start:g}": {"d0": start} for start in (1e-8, 1e-7, 1e-5, 1e-4)}
OURS = {
    name: Entry(name, partial(peers.ours, step_size="balance", **options), tuned="nothing", distribution="")
    for name, options in {"untuned": {}, **FACTORS, **STARTS}.items()
}
ADAMW = OPTIMIZERS["adamw-cosine"]
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # each about three times the one before
WIDTHS = (32, 64, 128, 256)
BATCHES = (4, 8, 16, 32, 64)
SEED = 1

Losses = Mapping[tuple[str, str], float]
"""By the name of the task and that of the optimiser; AdamW's has its rate."""


def gpt(name: str, width: int, batch: int) -> Task:
    """A byte-level GPT of two layers."""
    shape = {"width": width, "layers": 2, "context": 64, "windows": 128}
    return dataclasses.replace(
        TASKS["gpt-w64-b8"], name=f"gpt: {name}", scales={"small": Scale(250, batch, shape)}
    )


OF_WIDTH = {str(width): gpt(f"width {width}", width, 16) for width in WIDTHS}
OF_BATCH = {str(batch): gpt(f"batch {batch}", 64, batch) for batch in BATCHES}


def planned() -> Iterator[Run]:
    """All runs; those that a table needs come together."""
    for name in FEW:
        yield from (Run(TASKS[name], entry, Setting(), SEED) for entry in OURS.values())
        yield from of_adamw(TASKS[name])
    for task in (*OF_WIDTH.values(), *OF_BATCH.values()):
        yield Run(task, OURS["untuned"], Setting(), SEED)
        yield from of_adamw(task)


def of_adamw(task: Task) -> Iterator[Run]:
    """AdamW with cosine and a warm-up, over its rates."""
    return (Run(task, ADAMW, Setting(rate, warm_up=True), SEED) for rate in RATES)


def losses_of(rows: Iterable[results.Row]) -> Losses:
    """The loss of each run; infinite where it diverged."""
    found = {}
    for row in rows:
        rate = row["setting"]["rate"]
        name = row["optimizer"] if rate is None else at(rate)
        found[row["task"], name] = math.inf if row["loss"] is None else row["loss"]
    return found


def at(rate: float) -> str:
    """AdamW's name with a rate."""
    return f"{rate:g}"


def around(losses: Losses, task: str) -> list[float]:
    """AdamW's losses at its best rate, at a third of it and at three times it, where these were run."""
    of_rates = [losses.get((task, at(rate)), math.nan) for rate in RATES]
    best = min(range(len(RATES)), key=lambda i: of_rates[i])
    return [of_rates[best], *of_rates[max(0, best - 1) : best], *of_rates[best + 1 : best + 2]]


def spread(losses: Sequence[float]) -> str:
    """By how much the largest exceeds the smallest."""
    return f"{max(losses) / min(losses) - 1:.1%}"


def report(losses: Losses) -> Iterator[str]:
    """The tables, for the tasks whose runs are complete."""
    rates = {at(rate) for rate in RATES}

    def ran(task: str, *names: str) -> bool:
        return {(task, name) for name in (*names, *rates)} <= losses.keys()

    yield f"| task | {' | '.join(OURS)} | over lr | over d0 | AdamW over its rate |"
    yield f"|---|{'--:|' * (len(OURS) + 3)}"
    for task in (name for name in FEW if ran(name, *OURS)):
        ours = {name: losses[task, name] for name in OURS}
        spreads = [spread([ours["untuned"], *(ours[name] for name in names)]) for names in (FACTORS, STARTS)]
        cells = [f"{loss:.4g}" for loss in ours.values()]
        yield f"| {task} | {' | '.join([*cells, *spreads, spread(around(losses, task))])} |"
    for what, tasks in (("width", OF_WIDTH), ("batch", OF_BATCH)):
        yield from of_gpts(
            losses, what, {value: task.name for value, task in tasks.items() if ran(task.name, "untuned")}
        )


def of_gpts(losses: Losses, what: str, tasks: Mapping[str, str]) -> Iterator[str]:
    """The table over widths or batch sizes."""
    yield ""
    yield f"| {what} | untuned | {' | '.join(f'AdamW {at(rate)}' for rate in RATES)} | untuned ÷ best AdamW |"
    yield f"|--:|--:|{'--:|' * len(RATES)}--:|"
    ratios = []
    for value, task in tasks.items():
        ours, adamw = losses[task, "untuned"], [losses[task, at(rate)] for rate in RATES]
        ratios.append(ours / min(adamw))
        yield f"| {value} | {' | '.join(f'{loss:.3f}' for loss in (ours, *adamw, ratios[-1]))} |"
    if ratios:
        changes = [spread(around(losses, task)) for task in tasks.values()]
        yield f"\nuntuned ÷ best AdamW: {spread(ratios)}. AdamW over its rate: {', '.join(changes)}."


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = results.read([args.out])
    if args.report:
        print("\n".join(report(losses_of(done.values()))))
    else:
        finish(args.out, planned(), done, until=time.monotonic() + 60 * args.minutes)


if __name__ == "__main__":
    main()
