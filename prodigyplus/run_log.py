"""Write a run's numbers row by row: to a file that ``python -m prodigyplus.plot`` draws, or TensorBoard."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any


class RunLog:
    """Rows of numbers in a file: CSV if its name ends in ``.csv``, JSON lines otherwise.

    Rows are appended to a file that exists, so that a resumed run continues it. Write from one rank only.

    >>> log = RunLog("run.jsonl")
    >>> log.add(step, optimizer.scalars(), loss=loss.item())

    Args:
        path: The file; folders above it are created.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns: list[str] = []
        if self._is_csv and self.path.exists():
            with self.path.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

    @property
    def _is_csv(self) -> bool:
        return self.path.suffix == ".csv"

    def add(self, step: int, numbers: Mapping[str, float] = MappingProxyType({}), **others: float) -> None:
        """Write a row.

        Args:
            step: The training loop's step, written as ``step``.
            numbers: Numbers by name, such as ``optimizer.scalars()``.
            others: More numbers by name, such as the loss. Tensors of one element are read, which waits for
                their device.

        Raises:
            ValueError: The names differ from the columns of the CSV file, which are those of its first row.
            TypeError: ``numbers`` is not a mapping.
        """
        if not isinstance(numbers, Mapping):
            raise TypeError(
                f"RunLog.add: numbers is a {type(numbers).__name__}, no dict: pass optimizer.scalars()."
            )
        row = {
            name: value.item() if hasattr(value, "item") else value  # of tensors and NumPy scalars
            for name, value in {**numbers, **others, "step": step}.items()
        }
        new = self._is_csv and not self._columns
        if new:
            self._columns = [*row]
        if self._is_csv and {*row} != {*self._columns}:
            odd = sorted({*row} ^ {*self._columns})
            raise ValueError(
                f"{self.path} has the columns {', '.join(self._columns)}, and a row differs in "
                f"{', '.join(odd)}: give every row the same names, or write JSON lines (run.jsonl)."
            )
        with self.path.open("a", newline="") as file:
            if self._is_csv:
                rows = csv.writer(file)
                rows.writerows([self._columns] if new else [])
                rows.writerow([row[name] for name in self._columns])
            else:
                file.write(json.dumps(row) + "\n")


def to_tensorboard(writer: Any, numbers: Mapping[str, float], step: int) -> None:
    """Write numbers to TensorBoard, each under its own name.

    >>> to_tensorboard(writer, optimizer.scalars("prodigyplus/"), step)

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
        numbers: The numbers.
        step: The step that the numbers belong to.
    """
    for name, number in numbers.items():
        writer.add_scalar(name, number, step)
