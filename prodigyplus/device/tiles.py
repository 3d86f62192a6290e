"""What all passes do first: find the tile that a program works on, and where its elements are."""

# No ``from __future__ import annotations``: Triton reads the annotations of arguments at run time.

from typing import NamedTuple

import triton
import triton.language as tl

from prodigyplus.device.tables import POINTERS, MatrixRow, SizeRow, TileRow

# How many columns tables have, and the indices of columns; see ``prodigyplus.device.tables``.
TILE_COLUMNS = tl.constexpr(len(TileRow._fields))
MATRIX_COLUMNS = tl.constexpr(len(MatrixRow._fields))
SIZE_COLUMNS = tl.constexpr(len(SizeRow._fields))
POINTER_COLUMNS = tl.constexpr(len(POINTERS))
T_MATRIX = tl.constexpr(TileRow._fields.index("matrix"))
T_DOWN = tl.constexpr(TileRow._fields.index("down"))
T_ACROSS = tl.constexpr(TileRow._fields.index("across"))
M_TENSOR = tl.constexpr(MatrixRow._fields.index("tensor"))
M_OFFSET = tl.constexpr(MatrixRow._fields.index("offset"))
M_HEIGHT = tl.constexpr(MatrixRow._fields.index("height"))
M_WIDTH = tl.constexpr(MatrixRow._fields.index("width"))
M_ROW_STRIDE = tl.constexpr(MatrixRow._fields.index("row_stride"))
M_COLUMN_STRIDE = tl.constexpr(MatrixRow._fields.index("column_stride"))
S_LOCAL = tl.constexpr(SizeRow._fields.index("local"))


class Tile(NamedTuple):
    """A program's tile."""

    tensor: tl.tensor  # the index of its tensor
    size: tl.tensor  # the address of the tensor's row in ``sizes``
    pointers: tl.tensor  # the address of the tensor's row in ``pointers``
    matrix: tl.tensor  # the address of its matrix's row in ``matrices``
    down: tl.tensor  # its position in the matrix, in tiles
    across: tl.tensor
    local: tl.tensor  # the number of the tensor's elements
    offset: tl.tensor  # where the matrix lies in the tensor
    height: tl.tensor
    width: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor


@triton.jit
def tile_of(pointers, sizes, matrices, tiles, MULTIPLE: tl.constexpr):
    """The program's tile; ``MULTIPLE`` divides what it holds of offsets, widths and strides of rows."""
    tile = tiles + tl.program_id(0) * TILE_COLUMNS
    matrix = matrices + tl.load(tile + T_MATRIX).to(tl.int64) * MATRIX_COLUMNS
    tensor = tl.load(matrix + M_TENSOR)
    size, addresses = sizes + tensor * SIZE_COLUMNS, pointers + tensor * POINTER_COLUMNS
    local = tl.multiple_of(tl.load(size + S_LOCAL).to(tl.int32), MULTIPLE)
    offset = tl.multiple_of(tl.load(matrix + M_OFFSET).to(tl.int32), MULTIPLE)
    height = tl.load(matrix + M_HEIGHT).to(tl.int32)
    width = tl.multiple_of(tl.load(matrix + M_WIDTH).to(tl.int32), MULTIPLE)
    row_stride = tl.multiple_of(tl.load(matrix + M_ROW_STRIDE).to(tl.int32), MULTIPLE)
    column_stride = tl.load(matrix + M_COLUMN_STRIDE).to(tl.int32)
    down, across = tl.load(tile + T_DOWN), tl.load(tile + T_ACROSS)
    return Tile(
        tensor, size, addresses, matrix, down, across,
        local, offset, height, width, row_stride, column_stride,
    )  # fmt: skip


@triton.jit
def pointer(pointers, COLUMN: tl.constexpr, DTYPE: tl.constexpr, MULTIPLE: tl.constexpr):
    """An address from a tensor's row of ``pointers``, of elements of ``DTYPE``, divisible by ``MULTIPLE``."""
    return tl.multiple_of(tl.load(pointers + COLUMN).to(tl.pointer_type(DTYPE)), MULTIPLE)


@triton.jit
def elements_of(tile, row, column, FACTORED: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr):
    """The indices of a strip's elements in their tensor, and a mask of those that exist."""
    columns = column[None, :] if FAST else column[None, :] * tile.column_stride
    index = tile.offset + row[:, None] * tile.row_stride + columns
    exists = (row[:, None] < tile.height) & (column[None, :] < tile.width)
    if not FACTORED:
        exists = exists & (index < tile.local)
    if FAST:
        # Tell Triton that 16 bytes can be read at a time: it cannot see it, as offsets come from tables.
        index = tl.max_contiguous(tl.multiple_of(index, (1, VECTOR)), (1, VECTOR))
        exists = tl.max_constancy(exists, (1, 16))
    return index, exists
