"""The first pass in Triton, Σg² by rows, by columns and in all, and the factors that are updated from it.

Programs write partial sums of tiles, which other kernels add up in a fixed order. :func:`add_up` does so for
the sums of the other passes, too, see :mod:`prodigyplus.device.kernels`.
"""

# No ``from __future__ import annotations``: Triton reads the annotations of arguments at run time.

import triton.language as tl

from prodigyplus.device.jit import kernel
from prodigyplus.device.tables import POINTERS, FactorRow, MatrixRow, PartsRow, SumRow
from prodigyplus.device.tiles import POINTER_COLUMNS, elements_of, pointer, tile_of
from prodigyplus.terms.step_numbers import VALUES

# Indices of columns, and how many columns tables have; see ``prodigyplus.device.tables``.
P_GRAD = tl.constexpr(POINTERS.index("grad"))
P_MEAN = tl.constexpr(POINTERS.index("mean"))
M_OUTER_PARTS = tl.constexpr(MatrixRow._fields.index("outer_parts"))
M_INNER_PARTS = tl.constexpr(MatrixRow._fields.index("inner_parts"))
PARTS_COLUMNS = tl.constexpr(len(PartsRow._fields))
A_IS_INNER = tl.constexpr(PartsRow._fields.index("is_inner"))
A_FIRST = tl.constexpr(PartsRow._fields.index("first"))
A_OUT = tl.constexpr(PartsRow._fields.index("out"))
A_STRIDE = tl.constexpr(PartsRow._fields.index("stride"))
A_LENGTH = tl.constexpr(PartsRow._fields.index("length"))
A_PARTS = tl.constexpr(PartsRow._fields.index("parts"))
A_BLOCK = tl.constexpr(PartsRow._fields.index("block"))
SUM_COLUMNS = tl.constexpr(len(SumRow._fields))
U_FIRST = tl.constexpr(SumRow._fields.index("first"))
U_STRIDE = tl.constexpr(SumRow._fields.index("stride"))
U_VALUES = tl.constexpr(SumRow._fields.index("values"))
U_OUT = tl.constexpr(SumRow._fields.index("out"))
FACTOR_COLUMNS = tl.constexpr(len(FactorRow._fields))
B_TENSOR = tl.constexpr(FactorRow._fields.index("tensor"))
B_POINTER = tl.constexpr(FactorRow._fields.index("pointer"))
B_FIRST = tl.constexpr(FactorRow._fields.index("first"))
B_LENGTH = tl.constexpr(FactorRow._fields.index("length"))
B_ELEMENTS = tl.constexpr(FactorRow._fields.index("elements"))
B_BLOCK = tl.constexpr(FactorRow._fields.index("block"))
N_BETA2 = tl.constexpr(VALUES.index("beta2"))
N_SQ_WEIGHT = tl.constexpr(VALUES.index("sq_weight"))


