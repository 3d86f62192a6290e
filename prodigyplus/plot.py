"""Draw and compare runs: ``python -m prodigyplus.plot run.jsonl other.csv --out runs.png``.

Reads what :class:`prodigyplus.run_log.RunLog` writes, the ``log.jsonl`` of the launch scripts, and the
``trainer_state.json`` of a Hugging Face Trainer: rows with a ``step``, a ``loss`` and the names of
``optimizer.scalars()``, with any prefix. Needs matplotlib: ``pip install matplotlib``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, float]
Curve = tuple[list[float], list[float]]  # steps and values


class Panel(NamedTuple):
    """One of the plots, which are stacked vertically."""

    title: str
    name: str  # a regular expression for the number's name, without prefix and group
    scale: str | None  # None: linear, or logarithmic where values differ by a factor above _WIDE


OF_MODEL = (
    Panel("training loss (lower is better)", "loss", None),
    Panel("loss in evaluations (lower is better)", "eval_loss|val_loss", None),
    Panel("accuracy in evaluations (higher is better)", "(?:eval_|val_)?accuracy", "linear"),
)
OF_OPTIMIZER = (
    Panel("step size", "step_size", "log"),
    Panel("d: should climb early, then level off", "d", "log"),
    Panel("estimate before its limits (Prodigy: numerator / denominator; balance: ρ)", "d_hat", "linear"),
    Panel("steps skipped for an inf or NaN (0 is best)", "skipped_steps", "linear"),
)

_WIDE = 50.0


def rows_of(path: Path) -> list[Row]:
    """The rows of a run that have a step and other numbers.

    Raises:
        ValueError: There are none, or the file is not a log of a run.
    """
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                found: list[Any] = list(csv.DictReader(file))
        elif path.suffix == ".json":
            found = json.loads(path.read_text()).get("log_history", [])
        else:
            found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        rows = rows_in(found)
    except (ValueError, AttributeError) as error:  # no JSON, or JSON of something else
        raise ValueError(
            f"{path} is not a log of a run ({error}): pass JSON lines, a .csv of prodigyplus.run_log.RunLog, "
            "or the trainer_state.json of a Hugging Face Trainer."
        ) from error
    if not rows:
        raise ValueError(f"{path} has no row with a 'step': write them by prodigyplus.run_log.RunLog.")
    return rows


def rows_in(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows among a run's records: the numbers of those that have a step and other numbers."""
    return [row for row in map(_row_of, records) if "step" in row and len(row) > 1]


def _row_of(record: Mapping[str, Any]) -> Row:
    # The launch scripts' evaluations are of the kind "test" or "held out".
    prefix = "" if record.get("kind", "train") == "train" else "eval_"
    row = {}
    for name, value in record.items():
        with suppress(TypeError, ValueError):  # text
            row[name if name == "step" else prefix + name] = float(value)
    return row


def curves_of(rows: Sequence[Row], name: str) -> dict[str, Curve]:
    """The curves of a number: one, under "", or one for each group, under the group's number.

    Args:
        rows: In the order in which they were written; where a step occurs twice, as in a resumed run, the
            last row counts.
        name: As in ``optimizer.scalars()``; a prefix before it ends in ``/``.
    """
    pattern = re.compile(rf"(?:.*/)?(?:{name})(?:/(\d+))?")
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        for key, value in row.items():
            if match := pattern.fullmatch(key):
                points.setdefault(match[1] or "", {})[row["step"]] = value
    return {
        group: ([*steps], [steps[step] for step in steps])
        for group, steps in ((group, dict(sorted(of.items()))) for group, of in points.items())
    }


def draw(runs: Mapping[str, Sequence[Row]], panels: Sequence[Panel] = OF_MODEL + OF_OPTIMIZER) -> Figure:
    """Draw runs over one another, one plot for each number that any of them has.

    Args:
        runs: Their rows, under the names for the legend.
        panels: The plots, from top to bottom.
    """
    from matplotlib.figure import Figure

    found = [(panel, {run: curves_of(rows, panel.name) for run, rows in runs.items()}) for panel in panels]
    shown = [(panel, curves) for panel, curves in found if any(curves.values())]
    figure = Figure(figsize=(8, 2.3 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    styles = ("-", "--", ":", "-.")
    for axes, (panel, curves) in zip(grid, shown, strict=True):
        for colour, (run, groups) in enumerate(curves.items()):
            for index, (group, (steps, values)) in enumerate(groups.items()):
                label = f"{run}, group {group}" if group else run
                style = {"color": f"C{colour}", "linestyle": styles[index % len(styles)], "linewidth": 1.2}
                marker = "o" if len(steps) <= 20 else ""
                axes.plot(steps, values, label=label, marker=marker, markersize=3, **style)
        drawn = [value for groups in curves.values() for _, values in groups.values() for value in values]
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_yscale(_scale(panel, drawn))
        axes.grid(alpha=0.3)
    grid[0].legend(frameon=False, fontsize=8)
    grid[-1].set_xlabel("step")
    return figure


def _scale(panel: Panel, values: Sequence[float]) -> str:
    if not all(value > 0 for value in values):  # also where one is NaN
        return "linear"
    return panel.scale or ("log" if max(values) > _WIDE * min(values) else "linear")


def summary(name: str, rows: Sequence[Row]) -> str:
    """A line on a run: its last loss, its last step size and how many steps it skipped."""
    parts = [f"{name}: {int(rows[-1]['step'])} steps"]
    for title, number in (("loss", "loss"), ("d", "d"), ("skipped", "skipped_steps")):
        for group, (_, values) in curves_of(rows, number).items():
            last = values[-1]
            text = f"{last:.4g}" if math.isfinite(last) else str(last)
            parts.append(f"{title}{f' of group {group}' if group else ''} {text}")
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the runs that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m prodigyplus.plot", description="Draw and compare runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run.jsonl, run.csv or trainer_state.json")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="the picture (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        runs = {str(path): rows_of(path) for path in options.runs}
        draw(runs).savefig(options.out, dpi=120)
    except ImportError:
        parser.exit(1, "Drawing needs matplotlib: pip install matplotlib\n")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    lines = [summary(name, rows) for name, rows in runs.items()]
    sys.stdout.write("\n".join([*lines, f"drawn into {options.out}"]) + "\n")


if __name__ == "__main__":
    main()
