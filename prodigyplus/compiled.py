"""What ``compile=True`` runs through ``torch.compile``: the default options' passes over whole tensors.

Run operator by operator, each operator is a pass over memory, and a direction is kept from its sums to its
move. Compiled, there are two passes, one that measures and one that moves, and the direction is computed in
both rather than written and read. Before them, sums of squares have a pass of their own. The formulas are
those of the rule, by the same functions.

Whatever changes from step to step comes as a tensor, and sizes are symbols: after the first steps nothing is
compiled again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from prodigyplus import averaging, directions, moments, progress, rounding, stacks
from prodigyplus.layout import Layout
from prodigyplus.options import Options
from prodigyplus.scalars import Packed, Scalars

F = TypeVar("F", bound=Callable[..., object])
Noise = tuple[Sequence[Tensor], Tensor] | None

# How many rows are summed at a time.
_LANES = 16

# How many tensors an element of a direction is computed from.
_READS = 5


class Kind(NamedTuple):
    """What of a group's options the passes depend on."""

    atan2: bool
    stable: bool
    decays: bool
    use_speed: object
    apart: bool  # whether z − y is kept in place of z

    @classmethod
    def of(cls, o: Options, *, apart: bool) -> Kind:
        """That of a group's options."""
        return cls(o.eps is None, o.use_stableadamw, o.weight_decay > 0, o.use_speed, apart)


def applies(o: Options) -> bool:
    """Whether a group's options are those that are compiled; the others run operator by operator."""
    others = (o.use_muon_pp, o.use_cautious, o.use_grams, o.use_adopt, o.use_orthograd, o.use_focus)
    return o.compile and o.use_schedulefree and not any(others)


def _compiled(function: F) -> F:
    """A pass, compiled: once for each number of dimensions, dtype and kind that it is called with."""

    # At the first call: whoever does not compile need not wait for the import of the compiler.
    @functools.cache
    def compiled() -> F:
        made: F = torch.compile(  # type: ignore[call-overload]
            function,
            dynamic=True,
            fullgraph=True,
            recompile_limit=256,
            options={
                # What has more reads is written and read if it is used twice: the factors' roots are to be,
                # directions are to be computed where they are used.
                "realize_reads_threshold": _READS,
                "realize_opcount_threshold": 1000,
                # What is bfloat16 between two operators is rounded there, as it is without.
                "emulate_precision_casts": True,
            },
        )
        return made

    @functools.wraps(function)
    def call(*args: object) -> object:
        return compiled()(*args)

    return cast("F", call)


