"""What a rule asks of those who hold the other pieces of its tensors: sums, and orthogonalised matrices.

Every quantity of the algorithm that spans a whole tensor is a sum over some of its dimensions. A rule adds up
what it holds and names the mesh axes that cut these dimensions; an exchange completes the sum. In one
process the local tensor is the global one, and the sum is complete already.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Sum(NamedTuple):
    """A sum that may be incomplete.

    Args:
        local: The sum over what is here; or a buffer of several that are incomplete alike.
        axes: The mesh axes over which it is to be summed, see :meth:`prodigyplus.terms.layout.Layout.axes`.
    """

    local: Tensor
    axes: tuple[Hashable, ...]


SymmetricProduct = Callable[[Tensor, tuple[float, float, float] | None], Tensor]
"""``x xᵀ`` of matrices x, (count, rows, columns); or of symmetric ones, with a, b, c: ``a + b x + c x²``."""


class Method(NamedTuple):
    """How matrices are orthogonalised; those of one method and shape may be orthogonalised together.

    Args:
        dtype: The dtype that they are computed in, and sent in.
        quintic: Whether by the first Muon's polynomial rather than Polar Express's.
        stable: Whether StableAdamW holds the rms of the result to 1.
        symmetric_product: What computes their products with their own transposes; None for torch's operators.
    """

    dtype: torch.dtype
    quintic: bool
    stable: bool
    symmetric_product: SymmetricProduct | None = None


class Matrices(NamedTuple):
    """A request for the matrices of a whole tensor, orthogonalised; the answer is the local piece of them.

    Args:
        local: The local piece of the tensor, of any dtype; it is read when it is sent.
        batched: Whether the tensor is a batch of matrices, its last two dimensions. Otherwise it is one
            matrix: its first dimension, by all others.
        method: How.
        parameter: The number of the parameter in the optimiser, by which those who share the work take turns.
    """

    local: Tensor
    batched: bool
    method: Method
    parameter: int = 0


Request = Sum | Matrices
Requests = Mapping[str, Request]
