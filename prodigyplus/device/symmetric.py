"""Products of matrices with their own transposes, in Triton: half of one is the other half, mirrored.

Only blocks on and above the diagonal are computed; each is written on both sides. Sums are in float32, and
products of float32 are too: TensorFloat-32 never takes their place, whatever torch is told.
"""

# No ``from __future__ import annotations``: Triton reads the annotation of an argument itself.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodigyplus.device.jit import interprets, on_device


class Block(NamedTuple):
    """What a program computes, and how: rows and columns of the product, and terms of the sums at a time."""

    side: int
    depth: int
    warps: int
    stages: int


# With room in the shared memory of the smallest GPUs that multiply bfloat16, 99 KiB.
_BLOCKS = {torch.bfloat16: Block(128, 64, 8, 3), torch.float32: Block(64, 32, 4, 3)}
DTYPES = tuple(_BLOCKS)

# So small that the interpreter has several of them in small matrices.
_INTERPRETED = Block(16, 16, 1, 1)


@triton.jit
def _block_of(pair):
    """The block's place down and across, of the pairs on and above the diagonal, column after column."""
    across = ((tl.sqrt((8 * pair + 1).to(tl.float32)) - 1.0) / 2.0).to(tl.int32)
    # A root in float32 may be one off.
    across = tl.where(across * (across + 1) // 2 > pair, across - 1, across)
    across = tl.where((across + 1) * (across + 2) // 2 <= pair, across + 1, across)
    return pair - across * (across + 1) // 2, across


@triton.jit
def product(
    x, out, size, terms, pairs, matrix_stride, row_stride, column_stride, constant, linear, square,
    IS_PRODUCT: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of ``square`` · x xᵀ, and its mirror image.

    Unless ``IS_PRODUCT``, of ``constant`` + ``linear`` · x + that, where x is symmetric.
    """
    matrix = (tl.program_id(0) // pairs).to(tl.int64)
    down, across = _block_of(tl.program_id(0) % pairs)
    x += matrix * matrix_stride
    row, column = down * SIDE + tl.arange(0, SIDE), across * SIDE + tl.arange(0, SIDE)
    # A matrix may have more elements than 32 bits can count.
    rows, columns = x + row.to(tl.int64) * row_stride, x + column.to(tl.int64) * row_stride
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, terms, DEPTH):
        term = start + tl.arange(0, DEPTH)
        along = term.to(tl.int64) * column_stride
        left = tl.load(
            rows[:, None] + along[None, :], mask=(row[:, None] < size) & (term[None, :] < terms), other=0.0
        )
        right = tl.load(
            columns[None, :] + along[:, None],
            mask=(column[None, :] < size) & (term[:, None] < terms),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    exists = (row[:, None] < size) & (column[None, :] < size)
    if not IS_PRODUCT:
        its = rows[:, None] + (column.to(tl.int64) * column_stride)[None, :]
        total = total * square + tl.load(its, mask=exists, other=0.0).to(tl.float32) * linear
        total += tl.where(row[:, None] == column[None, :], constant, 0.0)
    value = total.to(out.dtype.element_ty)
    out += matrix * size * size
    tl.store(out + row.to(tl.int64)[:, None] * size + column[None, :], value, mask=exists)
    if down != across:
        mirrored = (column[:, None] < size) & (row[None, :] < size)
        tl.store(out + column.to(tl.int64)[:, None] * size + row[None, :], tl.trans(value), mask=mirrored)


def symmetric_product(x: Tensor, coefficients: tuple[float, float, float] | None = None) -> Tensor:
    """``x xᵀ`` of each matrix; or with coefficients a, b, c, of symmetric ones, ``a + b x + c x xᵀ``.

    Args:
        x: (count, rows, columns), bfloat16 or float32, of any strides.
        coefficients: See above; a is of the identity matrix.

    Returns:
        (count, rows, rows), of the same dtype; contiguous.
    """
    count, size, terms = x.shape
    out = x.new_empty(count, size, size)
    block = _INTERPRETED if interprets() else _BLOCKS[x.dtype]
    blocks = -(-size // block.side)
    pairs = blocks * (blocks + 1) // 2
    if out.numel():
        with on_device(x.device):
            product[(count * pairs,)](
                x, out, size, terms, pairs, *x.stride(), *(coefficients or (0.0, 0.0, 1.0)),
                IS_PRODUCT=coefficients is None, SIDE=block.side, DEPTH=block.depth,
                num_warps=block.warps, num_stages=block.stages,
            )  # fmt: skip
    return out
