"""The output of a run: lines and a progress bar on the terminal, a log of JSON lines, a figure of curves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 - draw needs it; where it is missing, the run ends before it begins
from files import replacing, writing
from tqdm import tqdm

from prodigyplus.plot import OF_MODEL, OF_OPTIMIZER, Panel, draw, rows_in

Record = dict[str, Any]


class Report:
    """Writes the output of a run, in the process that is not ``silent``.

    All processes call its methods, and a failed write raises in the one that writes: call them within
    :meth:`ranks.Ranks.fail_together`.

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
        """Add a record to the log; :meth:`draw` draws those with a ``step``.

        Raises:
            OSError: The file cannot be written.
        """
        record = {"kind": kind, **values}
        self.records.append(record)
        if not self.silent:
            path = self.folder / "log.jsonl"
            with writing(path), path.open("a") as log:
                log.write(_line(record))

    def draw(self, panels: Sequence[Panel] = OF_MODEL + OF_OPTIMIZER) -> None:
        """Draw the log so far, as ``python -m prodigyplus.plot`` draws it.

        Args:
            panels: The plots, from top to bottom; those of which the log has nothing are left out.

        Raises:
            OSError: The file cannot be written.
        """
        if not self.silent:
            figure = draw({self.folder.name: rows_in(self.records)}, panels)
            with replacing(self.folder / "progress.png") as path:
                figure.savefig(path, format="png", dpi=120)


def _line(record: Record) -> str:
    return json.dumps(record, default=str) + "\n"
