"""Where a local tensor sits in its global tensor, and the sums a rule asks for across shards.

Every quantity of the algorithm that spans a whole tensor is a sum over some of its dimensions. A
rule adds up what it holds and names the dimensions; whoever drives it completes the sum. In one
process the local tensor is the global one and the sum is complete already.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of numbers and sums that must not depend on rounding: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Sum(NamedTuple):
    """A sum that may be incomplete: ``local``, summed over the dimensions ``dims`` of this shard.

    Copies of a tensor count once, but where ``copies`` is set: there each counts, so that all hear of all.
    """

    local: Tensor
    dims: tuple[int, ...]
    copies: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of a local tensor in its global tensor: in each dimension, the indices that it holds.

    Args:
        shape: The shape of the global tensor.
        indices: For each dimension, the global indices of the local tensor, ascending: a range where
            they follow on one another. Left out, the local tensor is the global one.
        cuts: What cuts the global tensor, as pairs of a mesh axis (known to who completes sums over it)
            and the dimension that it cuts.
        copies: The mesh axes along which there are copies of the tensor.
        most: How many elements the largest local tensor of all ranks has. Left out, the local tensor's.
    """

    shape: tuple[int, ...]
    indices: tuple[Sequence[int], ...] = ()
    cuts: tuple[tuple[Hashable, int], ...] = ()
    copies: tuple[Hashable, ...] = ()
    most: int = -1
    _samples: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.indices:
            object.__setattr__(self, "indices", tuple(range(size) for size in self.shape))
        if self.most < 0:
            object.__setattr__(self, "most", math.prod(self.local_shape))

    @property
    def dims(self) -> tuple[int, ...]:
        """All dimensions of the tensor: what a sum over the whole tensor is taken over."""
        return tuple(range(len(self.shape)))

    @property
    def is_whole(self) -> bool:
        """Whether every sum over the local tensor is complete, and nobody else has a copy."""
        return not (self.cuts or self.copies)

    @property
    def numel(self) -> int:
        """The number of elements of the global tensor, as a divisor: at least 1."""
        return max(1, math.prod(self.shape))

    def axes(self, asked: Sum) -> list[Hashable]:
        """The mesh axes over which a local sum has to be summed to be complete."""
        cutting = [axis for axis, dim in self.cuts if dim in asked.dims]
        return [*cutting, *self.copies] if asked.copies else cutting

    def size(self, dim: int) -> int:
        """The size of one dimension of the global tensor, as a divisor: at least 1."""
        return max(1, self.shape[dim])

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the local tensor."""
        return tuple(map(len, self.indices))

    def sample(self, tensor: Tensor, every: int) -> Tensor:
        """The local elements whose index in the row-major flattened global tensor is a multiple of ``every``.

        Args:
            tensor: The local tensor, or a stack of several, with more dimensions before its own.
            every: The distance of two samples in the global tensor.

        Returns:
            One dimension for those of the tensor, in ascending order of the index; a view where the memory
            allows it.
        """
        flat = tensor.reshape(*tensor.shape[: tensor.ndim - len(self.shape)], math.prod(self.local_shape))
        if self._is_one_run:
            return flat[..., -self._first % every :: every]
        key = every, tensor.device
        if key not in self._samples:
            # On the host: finding them on a device would wait for how many there are.
            chosen = (self.positions().reshape(-1) % every == 0).nonzero()
            self._samples[key] = chosen.view(-1).to(torch.int32).to(tensor.device)
        return flat.index_select(-1, self._samples[key])

    def positions(self) -> Tensor:
        """The index of each local element in the row-major flattened global tensor; int64, on the host."""
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        return functools.reduce(torch.add, self._places(torch.int64, torch.device("cpu")), zero)

    def places(self, device: torch.device) -> list[Tensor]:
        """The same modulo 2³², int32, as what each dimension adds to it: shapes to be added."""
        return self._places(torch.int32, device)

    def _places(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        result = []
        stride = 1
        for dim in reversed(self.dims):
            indices = self.indices[dim]
            along = (
                torch.arange(indices.start, indices.stop, device=device)
                if isinstance(indices, range)
                else torch.tensor(indices, dtype=torch.int64, device="cpu").to(device)
            )
            result.append((along * stride).to(dtype).view(-1, *(1,) * (len(self.shape) - dim - 1)))
            stride *= self.shape[dim]
        return result

    @property
    def _is_one_run(self) -> bool:
        """Whether the local elements follow on one another in the flattened global tensor."""
        whole = all(
            len(indices) == size for indices, size in zip(self.indices[1:], self.shape[1:], strict=True)
        )
        return whole and (not self.shape or isinstance(self.indices[0], range))

    @property
    def _first(self) -> int:
        """The position of the first local element, where they are one run."""
        return self.indices[0][0] * math.prod(self.shape[1:]) if self.shape and self.indices[0] else 0
