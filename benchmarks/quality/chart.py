"""The chart of a task: the untuned optimisers as lines, the peers as tuning curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DECADES_APART = 20.0  # ratio of the largest to the smallest loss above which the axis is logarithmic
HEADROOM = 4.0  # of a linear axis, as a multiple of the distance from the best loss to the median


class Untuned(Protocol):
    """An optimiser that is drawn as a line."""

    optimizer: str

    @property
    def loss(self) -> float:
        """The mean of the final losses."""

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds."""


class Curve(NamedTuple):
    """The losses of a peer over its rates, or over the factors of the step size that it finds."""

    name: str
    warm_up: bool
    is_factor: bool
    points: list[tuple[float, float]]


def draw(curves: Sequence[Curve], untuned: Sequence[Untuned], path: Path, title: str) -> None:
    """Draw and save; runs that diverged are left out of their curve."""
    factors = any(curve.is_factor for curve in curves)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 1 + factors, sharey=True, squeeze=False, width_ratios=[3, 2][: 1 + factors])[
        0
    ]
    colours = {
        name: f"C{1 + number % 9}" for number, name in enumerate(dict.fromkeys(c.name for c in curves))
    }
    for is_factor, axes in enumerate(panels):
        for curve in curves:
            if curve.is_factor == is_factor:
                label = curve.name + (", warm-up" if curve.warm_up else "")
                style = "-" if curve.warm_up else ":"
                rates = [rate for rate, _ in curve.points]
                losses = [loss if math.isfinite(loss) else math.nan for _, loss in curve.points]
                axes.plot(rates, losses, style, marker=".", color=colours[curve.name], label=label)
        across(axes, untuned)
        axes.set(xscale="log", xlabel="factor of the step size found" if is_factor else "rate")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("final loss")
    limit(panels[0], [loss for curve in curves for _, loss in curve.points] + [its.loss for its in untuned])
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def across(axes: Axes, untuned: Iterable[Untuned]) -> None:
    """Lines for the untuned optimisers, in bands of a standard deviation to either side."""
    for its, style in zip(untuned, ("-", "--", "-.", ":"), strict=False):
        if not math.isfinite(its.loss):
            continue
        axes.axhline(its.loss, color="black", linestyle=style, linewidth=2, label=f"{its.optimizer}, untuned")
        if its.spread is not None:
            axes.axhspan(its.loss - its.spread, its.loss + its.spread, color="black", alpha=0.12)


def limit(axes: Axes, losses: Iterable[float]) -> None:
    """Limit an axis so that the good losses can be told apart."""
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite:
        return
    least, most = finite[0], finite[-1]
    if least > 0 and most / least > DECADES_APART:
        axes.set_yscale("log")
    elif most > least:
        top = min(most, least + HEADROOM * (statistics.median(finite) - least))
        margin = 0.05 * (top - least)
        axes.set_ylim(least - margin, top + margin)