def square_sums(grad: Tensor, row: int, column: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`prodigyplus.moments.square_sums`."""
    outer, inner = sorted((row, column))
    if grad.shape[outer] % _LANES:
        return moments.square_sums(grad, row, column, dtype)
    along_inner, along_outer = _square_sums(grad, outer, inner, dtype)
    return (along_inner, along_outer) if outer == row else (along_outer, along_inner)


@_compiled
def _square_sums(grad: Tensor, outer: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    squared = grad.to(dtype).square()
    shape = squared.shape
    # A few rows at a time: a sum along what lies far apart reads each line of the cache for itself.
    lanes = squared.reshape(*shape[:outer], shape[outer] // _LANES, _LANES, *shape[outer + 1 :])
    return squared.sum(inner, keepdim=True), lanes.sum(outer + 1).sum(outer, keepdim=True)


class Moment(NamedTuple):
    """What the second moment of a stack is, and what moves it."""

    state: Mapping[str, Tensor]  # the averages, see :func:`prodigyplus.moments.new_state`
    sums: Mapping[str, Tensor]  # where they are factored, the whole ones of g²
    sizes: tuple[int, int]  # and how many rows and columns a tensor has

    @classmethod
    def of(cls, state: Mapping[str, Tensor], squares: Mapping[str, Tensor], layout: Layout) -> Moment:
        """That of the states of a stack, and the sums of :func:`prodigyplus.moments.squares`."""
        averages = {key: value for key, value in state.items() if key.startswith("exp_avg_sq")}
        if not moments.is_factored(state):
            return cls(averages, {}, (0, 0))
        return cls(averages, {key: squares[key] for key in moments.FACTORS}, moments.factored_sizes(layout))


def _measure(
    grad: Tensor,
    moment: Moment,
    samples: Sequence[Tensor],
    evidence: Mapping[str, Tensor],
    n: Packed,
    kind: Kind,
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The first pass: moves the second moment and s, and gives the sums that the step needs.

    Args:
        grad: The stack of gradients; shape (count, *local shape).
        moment: Its averages are moved.
        samples: Those of the gradients and of z, (count, samples); none once the step size is frozen.
        evidence: What Prodigy keeps, stacked.
        n: The numbers of the step.
        kind: What to do.

    Returns:
        The sums by their names, each of shape (count,), and what :func:`prodigyplus.moments.roots` gives.
    """
    sums = {}
    if samples:
        over = n.across(1)
        of_grad, of_z = _written(over.admit(samples[0].to(over.d.dtype))), _written(samples[1])
        sums = progress.local_sums(of_grad, of_z, evidence, kind.use_speed, over)
    across = n.across(grad.ndim - 1)
    if moments.is_factored(moment.state):
        moments.advance_factors(moment.state, moment.sums, moment.sizes, across)
    else:
        moments.advance_full(moment.state, grad, across)
    roots = moments.roots(moment.state, across.d, across.d.dtype)
    if kind.stable:
        sums["uu"] = stacks.square_total(_direction(grad, roots, across, kind))
    return sums, roots


def _move(
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    roots: tuple[Tensor, ...],
    scale: Tensor,
    n: Packed,
    kind: Kind,
    noise: Noise,
) -> None:
    """The second pass: moves y and z in place.

    Args:
        y, z, grad: Stacks of the weights, the base iterates (or what is kept in their place) and the
            gradients; shape (count, *local shape).
        roots: As :func:`_measure` gave them.
        scale: A factor for each direction; shape (count,), or 0-dim.
        n, kind: See :func:`_measure`.
        noise: For what is kept in bfloat16, what :func:`prodigyplus.rounding.noise` takes; else None.
    """
    across = n.across(grad.ndim - 1)
    u = _direction(grad, roots, across, kind)
    wide_y, wide_z = y.to(u.dtype), z.to(u.dtype)
    advance = averaging.move_apart if kind.apart else averaging.move
    advance(wide_y, wide_z, u, across.dlr * stacks.across(scale, u), across, decays=kind.decays)
    bits = None if noise is None else rounding.noise(*noise)
    rounding.write(y, wide_y, bits, rounding.low_half)
    rounding.write(z, wide_z, bits, rounding.high_half)


measure, move = _compiled(_measure), _compiled(_move)


@_compiled
def measure_and_move(
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    moment: Moment,
    every: int,
    evidence: Mapping[str, Tensor],
    n: Packed,
    kind: Kind,
    numel: int,
    noise: Noise,
) -> dict[str, Tensor]:
    """Both passes on tensors that are whole here, with nothing to ask in between: one call in place of two.

    Args:
        y, z, grad, moment, evidence, n, kind, noise: See :func:`_measure` and :func:`_move`.
        every: The distance of two samples.
        numel: How many elements a tensor has.
    """
    base = y + z if kind.apart else z
    samples = [tensor.reshape(len(z), -1)[:, ::every] for tensor in (grad, base)] if evidence else []
    sums, roots = _measure(grad, moment, samples, evidence, n, kind)
    scale = directions.stable_scale(sums["uu"], numel) if kind.stable else n.across(0).unit
    _move(y, z, grad, roots, scale, n, kind, noise)
    return sums


def _written(values: Tensor) -> Tensor:
    """``values``, in memory: else each loop that reads them computes them, from what lies far apart."""
    values = values.contiguous()
    # As itself; but what as_strided() is given, Inductor writes.
    return values.as_strided(values.shape, values.stride())


def _direction(grad: Tensor, roots: tuple[Tensor, ...], n: Scalars, kind: Kind) -> Tensor:
    deviation = moments.deviation(roots, n.d, n.eps, n.d.dtype)
    return n.admit_((directions.atan2 if kind.atan2 else directions.adam)(grad, deviation))
