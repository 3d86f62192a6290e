"""Tables of what the kernels need to know about a batch's tensors: the same at every step, so made once.

A factored tensor is one or more matrices. Of its row and column dimensions, the first in memory is called
outer, the other inner; all other dimensions are batch dimensions. A tensor that is not factored is one
matrix, whose rows are consecutive in memory. Matrices are cut into tiles, one for each program.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from prodigyplus.formulas import moments, schedule_free
from prodigyplus.terms.layout import Layout, Runs

# The kernel ``add_parts``: how many sums a program makes, and how many parts it adds at a time.
BLOCK, AT_ONCE = 64, 32
FACTOR_BLOCK = 1024

# The kernels index elements with 32 bits.
MAX_NUMEL = 1 << 30

# The alignment of fast reads: addresses in bytes; offsets, widths and strides in elements.
ALIGNMENT = 16


def _keys(outer: str, inner: str) -> tuple[str, ...]:
    """The state entries that the kernels use, in the order of their addresses, which follow the weight's."""
    factors = (f"exp_avg_sq_{name}" for name in (outer, inner, "mean"))
    return schedule_free.BASE, schedule_free.OFFSET, "exp_avg", "exp_avg_sq", *factors, "p0", "s"


# The index of the outer factor's address; those of the inner factor and of the mean follow.
_OUTER = 5

_ROW_OUTER, _ROW_INNER = _keys("row", "col"), _keys("col", "row")


class TileSize(NamedTuple):
    """The size of a tile."""

    rows: int = 64
    columns: int = 256


class Tiles(NamedTuple):
    """The tiles of one launch."""

    table: Tensor  # int32, (tiles, 3): the matrix, and the tile's row and column in its grid of tiles
    factored: bool
    single: bool  # whether the local elements are one run of the whole tensor
    fast: bool  # whether rows are contiguous, and sizes multiples of 16
    first: int  # the index of the first of them among all tiles


class Piece(NamedTuple):
    """A range of the buffer of sums, all of which are completed over the same mesh axes."""

    start: int
    end: int
    axes: tuple[Hashable, ...]


class _Matrices(NamedTuple):
    """The matrices of one tensor: what they have in common, and the offsets of each."""

    height: int
    width: int
    row_stride: int
    column_stride: int
    outer_stride: int
    inner_stride: int
    offsets: Tensor  # of each matrix in the tensor
    outer_offsets: Tensor  # in the outer factor
    inner_offsets: Tensor  # in the inner factor

    def __len__(self) -> int:
        return len(self.offsets)


