"""Tables of what the kernels need to know about a batch's tensors: the same at every step, so made once.

A factored tensor is one or more matrices. Of its row and column dimensions, the first in memory is called
outer, the other inner; all other dimensions are batch dimensions. A tensor that is not factored is one
matrix, whose rows are consecutive in memory. Matrices are cut into tiles, one for each program.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from prodigyplus.device import tables
from prodigyplus.device.tables import Column, FactorRow, MatrixRow, PartsRow, RunRow, SizeRow, SumRow, TileRow
from prodigyplus.formulas import moments
from prodigyplus.terms.device_constants import sent
from prodigyplus.terms.layout import Layout, Runs

# The kernel ``add_parts``: how many sums a program makes, and how many parts it adds at a time.
BLOCK, AT_ONCE = 64, 32
FACTOR_BLOCK = 1024

# The kernels index elements with 32 bits.
MAX_NUMEL = 1 << 30

# The alignment of fast reads: addresses in bytes; offsets, widths and strides in elements.
ALIGNMENT = 16

# The state entries that the kernels use, in the order of their addresses, which follow the weight's.
_ROW_OUTER, _ROW_INNER = tables.entries("row", "col"), tables.entries("col", "row")


class TileSize(NamedTuple):
    """The size of a tile."""

    rows: int = 64
    columns: int = 256


class TileKind(NamedTuple):
    """What the tiles of one launch have in common."""

    factored: bool
    single: bool  # whether the local elements are one run of the whole tensor
    fast: bool  # whether rows are contiguous, and sizes multiples of 16


class Tiles(NamedTuple):
    """The tiles of one launch."""

    table: Tensor  # int32; rows as of ``TileRow``
    kind: TileKind
    first: int  # the index of the first of them among all tiles


class Piece(NamedTuple):
    """A range of the buffer of sums, all of which are completed over the same mesh axes."""

    start: int
    end: int
    axes: tuple[Hashable, ...]


class _FactorSums(NamedTuple):
    """The sums of g² that one factor of a tensor needs."""

    tensor: int
    factor: str  # one of ``tables.FACTORS``
    length: int  # how many they are
    elements: int  # how many elements each of them is over


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
        slice_p: The distance between samples.
        device: The device of the tables.
        tile: The size of a tile.

    Attributes:
        keys: For each tensor, the state entries in the order of their addresses.
        sizes, runs, matrices: Tables with a row for each tensor, each run and each matrix; see ``tables.py``.
        tiles, tile_count: The tiles of each launch, and the number of tiles in all.
        outer_parts, inner_parts: The numbers of partial sums of g².
        parts, totals: Tables for the kernels ``add_parts``, which adds up partial sums, and ``add_up``,
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
        slice_p: int,
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
        self._lay_out_runs(is_row_outer, slice_p)
        numels = torch.tensor([layout.numel for layout in layouts], dtype=torch.int64, device="cpu")
        self.numels = sent(numels, device)[1].to(torch.float32)
        matrices = [
            _matrices(layout.local_shape, dims, tile.columns)
            for layout, dims in zip(layouts, self._dims, strict=True)
        ]
        self._lay_out_sums(matrices)
        self._lay_out_parts(matrices)
        self._make_tiles(matrices)

    def _lay_out_runs(self, is_row_outer: Sequence[bool], slice_p: int) -> None:
        """Where the local elements of each tensor lie in the whole one; if in several runs, their table."""
        sizes: list[SizeRow] = []
        of_runs: list[Tensor] = []
        self._is_single: list[bool] = []
        first_run = 0
        for layout, row_first in zip(self.layouts, is_row_outer, strict=True):
            runs = layout.runs()
            first = int(runs.firsts[0])
            sizes.append(
                SizeRow(
                    local=math.prod(layout.local_shape),
                    first_index=_as_int32(first),
                    first_phase=first % slice_p,
                    is_row_outer=int(row_first),
                    run_length=max(1, runs.length),
                    first_run=first_run,
                )
            )
            self._is_single.append(len(runs.firsts) == 1)
            if not self._is_single[-1]:
                of_runs.append(_table_of(_run_rows(runs, slice_p)))
                first_run += len(runs.firsts)
        self.sizes = self._table(sizes, SizeRow._fields)
        self.runs = self._joined(of_runs, RunRow._fields).to(torch.int32)

    def _lay_out_sums(self, matrices: Sequence[_Matrices]) -> None:
        """Where the sums of g² are in the buffer: those to be completed over the same axes are adjacent."""
        by_axes: dict[tuple[Hashable, ...], list[_FactorSums]] = {}
        for tensor, (layout, dims) in enumerate(zip(self.layouts, self._dims, strict=True)):
            if dims is None:
                continue
            outer, inner = sorted(dims)
            count, local = len(matrices[tensor]), layout.local_shape
            lengths = count * local[outer], count * local[inner], count
            summed = (inner,), (outer,), dims
            for factor, length, over in zip(tables.FACTORS, lengths, summed, strict=True):
                elements = math.prod(layout.size(dim) for dim in over)
                sums = _FactorSums(tensor, factor, length, elements)
                by_axes.setdefault(layout.axes(over), []).append(sums)
        self._sum_starts: dict[tuple[int, str], int] = {}  # by tensor and factor
        self.sum_pieces: list[Piece] = []
        rows: list[FactorRow] = []
        start = 0
        for axes, of_axes in by_axes.items():
            first = start
            for sums in of_axes:
                self._sum_starts[sums.tensor, sums.factor] = start
                column = tables.POINTERS.index(sums.factor)
                rows += (
                    FactorRow(sums.tensor, column, start, sums.length, sums.elements, block)
                    for block in range(-(-sums.length // FACTOR_BLOCK))
                )
                start += sums.length
            self.sum_pieces.append(Piece(first, start, axes))
        self.sum_count = start
        self.factor_blocks = self._table(rows, FactorRow._fields)

    def _lay_out_parts(self, matrices: Sequence[_Matrices]) -> None:
        """Where the partial sums of g² of each tile are, and how they are added up."""
        rows: list[Tensor] = []
        parts: list[Tensor] = []
        totals: list[Tensor] = []
        totals_of_tiles: list[SumRow] = []
        outer_parts = inner_parts = 0
        self._grids: list[tuple[int, int]] = []  # for each tensor, a matrix's tiles down and across
        for tensor, (m, dims) in enumerate(zip(matrices, self._dims, strict=True)):
            down = -(-m.height // self.tile.rows)
            across = 1 if dims is None else -(-m.width // self.tile.columns)
            self._grids.append((down, across))
            # A matrix has, for each tile across, a sum of each row; and for each tile down, of each column.
            outer_size, inner_size = (0, down) if dims is None else (m.height * across, m.width * down)
            index = torch.arange(len(m), dtype=torch.int64, device="cpu")
            outer_firsts, inner_firsts = outer_parts + index * outer_size, inner_parts + index * inner_size
            rows.append(_table_of(_matrix_rows(tensor, m, index, outer_firsts, inner_firsts)))
            total = self.sum_count + tensor  # where the tensor's total is
            if dims is None:
                totals_of_tiles.append(SumRow(inner_parts, stride=1, values=down, out=total))
            else:
                starts = (self._sum_starts[tensor, factor] for factor in tables.FACTORS)
                outer_start, inner_start, mean_start = starts
                outer, inner = outer_start + m.outer_offsets, inner_start + m.inner_offsets
                parts += (
                    _table_of(_parts_rows(0, outer_firsts, outer, m.outer_stride, m.height, across)),
                    _table_of(_parts_rows(1, inner_firsts, inner, m.inner_stride, m.width, down)),
                )
                means = SumRow(outer, m.outer_stride, m.height, mean_start + index)
                of_tensor = SumRow(outer_start, stride=1, values=len(m) * m.height, out=total)
                totals += (_table_of(means), _rows([of_tensor], SumRow._fields))
            outer_parts, inner_parts = outer_parts + len(m) * outer_size, inner_parts + len(m) * inner_size
        self.outer_parts, self.inner_parts = outer_parts, inner_parts
        # The inner ones come last in the buffer of sums.
        first_inner = self.sum_count + len(matrices) + outer_parts
        in_buffer = [row._replace(first=first_inner + row.first) for row in totals_of_tiles]
        totals.append(_rows(in_buffer, SumRow._fields))
        self.matrices = self._joined(rows, MatrixRow._fields)
        self.parts = self._joined(parts, PartsRow._fields)
        self.totals = self._joined(totals, SumRow._fields)

    def _make_tiles(self, matrices: Sequence[_Matrices]) -> None:
        """The tiles of each launch, and where each tensor's are among all tiles."""
        # For each launch, its tensors, and the table of tiles of each.
        by_launch: dict[TileKind, list[tuple[int, Tensor]]] = {}
        first_matrix = 0
        for tensor, (m, grid_size, dims) in enumerate(zip(matrices, self._grids, self._dims, strict=True)):
            # Tiles at the same place in a tensor's matrices are side by side: they share cache lines.
            down, across, matrix = _grid(*grid_size, len(m))
            numel = math.prod(self.layouts[tensor].local_shape)
            fast = numel % ALIGNMENT == 0 if dims is None else _is_fast(m)
            kind = TileKind(dims is not None, self._is_single[tensor], fast)
            table = _table_of(TileRow(first_matrix + matrix, down, across))
            by_launch.setdefault(kind, []).append((tensor, table))
            first_matrix += len(m)
        self.tiles: list[Tiles] = []
        of_tensors = []
        first = 0
        for kind, of_launch in by_launch.items():
            joined = torch.cat([table for _, table in of_launch]).to(torch.int32)
            if len(joined):
                self.tiles.append(Tiles(sent(joined, self.device)[1], kind, first))
            for tensor, table in of_launch:
                of_tensors.append(SumRow(first, stride=1, values=len(table), out=tensor))
                first += len(table)
        self.tile_count = first
        self.of_tensors = self._table(of_tensors, SumRow._fields)

    def _table(self, rows: Sequence[tuple[Column, ...]], fields: Sequence[str]) -> Tensor:
        """A table of these rows, on the device; ``fields``: the names of its columns."""
        return self._joined([_rows(rows, fields)], fields)

    def _joined(self, each: Sequence[Tensor], fields: Sequence[str]) -> Tensor:
        """Tables one below the other, on the device; ``fields`` as above."""
        return sent(torch.cat([_rows([], fields), *each]), self.device)[1]


