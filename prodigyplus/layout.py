"""Where a local tensor sits in its global tensor, and the sums a rule asks for across shards.

Every quantity of the algorithm that spans a whole tensor is a sum over some of its dimensions. A
rule adds up what it holds and names the dimensions; whoever drives it completes the sum. In one
process the local tensor is the global one and the sum is complete already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Sum(NamedTuple):
    """A sum that may be incomplete: ``local``, summed over the dimensions ``dims`` of this shard."""

    local: Tensor
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of a local tensor in its global tensor; here, the whole of it.

    Args:
        shape: The shape of the global tensor.
    """

    shape: tuple[int, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """All dimensions of the tensor: what a sum over the whole tensor is taken over."""
        return tuple(range(len(self.shape)))

    @property
    def numel(self) -> int:
        """The number of elements of the global tensor, as a divisor: at least 1."""
        return max(1, math.prod(self.shape))

    def size(self, dim: int) -> int:
        """The size of one dimension of the global tensor, as a divisor: at least 1."""
        return max(1, self.shape[dim])

    def sample(self, tensor: Tensor, every: int) -> Tensor:
        """The local elements whose index in the row-major flattened global tensor is a multiple of
        ``every``: one dimension, a view where the memory allows it.
        """
        return tensor.reshape(-1)[::every]

    def positions(self, device: torch.device) -> Tensor:
        """The index of each local element in the row-major flattened global tensor, modulo 2³²:
        int32, in the shape of the local tensor.
        """
        return torch.arange(math.prod(self.shape), dtype=torch.int32, device=device).view(self.shape)
