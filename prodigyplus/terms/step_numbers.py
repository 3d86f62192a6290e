"""The numbers of a step, as tensors: what the formulas multiply by.

They are never read back to the host. A step that must change nothing (a no-op) runs all the same, with
numbers that make it change nothing.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# Integers as wide as the dtypes of a step's arithmetic.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class StepNumbers(NamedTuple):
    """The numbers of a group in one step: 0-dim tensors of one dtype and device.

    In a no-op, weights that keep something are 1 and weights that add something are 0. If the step is a no-op
    for only some parameters of a stack, each parameter has its own numbers, in shapes that broadcast.
    """

    # Weights that keep something: 1 in a no-op.
    beta1: Tensor  # decay of the first moment, without Schedule-Free
    beta2: Tensor  # decay of the second moment
    beta3: Tensor  # decay of Prodigy's statistics
    # Weights that add something: 0 in a no-op.
    grad_weight: Tensor  # (1 − β1) d, the weight of this g in the first moment
    sq_weight: Tensor  # (1 − β2) d², the weight of this g² in the second moment
    evidence_weight: Tensor  # the weight of this gradient in Prodigy's statistics, or of balance's products
    unit: Tensor  # 1
    dlr: Tensor  # the step size d·lr, with RAdam and warm-up
    decay: Tensor  # the fraction of a weight that weight decay subtracts: λ·dlr, or λ
    c: Tensor  # Schedule-Free's averaging weight
    # Unchanged in a no-op.
    y_fraction: Tensor  # 1 − β1 (1 − c), the fraction of z's step that y makes
    d: Tensor
    eps: Tensor  # 0 for Adam-atan2, which needs none
    ema_weight: Tensor  # k^-¾, the weight of this step in SPEED's average
    adopt_clip: Tensor  # k^¼, the largest normalised gradient (ADOPT without Schedule-Free)
    # Of other dtypes than those above.
    gate: Tensor  # an integer of the same width: all bits set, or none in a no-op
    observes: Tensor  # bool: whether this gradient counts as evidence; not if lr is 0
    step: Tensor  # int64: the number of this step, from 1

    packed: PackedNumbers  # the same numbers in few tensors

    def where(self, condition: Tensor) -> StepNumbers:
        """These numbers where ``condition`` (bool, 0-dim or (count,)) holds, a no-op's elsewhere."""
        return self.packed.where(condition).across(0)

    def across(self, dims: int) -> StepNumbers:
        """These numbers, in shapes that broadcast over a stack of tensors of ``dims`` dimensions."""
        return self.packed.across(dims) if self.unit.ndim else self

    def gated(self, values: Tensor) -> Tensor:
        """``values``, or zeros in a no-op, so that no 0·inf can arise; a new tensor.

        Args:
            values: A tensor of the same dtype as the numbers.
        """
        # By a bitwise and: torch.where() takes four times as long on a CPU.
        return (values.view(self.gate.dtype) & self.gate).view(values.dtype)

    def gated_(self, values: Tensor) -> Tensor:
        """:meth:`gated`, in place."""
        values.view(self.gate.dtype).bitwise_and_(self.gate)
        return values


# The indices of the first field that adds something, and of the first that a no-op leaves unchanged.
_FIRST_ADDED, _FIRST_UNCHANGED = map(StepNumbers._fields.index, ("grad_weight", "y_fraction"))

VALUES: tuple[str, ...] = StepNumbers._fields[: StepNumbers._fields.index("gate")]
"""The names of the numbers in :attr:`PackedNumbers.values`, in order."""


class PackedNumbers(NamedTuple):
    """:class:`StepNumbers` in few tensors: the form that compiled passes and kernels take."""

    values: Tensor  # shape (numbers,), or (numbers, count) where parameters of a stack have their own
    gate: Tensor
    observes: Tensor
    step: Tensor

    def where(self, condition: Tensor) -> PackedNumbers:
        """See :meth:`StepNumbers.where`."""
        values = self.values
        if values.ndim <= condition.ndim:
            values = values.unsqueeze(1).expand(-1, len(condition))
        kept, added, unchanged = values.tensor_split((_FIRST_ADDED, _FIRST_UNCHANGED))
        return PackedNumbers(
            torch.cat((torch.where(condition, kept, 1), torch.where(condition, added, 0), unchanged)),
            torch.where(condition, self.gate, 0),
            self.observes & condition,
            self.step,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> PackedNumbers:
        """These numbers on ``device``, floating-point ones in ``dtype``."""
        gate = self.gate.to(device, _BITS[dtype])
        return PackedNumbers(
            self.values.to(device, dtype), gate, self.observes.to(device), self.step.to(device)
        )

    def across(self, dims: int) -> StepNumbers:
        """These numbers one by one, in shapes that broadcast over a stack of ``dims``-dimensional tensors."""
        values, gate, observes = self.values, self.gate, self.observes
        if values.ndim > 1:
            shape = -1, *(1,) * dims
            values, gate, observes = values.view(len(values), *shape), gate.view(shape), observes.view(shape)
        # Not _make(), which torch.compile cannot trace in 2.8; mypy cannot know how many values there are.
        return StepNumbers(*values.unbind(), gate, observes, self.step, self)  # type: ignore[call-arg, arg-type]


Numbers: TypeAlias = "StepNumbers | PackedNumbers"
"""The numbers of a step in either form; both have ``across``."""
