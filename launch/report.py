"""What a run tells: lines and a progress bar on the terminal, a log of JSON lines, a picture of curves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from files import replacing, writing
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Curve:
    """The values under ``key`` in the records of one kind."""

    kind: str
    key: str
    label: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the plots of the picture."""

    title: str
    curves: tuple[Curve, ...]
    scale: Literal["linear", "log"] = "linear"


class Report:
    """Tells of a run, in the process that is not ``silent``.

    Every process calls its methods, and what cannot be written raises in one of them:
    :meth:`ranks.Ranks.together` tells all.

    Args:
        folder: Where ``log.jsonl`` and ``progress.png`` go; it is made if need be.
        run: The first line of the log: what tells this run from others.
        silent: Whether another process does the telling.
        records: What the log holds already, when a run is resumed.
    """

    def __init__(self, folder: Path, run: Record, *, silent: bool, records: Iterable[Record] = ()) -> None:
        self.folder = folder
        self.silent = silent
        self.records = list(records)
        if not silent:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [{"kind": "run", **run}, *self.records]
            with replacing(folder / "log.jsonl") as path:
                path.write_text("".join(map(_line, lines)))

    def say(self, line: str) -> None:
        """Print a line, also under a bar."""
        if not self.silent:
            tqdm.write(line)
            sys.stdout.flush()

    def bar(self, steps: Iterable[Any], title: str) -> Any:
        """A tqdm bar over ``steps``, seldom redrawn where it cannot be redrawn in place."""
        interval = 0.1 if sys.stderr.isatty() else 10.0
        return tqdm(steps, title, disable=self.silent, leave=False, mininterval=interval, dynamic_ncols=True)

    def log(self, kind: str, **numbers: float) -> None:
        """Add a record to the log; one with what :meth:`draw` draws over can be drawn.

        Raises:
            OSError: It cannot be written.
        """
        record = {"kind": kind, **numbers}
        self.records.append(record)
        if not self.silent:
            path = self.folder / "log.jsonl"
            with writing(path), path.open("a") as log:
                log.write(_line(record))

    def draw(self, panels: Sequence[Panel], over: str = "epoch") -> None:
        """Draw the log so far, one plot under the other, over what the records have under ``over``.

        Raises:
            OSError: It cannot be written.
        """
        if self.silent:
            return
        figure = Figure(figsize=(7, 2.4 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), sharex=True, squeeze=False)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            for curve in panel.curves:
                points = [(r[over], r[curve.key]) for r in self.records if r["kind"] == curve.kind]
                # Few points are results, many are a course.
                style = "o-" if len(points) <= 20 else "-"
                axes.plot(*zip(*points, strict=True), style, label=curve.label, linewidth=1.2, markersize=4)
            axes.set(title=panel.title, yscale=panel.scale)
            axes.grid(alpha=0.3)
            if len(panel.curves) > 1:
                axes.legend(frameon=False)
        grid[-1, 0].set(xlabel=over, xlim=(0, None))
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        with replacing(self.folder / "progress.png") as path:
            figure.savefig(path, format="png", dpi=120)


def _line(record: Record) -> str:
    return json.dumps(record, default=str) + "\n"
