"""Command lines, readable numbers, and tables in Markdown."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOW, HIGH = 0.1, 0.9  # quantiles that are given as the spread


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser for a script's command line, with the script's docstring as its description."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


class Page:
    """Lines that are printed at once, and kept for a file.

    Args:
        title: Its first line; none if it is empty.
        out: The folder for files; None: nothing is written.
        named: Names that replace the user's own paths in the command that the page shows.
    """

    def __init__(self, title: str, out: Path | None = None, named: Mapping[Any, str] | None = None) -> None:
        self.lines: list[str] = []
        self.out = out
        own = {str(path): name for path, name in (named or {}).items()}
        script, *arguments = sys.argv
        command = ["python", f"benchmarks/{Path(script).name}", *(own.get(word, word) for word in arguments)]
        lead = [f"# {title}\n", "The figures on this page are printed by\n"] if title else []
        self.tell(*lead, f"    {shlex.join(command)}\n")

    def tell(self, *lines: str) -> None:
        """Print lines, and keep them for the file."""
        self.lines += lines
        for line in lines:
            print(line, flush=True)

    def table(self, columns: str, rows: Iterable[Iterable[object]]) -> None:
        """Print a table, each row as soon as it is ready."""
        self.tell(head(columns))
        for cells in rows:
            self.tell(row(*cells))

    def path(self, name: str) -> Path:
        """Where a file goes."""
        assert self.out is not None
        self.out.mkdir(parents=True, exist_ok=True)
        return self.out / name

    def save(self, name: str) -> None:
        """Write the page, if there is a folder for it."""
        if self.out is not None:
            self.path(name).write_text("\n".join(self.lines) + "\n")


def head(columns: str) -> str:
    """The first two lines of a table, from columns separated by bars; those of numbers end in a colon."""
    names = columns.split(" | ")
    rules = ("--:" if name.endswith(":") else "---" for name in names)
    return f"{row(*(name.removesuffix(':') for name in names))}\n|{'|'.join(rules)}|"


def row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def digits(value: float) -> str:
    """A number in three digits, or more if it is 100 or larger."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def quantiles(values: Sequence[float], low: float = LOW, high: float = HIGH) -> tuple[float, float, float]:
    """The lower end of the spread, the median, and the upper end."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return at(low), at(0.5), at(high)


def spread(values: Sequence[float], low: float = LOW, high: float = HIGH) -> str:
    """The median, and the spread."""
    if not values:
        return "–"
    least, middle, most = map(digits, quantiles(values, low, high))
    return f"{middle} ({least}–{most})"


def ratios(values: Iterable[float], to: Iterable[float]) -> list[float]:
    """Ratios of values to others, pair by pair."""
    return [a / b for a, b in zip(values, to, strict=True)]


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, in milliseconds."""
    return digits(1e3 * statistics.median(seconds))
