"""Where a DTensor's local piece lies in its global tensor, read off its placements."""

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
"""What a piece holds of a tensor: in each dimension, the global indices."""


@dataclass(frozen=True, slots=True)
class MeshLayout(Layout):
    """A :class:`Layout` that knows of the other ranks which hold the tensor, and what they hold.

    Args:
        ranks: Their global ranks: a row for each copy of the tensor, a column for each piece of it.
        coordinate: The row and the column of this rank.
        pieces: Gives the indices of all pieces, in the order of the columns. A function, since on a large
            mesh they are many.
    """

    ranks: tuple[tuple[int, ...], ...] = ((0,),)
    coordinate: tuple[int, int] = (0, 0)
    pieces: Callable[[], Sequence[Indices]] = field(default=lambda: (), repr=False, compare=False)

    @property
    def row(self) -> tuple[int, ...]:
        """The ranks that hold this rank's copy."""
        return self.ranks[self.coordinate[0]]

    @property
    def column(self) -> tuple[int, ...]:
        """The ranks that hold the same piece as this one, one of each copy."""
        return tuple(row[self.coordinate[1]] for row in self.ranks)


def layout_of(tensor: Tensor, replicas: dist.ProcessGroup | None = None) -> MeshLayout:
    """The layout of a parameter: of a DTensor, from its placements; of another tensor, the whole.

    It names a mesh axis by the process group of the ranks along it.

    Args:
        tensor: The parameter.
        replicas: The ranks that have copies of it, if it is no DTensor.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        whole = tuple(range(size) for size in shape)
        if replicas is None:
            return MeshLayout(shape, pieces=lambda: [whole])
        ranks = tuple((rank,) for rank in dist.get_process_group_ranks(replicas))
        own = dist.get_rank(replicas), 0
        return MeshLayout(
            shape, replica_axes=(replicas,), ranks=ranks, coordinate=own, pieces=lambda: [whole]
        )
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a parameter on a mesh that this rank is not of"
    axes = [(axis, cut_dim(placements[axis], len(shape))) for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    cutting = [(axis, dim) for axis, dim in axes if dim is not None]
    copying = [axis for axis, dim in axes if dim is None]

    def pieces() -> list[Indices]:
        return _pieces(shape, [(dim, placements[axis], mesh.size(axis)) for axis, dim in cutting])

    indices: list[Sequence[int]] = [range(size) for size in shape]
    largest = list(shape)
    for axis, dim in cutting:
        indices[dim] = _cut(indices[dim], dim, placements[axis], mesh.size(axis))[coordinate[axis]]
        largest[dim] = -(-largest[dim] // mesh.size(axis))
    order = [*copying, *(axis for axis, _ in cutting)]
    order += [axis for axis in range(mesh.ndim) if axis not in order]
    sizes = [mesh.size(axis) for axis in order]
    rows = math.prod(sizes[: len(copying)])
    number = 0
    for axis, size in zip(order, sizes, strict=True):
        number = number * size + coordinate[axis]
    columns = math.prod(sizes) // rows
    layout = MeshLayout(
        shape,
        tuple(indices),
        tuple((mesh.get_group(axis), dim) for axis, dim in cutting),
        tuple(mesh.get_group(axis) for axis in copying),
        math.prod(largest),
        tuple(map(tuple, mesh.mesh.permute(order).reshape(rows, columns).tolist())),
        divmod(number, columns),
        pieces,
    )
    assert layout.local_shape == tuple(tensor.to_local().shape)
    return layout


def cut_dim(placement: Placement, ndim: int) -> int | None:
    """The dimension that a placement cuts, if any."""
    # Shard and its strided kind, of which is_shard() does not know.
    dim: int | None = getattr(placement, "dim", None)
    return None if dim is None else dim % ndim


def placements_of(like: DTensor, whole: Sequence[int]) -> list[Placement]:
    """The placements of ``like``, but uncut in the dimensions ``whole``."""
    return [
        Replicate() if cut_dim(placement, like.ndim) in whole else placement for placement in like.placements
    ]


def _pieces(shape: tuple[int, ...], cuts: Sequence[tuple[int, Placement, int]]) -> list[Indices]:
    """The indices of all pieces of a tensor, the last cut's number the fastest to change.

    Args:
        shape: The tensor's.
        cuts: The dimension that is cut, how, and into how many pieces, one cut after the other.
    """
    # By dimension, the indices along it by the numbers of the cuts that concern it.
    along: list[dict[tuple[int, ...], Sequence[int]]] = [{(): range(size)} for size in shape]
    for dim, placement, count in cuts:
        along[dim] = {
            (*numbers, number): piece
            for numbers, indices in along[dim].items()
            for number, piece in enumerate(_cut(indices, dim, placement, count))
        }
    return [
        tuple(
            pieces[tuple(number for number, (cut, *_) in zip(numbers, cuts, strict=True) if cut == dim)]
            for dim, pieces in enumerate(along)
        )
        for numbers in itertools.product(*(range(count) for *_, count in cuts))
    ]


def _cut(indices: Sequence[int], dim: int, placement: Placement, count: int) -> list[Sequence[int]]:
    """The indices along a dimension in ``count`` pieces, as the placement cuts."""
    # The indices as a tensor, which DTensor cuts as it would cut one of weights.
    along = torch.tensor(indices, dtype=torch.int64, device="cpu").view((1,) * dim + (-1,))
    return [range_if_one(piece.flatten().tolist()) for piece in torch_private.split(placement, along, count)]


def range_if_one(indices: Sequence[int]) -> Sequence[int]:
    """Ascending indices, as a range if they follow on one another."""
    if not indices:
        return range(0)
    run = range(indices[0], indices[-1] + 1)
    return run if len(run) == len(indices) else tuple(indices)
