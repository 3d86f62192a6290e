"""Launches of the kernels that update the numbers of parameter groups; see ``group_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from prodigyplus.device import jit
from prodigyplus.device.tables import GroupOptions
from prodigyplus.formulas import balance, prodigy
from prodigyplus.terms.device_constants import SentTable
from prodigyplus.terms.step_numbers import VALUES, PackedNumbers


def table_of(
    key: object, rows: Callable[[], list[GroupOptions]], lrs: Sequence[float | Tensor], sent: SentTable
) -> Tensor:
    """The options of all groups as a table on a device; float64, (options, groups).

    Args:
        key: What the options are made from: the table is sent again only if it changes.
        rows: Returns the options of each group.
        lrs: The groups' ``lr``, 0-dim tensors or numbers.
        sent: The table, except for an ``lr`` that is a tensor.
    """
    table = sent.of(
        key, lambda: torch.tensor(list(zip(*rows(), strict=True)), dtype=torch.float64, device="cpu")
    )
    if not any(isinstance(lr, Tensor) for lr in lrs):
        return table
    # The value of such an lr may change without the host knowing.
    like = table[0, 0]
    row = torch.stack([torch.ones_like(like) * lr for lr in lrs])
    return torch.cat((row.unsqueeze(0), table[1:]))


class GroupLaunches:
    """The launches that update the numbers of all groups.

    Args:
        floats, counts: The numbers themselves, (numbers, groups), in the order of ``FLOATS`` and ``COUNTS``.
        options: The table of their options.
    """

    def __init__(self, floats: Tensor, counts: Tensor, options: Tensor) -> None:
        self._floats, self._counts, self._options = floats, counts, options
        self._count = floats.shape[1]
        self._block = max(4, 1 << (self._count - 1).bit_length())
        self._values: Tensor

    def begin_(
        self, square: Tensor, present: Tensor, *, initializes: bool
    ) -> tuple[list[PackedNumbers], Tensor]:
        """Set the numbers of a step, and count it; see :meth:`prodigyplus.engine.groups.Groups.begin`.

        Returns:
            The numbers of all groups, of shapes (groups, …), with values in float64 and in float32; and
            whether the evidence of the step updates each group's ``d``, bool, (groups,).
        """
        count, device = self._count, self._floats.device
        observes, learns = (torch.empty(count, dtype=torch.bool, device=device) for _ in range(2))
        steps = torch.empty(count, dtype=torch.int64, device=device)
        wide, narrow = (
            PackedNumbers(
                torch.empty(count, len(VALUES), dtype=dtype, device=device),
                torch.empty(count, dtype=bits, device=device),
                observes,
                steps,
            )
            for dtype, bits in ((torch.float64, torch.int64), (torch.float32, torch.int32))
        )
        self._values = wide.values
        with jit.on_device(device):
            jit.launch(
                _kernels().begin, (1,),
                self._floats, self._counts, self._options, square, present, wide.values, narrow.values,
                wide.gate, narrow.gate, observes, steps, learns, count,
                INITIALIZES=initializes, BLOCK=self._block,
            )  # fmt: skip
        return [wide, narrow], learns

    def end_(self, totals: Tensor, learns: Tensor) -> None:
        """Update ``d`` and the step sizes in use; see :meth:`prodigyplus.engine.groups.Groups.end`.

        Args:
            totals: The sums of all groups, products and norms, not weighted yet; (groups, 2).
            learns: The second result of :meth:`begin_`.
        """
        with jit.on_device(totals.device):
            jit.launch(
                _kernels().end, (1,),
                self._floats, self._counts, self._options, totals, self._values, learns, self._count,
                LIMIT_OF_SPEED=prodigy.SPEED_LIMIT, LARGEST_FACTOR=prodigy.LIMIT,
                LEAST_GROWTH=prodigy.LEAST_GROWTH, NEAR=prodigy.NEAR, EARLY=prodigy.EARLY,
                TARGET=balance.TARGET, GROWTH=balance.GROWTH, LOG_LIMIT=balance.LOG_LIMIT,
                WINDOW=balance.WINDOW, BLOCK=self._block,
            )  # fmt: skip


def _kernels() -> ModuleType:
    from prodigyplus.device import group_kernels

    return group_kernels
