"""The second moment of ``d·g``, factored or full, and the first moment: pure functions on tensors.

Factored (Adafactor, arXiv 1804.04235, eq. 4), over the two largest dimensions of a tensor, rows and
columns; any other dimension is a batch dimension::

    R ← β2 R + (1−β2) d² mean over columns (g²)
    C ← β2 C + (1−β2) d² mean over rows (g²)
    sqrt(V) ≈ sqrt(R · C / mean(R))

Averages are linear, so mean(R) is kept as a third average, fed by the mean over both dimensions: then no
shard needs the other shards' R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prodigyplus.terms import stacks
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Sum
from prodigyplus.terms.step_numbers import StepNumbers

# A matrix smaller than this in every dimension is not worth factoring.
_SMALLEST_FACTORED = 32

# The names of the sums of g² per row, column and matrix, and of the averages that they feed.
FACTORS = ("row", "col", "mean")

# How many elements are squared at a time: on a CPU what fits its caches, elsewhere what is worth a launch.
_RUN, _RUN_ON_DEVICE = 1 << 20, 1 << 24

# How many parts of the outer dimension are summed separately, so that each thread adds up squares that are in
# its own cache.
_LANES = 8

# As in Adafactor: avoids 0/0 in the normalised row factor of an all-zero tensor.
TINY = 1e-30


def factored_dims(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The dimensions ``(row, column)`` over which a tensor of this global shape is factored.

    The column dimension is the largest, the row dimension the second largest; if sizes are equal, the later
    dimension counts as larger. None for tensors that are too small to factor.
    """
    if len(shape) < 2 or max(shape) < _SMALLEST_FACTORED:
        return None
    *_, (_, row), (_, column) = sorted((size, dim) for dim, size in enumerate(shape))
    return row, column


def factored_sizes(layout: Layout) -> tuple[int, int]:
    """The numbers of rows and columns of a factored global tensor, for use as divisors: at least 1."""
    dims = factored_dims(layout.shape)
    assert dims is not None
    return layout.size(dims[0]), layout.size(dims[1])


def is_factored(state: Mapping[str, Tensor]) -> bool:
    """Whether the second moment in a parameter's state is factored."""
    return "exp_avg_sq_row" in state


SquareSums = Callable[[Tensor, int, int, torch.dtype], tuple[Tensor, Tensor]]


def squares(
    grad: Tensor, layout: Layout, *, factored: bool, dtype: torch.dtype, square_sums: SquareSums
) -> dict[str, Sum]:
    """Requests for sums of g²: the total; and if factored, the sums per row, column and matrix.

    The total shows whether the gradient is finite, on which replicas of the tensor must agree.

    Args:
        grad: The stack of local gradients; shape (count, *local shape).
        layout: Their layout.
        factored: Whether their second moment is factored.
        dtype: The dtype of the computation and of the sums.
        square_sums: The function :func:`square_sums`, or one that does the same.
    """
    dims = factored_dims(layout.shape) if factored else None
    if dims is None:
        total = stacks.square_total(grad, dtype)
        return {"total": layout.sum(total, layout.dims, count_replicas=True)}
    row, column = dims
    rows, columns = square_sums(grad, row + 1, column + 1, dtype)
    matrix = rows.sum(row + 1, keepdim=True)
    return {
        "total": layout.sum(stacks.total(matrix), layout.dims, count_replicas=True),
        "row": layout.sum(rows, (column,)),
        "col": layout.sum(columns, (row,)),
        "mean": layout.sum(matrix, (row, column)),
    }


def square_sums(grad: Tensor, row: int, column: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums of g² along the dimension ``column``, and along ``row``; both keep the summed dimension.

    One run of consecutive memory at a time: the squares are then read again from the cache, and take little
    memory.
    """
    outer, inner = sorted((row, column))
    cut = 0 if len(grad) > 1 else outer  # the tensors of a stack stay whole
    run = _RUN if grad.device.type == "cpu" else _RUN_ON_DEVICE
    length = max(1, run * grad.shape[cut] // max(1, grad.numel()))
    along_inner, along_outer = [], []
    squared = grad.new_empty(0, dtype=dtype)
    for piece in torch.split(grad, length // _LANES * _LANES or length, cut):
        wide = piece.to(dtype)
        squared = torch.mul(wide, wide, out=squared if squared.shape == piece.shape else None)
        along_inner.append(squared.sum(inner, keepdim=True))
        shape = squared.shape
        if shape[outer] % _LANES == 0 and shape.numel():
            along_outer.append(squared.view(*shape[:outer], _LANES, -1, *shape[outer + 1 :]).sum(outer + 1))
        else:
            along_outer.append(squared.sum(outer, keepdim=True))
    sums = _joined(along_inner, cut), _joined(along_outer, cut).sum(outer, keepdim=True)
    return sums if outer == row else sums[::-1]


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def advance_factors_(
    state: Mapping[str, Tensor], sums: Mapping[str, Tensor], sizes: tuple[int, int], n: StepNumbers
) -> None:
    """Update the factors of the second moment, in place.

    Args:
        state: The stack's state, which has the factors.
        sums: The sums of g² over the whole tensors, by the names in ``FACTORS``; see :func:`squares`.
        sizes: The numbers of rows and columns of the tensor.
        n: The numbers of the step.
    """
    rows, columns = sizes
    for name, count in zip(FACTORS, (columns, rows, rows * columns), strict=True):
        _average_(state[f"exp_avg_sq_{name}"], n.gated(sums[name]) * (n.sq_weight / count), n.beta2)


def advance_full_(state: Mapping[str, Tensor], grad: Tensor, n: StepNumbers) -> None:
    """Update a full second moment with a stack of gradients, in place."""
    squares = n.gated(grad.to(n.d.dtype)).square_()
    _average_(state["exp_avg_sq"], squares.mul_(n.sq_weight), n.beta2)


def advance_weight_(state: Mapping[str, Tensor], weight: Tensor, n: StepNumbers) -> None:
    """FOCUS's average of the weights, in place: ``w̄ ← β2·w̄ + (1−β2) d²·w``."""
    _average_(state["exp_avg_weight"], weight * n.sq_weight, n.beta2)


def advance_first_(state: Mapping[str, Tensor], grad: Tensor, n: StepNumbers) -> Tensor:
    """``m ← β1·m + (1−β1) d·g``, in place; returns m in the dtype of the computation."""
    return _average_(state["exp_avg"], grad * n.grad_weight, n.beta1)


def _average_(average: Tensor, new: Tensor, keep: Tensor) -> Tensor:
    """``average ← keep·average + new``; the result is also written to ``new``, in its dtype, and returned."""
    average.copy_(new.addcmul_(average.to(new.dtype), keep))
    return new


def roots(state: Mapping[str, Tensor], d: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The input of :func:`deviation`: roots of the two factors, new tensors; or the full moment itself."""
    if not is_factored(state):
        return (state["exp_avg_sq"],)
    row, column, mean = (state[f"exp_avg_sq_{name}"].to(dtype) for name in FACTORS)
    return row.div(mean + TINY).sqrt_(), column.sqrt().div_(d)


def deviation(roots: tuple[Tensor, ...], d: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """``sqrt(V)/d + offset``, a new tensor, on the scale of g, since V averages (d·g)²."""
    if len(roots) == 1:
        return roots[0].to(dtype).sqrt().div_(d).add_(offset)
    row_root, column_root = roots
    return row_root.mul(column_root).add_(offset)
