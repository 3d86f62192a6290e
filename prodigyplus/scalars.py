"""The numbers that one step's arithmetic uses, as tensors: what a rule multiplies with.

No step reads one back. A step that must change nothing is a step whose numbers are chosen so that it changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# How many tensors of constants an optimiser keeps.
_MOST = 4096

# Integers as wide as the dtypes of a step's arithmetic.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Scalars(NamedTuple):
    """The numbers of a group that one step's arithmetic uses: 0-dim tensors, one dtype and device.

    Where the step is not to happen, what keeps something is 1 and what adds to something is 0. Where it may
    happen for some parameters of a stack only, there is one for each, in a shape to be multiplied with it.
    """

    # What keeps something.
    beta1: Tensor  # decay of the first moment, without Schedule-Free
    beta2: Tensor  # decay of the second moment
    beta3: Tensor  # decay of Prodigy's statistics
    # What adds to something.
    gradient: Tensor  # (1 − β1) d, the weight of this g in the first moment
    square: Tensor  # (1 − β2) d², the weight of this g² in the second moment
    statistic: Tensor  # the weight of this gradient in Prodigy's statistics
    unit: Tensor  # 1
    dlr: Tensor  # d·lr
    decay: Tensor  # what weight decay takes off a weight: λ·dlr, or λ
    c: Tensor  # Schedule-Free's averaging weight
    # What is as it is.
    xy: Tensor  # 1 − β1 (1 − c), how much of z's step y makes
    d: Tensor
    eps: Tensor  # 0 for Adam-atan2, which needs none
    recent: Tensor  # k^-¾, the weight of this step in SPEED's average
    bound: Tensor  # k^¼, how large a normalised gradient may be (ADOPT without Schedule-Free)
    # Not of that dtype.
    admits: Tensor  # an integer as wide as the others: all its bits if this step changes anything, or none
    observes: Tensor  # bool: whether Prodigy counts this gradient
    step: Tensor  # int64: number of this step, from 1

    packed: Packed  # all of them

    def only_if(self, condition: Tensor) -> Scalars:
        """These, if ``condition`` (bool, 0-dim or (count,)) holds as well; else those of no step."""
        return self.packed.only_if(condition).across(0)

    def across(self, dims: int) -> Scalars:
        """These in shapes to be multiplied with a stack of tensors of so many dimensions."""
        return self.packed.across(dims) if self.unit.ndim else self

    def admit(self, values: Tensor) -> Tensor:
        """``values``, or zeros if the step is not to happen; a new tensor. Keeps 0·inf out of what follows.

        Args:
            values: Of the dtype of the numbers.
        """
        # By their bits: to choose, with torch.where(), takes four times as long on a CPU.
        return (values.view(self.admits.dtype) & self.admits).view(values.dtype)

    def admit_(self, values: Tensor) -> Tensor:
        """:meth:`admit`, in place."""
        values.view(self.admits.dtype).bitwise_and_(self.admits)
        return values


# Where among them those that add something begin, and those that are as they are.
_ADDS, _STAYS = map(Scalars._fields.index, ("gradient", "xy"))


class Packed(NamedTuple):
    """:class:`Scalars` in few tensors, in which a compiled pass takes them."""

    values: Tensor  # shape (numbers,), or (numbers, count) where parameters of a stack have their own
    admits: Tensor
    observes: Tensor
    step: Tensor

    def only_if(self, condition: Tensor) -> Packed:
        """See :meth:`Scalars.only_if`."""
        values = self.values
        if values.ndim <= condition.ndim:
            values = values.unsqueeze(1).expand(-1, len(condition))
        kept, added, others = values.tensor_split((_ADDS, _STAYS))
        return Packed(
            torch.cat((torch.where(condition, kept, 1), torch.where(condition, added, 0), others)),
            torch.where(condition, self.admits, 0),
            self.observes & condition,
            self.step,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """These on another device, in another dtype."""
        admits = self.admits.to(device, _BITS[dtype])
        return Packed(self.values.to(device, dtype), admits, self.observes.to(device), self.step.to(device))

    def across(self, dims: int) -> Scalars:
        """These one by one, in shapes to be multiplied with a stack of tensors of so many dimensions."""
        if self.values.ndim == 1:
            return Scalars._make((*self.values.unbind(), self.admits, self.observes, self.step, self))
        shape = -1, *(1,) * dims
        values = self.values.view(len(self.values), *shape).unbind()
        return Scalars._make((*values, self.admits.view(shape), self.observes.view(shape), self.step, self))


class Constants:
    """Integers that are mostly the same at every step, as tensors: sent to their device once.

    An optimiser has its own: a tensor is good for those among which it was made, which may be fake ones.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def on(self, device: torch.device, numbers: Sequence[int]) -> Tensor:
        """``numbers`` on ``device``; int64."""
        key = tuple(numbers), device
        if key not in self._kept:
            if len(self._kept) >= _MOST:
                self._kept.clear()
            self._kept[key] = torch.tensor(key[0], dtype=torch.int64, device="cpu").to(
                device, non_blocking=True
            )
        return self._kept[key]
