"""The passes of a step over a stack of tensors: pure functions whose branches depend on a small ``Kind``.

``moments.squares`` reads the gradient. ``measure_`` reads it again, updates the second moment and Prodigy's
s, and returns the sums that the step needs. ``move_`` reads gradient, y and z, and writes y and z; if
Cautious or Grams mask the move, it only proposes one, and ``finish_`` makes it. Without Schedule-Free there
is one more pass, before ``measure_``: ``momentum_`` updates the first moment.

:mod:`prodigyplus.engine.rule` calls the passes, and has sums completed over shards between them. They run
operator by operator, and keep the direction from ``measure_`` to ``move_``; or through ``torch.compile``,
which computes it in both (see :mod:`prodigyplus.engine.compiled`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.engine.kind import Kind
from prodigyplus.formulas import (
    balance,
    directions,
    moments,
    prodigy,
    schedule_free,
    stochastic_rounding,
    variants,
)
from prodigyplus.terms import stacks
from prodigyplus.terms.step_numbers import Numbers, StepNumbers

State = Mapping[str, Tensor]

Noise = tuple[Sequence[Tensor], Tensor] | None
"""Arguments of :func:`prodigyplus.formulas.stochastic_rounding.noise`; None to round to nearest."""


class FactorSums(NamedTuple):
    """What updates a factored second moment."""

    squares: State  # sums of g² per row, column and matrix of whole tensors
    sizes: tuple[int, int]  # the numbers of rows and columns of a tensor


class Samples(NamedTuple):
    """The samples of a stack for Prodigy's evidence; shapes (count, samples)."""

    grad: Tensor
    base: Tensor  # of the base iterates z; without Schedule-Free, of y

    @classmethod
    def of(
        cls, sample: Callable[[Tensor], Tensor], y: Tensor, grad: Tensor, z: Tensor | None, kind: Kind
    ) -> Samples:
        """The samples of stacks y, grad and z (or z − y), each taken by ``sample``."""
        if z is None:
            return cls(sample(grad), sample(y))
        return cls(sample(grad), sample(y) + sample(z) if kind.is_offset else sample(z))


def momentum_(
    y: Tensor, grad: Tensor, state: State, n: StepNumbers, kind: Kind
) -> tuple[Tensor, Tensor | None]:
    """Update the first moment.

    Args:
        y, grad: Stacks of the weights and of the gradients, (count, *local shape).
        state: The stack's state.
        n: The numbers of the step, in shapes that broadcast.
        kind: The stack's kind.

    Returns:
        The first moment on the scale of g (with ADOPT, of normalised gradients), masked by Cautious or Grams,
        a new tensor that the direction is made from; and with Cautious, how many elements of each tensor
        agree, else None.
    """
    raw = grad.to(n.d.dtype)
    if kind.direction == "muon":
        return moments.advance_first_(state, n.gated(raw), n), None
    if kind.use_adopt:
        by = _denominator(_roots(state, n, kind), n, kind)
        u = n.gated_(_normalised(raw, by, y, state, n, kind))
        raw = variants.adopt_clip_(u, n.adopt_clip)
    else:
        raw = n.gated(raw)
    return mask_(moments.advance_first_(state, raw, n).div_(n.d), raw, kind)


