"""The numbers that one step's arithmetic uses, as tensors: what formulas multiply with.

No step reads one back. A step that must change nothing is a step whose numbers are such that it changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from prodigyplus.terms.isolation import is_captured

T = TypeVar("T")

# How many constants an optimiser keeps.
_MAX_CONSTANTS = 1 << 14

# Integers as wide as the dtypes of a step's arithmetic.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Scalars(NamedTuple):
    """The numbers of a group in one step: tensors of one dtype and device, 0-dim.

    Where the step is a no-op, weights that keep something are 1 and weights that add something are 0. Where
    it is one for some parameters of a stack only, each parameter has its own, in shapes that broadcast.
    """

    # What keeps something.
    beta1: Tensor  # decay of the first moment, without Schedule-Free
    beta2: Tensor  # decay of the second moment
    beta3: Tensor  # decay of Prodigy's statistics
    # What adds something.
    grad_weight: Tensor  # (1 − β1) d, the weight of this g in the first moment
    sq_weight: Tensor  # (1 − β2) d², the weight of this g² in the second moment
    prodigy_weight: Tensor  # the weight of this gradient in Prodigy's statistics
    unit: Tensor  # 1
    dlr: Tensor  # d·lr
    decay: Tensor  # what weight decay takes off a weight: λ·dlr, or λ
    c: Tensor  # Schedule-Free's averaging weight
    # What is the same in a no-op.
    y_fraction: Tensor  # 1 − β1 (1 − c), the fraction of z's step that y makes
    d: Tensor
    eps: Tensor  # 0 for Adam-atan2, which needs none
    ema_weight: Tensor  # k^-¾, the weight of this step in SPEED's average
    adopt_clip: Tensor  # k^¼, the largest normalised gradient (ADOPT without Schedule-Free)
    # Of other dtypes.
    gate: Tensor  # an integer as wide as the others: all its bits set, or none in a no-op
    observes: Tensor  # bool: whether Prodigy counts this gradient
    step: Tensor  # int64: number of this step, from 1

    packed: Packed  # all of them

    def where(self, condition: Tensor) -> Scalars:
        """These where ``condition`` holds (bool, 0-dim or (count,)); elsewhere those of a no-op."""
        return self.packed.where(condition).across(0)

    def across(self, dims: int) -> Scalars:
        """These in shapes that broadcast over a stack of tensors of ``dims`` dimensions."""
        return self.packed.across(dims) if self.unit.ndim else self

    def gated(self, values: Tensor) -> Tensor:
        """``values``, or zeros in a no-op; a new tensor. Keeps 0·inf out of what follows.

        Args:
            values: Of the dtype of the numbers.
        """
        # By their bits: to choose, with torch.where(), takes four times as long on a CPU.
        return (values.view(self.gate.dtype) & self.gate).view(values.dtype)

    def gated_(self, values: Tensor) -> Tensor:
        """:meth:`gated`, in place."""
        values.view(self.gate.dtype).bitwise_and_(self.gate)
        return values


# The indices of the first field that adds something, and of the first that is the same in a no-op.
_FIRST_ADDED, _FIRST_UNCHANGED = map(Scalars._fields.index, ("grad_weight", "y_fraction"))

VALUES: tuple[str, ...] = Scalars._fields[: Scalars._fields.index("gate")]
"""The names of the numbers in :attr:`Packed.values`, in their order."""


class Packed(NamedTuple):
    """:class:`Scalars` in few tensors, in which a compiled pass takes them."""

    values: Tensor  # shape (numbers,), or (numbers, count) where parameters of a stack have their own
    gate: Tensor
    observes: Tensor
    step: Tensor

    def where(self, condition: Tensor) -> Packed:
        """See :meth:`Scalars.where`."""
        values = self.values
        if values.ndim <= condition.ndim:
            values = values.unsqueeze(1).expand(-1, len(condition))
        kept, added, unchanged = values.tensor_split((_FIRST_ADDED, _FIRST_UNCHANGED))
        return Packed(
            torch.cat((torch.where(condition, kept, 1), torch.where(condition, added, 0), unchanged)),
            torch.where(condition, self.gate, 0),
            self.observes & condition,
            self.step,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """These on another device, in another dtype."""
        gate = self.gate.to(device, _BITS[dtype])
        return Packed(self.values.to(device, dtype), gate, self.observes.to(device), self.step.to(device))

    def across(self, dims: int) -> Scalars:
        """These one by one, in shapes that broadcast over a stack of tensors of ``dims`` dimensions."""
        values, gate, observes = self.values, self.gate, self.observes
        if values.ndim > 1:
            shape = -1, *(1,) * dims
            values, gate, observes = values.view(len(values), *shape), gate.view(shape), observes.view(shape)
        # Not by _make(), into which torch.compile does not look in 2.8; how many there are, mypy cannot know.
        return Scalars(*values.unbind(), gate, observes, self.step, self)  # type: ignore[call-arg, arg-type]


Numbers: TypeAlias = "Scalars | Packed"
"""The numbers of a step in either form; both have ``across``."""


class Constants:
    """What is mostly the same at every step, and made once: integers on their device, and tables of them.

    Each optimiser has its own, since its tensors may be fake ones, of no use to others.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._in_graphs: list[dict[Hashable, Any]] = []

    def made(self, device: torch.device, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` makes on ``device``, as it was made when it was first asked for under this key.

        Raises:
            RuntimeError: It would be made while a graph is captured, and be there only when that is replayed.
        """
        key = device, key
        if key not in self._made:
            if is_captured(device):
                raise RuntimeError(
                    "a step is captured in a CUDA graph that differs from those before: before the capture, "
                    "make at least one step with the same options and with gradients of the same parameters."
                )
            if len(self._made) >= _MAX_CONSTANTS:
                self._made.clear()
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def on(self, device: torch.device, numbers: Sequence[int]) -> Tensor:
        """``numbers`` on ``device``; int64."""

        def make() -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)

        return self.made(device, tuple(numbers), make)

    def keep_for_graph(self) -> None:
        """Keep all that there is for as long as this lives: a graph that is captured now reads it."""
        self._in_graphs.append(dict(self._made))
