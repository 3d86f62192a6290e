"""What the kernels need to know of the tensors of a batch that is the same at every step: tables, made once.

A factored tensor is one or more matrices, of its rows and columns in the order of memory, the outer and the
inner dimension; any dimension before, between or behind them makes more matrices. A tensor that is not
factored is one matrix, whose rows follow on one another. Matrices are cut into tiles, one for each program.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.formulas import moments, schedule_free
from prodigyplus.terms.layout import Layout

# Of sums, how many a program makes, and of how many parts at a time.
BLOCK, AT_ONCE = 64, 32
FACTOR_BLOCK = 1024

# Elements are counted in 32 bits.
MAX_NUMEL = 1 << 30

# What memory is read in at a time: 16 bytes, or 16 elements of a table's multiple.
_ALIGNMENT = 16


def _keys(outer: str, inner: str) -> tuple[str, ...]:
    """The entries of a state that the kernels move, in the order of their addresses, after the weight's."""
    factors = (f"exp_avg_sq_{name}" for name in (outer, inner, "mean"))
    return schedule_free.BASE, schedule_free.OFFSET, "exp_avg", "exp_avg_sq", *factors, "p0", "s"


_ROW_OUTER, _ROW_INNER = _keys("row", "col"), _keys("col", "row")


class TileSize(NamedTuple):
    """The size of a tile, and how many rows of it are in registers at a time."""

    rows: int = 64
    columns: int = 256
    strip: int = 4


class Tiles(NamedTuple):
    """The tiles of one launch."""

    table: Tensor  # int32, (tiles, 3): the matrix, and the tile's place down and across it
    factored: bool
    fast: bool  # whether all sizes are multiples of 16, and elements of a row follow on one another
    first: int  # the number of the first of them among all tiles


class Piece(NamedTuple):
    """A run of the buffer of sums that is to be completed over the same axes of a mesh."""

    start: int
    end: int
    axes: tuple[Hashable, ...]


class _Matrices(NamedTuple):
    """The matrices of one tensor: what they have in common, and of each where it begins."""

    height: int
    width: int
    row_stride: int
    column_stride: int
    outer_stride: int
    inner_stride: int
    offsets: Tensor  # of each matrix, in the tensor
    outer_offsets: Tensor  # in the averages of the outer dimension
    inner_offsets: Tensor