@kernel
def squares(
    pointers, sizes, matrices, tiles, outer_parts, inner_parts,
    DTYPE: tl.constexpr, FACTORED: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Sums of g² in each tile: of each row and of each column; if not factored, of the whole tile."""
    MULTIPLE: tl.constexpr = 16 if FAST else 1
    tile = tile_of(pointers, sizes, matrices, tiles, MULTIPLE)
    grad = pointer(tile.pointers, P_GRAD, DTYPE, MULTIPLE)
    column = tile.across * COLUMNS + tl.arange(0, COLUMNS)
    of_columns = tl.zeros((STRIP, COLUMNS), tl.float32)
    rows_out = outer_parts + tl.load(tile.matrix + M_OUTER_PARTS) + tile.across * tile.height
    columns_out = inner_parts + tl.load(tile.matrix + M_INNER_PARTS) + tile.down * tile.width
    for start in range(0, ROWS, STRIP):
        row = tile.down * ROWS + start + tl.arange(0, STRIP)
        index, exists = elements_of(tile, row, column, FACTORED, FAST, VECTOR)
        g = tl.load(grad + index, mask=exists, other=0.0).to(tl.float32)
        square = g * g
        of_columns += square
        if FACTORED:
            tl.store(rows_out + row, tl.sum(square, 1), mask=row < tile.height)
    if FACTORED:
        tl.store(columns_out + column, tl.sum(of_columns, 0), mask=column < tile.width)
    else:
        tl.store(inner_parts + tl.load(tile.matrix + M_INNER_PARTS) + tile.down, tl.sum(of_columns))


@kernel
def add_parts(outer_parts, inner_parts, sums, parts, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Add up the partial sums of rows and of columns, in the order of the tiles.

    ``parts`` is a table of :class:`prodigyplus.device.tables.PartsRow`.
    """
    row = parts + tl.program_id(0) * PARTS_COLUMNS
    is_inner, first = tl.load(row + A_IS_INNER), tl.load(row + A_FIRST)
    out, stride = tl.load(row + A_OUT), tl.load(row + A_STRIDE)
    length, count, block = tl.load(row + A_LENGTH), tl.load(row + A_PARTS), tl.load(row + A_BLOCK)
    values = inner_parts + first if is_inner != 0 else outer_parts + first
    column = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        exists = (part[:, None] < count) & (column[None, :] < length)
        total += tl.sum(tl.load(values + part[:, None] * length + column[None, :], mask=exists, other=0.0), 0)
    tl.store(sums + out + column * stride, total, mask=column < length)


@kernel
def add_up(values, values_stride, out, out_stride, sums, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum segments of each row of ``values``; the second axis of the grid runs over rows.

    ``sums`` is a table of :class:`prodigyplus.device.tables.SumRow`.
    """
    entry = sums + tl.program_id(0) * SUM_COLUMNS
    first, stride = tl.load(entry + U_FIRST), tl.load(entry + U_STRIDE)
    count, target = tl.load(entry + U_VALUES), tl.load(entry + U_OUT)
    row = tl.program_id(1).to(tl.int64)
    values += row * values_stride + first
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index * stride, mask=index < count, other=0.0)
    tl.store(out + row * out_stride + target, tl.sum(total, 0))


@kernel
def factors(
    pointers, blocks, sums, numbers, number_stride, tensor_stride, gate, gate_stride,
    FACTOR_DTYPE: tl.constexpr, MEAN_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the factors of the second moment from the sums of g².

    ``blocks`` is a table of :class:`prodigyplus.device.tables.FactorRow`.
    """
    row = blocks + tl.program_id(0) * FACTOR_COLUMNS
    tensor, column, first = tl.load(row + B_TENSOR), tl.load(row + B_POINTER), tl.load(row + B_FIRST)
    length, elements, block = tl.load(row + B_LENGTH), tl.load(row + B_ELEMENTS), tl.load(row + B_BLOCK)
    index = block * BLOCK + tl.arange(0, BLOCK)
    exists = index < length
    numbers += tensor * tensor_stride
    weight = tl.load(numbers + N_SQ_WEIGHT * number_stride) / elements.to(tl.float32)
    keep = tl.load(numbers + N_BETA2 * number_stride)
    total = tl.load(sums + first + index, mask=exists, other=0.0)
    total = tl.where(tl.load(gate + tensor * gate_stride) != 0, total, 0.0)
    address = tl.load(pointers + tensor * POINTER_COLUMNS + column)
    if column == P_MEAN:
        average = address.to(tl.pointer_type(MEAN_DTYPE))
        old = tl.load(average + index, mask=exists, other=0.0).to(tl.float32)
        tl.store(average + index, (total * weight + old * keep).to(MEAN_DTYPE), mask=exists)
    else:
        factor = address.to(tl.pointer_type(FACTOR_DTYPE))
        old = tl.load(factor + index, mask=exists, other=0.0).to(tl.float32)
        tl.store(factor + index, (total * weight + old * keep).to(FACTOR_DTYPE), mask=exists)