_Index = TypeVar("_Index", int, Tensor)


def _as_int32(index: _Index) -> _Index:
    """An index, or a tensor of them, modulo 2³², as a signed 32-bit number."""
    return (index + (1 << 31)) % (1 << 32) - (1 << 31)


def _run_rows(runs: Runs, slice_p: int) -> RunRow:
    phases = runs.firsts % slice_p
    samples = (phases + runs.length - 1) // slice_p + (phases == 0)
    return RunRow(_as_int32(runs.firsts), phases, samples=samples.cumsum(0) - samples)


def _matrices(shape: tuple[int, ...], dims: tuple[int, int] | None, columns: int) -> _Matrices:
    """The matrices of a local tensor whose second moment is factored over ``dims``; None: not factored."""
    if dims is None:
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        return _Matrices(
            height=-(-math.prod(shape) // columns),
            width=columns,
            row_stride=columns,
            column_stride=1,
            outer_stride=0,
            inner_stride=0,
            offsets=zero,
            outer_offsets=zero,
            inner_offsets=zero,
        )
    outer, inner = sorted(dims)
    height, width = shape[outer], shape[inner]
    # Batch dimensions are before the outer dimension, between the two, and behind the inner one.
    batches = shape[:outer], shape[outer + 1 : inner], shape[inner + 1 :]
    before, between, behind = _grid(*map(math.prod, batches))
    _, n_between, n_behind = map(math.prod, batches)
    row_stride = n_between * width * n_behind
    return _Matrices(
        height=height,
        width=width,
        row_stride=row_stride,
        column_stride=n_behind,
        outer_stride=n_between * n_behind,
        inner_stride=n_behind,
        offsets=before * height * row_stride + between * width * n_behind + behind,
        outer_offsets=before * height * n_between * n_behind + between * n_behind + behind,
        inner_offsets=(before * n_between + between) * width * n_behind + behind,
    )


def _grid(*sizes: int) -> list[Tensor]:
    """All positions in a grid of these sizes, as an index along each axis; (positions,) each."""
    axes = (torch.arange(size, dtype=torch.int64, device="cpu") for size in sizes)
    return [index.reshape(-1) for index in torch.meshgrid(*axes, indexing="ij")]


def _matrix_rows(
    tensor: int, m: _Matrices, index: Tensor, outer_parts: Tensor, inner_parts: Tensor
) -> MatrixRow:
    return MatrixRow(
        tensor=tensor,
        offset=m.offsets,
        height=m.height,
        width=m.width,
        row_stride=m.row_stride,
        column_stride=m.column_stride,
        outer_offset=m.outer_offsets,
        outer_stride=m.outer_stride,
        inner_offset=m.inner_offsets,
        inner_stride=m.inner_stride,
        outer_parts=outer_parts,
        inner_parts=inner_parts,
        mean_offset=index,
    )


def _parts_rows(is_inner: int, parts: Tensor, sums: Tensor, stride: int, length: int, count: int) -> PartsRow:
    """For each of a tensor's matrices, a row for each block of its sums.

    Args:
        is_inner, stride, length, count: As in the rows.
        parts, sums: For each matrix, the index of its first part and that of its first sum.
    """
    each = -(-length // BLOCK)
    blocks = torch.arange(each, dtype=torch.int64, device="cpu").repeat(len(parts))
    firsts, out = parts.repeat_interleave(each), sums.repeat_interleave(each)
    return PartsRow(is_inner, firsts, out, stride, length, count, blocks)


def _rows(rows: Sequence[tuple[Column, ...]], fields: Sequence[str]) -> Tensor:
    """A table of these rows of numbers; ``fields``: the names of its columns. int64, on the host."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, len(fields))


def _table_of(columns: tuple[Column, ...]) -> Tensor:
    """A table of these columns, of which at least one is a tensor. int64, on the host."""
    like = next(column for column in columns if isinstance(column, Tensor))
    return torch.stack(
        [column if isinstance(column, Tensor) else torch.full_like(like, column) for column in columns], 1
    )


def _is_fast(m: _Matrices) -> bool:
    """Whether rows are contiguous and aligned, so that they can be read 16 bytes at a time."""
    return m.column_stride == 1 and m.width % ALIGNMENT == 0 and m.row_stride % ALIGNMENT == 0
