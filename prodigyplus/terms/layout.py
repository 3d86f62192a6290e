"""Where a local tensor lies in its global tensor: the global indices that it holds in each dimension."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.terms.requests import Sum


class Runs(NamedTuple):
    """A local tensor as runs of equal length, each consecutive in the flattened global tensor."""

    firsts: Tensor  # the global position of each run's first element; int64, on the host
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a local tensor lies in its global tensor.

    Args:
        shape: The shape of the global tensor.
        indices: For each dimension, the global indices of the local tensor, ascending; a range if they are
            consecutive. By default the local tensor is the global one.
        shard_axes: The mesh axes that shard the tensor, as pairs of an axis (known to the exchange that sums
            over it) and the dimension that it shards.
        replica_axes: The mesh axes along which the tensor is replicated.
        max_local_numel: The number of elements of the largest local tensor of any rank. By default, of this
            one.

    Attributes:
        is_run: Whether the local elements are consecutive in the flattened global tensor.
    """

    shape: tuple[int, ...]
    indices: tuple[Sequence[int], ...] = ()
    shard_axes: tuple[tuple[Hashable, int], ...] = ()
    replica_axes: tuple[Hashable, ...] = ()
    max_local_numel: int = -1
    is_run: bool = field(init=False, repr=False, compare=False)
    _samples: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.indices:
            object.__setattr__(self, "indices", tuple(range(size) for size in self.shape))
        if self.max_local_numel < 0:
            object.__setattr__(self, "max_local_numel", math.prod(self.local_shape))
        object.__setattr__(self, "is_run", self._is_run())

    @property
    def dims(self) -> tuple[int, ...]:
        """All dimensions of the tensor: those that a sum over the whole tensor runs over."""
        return tuple(range(len(self.shape)))

    @property
    def is_whole(self) -> bool:
        """Whether there are no shards and no replicas: sums over the local tensor are complete."""
        return not (self.shard_axes or self.replica_axes)

    @property
    def numel(self) -> int:
        """The number of elements of the global tensor, for use as a divisor: at least 1."""
        return max(1, math.prod(self.shape))

    def axes(self, dims: Collection[int], *, count_replicas: bool = False) -> tuple[Hashable, ...]:
        """The mesh axes over which a local sum must be reduced to be complete.

        Args:
            dims: The dimensions of the tensor that the sum runs over.
            count_replicas: Whether to sum over replicas too, so that all ranks get the same. Otherwise a
                replicated tensor counts once.
        """
        sharding = tuple(axis for axis, dim in self.shard_axes if dim in dims)
        return (*sharding, *self.replica_axes) if count_replicas else sharding

    def sum(self, local: Tensor, dims: Collection[int], *, count_replicas: bool = False) -> Sum:
        """A request to complete ``local``, a sum over the local tensor; the rest as for :meth:`axes`."""
        return Sum(local, self.axes(dims, count_replicas=count_replicas))

    def size(self, dim: int) -> int:
        """The size of a dimension of the global tensor, for use as a divisor: at least 1."""
        return max(1, self.shape[dim])

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the local tensor."""
        return tuple(map(len, self.indices))

    def sample(self, tensor: Tensor, slice_p: int) -> Tensor:
        """The local elements whose index in the flattened global tensor is a multiple of ``slice_p``.

        Args:
            tensor: The local tensor, or a stack of several, with extra leading dimensions.
            slice_p: The distance between samples in the flattened global tensor.

        Returns:
            The samples, with the tensor's dimensions flattened into one, in ascending order of the index; a
            view if the memory layout allows it.
        """
        dims = len(self.shape)
        if self.is_run:
            return strided_samples(tensor, dims, -self.first % slice_p, slice_p)
        flat = tensor.reshape(*tensor.shape[: tensor.ndim - dims], math.prod(self.local_shape))
        return flat.index_select(-1, self.sample_indices(slice_p, tensor.device))

    def sample_indices(self, slice_p: int, device: torch.device) -> Tensor:
        """The indices of the samples in the flattened local tensor, ascending; int64 or int32, (samples,)."""
        if self.is_run:
            numel = math.prod(self.local_shape)
            return torch.arange(min(-self.first % slice_p, numel), numel, slice_p, device=device)
        key = slice_p, device
        if key not in self._samples:
            # On the host: nonzero() on a device would synchronise, to know the size of its result.
            chosen = (self.positions().reshape(-1) % slice_p == 0).nonzero()
            self._samples[key] = chosen.view(-1).to(torch.int32).to(device)
        return self._samples[key]

    def positions(self) -> Tensor:
        """The index of each local element in the row-major flattened global tensor; int64, on the host."""
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        return functools.reduce(torch.add, self._index_terms(torch.int64, torch.device("cpu")), zero)

    def runs(self) -> Runs:
        """The local elements, in order, as runs of one length: the greatest length that is possible."""
        numel = math.prod(self.local_shape)
        if self.is_run or not numel:
            return Runs(torch.tensor([self.first], dtype=torch.int64, device="cpu"), max(1, numel))
        last = max(dim for dim in self.dims if len(self.indices[dim]) < self.shape[dim])
        along = self.indices[last]
        breaks = [i for i in range(1, len(along)) if along[i] != along[i - 1] + 1]
        chunk = math.gcd(len(along), *breaks)
        terms = self._index_terms(torch.int64, torch.device("cpu"))
        for term, dim in enumerate(reversed(self.dims)):  # keep the first elements of runs
            terms[term] = terms[term][:: chunk if dim == last else 1] if dim <= last else terms[term][:1]
        firsts = functools.reduce(torch.add, terms).reshape(-1)
        return Runs(firsts, chunk * math.prod(self.local_shape[last + 1 :]))

    def index_terms(self, device: torch.device) -> list[Tensor]:
        """Terms that broadcast and add up to :meth:`positions` modulo 2³², one for each dimension; int32."""
        return self._index_terms(torch.int32, device)

    def _index_terms(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
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

    def _is_run(self) -> bool:
        whole = all(
            len(indices) == size for indices, size in zip(self.indices[1:], self.shape[1:], strict=True)
        )
        return whole and (not self.shape or isinstance(self.indices[0], range))

    @property
    def first(self) -> int:
        """The global position of the first local element, if the local elements are one run."""
        return self.indices[0][0] * math.prod(self.shape[1:]) if self.shape and self.indices[0] else 0


def strided_samples(tensor: Tensor, dims: int, start: int, slice_p: int) -> Tensor:
    """Every ``slice_p``-th element of a flattened tensor, from element ``start`` on; a view if possible.

    Args:
        tensor: A tensor of ``dims`` dimensions, or a stack of several, with extra leading dimensions.
        dims: The number of dimensions of a single tensor; these are flattened.
        start, slice_p: The first index, and the distance between samples.
    """
    stacked = tensor.shape[: tensor.ndim - dims]
    return tensor.reshape(*stacked, math.prod(tensor.shape[tensor.ndim - dims :]))[..., start::slice_p]
