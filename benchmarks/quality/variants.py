"""Runs of optimisers that differ in one thing, each with the one that it is compared with."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import results
from .peers import Built, Entry, Setting
from .runs import Run, finish
from .tasks import TASKS

FEW = ("tanh-regression", "logistic-digits", "mnist-mlp", "gpt-w64-b8", "noisy-mnist")
"""Tasks of half a minute, of different kinds; none is held out."""


@dataclass(frozen=True, slots=True)
class Variant:
    """An optimiser.

    Attributes:
        build: Makes it; see :class:`Entry`.
        beside: The name of the variant that it is compared with; empty for those that others are compared
            with.
        nudged: The name of the variant that equals ``beside`` except for a difference that should not matter;
            it shows how large changes by chance are.
    """

    build: Callable[[nn.Module, Setting, int], Built]
    beside: str = ""
    nudged: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """What a variant changes of a task's loss.

    Attributes:
        before, after: Mean losses without and with it, over the seeds that both were run with.
        ratio: The geometric mean of after ÷ before.
        noise: The largest relative change by the nudge; 0 if that was not run.
        seeds: How many seeds both were run with.
    """

    before: float
    after: float
    ratio: float
    noise: float
    seeds: int

    @property
    def verdict(self) -> str:
        """What it does; a change within 1 %, or within twice the noise, counts as nothing."""
        if abs(math.log(self.ratio)) <= max(2 * self.noise, 0.01):
            return "nothing"
        return "helps" if self.ratio < 1 else "hurts"


def command(
    text: str | None,
    variants: Mapping[str, Variant],
    report: Callable[[Iterable[results.Row]], Iterable[str]],
) -> None:
    """The command line of a script: train what is left to train, or print the lines of the report.

    Args:
        text: The text of the help.
        variants: What can be trained.
        report: Makes the report's lines from the runs in the file.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    add, names = parser.add_argument, list(variants)
    add("--out", type=Path, required=True, metavar="FILE.jsonl")
    add("--tasks", nargs="+", choices=TASKS, default=FEW, metavar="NAME")
    add("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--seeds", nargs="+", type=int, default=[1], metavar="N")
    add("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.report:
        print("\n".join(report(results.read([args.out]).values())))
    else:
        runs = planned(variants, names=args.variants, tasks=args.tasks, seeds=args.seeds)
        finish(args.out, runs, results.read([args.out]))


def planned(
    variants: Mapping[str, Variant], *, names: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]
) -> Iterator[Run]:
    """The runs of some variants: for each seed all tasks, for each task all variants."""
    for seed, task, name in itertools.product(seeds, tasks, names):
        entry = Entry(name, variants[name].build, tuned="nothing", distribution="")
        yield Run(TASKS[task], entry, Setting(), seed)


def changes(rows: Iterable[results.Row], variants: Mapping[str, Variant]) -> dict[str, dict[str, Change]]:
    """What each compared variant changes, by task; tasks are in the order of TASKS."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        loss = math.inf if row["loss"] is None else row["loss"]
        losses.setdefault((row["optimizer"], row["task"]), {})[row["seed"]] = loss
    found: dict[str, dict[str, Change]] = {}
    for name, variant in variants.items():
        for task in TASKS if variant.beside else ():
            old, new = losses.get((variant.beside, task), {}), losses.get((name, task), {})
            nudged = losses.get((variant.nudged, task), {})
            if seeds := sorted(old.keys() & new.keys()):
                noise = [abs(math.log(nudged[s] / old[s])) for s in nudged.keys() & old.keys()]
                found.setdefault(name, {})[task] = Change(
                    statistics.fmean(old[s] for s in seeds),
                    statistics.fmean(new[s] for s in seeds),
                    math.exp(statistics.fmean(math.log(new[s] / old[s]) for s in seeds)),
                    max(noise, default=0.0),
                    len(seeds),
                )
    return found
