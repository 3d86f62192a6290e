"""What charts have in common. matplotlib is imported when one is drawn, since most processes draw nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLACK, BLUE, RED, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PINK, ORANGE, SKY, GREY = "#CC79A7", "#E69F00", "#56B4E9", "#999999"


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
    """A figure, and its panels in an array of (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def over_ranks(axes: Axes, ranks: Iterable[int]) -> None:
    """A logarithmic axis of numbers of ranks."""
    every = sorted(set(ranks))
    axes.set(xlabel="ranks", xscale="log")
    axes.set_xticks(every, [f"{r:,}" for r in every])
    axes.minorticks_off()


def plain(axis: Any, limits: tuple[float, float]) -> None:
    """Ticks of a logarithmic axis as plain numbers: 0.5, 1, 2, 5, 10."""
    low, high = limits
    ticks = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_formatter("")


def save(figure: Any, path: Path, *, legends: bool = True, below: Sequence[Any] = ()) -> None:
    """Give every panel a grid and a legend, or all panels one legend below, and write the figure."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        if legends and not below and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    if below:
        figure.legend(handles=below, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
