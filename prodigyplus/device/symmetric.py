"""Products of matrices with their own transposes, in Triton, which are symmetric: half the work is enough.

Only blocks on and above the diagonal are computed; each is also written to its mirror position. Sums are in
float32. So are products of float32: TensorFloat-32 is never used, whatever torch's settings are.
"""

# No ``from __future__ import annotations``: Triton reads the annotations of arguments at run time.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodigyplus.device.jit import interprets, on_device


class Block(NamedTuple):
    """What a program computes: a block of ``side`` × ``side``, summing ``depth`` terms at a time."""

    side: int
    depth: int
    warps: int
    stages: int


# They fit the 99 KiB of shared memory of the smallest GPUs that multiply bfloat16.
_BLOCKS = {torch.bfloat16: Block(128, 64, 8, 3), torch.float32: Block(64, 32, 4, 3)}
DTYPES = tuple(_BLOCKS)

# Small enough that small matrices have several of them in the interpreter.
_INTERPRETED = Block(16, 16, 1, 1)


@triton.jit
def _block_of(pair):
    """The block's row and column; pairs on and above the diagonal are counted column by column."""
    across = ((tl.sqrt((8 * pair + 1).to(tl.float32)) - 1.0) / 2.0).to(tl.int32)
    # The float32 square root may be off by one.
    across = tl.where(across * (across + 1) // 2 > pair, across - 1, across)
    across = tl.where((across + 1) * (across + 2) // 2 <= pair, across + 1, across)
    return pair - across * (across + 1) // 2, across


@triton.jit
def product(
    x, out, size, terms, pairs, matrix_stride, row_stride, column_stride, constant, linear, square,
    IS_PRODUCT: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of x xᵀ, and its mirror image.

    Unless ``IS_PRODUCT``, of ``constant`` · I + ``linear`` · x + ``square`` · x xᵀ, where x is symmetric.
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
    """``x xᵀ`` of each matrix; or with coefficients a, b, c, and symmetric x, ``a I + b x + c x xᵀ``.

    Args:
        x: (count, rows, columns), bfloat16 or float32, of any strides.
        coefficients: a, b and c.

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
