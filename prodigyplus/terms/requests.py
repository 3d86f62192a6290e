"""What a rule asks of the ranks that hold the other pieces of its tensors: sums and orthogonalised matrices.

Every quantity of the algorithm that spans a whole tensor is a sum over some of its dimensions. A rule sums
over its local piece and names the mesh axes that cut these dimensions; an exchange completes the sum. In one
process the local tensor is the global one, and the sum is already complete.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sum(NamedTuple):
    """A sum that may be incomplete.

    Args:
        local: The local sum, or a buffer of several sums that are incomplete along the same axes.
        axes: The mesh axes to reduce over, see :meth:`prodigyplus.terms.layout.Layout.axes`.
    """

    local: Tensor
    axes: tuple[Hashable, ...]


SymmetricProduct = Callable[[Tensor, tuple[float, float, float] | None], Tensor]
"""``x xᵀ`` of matrices x, (count, rows, columns); with a, b, c, and symmetric x: ``a I + b x + c x²``."""


class Method(NamedTuple):
    """How matrices are orthogonalised; matrices of equal method and shape may be orthogonalised together.

    Args:
        dtype: The dtype in which they are computed and sent.
        quintic: Whether to use the first Muon's polynomial instead of Polar Express's.
        stable: Whether StableAdamW scales the result, where its rms exceeds 1.
        symmetric_product: Computes their products with their own transposes; None for torch's operators.
    """

    dtype: torch.dtype
    quintic: bool
    stable: bool
    symmetric_product: SymmetricProduct | None = None


class Matrices(NamedTuple):
    """A request to orthogonalise the matrices of a whole tensor; the answer is the local piece of the result.

    Args:
        local: The local piece of the tensor, of any dtype; it is read when it is sent.
        batched: Whether the tensor is a batch of matrices in its last two dimensions. Otherwise it is one
            matrix: its first dimension by all others, flattened.
        method: How to orthogonalise them.
        ordinal: See :class:`prodigyplus.placement.Location`; by it, ranks take turns as owners.
    """

    local: Tensor
    batched: bool
    method: Method
    ordinal: int = 0


Request = Sum | Matrices
Requests = Mapping[str, Request]

Asked = Mapping[str, Sum]
"""The sums that a rule asks for in one round, by name."""

Answers = dict[str, Tensor]
"""The answers to requests, by name."""


def local_answers(asked: Sequence[Asked]) -> list[Answers]:
    """The local sums as answers, which they are wherever no other rank holds a piece."""
    return [{name: sum_.local for name, sum_ in sums.items()} for sums in asked]
