"""The passes through ``torch.compile``: what ``compile=True`` runs, for the kinds that can be compiled.

Run operator by operator, each operator is a pass over memory, and the direction is kept from ``measure_`` to
``move_``. Compiled, each of the two is one pass, and both compute the direction, which is cheaper than
writing and reading it. The functions are those of :mod:`prodigyplus.engine.passes`.

Whatever changes from step to step is passed as a tensor, and sizes are symbolic, except a size of 1, for
which torch.compile makes another graph: after one stack of one and one of several, nothing is compiled again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from prodigyplus import torch_private
from prodigyplus.engine import passes
from prodigyplus.engine.kind import ADMITTED_BY_ALL, Kind
from prodigyplus.engine.passes import FactorSums, Noise, Samples, State
from prodigyplus.formulas import moments, schedule_free
from prodigyplus.terms import stacks
from prodigyplus.terms.layout import strided_samples
from prodigyplus.terms.step_numbers import PackedNumbers

F = TypeVar("F", bound=Callable[..., object])

# How many rows are summed at a time.
_LANES = 16

# The values of the fields of a kind whose passes can be compiled.
_ADMITTED: dict[str, tuple[object, ...]] = {
    **ADMITTED_BY_ALL,
    "direction": ("adam", "atan2"),
    "z": (schedule_free.BASE, schedule_free.OFFSET),
}


@functools.cache
def admits(kind: Kind) -> bool:
    """Whether the passes of a kind can be compiled."""
    return kind.refused_by(_ADMITTED) is None


def _compiled(function: F) -> F:
    """Compile a pass, once for each number of dimensions, dtype and kind that it is called with."""

    # At the first call, so that the compiler is imported only where it is used.
    @functools.cache
    def compiled() -> F:
        return torch_private.compiled(function)

    @functools.wraps(function)
    def call(*args: object) -> object:
        return compiled()(*args)

    return cast("F", call)


def square_sums(grad: Tensor, row: int, column: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`prodigyplus.formulas.moments.square_sums`."""
    outer, inner = sorted((row, column))
    if grad.shape[outer] % _LANES:
        return moments.square_sums(grad, row, column, dtype)
    along_inner, along_outer = _square_sums(grad, outer, inner, dtype)
    return (along_inner, along_outer) if outer == row else (along_outer, along_inner)


@_compiled
def _square_sums(grad: Tensor, outer: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    squared = grad.to(dtype).square()
    shape = squared.shape
    # A few rows at a time: a sum along an outer dimension would read each cache line separately.
    lanes = squared.reshape(*shape[:outer], shape[outer] // _LANES, _LANES, *shape[outer + 1 :])
    return squared.sum(inner, keepdim=True), lanes.sum(outer + 1).sum(outer, keepdim=True)


def _measure_(
    y: Tensor,
    grad: Tensor,
    state: State,
    factor_sums: FactorSums | None,
    samples: Samples | None,
    n: PackedNumbers,
    kind: Kind,
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """:func:`prodigyplus.engine.passes.measure_`, without keeping the direction."""
    return passes.measure_(y, grad, state, factor_sums, samples, None, n, kind, keeps_direction=False)


def _move_(
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    roots: tuple[Tensor, ...],
    scale: Tensor,
    n: PackedNumbers,
    kind: Kind,
    noise: Noise,
) -> None:
    """:func:`prodigyplus.engine.passes.move_`, with the direction computed again.

    Args:
        y, z, n, kind, noise: As in that function.
        grad: The stack of gradients.
        roots: The second result of :func:`measure_`.
        scale: A factor for each direction; shape (count,), or 0-dim.
    """
    across = n.across(grad.ndim - 1)
    u = passes.direction(grad, roots, across, kind)
    passes.move_(y, z, u, stacks.across(scale, u), across, kind, noise)


measure_, move_ = _compiled(_measure_), _compiled(_move_)


@_compiled
def measure_and_move_(
    y: Tensor,
    grad: Tensor,
    state: State,
    factor_sums: FactorSums | None,
    slice_p: int,
    n: PackedNumbers,
    kind: Kind,
    numel: int,
    noise: Noise,
) -> dict[str, Tensor]:
    """Both passes in one call, for tensors that are whole on this rank: no sums are asked for in between.

    Args:
        y, grad, state, factor_sums, n, kind, noise: As for :func:`measure_` and :func:`move_`.
        slice_p: The distance between samples; 0 if no samples are needed.
        numel: The number of elements of a tensor.

    Returns:
        The sums of :func:`measure_`.
    """
    assert kind.z is not None
    z, dims, samples = state[kind.z], grad.ndim - 1, None
    if slice_p:
        samples = Samples.of(lambda stack: strided_samples(stack, dims, 0, slice_p), y, grad, z, kind)
        samples = Samples(*map(_written, samples))
    sums, roots = _measure_(y, grad, state, factor_sums, samples, n, kind)
    numbers = n.across(0)
    scale = passes.step_factor(passes.scales(sums, numel, numbers.d.dtype, kind), numbers)
    _move_(y, z, grad, roots, scale, n, kind, noise)
    return sums


def _written(values: Tensor) -> Tensor:
    """``values``, materialised: otherwise each loop that reads them would gather them from memory again."""
    values = values.contiguous()
    # The same view, but Inductor writes the input of as_strided() to memory.
    return values.as_strided(values.shape, values.stride())
