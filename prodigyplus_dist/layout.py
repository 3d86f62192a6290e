"""Which part of its global tensor a DTensor's local piece is, read off the placements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from prodigyplus.terms.layout import Layout
from prodigyplus_dist import torch_private

Indices = tuple[Sequence[int], ...]
"""A piece of a tensor: the global indices that it holds in each dimension, ascending."""


@dataclass(frozen=True, slots=True)
class MeshLayout(Layout):
    """A :class:`Layout` that also says which ranks hold which pieces of the tensor.

    Args:
        ranks: The global ranks: a row for each copy of the tensor, a column for each piece of it.
        own: This rank's copy and piece: its row and column in ``ranks``.
        pieces: Returns the indices of all pieces, in the order of the columns. A function, since a large mesh
            has many.
    """

    ranks: tuple[tuple[int, ...], ...] = ((0,),)
    own: tuple[int, int] = (0, 0)
    pieces: Callable[[], Sequence[Indices]] = field(default=lambda: (), repr=False, compare=False)

    @property
    def copy_ranks(self) -> tuple[int, ...]:
        """The ranks that hold this rank's copy."""
        return self.ranks[self.own[0]]

    @property
    def piece_ranks(self) -> tuple[int, ...]:
        """The ranks that hold the same piece as this one, one in each copy."""
        return tuple(copy[self.own[1]] for copy in self.ranks)


def layout_of(tensor: Tensor, replicas: dist.ProcessGroup | None = None) -> MeshLayout:
    """The layout of a parameter: a DTensor's from its placements; a plain tensor is whole.

    Each mesh axis is given by the process group of the ranks along it.

    Args:
        tensor: The parameter.
        replicas: The ranks that hold copies of a plain tensor; ignored for a DTensor.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        whole = tuple(range(size) for size in shape)
        if replicas is None:
            return MeshLayout(shape, pieces=lambda: [whole])
        ranks = tuple((rank,) for rank in dist.get_process_group_ranks(replicas))
        own = dist.get_rank(replicas), 0
        return MeshLayout(shape, replica_axes=(replicas,), ranks=ranks, own=own, pieces=lambda: [whole])
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a parameter on a mesh that this rank is not part of"
    axes = [(axis, shard_dim(p, len(shape))) for axis, p in enumerate(placements) if mesh.size(axis) > 1]
    sharding_axes = [(axis, dim) for axis, dim in axes if dim is not None]
    replicating_axes = [axis for axis, dim in axes if dim is None]

    def pieces() -> list[Indices]:
        return _pieces(shape, [(dim, placements[axis], mesh.size(axis)) for axis, dim in sharding_axes])

    indices: list[Sequence[int]] = [range(size) for size in shape]
    largest = list(shape)
    for axis, dim in sharding_axes:
        shards = shard_indices(indices[dim], dim, placements[axis], mesh.size(axis))
        indices[dim] = shards[coordinate[axis]]
        largest[dim] = -(-largest[dim] // mesh.size(axis))
    order = [*replicating_axes, *(axis for axis, _ in sharding_axes)]
    order += [axis for axis in range(mesh.ndim) if axis not in order]
    sizes = [mesh.size(axis) for axis in order]
    copies = math.prod(sizes[: len(replicating_axes)])
    index = 0  # of this rank in the flattened mesh, axes in this order
    for axis, size in zip(order, sizes, strict=True):
        index = index * size + coordinate[axis]
    per_copy = math.prod(sizes) // copies
    layout = MeshLayout(
        shape,
        tuple(indices),
        tuple((mesh.get_group(axis), dim) for axis, dim in sharding_axes),
        tuple(mesh.get_group(axis) for axis in replicating_axes),
        math.prod(largest),
        tuple(map(tuple, mesh.mesh.permute(order).reshape(copies, per_copy).tolist())),
        divmod(index, per_copy),
        pieces,
    )
    assert layout.local_shape == tuple(tensor.to_local().shape)
    return layout


def shard_dim(placement: Placement, ndim: int) -> int | None:
    """The dimension that a placement shards, or None."""
    # Not is_shard(), which is false for strided shards.
    dim: int | None = getattr(placement, "dim", None)
    return None if dim is None else dim % ndim


def placements_of(like: DTensor, whole: Sequence[int]) -> list[Placement]:
    """The placements of ``like``, but replicated where they shard one of the dimensions ``whole``."""
    return [
        Replicate() if shard_dim(placement, like.ndim) in whole else placement
        for placement in like.placements
    ]


def _pieces(shape: tuple[int, ...], shards: Sequence[tuple[int, Placement, int]]) -> list[Indices]:
    """The indices of all pieces of a tensor, in row-major order of their coordinates along the sharding axes.

    Args:
        shape: The shape of the tensor.
        shards: For each sharding axis in turn the dimension it shards, its placement and its size.
    """
    # For each dimension, the indices along it, by the coordinates along the axes that shard it.
    along: list[dict[tuple[int, ...], Sequence[int]]] = [{(): range(size)} for size in shape]
    for dim, placement, count in shards:
        along[dim] = {
            (*coordinates, coordinate): piece
            for coordinates, indices in along[dim].items()
            for coordinate, piece in enumerate(shard_indices(indices, dim, placement, count))
        }
    return [
        tuple(
            pieces[tuple(at for at, (sharded, *_) in zip(coordinate, shards, strict=True) if sharded == dim)]
            for dim, pieces in enumerate(along)
        )
        for coordinate in itertools.product(*(range(count) for *_, count in shards))
    ]


def shard_indices(indices: Sequence[int], dim: int, placement: Placement, count: int) -> list[Sequence[int]]:
    """Split the indices along dimension ``dim`` into ``count`` shards, as the placement does."""
    # DTensor splits a tensor of indices as it would split one of weights.
    along = torch.tensor(indices, dtype=torch.int64, device="cpu").view((1,) * dim + (-1,))
    shards = torch_private.split(placement, along, count)
    return [range_if_consecutive(shard.flatten().tolist()) for shard in shards]


def range_if_consecutive(indices: Sequence[int]) -> Sequence[int]:
    """Ascending indices, as a range if they are consecutive."""
    if not indices:
        return range(0)
    run = range(indices[0], indices[-1] + 1)
    return run if len(run) == len(indices) else tuple(indices)
