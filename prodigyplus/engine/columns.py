"""The numbers of parameter groups as columns: one tensor of shape (groups,) for each number.

The numbers in ``param_groups`` are views of the columns: 0-dim tensors on the device of the parameters. What
is written to one shows in the other. No step reads a number back to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from prodigyplus.terms.device_constants import SentTable
from prodigyplus.terms.dtypes import wide_dtype
from prodigyplus.terms.group_numbers import COUNTS, FLOATS, NUMBERS

_CPU = torch.device("cpu")


def as_tensor(name: str, value: float | Tensor, device: torch.device = _CPU) -> Tensor:
    """A group's number as a 0-dim tensor: int64 for counts, else float64 (float32 on MPS)."""
    dtype = torch.int64 if name in COUNTS else wide_dtype(device)
    return torch.as_tensor(value, dtype=dtype, device=device)


def to_python_numbers_(groups: Sequence[dict[str, Any]], names: Iterable[str] = NUMBERS) -> None:
    """Turn 0-dim tensors in ``groups`` into Python numbers, in place, with one synchronisation in all.

    Args:
        groups: Dicts with such tensors, or with Python numbers, which stay.
        names: The keys to convert.
    """
    found = [(group, name) for group in groups for name in names if isinstance(group[name], Tensor)]
    if found:
        values = torch.stack(
            [group[name].to(wide_dtype(group[name].device)) for group, name in found]
        ).tolist()
        for (group, name), value in zip(found, values, strict=True):
            group[name] = value if group[name].is_floating_point() else int(value)


class Columns:
    """The numbers of all groups; makes those in ``param_groups`` views of them.

    Args:
        groups: ``param_groups``, with Python numbers or 0-dim tensors; changed in place.
        device: The device of the columns.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], device: torch.device) -> None:
        self.device = device
        rows = {name: [as_tensor(name, group[name], device) for group in groups] for name in NUMBERS}
        # As two tensors, (numbers, groups), that a kernel takes: floating-point numbers, and counts.
        self.floats, self.counts = (
            torch.stack([torch.stack(rows[name]) for name in names]) for names in (FLOATS, COUNTS)
        )
        self.zeros = torch.zeros_like(self.floats[0])  # never written
        self.sent_options = SentTable(device)  # the options of the groups, as a table for kernels
        columns = *self.floats.unbind(), *self.counts.unbind()
        self._columns = dict(zip((*FLOATS, *COUNTS), columns, strict=True))
        self._views = [
            dict(zip(NUMBERS, row, strict=True))
            for row in zip(*(self[name].unbind() for name in NUMBERS), strict=True)
        ]
        for group, views in zip(groups, self._views, strict=True):
            group.update(views)

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def __len__(self) -> int:
        return len(self._views)

    def are_of(self, groups: Sequence[dict[str, Any]], device: torch.device) -> bool:
        """Whether these are the columns of ``groups`` on ``device``; False if a user replaced a number."""
        return (
            device == self.device
            and len(groups) == len(self._views)
            and all(
                group[name] is view
                for group, views in zip(groups, self._views, strict=True)
                for name, view in views.items()
            )
        )
