"""What ``compile=True`` runs through ``torch.compile``: the default options' passes over whole tensors.

Run operator by operator, each operator is a pass over memory, and a direction is kept from its sums to its
move. Compiled, there are two passes, one that measures and one that moves, and the direction is computed in
both rather than written and read. The formulas are those of the rule, by the same functions.

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
from prodigyplus.options import Options
from prodigyplus.stepsize import Scalars

F = TypeVar("F", bound=Callable[..., object])


class Kind(NamedTuple):
    """What of a group's options the passes depend on."""

    atan2: bool
    stable: bool
    decays: bool
    use_speed: object

    @classmethod
    def of(cls, o: Options) -> Kind:
        """That of a group's options."""
        return cls(o.eps is None, o.use_stableadamw, o.weight_decay > 0, o.use_speed)


def applies(o: Options) -> bool:
    """Whether a group's options are those that are compiled; the others run operator by operator."""
    others = (o.use_muon_pp, o.use_cautious, o.use_grams, o.use_adopt, o.use_orthograd, o.use_focus)
    return o.compile and o.use_schedulefree and not any(others)


def _compiled(function: F) -> F:
    """A pass, compiled: once for each number of dimensions, dtype and kind that it is called with."""

    @functools.cache
    def compiled() -> (
        F
    ):  # at the first call: whoever does not compile need not wait for the compiler's import
        made: F = torch.compile(  # type: ignore[call-overload]
            function,
            dynamic=True,
            fullgraph=True,
            recompile_limit=256,
            options={
                # A direction is to be computed where it is used, however much there is to read for it.
                "realize_reads_threshold": 1000,
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


@_compiled
def measure(
    grad: Tensor,
    roots: tuple[Tensor, ...],
    samples: Sequence[Tensor],
    state: Mapping[str, Tensor],
    n: Scalars,
    kind: Kind,
) -> dict[str, Tensor]:
    """The first pass: moves a full second moment and s, and gives the sums that the step needs.

    Args:
        grad: The stack of gradients; shape (count, *local shape).
        roots: See :func:`prodigyplus.moments.roots`; a full moment is moved.
        samples: Those of the gradients and of z, (count, samples); none once the step size is frozen.
        state: What Prodigy keeps, stacked.
        n: The numbers of the step.
        kind: What to do.

    Returns:
        By their names, each of shape (count,).
    """
    sums = {}
    if samples:
        sums = progress.local_sums(samples[0], samples[1], state, kind.use_speed, n.across(1))
    n = n.across(grad.ndim - 1)
    if len(roots) == 1:
        moments.advance_full(roots[0], n.admit(grad.to(n.d.dtype)), n.beta2, n.square)
    if kind.stable:
        sums["uu"] = stacks.square_total(_direction(grad, roots, n, kind))
    return sums


@_compiled
def move(
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    roots: tuple[Tensor, ...],
    scale: Tensor,
    n: Scalars,
    kind: Kind,
    noise: tuple[Sequence[Tensor], Tensor] | None,
) -> None:
    """The second pass: moves y and z in place.

    Args:
        y, z, grad: Stacks of the weights, the base iterates and the gradients; shape (count, *local shape).
        roots, n, kind: See :func:`measure`.
        scale: A factor for each direction; shape (count,).
        noise: For weights in bfloat16, what :func:`prodigyplus.rounding.noise` takes; else None.
    """
    n = n.across(grad.ndim - 1)
    u = _direction(grad, roots, n, kind)
    wide_y, wide_z = y.to(u.dtype), z.to(u.dtype)
    averaging.move(wide_y, wide_z, u, n.dlr * stacks.across(scale, u), n, decays=kind.decays)
    bits = None if noise is None else rounding.noise(*noise)
    rounding.write(y, wide_y, bits, rounding.low_half)
    rounding.write(z, wide_z, bits, rounding.high_half)


def _direction(grad: Tensor, roots: tuple[Tensor, ...], n: Scalars, kind: Kind) -> Tensor:
    deviation = moments.deviation(roots, n.d, n.eps, n.d.dtype)
    return n.admit_((directions.atan2 if kind.atan2 else directions.adam)(grad, deviation))
