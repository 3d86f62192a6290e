"""Which rank orthogonalises which matrix: where the pieces of matrices are on a mesh, and who owns them."""

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
    """Consecutive matrices of one tensor, ``first`` to ``end - 1``, that one rank owns."""

    request: int  # the index of the tensor's request
    first: int
    end: int
    travels: bool  # whether ranks other than the owner hold pieces of them
    copy: int = 0  # the owner's row in ``MeshLayout.ranks``
    piece: int = 0  # the owner's column there

    @property
    def size(self) -> int:
        """The number of matrices."""
        return self.end - self.first


class MatrixSharding:
    """Where the pieces of a tensor's matrices are.

    Pieces are numbered like the columns of ``MeshLayout.ranks``.

    Args:
        layout: The layout of the tensor.
        batched: See :class:`prodigyplus.terms.requests.Matrices`.
    """

    def __init__(self, layout: MeshLayout, *, batched: bool) -> None:
        self.layout = layout
        self.count, self.rows, self.columns = muon.sizes(layout.shape, batched=batched)
        split = (len(layout.shape) - 2, len(layout.shape) - 1) if batched else (0, 1)
        # For each piece, the indices of the matrices, rows and columns that it has elements of.
        self.pieces = [_as_matrices(indices, layout.shape, split) for indices in layout.pieces()]
        self._indices: dict[tuple[int, torch.device], tuple[slice | Tensor, ...]] = {}

    def holders(self, matrix: int) -> tuple[int, ...]:
        """The pieces that have elements of a matrix."""
        return tuple(
            piece
            for piece, (matrices, rows, columns) in enumerate(self.pieces)
            if len(rows) and len(columns) and matrix in matrices
        )

    def runs(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Runs of matrices with the same holders: the first matrix, their number, and the holders."""
        for holders, run in groupby(range(self.count), self.holders):
            first, *others = run
            if holders:
                yield first, 1 + len(others), holders

    def piece_shape(self, block: Block, piece: int) -> tuple[int, int, int]:
        """The shape (matrices, rows, columns) of the part of a block that a piece has; zeros if none."""
        matrices, rows, columns = self.pieces[piece]
        is_holder = len(rows) and len(columns) and block.first in matrices
        return (block.size, len(rows), len(columns)) if is_holder else (0, 0, 0)

    def local_shape(self, block: Block) -> tuple[int, int, int]:
        """:meth:`piece_shape` of this rank's piece."""
        return self.piece_shape(block, self.layout.own[1])

    def local_piece(self, block: Block, local: Tensor) -> Tensor:
        """The part of a block in this rank's local tensor, of shape :meth:`local_shape`."""
        matrices, rows, columns = self.pieces[self.layout.own[1]]
        local = local.reshape(len(matrices), len(rows), len(columns))
        if not math.prod(self.local_shape(block)):
            return local[:0, :0, :0]
        first = bisect_left(matrices, block.first)
        return local[first : first + block.size]

    def assemble_(self, whole: Tensor, pieces: Iterable[tuple[int, Tensor]]) -> None:
        """Copy the pieces of a block, pairs of a piece's number and its values, into the whole matrices.

        Args:
            whole: Shape (matrices, rows, columns), of any dtype; written.
            pieces: Their values are of shape :meth:`piece_shape`; empty ones are ignored.
        """
        nonempty = [(self._index(piece, whole.device), values) for piece, values in pieces if values.numel()]
        for index, values in nonempty:
            if not _is_view(index):
                whole[index] = values
        views = [(whole[index], values) for index, values in nonempty if _is_view(index)]
        if views:
            foreach_copy_([view for view, _ in views], [values for _, values in views])

    def piece_of(self, block: Block, whole: Tensor, piece: int) -> Tensor:
        """The part of a block's whole matrices that a piece has; the inverse of :meth:`assemble_`."""
        if not math.prod(self.piece_shape(block, piece)):
            return whole[:0, :0, :0]
        return whole[self._index(piece, whole.device)]

    def _index(self, piece: int, device: torch.device) -> tuple[slice | Tensor, ...]:
        """The index of a piece's rows and columns in a batch of matrices; slices if they are consecutive."""
        key = piece, device
        if key not in self._indices:
            _, rows, columns = self.pieces[piece]
            if isinstance(rows, range) and isinstance(columns, range):
                self._indices[key] = (
                    slice(None),
                    slice(rows.start, rows.stop),
                    slice(columns.start, columns.stop),
                )
            else:
                row_index, column_index = (
                    torch.tensor(indices, dtype=torch.int64, device="cpu") for indices in (rows, columns)
                )
                self._indices[key] = slice(None), row_index.view(-1, 1).to(device), column_index.to(device)
        return self._indices[key]


def _is_view(index: tuple[slice | Tensor, ...]) -> bool:
    return all(isinstance(along, slice) for along in index)


def _as_matrices(indices: Indices, shape: Sequence[int], split: tuple[int, int]) -> Indices:
    """A piece's indices of (matrices, rows, columns): the dimensions before, within and after ``split``."""
    first, second = split
    dims = (slice(0, first), slice(first, second), slice(second, None))
    return tuple(_flattened(indices[part], shape[part]) for part in dims)


def _flattened(indices: Sequence[Sequence[int]], shape: Sequence[int]) -> Sequence[int]:
    """The row-major indices of a piece in the flattened dimensions; a range where that is easy to tell."""
    flat: Sequence[int] = range(1)
    for along, size in zip(indices, shape, strict=True):
        if isinstance(flat, range) and len(along) == size:
            flat = range(flat.start * size, flat.stop * size)
        elif len(flat) == 1 and isinstance(along, range):
            flat = range(flat[0] * size + along.start, flat[0] * size + along.stop)
        else:
            flat = tuple(outer * size + inner for outer in flat for inner in along)
    return flat


def assign_owners(shardings: Sequence[MatrixSharding], turn: int = 0) -> list[Block]:
    """Assign all matrices to owners: the most expensive first, each to the holder with the least work so far.

    Only a rank that holds a piece of a matrix may own it, so that as little as possible travels. Matrices of
    one tensor with the same holders are assigned in as few blocks as share them evenly.

    Args:
        shardings: One for each request.
        turn: Which owner to start from among equals, so that the same rank is not always chosen where few
            matrices are assigned at a time.

    Returns:
        The blocks, sorted by request and first matrix; the same on all ranks.
    """
    candidates: list[tuple[int, tuple[int, ...], Block]] = []
    for request, sharding in enumerate(shardings):
        cost = muon.cost(sharding.rows, sharding.columns)
        for first, count, holders in sharding.runs():
            parts = min(count, len(holders) * len(sharding.layout.ranks))
            edges = [first + count * part // parts for part in range(parts + 1)]
            for start, end in pairwise(edges):
                block = Block(request, start, end, len(holders) > 1)
                candidates.append((cost * block.size, holders, block))
    candidates.sort(key=lambda candidate: -candidate[0])
    # Loads are kept separately for each set of ranks: all ranks of a set know its loads, and no others do.
    loads: dict[frozenset[int], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    blocks = []
    for work, holders, block in candidates:
        ranks = shardings[block.request].layout.ranks
        load = loads[frozenset(rank for copy in ranks for rank in copy)]
        # Among equals go through the copies first, then through the pieces, which spreads the sending too.
        copy, piece = min(
            (
                ((copy + turn) % len(ranks), holders[(copy + shift + turn // len(ranks)) % len(holders)])
                for shift in range(len(holders))
                for copy in range(len(ranks))
            ),
            key=lambda owner: load[ranks[owner[0]][owner[1]]],
        )
        load[ranks[copy][piece]] += work
        blocks.append(block._replace(copy=copy, piece=piece))
    return sorted(blocks)
