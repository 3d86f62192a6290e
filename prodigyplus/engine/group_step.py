"""One parameter group during one step: its options, its numbers, and what its parameters have observed."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from prodigyplus.options import Options
from prodigyplus.state_table import StateOptions
from prodigyplus.terms.device_constants import Constants, int64_on
from prodigyplus.terms.step_numbers import PackedNumbers, StepNumbers


class GroupStep:
    """One parameter group during one step.

    Args:
        index: Its index in ``param_groups``.
        param_group: The group itself; its numbers are views of the columns.
        constants: The optimiser's cache of constants.

    Attributes:
        skips_per_param: Whether each parameter is skipped individually, instead of all together.
        adapts: Whether its step size adapts; False once ``prodigy_steps`` have passed.
        batch_keys: A cache of its parameters' batch keys, by what they depend on; see ``engine/batches.py``.
    """

    def __init__(self, index: int, param_group: dict[str, Any], constants: Constants) -> None:
        self.index = index
        self.param_group = param_group
        self.constants = constants
        self.options = Options.of(param_group)
        self.skips_per_param = False
        self.adapts = not self.options.is_frozen(param_group)
        self.batch_keys: dict[Hashable, Hashable | None] = {}
        self._numbers: tuple[PackedNumbers, ...]
        self._observed: list[tuple[list[int], Tensor, Tensor]] = []
        self._in_dtypes: dict[tuple[torch.device, torch.dtype], StepNumbers] = {}

    @functools.cached_property
    def state_options(self) -> StateOptions:
        """Those of its options that determine which state its parameters have."""
        return StateOptions.of(self.options)

    def set_numbers(self, *numbers: PackedNumbers) -> None:
        """Set the numbers of this step, in one or more dtypes."""
        self._numbers = numbers
        self._in_dtypes.clear()

    def step_numbers(self, device: torch.device, dtype: torch.dtype) -> StepNumbers:
        """The numbers of this step on ``device``, floating-point ones in ``dtype``; cached."""
        key = device, dtype
        if key not in self._in_dtypes:
            numbers = next(
                (given for given in self._numbers if given.values.dtype == dtype), self._numbers[0]
            )
            self._in_dtypes[key] = numbers.to(device, dtype).across(0)
        return self._in_dtypes[key]

    def observe(self, ordinals: list[int], products: Tensor, norms: Tensor) -> None:
        """Record the evidence of the parameters at ``ordinals``: products and norms, (count,)."""
        self._observed.append((ordinals, products, norms))

    @property
    def evidence_weights(self) -> tuple[Tensor, Tensor]:
        """The factors of this step's products and of its norms, 0-dim."""
        n = self._numbers[0].across(0)
        return n.evidence_weight, n.dlr if self.options.evidence == "balance" else torch.ones_like(n.dlr)

    def totals(self) -> Tensor:
        """The sums of this step over the group: products and norms, not weighted yet; shape (2,)."""
        d: Tensor = self.param_group["d"]
        if not self._observed:
            return d.new_zeros(2)
        ordinals, *pairs = zip(*self._observed, strict=True)
        # Sum in the order of the parameters, not of arrival: the last bits of a sum depend on its order.
        came = tuple(map(tuple, ordinals))
        rows = self.constants.get_recent(d.device, ("order", came), lambda: _order(came, d.device))
        sums = []
        for values in pairs:
            wide = [value.to(d.device, d.dtype) for value in values]
            whole = torch.cat(wide) if len(wide) > 1 else wide[0]
            sums.append((whole if rows is None else whole.index_select(0, rows)).sum())
        return torch.stack(sums)


def _order(ordinals: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """The indices that sort ``ordinals``, concatenated; None if they are in order already."""
    every = [ordinal for run in ordinals for ordinal in run]
    order = sorted(range(len(every)), key=every.__getitem__)
    if order == list(range(len(order))):
        return None
    return int64_on(device, order)
