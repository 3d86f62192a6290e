"""The file of results: a JSON line for each finished run, with its setting and its outcome."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
IDENTITY = ("task", "size", "scale", "optimizer", "setting", "seed", "device")


def key(row: Row) -> str:
    """The identity of a run as one string."""
    return json.dumps([row[name] for name in IDENTITY], sort_keys=True)


def read(paths: Iterable[Path]) -> dict[str, Row]:
    """All runs in some files by their keys; a missing file has none.

    Raises:
        ValueError: A line is not a run. The last line may be cut short, if a write was interrupted.
    """
    rows: dict[str, Row] = {}
    for path in paths:
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        for number, line in enumerate(whole.splitlines(), start=1):
            row = parsed(line, f"{path}, line {number}")
            rows[key(row)] = row
    return rows


def parsed(line: str, place: str) -> Row:
    """A line as a run.

    Raises:
        ValueError: It is not one.
    """
    try:
        row: Row = json.loads(line)
        key(row)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is not a run: {error!r}") from error
    return row


def append(path: Path, row: Row) -> None:
    """Add a run, on a line of its own even after one that was cut short."""
    whole = path.read_bytes() if path.exists() else b""
    if whole and not whole.endswith(b"\n"):
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
