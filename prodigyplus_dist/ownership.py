"""Whose matrix is whose: where the pieces of matrices are on a mesh, and who orthogonalises which."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.formulas import muon
from prodigyplus.torch_private import foreach_copy_
from prodigyplus_dist.layout import Indices, MeshLayout


class Block(NamedTuple):
    """Matrices of one tensor that one rank owns."""

    request: int  # the number of the tensor
    first: int  # of its matrices
    end: int  # after the last
    travels: bool  # whether others than the owner have pieces of them
    row: int = 0  # the owner's place in ``MeshLayout.ranks``
    column: int = 0

    @property
    def size(self) -> int:
        """How many they are."""
        return self.end - self.first


class MatrixSharding:
    """Where the pieces of a tensor's matrices are.

    Args:
        layout: The tensor's.
        batched: See :class:`prodigyplus.formulas.muon.Matrices`.
    """

    def __init__(self, layout: MeshLayout, *, batched: bool) -> None:
        self.layout = layout
        self.count, self.rows, self.columns = muon.sizes(layout.shape, batched=batched)
        split = (len(layout.shape) - 2, len(layout.shape) - 1) if batched else (0, 1)
        # Of each piece the matrices, the rows and the columns that it has something of.
        self.pieces = [_as_matrices(indices, layout.shape, split) for indices in layout.pieces()]
        self._indices: dict[tuple[int, torch.device], tuple[slice | Tensor, ...]] = {}

    def holders(self, matrix: int) -> tuple[int, ...]:
        """The pieces that have something of a matrix."""
        return tuple(
            number
            for number, (matrices, rows, columns) in enumerate(self.pieces)
            if len(rows) and len(columns) and matrix in matrices
        )

    def runs(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Matrices that the same pieces have something of: the first, how many, and those pieces."""
        for holders, run in groupby(range(self.count), self.holders):
            first, *others = run
            if holders:
                yield first, 1 + len(others), holders

    def piece_shape(self, block: Block, piece: int) -> tuple[int, int, int]:
        """The shape of what a piece has of a block."""
        matrices, rows, columns = self.pieces[piece]
        here = len(rows) and len(columns) and block.first in matrices
        return (block.size, len(rows), len(columns)) if here else (0, 0, 0)

    def within(self, block: Block, piece: Tensor) -> Tensor:
        """Of this rank's piece of the tensor what is of a block."""
        matrices, rows, columns = self.pieces[self.layout.coordinate[1]]
        here = piece.reshape(len(matrices), len(rows), len(columns))
        if not math.prod(self.own_shape(block)):
            return here[:0, :0, :0]
        first = bisect_left(matrices, block.first)
        return here[first : first + block.size]

    def own_shape(self, block: Block) -> tuple[int, int, int]:
        """The shape of what this rank has of a block."""
        return self.piece_shape(block, self.layout.coordinate[1])

    def put(self, whole: Tensor, pieces: Iterable[tuple[int, Tensor]]) -> None:
        """Put together the whole matrices of a block, (count, rows, columns), from what the pieces have."""
        here = [(self._where(number, whole.device), values) for number, values in pieces if values.numel()]
        for where, values in here:
            if not _is_view(where):
                whole[where] = values
        views = [(whole[where], values) for where, values in here if _is_view(where)]
        if views:
            foreach_copy_([view for view, _ in views], [values for _, values in views])

    def taken(self, block: Block, whole: Tensor, piece: int) -> Tensor:
        """Of the whole matrices of a block what a piece has of them."""
        if not math.prod(self.piece_shape(block, piece)):
            return whole[:0, :0, :0]
        return whole[self._where(piece, whole.device)]

    def _where(self, piece: int, device: torch.device) -> tuple[slice | Tensor, ...]:
        """An index of the rows and columns of a piece in a batch of matrices."""
        key = piece, device
        if key not in self._indices:
            _, rows, columns = self.pieces[piece]
            if isinstance(rows, range) and isinstance(columns, range):
                along: tuple[slice | Tensor, ...] = tuple(
                    slice(its.start, its.stop) for its in (rows, columns)
                )
            else:
                its_rows, its_columns = (
                    torch.tensor(its, dtype=torch.int64, device="cpu") for its in (rows, columns)
                )
                along = its_rows.view(-1, 1).to(device), its_columns.to(device)
            self._indices[key] = slice(None), *along
        return self._indices[key]


def _is_view(where: tuple[slice | Tensor, ...]) -> bool:
    return all(isinstance(index, slice) for index in where)


def _as_matrices(indices: Indices, shape: Sequence[int], split: tuple[int, int]) -> Indices:
    """Indices of a piece as (matrix, row, column), each of these of some consecutive dimensions."""
    first, second = split
    cuts = (slice(0, first), slice(first, second), slice(second, None))
    return tuple(_flattened(indices[cut], shape[cut]) for cut in cuts)


def _flattened(indices: Sequence[Sequence[int]], shape: Sequence[int]) -> Sequence[int]:
    """The row-major indices of a piece in the flattened dimensions."""
    flat: Sequence[int] = range(1)
    for its, size in zip(indices, shape, strict=True):
        if isinstance(flat, range) and len(its) == size:
            flat = range(flat.start * size, flat.stop * size)
        elif len(flat) == 1 and isinstance(its, range):
            flat = range(flat[0] * size + its.start, flat[0] * size + its.stop)
        else:
            flat = tuple(outer * size + inner for outer in flat for inner in its)
    return flat


def assign_owners(shardings: Sequence[MatrixSharding], turn: int = 0) -> list[Block]:
    """Deal all matrices to owners, the most expensive first, each to who has least to do so far.

    Only who holds a piece of a matrix may own it, so that no more travels than must. Matrices of one tensor
    with the same holders are dealt in as few blocks as share them evenly.

    Args:
        shardings: Of the tensors.
        turn: With whom to begin, so that where few are dealt at a time it is not always the same.
    """
    dealt: list[tuple[int, tuple[int, ...], Block]] = []
    for request, sharding in enumerate(shardings):
        each = muon.cost(sharding.rows, sharding.columns)
        for first, count, holders in sharding.runs():
            parts = min(count, len(holders) * len(sharding.layout.ranks))
            edges = [first + count * part // parts for part in range(parts + 1)]
            for start, end in pairwise(edges):
                block = Block(request, start, end, len(holders) > 1)
                dealt.append((each * block.size, holders, block))
    dealt.sort(key=lambda one: -one[0])
    # Loads are kept for every set of ranks by itself: all ranks of it, and no others, know what they all do.
    loads: dict[frozenset[int], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    blocks = []
    for work, holders, block in dealt:
        ranks = shardings[block.request].layout.ranks
        load = loads[frozenset(rank for row in ranks for rank in row)]
        # Of equals, those of other copies first, then of other pieces: what they send is shared evenly too.
        row, column = min(
            (
                ((row + turn) % len(ranks), holders[(row + shift + turn // len(ranks)) % len(holders)])
                for shift in range(len(holders))
                for row in range(len(ranks))
            ),
            key=lambda place: load[ranks[place[0]][place[1]]],
        )
        load[ranks[row][column]] += work
        blocks.append(block._replace(row=row, column=column))
    return sorted(blocks)
