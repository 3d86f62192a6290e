"""Tables and charts of the results of run.py.

    python benchmarks/quality/report.py FILE.jsonl ... --out docs/quality.md

The charts are in a folder beside the file, with the same name.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is

from quality import chart, results
from quality.outcomes import Comparison, Outcome, comparisons
from quality.peers import OPTIMIZERS
from quality.results import Row
from quality.tasks import TASKS
from quality.train import FRACTIONS

ABOUT = """\
A loss is the mean over seeds ± their standard deviation. A tuned optimiser is shown with the setting of the
least mean loss, of those that were run with the most seeds; × is a factor of the step size that it finds
itself. Schedule-Free methods are evaluated at their averages. The range of a task is from the loss of the
untrained model to the least of all.""".splitlines()
CLOSE = 0.01  # of the range: how far above another a loss may be and still count as close

# ------------------------------------------------------------------------------------------ words


def number(value: float) -> str:
    """A loss in four digits."""
    return "diverged" if math.isinf(value) else f"{value:.4g}"


def with_spread(outcome: Outcome) -> str:
    """A mean with its spread and the number of seeds."""
    spread = "" if outcome.spread is None else f" ± {outcome.spread:.1g}"
    return f"{number(outcome.loss)}{spread} ({len(outcome.rows)})"


def described(outcome: Outcome, among: Sequence[Outcome]) -> str:
    """A setting in words; says so if it is the smallest or the largest that was tried."""
    setting = outcome.setting
    if setting.rate is None:
        return "none"
    tried = [its.setting.rate for its in among if its.setting.rate is not None]
    edge = len(set(tried)) > 1 and setting.rate in (min(tried), max(tried))
    is_factor = (entry := OPTIMIZERS.get(outcome.optimizer)) is not None and entry.tuned == "factor"
    return f"{'× ' * is_factor}{setting.rate:g}{', warm-up' * setting.warm_up}{' (edge of the grid)' * edge}"


def percent(value: float | None) -> str:
    """An accuracy."""
    return "" if value is None else f"{value:.2%}"


def ratio(value: float, to: float) -> str:
    """A loss as a multiple of another."""
    return f"{value / to:.3f}" if to > 0 and math.isfinite(value) and math.isfinite(to) else ""


def share(above: float | None, of: float | None) -> str:
    """How far a loss is above another, as a share of a range."""
    if above is None or of is None or not math.isfinite(above):
        return ""
    return f"{above / of:+.1%}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def overview(found: Sequence[Comparison]) -> list[str]:
    """A row for each task and each optimiser that is not tuned."""
    rows = []
    for comparison in found:
        peers = comparison.best_tuned
        held_out = (task := TASKS.get(comparison.task)) is not None and task.held_out
        for ours in comparison.untuned:
            if not peers:
                continue
            rows.append(
                [
                    comparison.name + " (held out)" * held_out,
                    ours.optimizer,
                    with_spread(ours),
                    f"{peers[0].optimizer}, {described(peers[0], comparison.of(peers[0].optimizer))}",
                    with_spread(peers[0]),
                    ratio(ours.loss, peers[0].loss),
                    share(ours.above(peers[0]), comparison.range),
                ]
            )
    head = ["task", "untuned", "loss (seeds)", "best tuned peer", "its loss"]
    return table([*head, "untuned ÷ tuned", "above it, of the range"], rows)


def tally(found: Sequence[Comparison]) -> list[str]:
    """On how many tasks each untuned optimiser ends at or below each other one, over their seeds.

    The second number also counts those that end above by at most CLOSE, on the tasks whose range is known.
    """
    counts: dict[tuple[str, str], list[tuple[bool, bool | None]]] = {}
    for comparison in found:
        for ours in comparison.untuned:
            for other in (*comparison.untuned, *comparison.best_tuned):
                above = None if other is ours else ours.above(other)
                if above is not None:
                    is_close = None if comparison.range is None else above <= CLOSE * comparison.range
                    counts.setdefault((ours.optimizer, other.optimizer), []).append((above <= 0, is_close))
    rows = []
    for pair, outcomes in sorted(counts.items(), key=lambda item: item[0]):
        close = [is_close for _, is_close in outcomes if is_close is not None]
        below = [is_below for is_below, _ in outcomes]
        rows.append([*pair, *(f"{sum(found)} of {len(found)}" for found in (below, close))])
    return table(
        ["untuned", "beside", "at or below it on", f"or above by {CLOSE:.0%} of the range at most"], rows
    )


def section(comparison: Comparison, picture: str) -> list[str]:
    """The section on a task."""
    task = TASKS.get(comparison.task)
    scale = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in comparison.scale.items())
    shown = [*comparison.untuned, *comparison.best_tuned]
    least = min(outcome.loss for outcome in shown)
    final = (
        [
            its.optimizer,
            described(its, comparison.of(its.optimizer)),
            with_spread(its),
            ratio(its.loss, least),
            percent(its.accuracy),
            f"{statistics.fmean(row['cpu_seconds'] for row in its.rows):.0f}",
        ]
        for its in shown
    )
    anytime = ([its.optimizer, *(number(its.after(fraction)) for fraction in FRACTIONS)] for its in shown)
    meaning = "" if task is None else f"Loss: {task.loss}."
    if task is not None and task.accuracy:
        meaning += f" Accuracy: {task.accuracy}."
    return [
        f"## {comparison.name}",
        "",
        *([meaning] if meaning else []),
        f"Scale: {scale}.",
        "",
        *table(["optimizer", "setting", "loss (seeds)", "÷ least", "accuracy", "CPU s"], final),
        "",
        "The loss on the way, after these parts of training:",
        "",
        *table(["optimizer", *(f"{fraction:.0%}" for fraction in FRACTIONS)], anytime),
        "",
        f"![the loss over the rates of all peers]({picture})",
        "",
    ]


def circumstances(rows: Iterable[Row]) -> str:
    """Machines and versions."""
    places = [row["environment"] for row in rows]
    parts = [
        f"{name}: {', '.join(sorted({str(place[name]) for place in places}))}"
        for name in ("processor", "threads", "torch", "python", "commit")
    ]
    return "; ".join(parts) + "."


def packages(rows: Iterable[Row]) -> str:
    """The versions of the optimisers."""
    found = {f"{row['optimizer']} {row['environment']['package']}" for row in rows}
    return ", ".join(sorted(found)) + "."


def write(rows: Sequence[Row], out: Path) -> None:
    """Write the report and draw its charts."""
    found = comparisons(rows)
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Untuned beside tuned",
        "",
        *ABOUT,
        "",
        circumstances(rows),
        packages(rows),
        "",
        *overview(found),
        "",
        *tally(found),
        "",
    ]
    for index, comparison in enumerate(found):
        same = sum(its.name == comparison.name for its in found[:index])
        name = comparison.name.replace(" ", "-") + (f"-{same + 1}" if same else "") + ".png"
        chart.draw(curves(comparison), comparison.untuned, folder / name, title(comparison))
        lines += section(comparison, f"{folder.name}/{name}")
    out.write_text("\n".join(lines).rstrip() + "\n")


def title(comparison: Comparison) -> str:
    """The title of a chart."""
    task = TASKS.get(comparison.task)
    return comparison.name + ("" if task is None else f": {task.loss}")


def curves(comparison: Comparison) -> list[chart.Curve]:
    """A tuning curve for each peer, with and without warm-up."""
    found: dict[tuple[str, bool], list[Outcome]] = {}
    for outcome in comparison.outcomes.values():
        if outcome.setting.rate is not None:
            found.setdefault((outcome.optimizer, outcome.setting.warm_up), []).append(outcome)
    return [
        chart.Curve(
            name,
            warm_up,
            (entry := OPTIMIZERS.get(name)) is not None and entry.tuned == "factor",
            [
                (its.setting.rate or 0.0, its.loss)
                for its in sorted(outcomes, key=lambda o: o.setting.rate or 0.0)
            ],
        )
        for (name, warm_up), outcomes in sorted(found.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    args = parser.parse_args(arguments)
    rows = list(results.read(args.files).values())
    if not rows:
        parser.error(f"no run in {', '.join(map(str, args.files))}")
    write(rows, args.out)


if __name__ == "__main__":
    main()