class Plan:
    """The tables of a batch.

    Args:
        layouts: Of its parameters.
        factored: Of each, whether its second moment is.
        every: The distance of two samples.
        device: Where the tables are to be.
        tile: The size of a tile.
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
        self.factored = tuple(factored)
        self.device = device
        self._dims = [moments.factored_dims(layout.shape) if f else None
                      for layout, f in zip(layouts, factored, strict=True)]  # fmt: skip
        self.is_row_outer = [dims is not None and dims[0] < dims[1] for dims in self._dims]
        self.keys = [_ROW_OUTER if is_row_outer else _ROW_INNER for is_row_outer in self.is_row_outer]
        matrices = [
            _matrices(layout.local_shape, dims, tile.columns)
            for layout, dims in zip(layouts, self._dims, strict=True)
        ]
        self._count = [len(of_tensor.offsets) for of_tensor in matrices]
        self._lay_out_sums()
        self.sizes = self._to(self._sizes(every))
        self.numels = torch.tensor(
            [layout.numel for layout in layouts], dtype=torch.float32, device="cpu"
        ).to(device)
        self._make_tables(matrices)

    def _lay_out_sums(self) -> None:
        """Where in one buffer the sums of g² of each tensor are: those to be completed alike side by side."""
        by_axes: dict[tuple[Hashable, ...], list[tuple[int, int, int, int]]] = {}
        for tensor, (layout, dims) in enumerate(zip(self.layouts, self._dims, strict=True)):
            if dims is None:
                continue
            row, column = dims
            local = layout.local_shape
            count = self._count[tensor]
            # Of each average: its length, over how many elements of the whole tensor it is, and which.
            for field, kept, over in (("row", row, (column,)), ("col", column, (row,)), ("mean", None, dims)):
                length = count if kept is None else count * local[kept]
                axes = tuple(layout.axes(over))
                elements = math.prod(layout.size(dim) for dim in over)
                is_outer = kept is not None and kept == min(dims)
                which = 2 if field == "mean" else int(not is_outer)
                by_axes.setdefault(axes, []).append((tensor, which, length, elements))
        self.sum_starts: dict[tuple[int, int], int] = {}
        self.sum_pieces: list[Piece] = []
        self._factor_pieces: list[tuple[int, int, int, int, int]] = []
        start = 0
        for axes, entries in by_axes.items():
            first = start
            for tensor, which, length, elements in entries:
                self.sum_starts[tensor, which] = start
                self._factor_pieces.append((tensor, which, start, length, elements))
                start += length
            self.sum_pieces.append(Piece(first, start, axes))
        self.sum_count = start

    def _sizes(self, every: int) -> Tensor:
        rows = []
        for layout, is_row_outer in zip(self.layouts, self.is_row_outer, strict=True):
            first = layout.first if math.prod(layout.local_shape) else 0
            rows.append((math.prod(layout.local_shape), first % (1 << 32), first % every, int(is_row_outer)))
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4)

    def _make_tables(self, matrices: Sequence[_Matrices]) -> None:
        table, segments, means, totals, norms = [], [], [], [], []
        outer_parts = inner_parts = matrix = 0
        tiles: dict[tuple[bool, bool], list[Tensor]] = {}
        of_tiles: list[tuple[int, tuple[bool, bool], int]] = []
        for tensor, m in enumerate(matrices):
            factored, count = self.factored[tensor], len(m.offsets)
            down, across = -(-m.height // self.tile.rows), -(-m.width // self.tile.columns)
            if not factored:
                across = 1
            numbers = torch.arange(count, dtype=torch.int64, device="cpu")
            outer_size, inner_size = (m.height * across, m.width * down) if factored else (0, down)
            rows = torch.zeros(count, 13, dtype=torch.int64, device="cpu")
            rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = tensor, m.offsets, m.height, m.width
            rows[:, 4], rows[:, 5], rows[:, 7], rows[:, 9] = (
                m.row_stride, m.column_stride, m.outer_stride, m.inner_stride
            )  # fmt: skip
            rows[:, 6], rows[:, 8], rows[:, 12] = m.outer_offsets, m.inner_offsets, numbers
            rows[:, 10], rows[:, 11] = outer_parts + numbers * outer_size, inner_parts + numbers * inner_size
            table.append(rows)
            if factored:
                outer_sums, inner_sums, mean_sums = (self.sum_starts[tensor, which] for which in range(3))
                for is_inner, parts, sums, stride, length, parts_count in (
                    (0, rows[:, 10], outer_sums + m.outer_offsets, m.outer_stride, m.height, across),
                    (1, rows[:, 11], inner_sums + m.inner_offsets, m.inner_stride, m.width, down),
                ):
                    segments.append(_segments(is_inner, parts, sums, stride, length, parts_count))
                means.append(
                    torch.stack(
                        [outer_sums + m.outer_offsets, torch.full_like(numbers, m.outer_stride),
                         torch.full_like(numbers, m.height), mean_sums + numbers], 1
                    )
                )  # fmt: skip
                totals.append((tensor, mean_sums, count))
            else:
                totals.append((tensor, inner_parts, down))
            # Tiles of one place in the matrices of a tensor side by side: they share lines of memory.
            grid = torch.cartesian_prod(
                torch.arange(down, device="cpu"), torch.arange(across, device="cpu"), matrix + numbers
            ).view(-1, 3)
            fast = _is_fast(m) if factored else math.prod(self.layouts[tensor].local_shape) % _ALIGNMENT == 0
            of_tiles.append((tensor, (factored, fast), len(grid)))
            tiles.setdefault((factored, fast), []).append(grid[:, [2, 0, 1]])
            outer_parts, inner_parts = outer_parts + count * outer_size, inner_parts + count * inner_size
            matrix += count
        self.outer_parts, self.inner_parts = outer_parts, inner_parts
        self.matrices = self._to(torch.cat(table) if table else torch.zeros(0, 13, dtype=torch.int64))
        self.tiles: list[Tiles] = []
        starts, first = {}, 0
        for key, grids in tiles.items():
            joined = torch.cat(grids)
            starts[key] = first
            if len(joined):
                self.tiles.append(Tiles(self._to(joined.to(torch.int32)), *key, first))
            first += len(joined)
        self.tile_count = first
        for _, key, length in of_tiles:
            norms.append((starts[key], 1, length))
            starts[key] += length
        self.segments = self._to(
            torch.cat(segments) if segments else torch.zeros(0, 7, dtype=torch.int64, device="cpu")
        )
        self.means = self._to(
            torch.cat(means) if means else torch.zeros(0, 4, dtype=torch.int64, device="cpu")
        )
        # Sums for each tensor: of the parts of its tiles; of g², of the sums of its matrices.
        self.of_tensors = self._rows([(*row, tensor) for tensor, row in enumerate(norms)], 4)
        factored_totals = [(first, 1, count, t) for t, first, count in totals if self.factored[t]]
        full_totals = [(first, 1, count, t) for t, first, count in totals if not self.factored[t]]
        self.factored_totals, self.full_totals = self._rows(factored_totals, 4), self._rows(full_totals, 4)
        blocks = [
            (tensor, 5 + which, start, length, elements, block)
            for tensor, which, start, length, elements in self._factor_pieces
            for block in range(-(-length // FACTOR_BLOCK))
        ]
        self.factor_blocks = self._rows(blocks, 6)

    def _rows(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        return self._to(torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, width))

    def _to(self, table: Tensor) -> Tensor:
        return table.to(self.device)


def _matrices(shape: tuple[int, ...], dims: tuple[int, int] | None, columns: int) -> _Matrices:
    """The matrices of a local tensor, whose second moment is factored over two dimensions, or not."""
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


def _segments(is_inner: int, parts: Tensor, sums: Tensor, stride: int, length: int, count: int) -> Tensor:
    """Rows for the kernel ``add_parts``: of each matrix, as many as its sums need programs."""
    blocks = torch.arange(-(-length // BLOCK), dtype=torch.int64, device="cpu")
    each = len(blocks)
    columns = [
        torch.full((len(parts) * each,), is_inner, dtype=torch.int64, device="cpu"),
        parts.repeat_interleave(each),
        sums.repeat_interleave(each),
        *(torch.full((len(parts) * each,), value, dtype=torch.int64, device="cpu")
          for value in (stride, length, count)),
        blocks.repeat(len(parts)),
    ]  # fmt: skip
    return torch.stack(columns, 1)


def _is_fast(m: _Matrices) -> bool:
    """Whether the elements of a row follow on one another, from a multiple of what is read at a time."""
    return m.column_stride == 1 and m.width % _ALIGNMENT == 0 and m.row_stride % _ALIGNMENT == 0