class Plan:
    """The tables of a batch.

    Args:
        layouts: The layouts of its parameters.
        factored: For each parameter, whether its second moment is factored.
        every: The distance between samples.
        device: The device of the tables.
        tile: The size of a tile.

    Attributes:
        keys: For each tensor, the state entries in the order of their addresses.
        sizes, runs, matrices: Tables with a row for each tensor, each run and each matrix.
        tiles, tile_count: The tiles of each launch, and the number of tiles in all.
        outer_parts, inner_parts: The numbers of partial sums of g².
        segments, totals: Tables for the kernels ``add_parts``, which adds up partial sums, and ``add_up``,
            which adds up the totals. All sums are in one buffer: first those that factors need, then the
            totals of tensors, then the partial sums, outer and inner.
        sum_pieces, sum_count: The pieces and the length of the part that factors need.
        factor_blocks: A table for the kernel ``factors``.
        of_tensors: A table for ``add_up``: the tiles of each tensor.
        numels: The numbers of elements of whole tensors; float32.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        factored: Sequence[bool],
        every: int,
        device: torch.device,
        tile: TileSize,
    ) -> None:
        self.tile = tile
        self.layouts = tuple(layouts)
        self.device = device
        self._dims = [
            moments.factored_dims(layout.shape) if is_factored else None
            for layout, is_factored in zip(layouts, factored, strict=True)
        ]
        is_row_outer = [dims is not None and dims[0] < dims[1] for dims in self._dims]
        self.keys = [_ROW_OUTER if row_first else _ROW_INNER for row_first in is_row_outer]
        self._lay_out_runs(is_row_outer, every)
        self.numels = self._table([(layout.numel,) for layout in layouts], 1).view(-1).to(torch.float32)
        matrices = [
            _matrices(layout.local_shape, dims, tile.columns)
            for layout, dims in zip(layouts, self._dims, strict=True)
        ]
        self._lay_out_sums(matrices)
        self._lay_out_parts(matrices)
        self._make_tiles(matrices)

    def _lay_out_runs(self, is_row_outer: Sequence[bool], every: int) -> None:
        """Where the local elements of each tensor lie in the whole one; if in several runs, their table."""
        sizes, tables = [], []
        self._is_single: list[bool] = []
        start = 0
        for layout, row_first in zip(self.layouts, is_row_outer, strict=True):
            local = math.prod(layout.local_shape)
            runs = layout.runs()
            first = int(runs.firsts[0])
            sizes.append((local, _as_int32(first), first % every, int(row_first), max(1, runs.length), start))
            self._is_single.append(len(runs.firsts) == 1)
            if not self._is_single[-1]:
                tables.append(_runs_table(runs, every))
                start += len(runs.firsts)
        self.sizes = self._table(sizes, 6)
        self.runs = self._joined(tables, 3).to(torch.int32)

    def _lay_out_sums(self, matrices: Sequence[_Matrices]) -> None:
        """Where the sums of g² are in the buffer: those to be completed over the same axes are adjacent."""
        by_axes: dict[tuple[Hashable, ...], list[tuple[int, int, int, int]]] = {}
        for tensor, (layout, dims) in enumerate(zip(self.layouts, self._dims, strict=True)):
            if dims is None:
                continue
            outer, inner = sorted(dims)
            count, local = len(matrices[tensor]), layout.local_shape
            lengths = count * local[outer], count * local[inner], count
            for which, (length, over) in enumerate(zip(lengths, ((inner,), (outer,), dims), strict=True)):
                elements = math.prod(layout.size(dim) for dim in over)
                by_axes.setdefault(layout.axes(over), []).append((tensor, which, length, elements))
        self._sum_starts: dict[tuple[int, int], int] = {}
        self.sum_pieces: list[Piece] = []
        blocks: list[tuple[int, ...]] = []
        start = 0
        for axes, entries in by_axes.items():
            first = start
            for tensor, which, length, elements in entries:
                self._sum_starts[tensor, which] = start
                row = tensor, _OUTER + which, start, length, elements
                blocks += ((*row, block) for block in range(-(-length // FACTOR_BLOCK)))
                start += length
            self.sum_pieces.append(Piece(first, start, axes))
        self.sum_count = start
        self.factor_blocks = self._table(blocks, 6)

    def _lay_out_parts(self, matrices: Sequence[_Matrices]) -> None:
        """Where the partial sums of g² of each tile are, and how they are added up."""
        rows, segments, totals = [], [], []
        full: list[tuple[int, int, int, int]] = []
        outer_parts = inner_parts = 0
        self._grids: list[tuple[int, int]] = []  # for each tensor, a matrix's tiles down and across
        for tensor, (m, dims) in enumerate(zip(matrices, self._dims, strict=True)):
            down = -(-m.height // self.tile.rows)
            across = 1 if dims is None else -(-m.width // self.tile.columns)
            self._grids.append((down, across))
            # A matrix has, for each tile across, a sum of each row; and for each tile down, of each column.
            outer_size, inner_size = (0, down) if dims is None else (m.height * across, m.width * down)
            index = torch.arange(len(m), dtype=torch.int64, device="cpu")
            firsts = outer_parts + index * outer_size, inner_parts + index * inner_size
            rows.append(_matrix_rows(tensor, m, index, *firsts))
            if dims is None:
                full.append((inner_parts, 1, down, self.sum_count + tensor))
            outer_parts, inner_parts = outer_parts + len(m) * outer_size, inner_parts + len(m) * inner_size
            if dims is None:
                continue
            outer_sums, inner_sums, mean_sums = (self._sum_starts[tensor, which] for which in range(3))
            outer, inner = outer_sums + m.outer_offsets, inner_sums + m.inner_offsets
            segments.append(_segments(0, firsts[0], outer, m.outer_stride, m.height, across))
            segments.append(_segments(1, firsts[1], inner, m.inner_stride, m.width, down))
            totals.append(_columns(outer, m.outer_stride, m.height, mean_sums + index))
            whole = outer_sums, 1, len(m) * m.height, self.sum_count + tensor
            totals.append(torch.tensor([whole], dtype=torch.int64, device="cpu"))
        self.outer_parts, self.inner_parts = outer_parts, inner_parts
        inner_start = self.sum_count + len(matrices) + outer_parts
        totals += [
            torch.tensor([(inner_start + first, *rest)], dtype=torch.int64, device="cpu")
            for first, *rest in full
        ]
        self.matrices, self.segments, self.totals = (
            self._joined(tables, width) for tables, width in ((rows, 13), (segments, 7), (totals, 4))
        )

    def _make_tiles(self, matrices: Sequence[_Matrices]) -> None:
        """The tiles of each launch, and where each tensor's are among all tiles."""
        grids: dict[tuple[bool, bool, bool], list[tuple[int, Tensor]]] = {}
        first_matrix = 0
        for tensor, (m, grid_size, dims) in enumerate(zip(matrices, self._grids, self._dims, strict=True)):
            # Tiles at the same place in a tensor's matrices are side by side: they share cache lines.
            axes = (torch.arange(size, device="cpu") for size in (*grid_size, len(m)))
            down, across, matrix = (index.reshape(-1) for index in torch.meshgrid(*axes, indexing="ij"))
            numel = math.prod(self.layouts[tensor].local_shape)
            fast = numel % ALIGNMENT == 0 if dims is None else _is_fast(m)
            grid = torch.stack((first_matrix + matrix, down, across), 1)
            kind = dims is not None, self._is_single[tensor], fast
            grids.setdefault(kind, []).append((tensor, grid))
            first_matrix += len(m)
        self.tiles: list[Tiles] = []
        of_tensors = []
        first = 0
        for kind, of_launch in grids.items():
            table = torch.cat([grid for _, grid in of_launch]).to(torch.int32)
            if len(table):
                self.tiles.append(Tiles(table.to(self.device), *kind, first))
            for tensor, grid in of_launch:
                of_tensors.append((first, 1, len(grid), tensor))
                first += len(grid)
        self.tile_count = first
        self.of_tensors = self._table(of_tensors, 4)

    def _table(self, rows: Iterable[Sequence[int]], width: int) -> Tensor:
        table = torch.tensor(list(rows), dtype=torch.int64, device="cpu")
        return table.view(-1, width).to(self.device)

    def _joined(self, tables: Sequence[Tensor], width: int) -> Tensor:
        empty = torch.zeros(0, width, dtype=torch.int64, device="cpu")
        return torch.cat([empty, *tables]).to(self.device)


