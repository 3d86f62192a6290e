"""The place of a DTensor's local piece in its global tensor, read off its placements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from prodigyplus.layout import Layout


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a parameter: of a DTensor, from its placements; of another tensor, the whole.

    It names a mesh axis by the process group of the ranks along it.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Layout(shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a parameter on a mesh that this rank is not of"
    indices: list[Sequence[int]] = [range(size) for size in shape]
    largest = list(shape)
    cuts, copies = [], []
    for axis, placement in enumerate(placements):
        if mesh.size(axis) == 1:
            continue
        dim = cut_dim(placement, len(shape))
        if dim is None:
            copies.append(mesh.get_group(axis))
        else:
            indices[dim] = _piece(indices[dim], dim, placement, mesh.size(axis), coordinate[axis])
            largest[dim] = -(-largest[dim] // mesh.size(axis))
            cuts.append((mesh.get_group(axis), dim))
    layout = Layout(shape, tuple(indices), tuple(cuts), tuple(copies), math.prod(largest))
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


def _piece(indices: Sequence[int], dim: int, placement: Placement, count: int, number: int) -> Sequence[int]:
    """Of the indices along a dimension, those of piece ``number`` of ``count``, as the placement cuts."""
    # DTensor's own way to cut a tensor, strided placements included; there is no public name for it.
    along = torch.tensor(indices, dtype=torch.int64).view((1,) * dim + (-1,))
    pieces, _ = placement._split_tensor(along, count, with_padding=False, contiguous=False)  # type: ignore[attr-defined]
    chosen: list[int] = pieces[number].flatten().tolist()
    if not chosen:
        return range(0)
    run = range(chosen[0], chosen[-1] + 1)
    return run if len(run) == len(chosen) else tuple(chosen)
