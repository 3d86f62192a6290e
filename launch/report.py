"""The output of a run: lines and a progress bar on the terminal, a log of JSON lines, a figure of curves."""

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
    """One of the plots of the figure."""

    title: str
    curves: tuple[Curve, ...]
    scale: Literal["linear", "log"] = "linear"


class Report:
    """Writes the output of a run, in the process that is not ``silent``.

    All processes call its methods, and a failed write raises in the one that writes: call them within
    :meth:`ranks.Ranks.together`.

    Args:
        folder: Where ``log.jsonl`` and ``progress.png`` go; it is created if it does not exist.
        run: The first line of the log, which describes the run.
        silent: Whether to write nothing, since another process does.
        records: The earlier records of the log, when a run is resumed.
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
        """Print a line, without breaking a progress bar."""
        if not self.silent:
            tqdm.write(line)
            sys.stdout.flush()

    def bar(self, steps: Iterable[Any], title: str) -> Any:
        """A tqdm bar over ``steps``, which is redrawn rarely when the output is not a terminal."""
        interval = 0.1 if sys.stderr.isatty() else 10.0
        return tqdm(steps, title, disable=self.silent, leave=False, mininterval=interval, dynamic_ncols=True)

    def log(self, kind: str, **values: float) -> None:
        """Add a record to the log; :meth:`draw` needs the key of its horizontal axis in it.

        Raises:
            OSError: The file cannot be written.
        """
        record = {"kind": kind, **values}
        self.records.append(record)
        if not self.silent:
            path = self.folder / "log.jsonl"
            with writing(path), path.open("a") as log:
                log.write(_line(record))

    def draw(self, panels: Sequence[Panel], over: str = "epoch") -> None:
        """Draw the log so far, one plot below the other; ``over`` is the key of the horizontal axis.

        Raises:
            OSError: The file cannot be written.
        """
        if self.silent:
            return
        figure = Figure(figsize=(7, 2.4 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), sharex=True, squeeze=False)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            for curve in panel.curves:
                points = [(r[over], r[curve.key]) for r in self.records if r["kind"] == curve.kind]
                # Markers only while they do not overlap.
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