def measure_(
    y: Tensor,
    grad: Tensor,
    state: State,
    factor_sums: FactorSums | None,
    samples: Samples | None,
    momentum: Tensor | None,
    n: Numbers,
    kind: Kind,
    *,
    keeps_direction: bool,
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Update the second moment and Prodigy's s, and return the sums that the step needs.

    Args:
        y, grad, state, kind: As for :func:`momentum_`.
        factor_sums: What updates a factored second moment; None if it is not factored.
        samples: The samples for Prodigy's evidence; None if it takes none.
        momentum: The first result of :func:`momentum_`, overwritten; None with Schedule-Free.
        n: The numbers of the step.
        keeps_direction: Whether to return the direction itself.

    Returns:
        Local sums by name, of shapes (count,): those of the evidence, and for the direction ``uu``, or with
        OrthoGrad ``uu``, ``wu`` and ``ww``; see :func:`scales` and :func:`balance_evidence`. And the
        direction in a tuple, or what :func:`direction` computes it from; empty with Muon.
    """
    across = n.across(grad.ndim - 1)
    sums: dict[str, Tensor] = {}
    kept: tuple[Tensor, ...] = ()
    if kind.direction != "muon":
        wide = grad.to(across.d.dtype)
        u = wide if momentum is None else momentum
        if kind.use_adopt:
            # Normalised by the second moment before this gradient; a first moment is of normalised gradients.
            if momentum is None:
                by = _denominator(_roots(state, across, kind), across, kind)
                u = _normalised(wide, by, y, state, across, kind)
            _advance_second_(y, wide, state, factor_sums, across, kind)
        else:
            _advance_second_(y, wide, state, factor_sums, across, kind)
            kept = _roots(state, across, kind)
            u = _normalised(u, _denominator(kept, across, kind), y, state, across, kind)
        if momentum is None:
            across.gated_(u)
        if keeps_direction:
            kept = (u,)
        del wide  # a copy, if gradients are bfloat16: free it before the sums below
        if kind.projects:
            sums |= variants.dots(u, base(y, state, kind))._asdict()
        elif kind.is_stable or kind.is_balanced:
            sums["uu"] = stacks.square_total(u)
        if kind.is_balanced:
            sums["gu"] = balance.dot(u, grad)
            if kind.projects:
                sums["gw"] = balance.dot(base(y, state, kind).to(u.dtype), grad)
    if kind.is_balanced:
        assert kind.z is not None
        z, dtype = state[kind.z], across.d.dtype
        sums["product"] = balance.product_sum(grad, y, z, dtype, is_offset=kind.is_offset)
    if samples is not None:
        assert kind.evidence is not None
        over = n.across(1)
        of_grad = over.gated(samples.grad.to(over.d.dtype))
        sums |= prodigy.evidence_sums_(of_grad, samples.base, state, kind.evidence, over)
    return sums, kept


class Scales(NamedTuple):
    """The projection and scaling of a direction u: ``(u − along·w)·factor``; shapes (count,)."""

    along: Tensor | None  # None without OrthoGrad
    factor: Tensor | None  # None: 1


def scales(sums: State, numel: int | Tensor, dtype: torch.dtype, kind: Kind) -> Scales:
    """OrthoGrad's projection and StableAdamW's factor.

    Args:
        sums: The sums from :func:`measure_`, over whole tensors.
        numel: The number of elements of every whole tensor, or of each.
        dtype: The dtype of the arithmetic.
        kind: The stack's kind.
    """
    along, factor, square = None, None, sums.get("uu")
    if kind.projects:
        dots = variants.Dots(*(sums[name] for name in variants.Dots._fields))
        along, factor, square = variants.projection(dots, dtype)
    if kind.is_stable:
        assert square is not None
        stable = directions.stable_scale(square, numel)
        factor = stable if factor is None else factor * stable
    return Scales(along, factor)


def step_factor(by: Scales, n: StepNumbers) -> Tensor:
    """What the step size is multiplied by for each tensor, (count,) or 0-dim; 0 in a no-op."""
    return n.unit if by.factor is None else n.unit * by.factor


def balance_evidence(sums: State, by: Scales, numel: int | Tensor, n: StepNumbers) -> tuple[Tensor, Tensor]:
    """The evidence of balance, see :func:`prodigyplus.formulas.balance.evidence`; shapes (count,).

    Args:
        sums: The sums from :func:`measure_`, over whole tensors; with Muon, ``gu`` and ``uu`` come later.
        by: How the directions are projected and scaled.
        numel: The number of elements of every whole tensor, or of each.
        n: The numbers of the step.
    """
    norm, square = sums["gu"], sums["uu"]
    if by.along is not None:
        norm, square = norm - by.along * sums["gw"], square - by.along * sums["wu"]
    if by.factor is not None:
        norm, square = norm * by.factor, square * by.factor.square()
    product, weight = balance.evidence(sums["product"], norm, square, numel)
    return torch.where(n.observes, product, 0), torch.where(n.observes, weight, 0)


def move_(
    y: Tensor,
    z: Tensor | None,
    u: Tensor,
    scale: Tensor,
    n: StepNumbers,
    kind: Kind,
    noise: Noise,
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Move y and z, in place; or, if the move is masked, only z, and propose the decrease of y.

    Args:
        y, z: Stacks of the weights, and of the base iterates or their offsets; (count, *local shape).
        u: The stack of directions; overwritten.
        scale: A factor for each direction, in a shape that broadcasts.
        n, kind: As for :func:`momentum_`.
        noise: The noise of stochastic rounding.

    Returns:
        If the move is masked: the decrease of y; with Cautious, how many of its elements agree, else None;
        and the new z in the dtype of the computation. None if there is nothing to finish.
    """
    wide_y, step = y.to(u.dtype), n.dlr * scale
    if z is None:
        schedule_free.descend_(wide_y, u, step, n, decays=kind.decays)
        write_(y, wide_y, None, None, noise)
        return None
    wide_z = z.to(u.dtype)
    if kind.mask is None:
        schedule_free.step_(wide_y, wide_z, u, step, n, decays=kind.decays, is_offset=kind.is_offset)
        write_(y, wide_y, z, wide_z, noise)
        return None
    decrease = schedule_free.propose_(
        wide_y,
        wide_z,
        u,
        step,
        n,
        decays=kind.decays,
        decays_by_lr=kind.decays_by_lr,
        is_offset=kind.is_offset,
    )
    return *mask_(decrease, u, kind), wide_z


def finish_(
    y: Tensor, z: Tensor | None, decrease: Tensor, wide_z: Tensor, n: StepNumbers, kind: Kind, noise: Noise
) -> None:
    """Subtract the decrease proposed by :func:`move_` from y, in place, and write z; arguments as there."""
    wide_y = y.to(decrease.dtype)
    schedule_free.accept_(
        wide_y,
        wide_z,
        decrease,
        n,
        decays=kind.decays,
        decays_by_lr=kind.decays_by_lr,
        is_offset=kind.is_offset,
    )
    write_(y, wide_y, z, wide_z, noise)


def write_(y: Tensor, wide_y: Tensor, z: Tensor | None, wide_z: Tensor | None, noise: Noise) -> None:
    """Write y and z, rounded from the dtype of the computation."""
    bits = None if noise is None else stochastic_rounding.noise(*noise)
    stochastic_rounding.write_(y, wide_y, bits, stochastic_rounding.low_half)
    if z is not None and wide_z is not None:
        stochastic_rounding.write_(z, wide_z, bits, stochastic_rounding.high_half)


def mask_(move: Tensor, grad: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """Cautious or Grams, in place: make a move agree with a gradient in sign. Overwrites ``grad``.

    Returns:
        The move; and with Cautious, whose result is still to be scaled up, how many elements of each tensor
        agree, else None.
    """
    if kind.mask == "cautious":
        return move, variants.cautious_(move, grad)
    return (variants.grams_(move, grad) if kind.mask == "grams" else move), None


def _denominator(roots: tuple[Tensor, ...], n: StepNumbers, kind: Kind) -> Tensor:
    """What gradients are normalised by, a new tensor: sqrt(V)/d + eps; with FOCUS, the weights' average."""
    if kind.direction == "focus":
        return roots[0].to(n.d.dtype)
    return moments.deviation(roots, n.d, n.eps, n.d.dtype)


def direction(grad: Tensor, roots: tuple[Tensor, ...], n: StepNumbers, kind: Kind) -> Tensor:
    """Adam's direction, computed again from the second result of :func:`measure_`."""
    return n.gated_(_normalised(grad, _denominator(roots, n, kind), grad, {}, n, kind))


def _roots(state: State, n: StepNumbers, kind: Kind) -> tuple[Tensor, ...]:
    """The tensors that :func:`_denominator` is computed from."""
    if kind.direction == "focus":
        return (state["exp_avg_weight"],)
    return moments.roots(state, n.d, n.d.dtype)


def _advance_second_(
    y: Tensor, grad: Tensor, state: State, factor_sums: FactorSums | None, n: StepNumbers, kind: Kind
) -> None:
    if kind.direction == "focus":
        moments.advance_weight_(state, base(y, state, kind).to(grad.dtype), n)
    elif factor_sums is not None:
        moments.advance_factors_(state, factor_sums.squares, factor_sums.sizes, n)
    else:
        moments.advance_full_(state, grad, n)


def base(y: Tensor, state: State, kind: Kind) -> Tensor:
    """The weights for FOCUS and OrthoGrad: the base iterate z, or without Schedule-Free y."""
    return y if kind.z is None else schedule_free.base_iterate(y, state)


def _normalised(numerator: Tensor, by: Tensor, y: Tensor, state: State, n: StepNumbers, kind: Kind) -> Tensor:
    """The direction, in place in ``by``; with FOCUS, a new tensor."""
    if kind.direction == "focus":
        return variants.focus(numerator, by, base(y, state, kind).to(numerator.dtype))
    # Where an element has had no gradient before this one, ADOPT has nothing to divide by.
    unknown = by <= n.eps if kind.use_adopt else None
    normalise_ = directions.atan2_ if kind.direction == "atan2" else directions.adam_
    u = normalise_(numerator, by)
    return u if unknown is None else u.masked_fill_(unknown, 0)
