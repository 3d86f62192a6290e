"""The results of runs: the same setting over seeds, and all settings of a task."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .peers import Setting
from .results import Row
from .tasks import TASKS
from .train import UNTRAINED


@dataclass
class Outcome:
    """The results of one optimiser with one setting, over seeds."""

    optimizer: str
    setting: Setting
    rows: list[Row] = field(default_factory=list)

    @cached_property
    def losses(self) -> list[float]:
        """The final losses; infinite where a run diverged."""
        return [math.inf if row["loss"] is None else row["loss"] for row in self.rows]

    @property
    def loss(self) -> float:
        """The mean of the final losses."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds."""
        if len(self.rows) < 2 or math.isinf(self.loss):
            return None
        return statistics.stdev(self.losses)

    def after(self, fraction: float) -> float:
        """The mean loss after a fraction of training."""
        losses = [
            next((point["loss"] for point in row["curve"] if point["fraction"] == fraction), None)
            for row in self.rows
        ]
        return statistics.fmean(math.inf if loss is None else loss for loss in losses)

    def above(self, other: Outcome) -> float | None:
        """How far its mean loss is above another's, over the seeds that both have; None if there are none."""
        seeds = {row["seed"] for row in self.rows} & {row["seed"] for row in other.rows}
        if not seeds:
            return None
        mine, others = (  # all that diverged are equally bad
            statistics.fmean(
                loss for loss, row in zip(its.losses, its.rows, strict=True) if row["seed"] in seeds
            )
            for its in (self, other)
        )
        return 0.0 if mine == others else mine - others

    @property
    def accuracy(self) -> float | None:
        """The mean accuracy, if the task has one."""
        found = [row["accuracy"] for row in self.rows if row["accuracy"] is not None]
        return statistics.fmean(found) if found else None


@dataclass
class Comparison:
    """All outcomes of a task at one scale."""

    task: str
    size: str
    device: str
    scale: Mapping[str, int]
    outcomes: dict[tuple[str, Setting], Outcome] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The task's name, with the size and the device where they are not the usual ones."""
        also = [word for word, usual in ((self.size, "small"), (self.device, "cpu")) if word != usual]
        return " ".join([self.task, *also])

    def of(self, optimizer: str) -> list[Outcome]:
        """The outcomes of one optimiser."""
        return [outcome for outcome in self.outcomes.values() if outcome.optimizer == optimizer]

    @property
    def untuned(self) -> list[Outcome]:
        """The outcomes of optimisers that were not tuned."""
        return [outcome for outcome in self.outcomes.values() if outcome.setting.rate is None]

    @property
    def range(self) -> float | None:
        """The distance from the untrained model's loss to the lowest; None if no run has the former."""
        untrained = [
            point["loss"]
            for outcome in self.outcomes.values()
            for row in outcome.rows
            for point in row["curve"]
            if point["fraction"] == UNTRAINED
        ]
        if not untrained:
            return None
        return statistics.fmean(untrained) - min(its.loss for its in (*self.untuned, *self.best_tuned))

    @property
    def best_tuned(self) -> list[Outcome]:
        """The best outcome of each optimiser that was tuned, from the best to the worst."""
        names = {outcome.optimizer for outcome in self.outcomes.values() if outcome.setting.rate is not None}
        return sorted((best(self.of(name)) for name in names), key=lambda its: (its.loss, its.optimizer))


def best(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome with the least mean loss among those with the most seeds: one lucky seed does not count."""
    seeds = max(len(outcome.rows) for outcome in outcomes)
    return min((its for its in outcomes if len(its.rows) == seeds), key=lambda its: its.loss)


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """The rows, grouped into what is to be compared."""
    found: dict[str, Comparison] = {}
    for row in rows:
        key = json.dumps([row[name] for name in ("task", "size", "device", "scale")])
        comparison = found.setdefault(key, Comparison(row["task"], row["size"], row["device"], row["scale"]))
        setting = Setting(**row["setting"])
        outcome = comparison.outcomes.setdefault(
            (row["optimizer"], setting), Outcome(row["optimizer"], setting)
        )
        outcome.rows.append(row)
    order = {name: number for number, name in enumerate(TASKS)}
    return sorted(found.values(), key=lambda its: (order.get(its.task, len(order)), its.size, its.device))