_Index = TypeVar("_Index", int, Tensor)


def _as_int32(index: _Index) -> _Index:
    """An index, or a tensor of them, modulo 2³², as a signed 32-bit number."""
    return (index + (1 << 31)) % (1 << 32) - (1 << 31)


def _runs_table(runs: Runs, every: int) -> Tensor:
    """The table of a tensor's runs: each one's first global index modulo 2³² and modulo ``every``, and the
    number of samples in the runs before it.
    """
    phases = runs.firsts % every
    samples = (phases + runs.length - 1) // every + (phases == 0)
    return torch.stack((_as_int32(runs.firsts), phases, samples.cumsum(0) - samples), 1)


def _matrices(shape: tuple[int, ...], dims: tuple[int, int] | None, columns: int) -> _Matrices:
    """The matrices of a local tensor whose second moment is factored over ``dims``; None: not factored."""
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    if dims is None:
        numel = math.prod(shape)
        return _Matrices(-(-numel // columns), columns, columns, 1, 0, 0, zero, zero, zero)
    outer, inner = sorted(dims)
    before, between, behind = (math.prod(part) for part in
                               (shape[:outer], shape[outer + 1 : inner], shape[inner + 1 :]))  # fmt: skip
    height, width = shape[outer], shape[inner]
    a, b, e = (
        index.reshape(-1)
        for index in torch.meshgrid(
            *(torch.arange(size, dtype=torch.int64, device="cpu") for size in (before, between, behind)),
            indexing="ij",
        )
    )
    row_stride = between * width * behind
    return _Matrices(
        height,
        width,
        row_stride,
        behind,
        between * behind,
        behind,
        a * height * row_stride + b * width * behind + e,
        a * height * between * behind + b * behind + e,
        (a * between + b) * width * behind + e,
    )


def _matrix_rows(
    tensor: int, m: _Matrices, index: Tensor, outer_parts: Tensor, inner_parts: Tensor
) -> Tensor:
    """The table of a tensor's matrices, with the columns that ``kernels.py`` names."""
    lies = m.offsets, m.height, m.width, m.row_stride, m.column_stride
    sums = m.outer_offsets, m.outer_stride, m.inner_offsets, m.inner_stride
    return _columns(tensor, *lies, *sums, outer_parts, inner_parts, index)


def _segments(is_inner: int, parts: Tensor, sums: Tensor, stride: int, length: int, count: int) -> Tensor:
    """Rows for the kernel ``add_parts``: for each matrix, one for each block of its sums."""
    each = -(-length // BLOCK)
    blocks = torch.arange(each, dtype=torch.int64, device="cpu").repeat(len(parts))
    parts, sums = parts.repeat_interleave(each), sums.repeat_interleave(each)
    return _columns(is_inner, parts, sums, stride, length, count, blocks)


def _columns(*columns: int | Tensor) -> Tensor:
    """A table of these columns; a column that is a number has it in all rows. int64."""
    like = next(column for column in columns if isinstance(column, Tensor))
    return torch.stack(
        [column if isinstance(column, Tensor) else torch.full_like(like, column) for column in columns], 1
    )


def _is_fast(m: _Matrices) -> bool:
    """Whether rows are contiguous and aligned, so that they can be read 16 bytes at a time."""
    return m.column_stride == 1 and m.width % ALIGNMENT == 0 and m.row_stride % ALIGNMENT == 0
