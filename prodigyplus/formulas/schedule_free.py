"""Schedule-Free (arXiv 2405.15682): the training weights y, the base iterate z, and their average x.

    y = (1−β1) z + β1 x

Only y (in the model) and z (in the state) are stored. The offset z − y may be stored instead of z: in
bfloat16, its rounding error is relative to the offset, where that of z would be relative to the weights. Pure
functions on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prodigyplus.terms.step_numbers import StepNumbers

# How many elements of a large tensor step at once on a CPU, so that what is read again is still in a cache.
_AT_ONCE = 1 << 17

# The keys of z and of z − y in a parameter's state.
BASE, OFFSET = "z", "z_minus_y"


def averaging_weight(
    weight: Tensor, weight_sum: Tensor, beta1: Tensor, strength: float | Tensor | None
) -> Tensor:
    """``c``, the weight of z in the average x.

    Args:
        weight: The weight of this step, dlr².
        weight_sum: The sum of the weights of all steps, including this one.
        beta1: β1.
        strength: ``schedulefree_c``, or None for 0: then ``c = weight / weight_sum``.

    Returns:
        ``c``, at most 1; 0 where the sum is 0.
    """
    c = torch.where(weight_sum > 0, weight / weight_sum, torch.zeros_like(weight))
    if strength is not None:
        c = (c * ((1 - beta1) * strength)).clamp_(max=1)
    return c


def y_fraction(beta1: Tensor, c: Tensor) -> Tensor:
    """``1 − β1 (1 − c)``, the fraction of z's step that y makes."""
    return 1 - beta1 * (1 - c)


def is_averaged(state: Mapping[str, Tensor]) -> bool:
    """Whether a parameter's state has z or z − y."""
    return BASE in state or OFFSET in state


def base_iterate(y: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The base iterate z: the tensor in ``state`` itself, or a new one if the offset is stored."""
    return state[BASE] if BASE in state else y + state[OFFSET]


def step_(
    y: Tensor, z: Tensor, u: Tensor, step: Tensor, n: StepNumbers, *, decays: bool, is_offset: bool
) -> None:
    """Step y and z, in place: ``y ← y + [c·(z − y) − step·(1−β1(1−c))·u]``, ``z ← z − step·u``.

    This moves x to ``lerp(x, z, c)``. The bracket is added to y at once: late in a run ``c·(z − y)`` alone
    would be less than half of y's last bit, and be lost at every step, so that x would stand still. With
    weight decay, ``decay·y`` is added to ``step·u``.

    Args:
        y: The weights.
        z: The base iterates; or with ``is_offset`` z − y, for which the step is
            ``z − y ← (1−c)·(z − y) − step·β1(1−c)·u``.
        u: The directions; overwritten.
        step: The step size; 0-dim, or one for each tensor of a stack, in a shape that broadcasts.
        n: The numbers of the step.
        decays: Whether there is weight decay.
        is_offset: Whether ``z`` holds z − y.
    """
    if _goes_in_pieces(y):
        rows = max(1, y.shape[1] * _AT_ONCE // y.numel())
        pieces = (torch.split(tensor, rows, dim=1) for tensor in (y, z, u))
        for some_y, some_z, some_u in zip(*pieces, strict=True):
            step_(some_y, some_z, some_u, step, n, decays=decays, is_offset=is_offset)
        return
    if decays:
        u.mul_(step).addcmul_(y, n.decay)
        step = n.unit
    if is_offset:
        change = z * n.c
        z.sub_(change).addcmul_(u, step * (1 - n.y_fraction), value=-1)
    else:
        change = (z - y).mul_(n.c)  # the difference first: it is exact where z is near y
        z.addcmul_(u, step, value=-1)
    y.add_(change.addcmul_(u, step * n.y_fraction, value=-1))


def _goes_in_pieces(y: Tensor) -> bool:
    """Whether a single large tensor, (1, rows, …), steps a few rows at a time: on a CPU, if not compiled."""
    if torch.compiler.is_compiling():  # first, since a graph must not depend on the sizes
        return False
    return y.device.type == "cpu" and y.numel() > _AT_ONCE and y.ndim > 1 and len(y) == 1 < y.shape[1]


def propose_(
    y: Tensor,
    z: Tensor,
    u: Tensor,
    step: Tensor,
    n: StepNumbers,
    *,
    decays: bool,
    decays_by_lr: bool,
    is_offset: bool,
) -> Tensor:
    """Step z, and return the proposed decrease of y, for Cautious or Grams to mask before :func:`accept_`.

    Args:
        y, z, u, step, n, decays, is_offset: As for :func:`step_`; y is not changed. With ``is_offset``, z
            becomes the offset of the new z from the old y.
        decays_by_lr: The option ``weight_decay_by_lr``: whether weight decay is part of what is masked.

    Returns:
        The decrease, ``c·(y − z) + step·(1−β1(1−c))·u``; a new tensor.
    """
    if decays and decays_by_lr:
        u.mul_(step).addcmul_(y, n.decay)
        step = n.unit
    away = -z if is_offset else y - z
    decrease = away.mul_(n.c).addcmul_(u, step * n.y_fraction)
    z.addcmul_(u, step, value=-1)
    if decays and not decays_by_lr:
        z.addcmul_(y, n.decay, value=-1)
    return decrease


def accept_(
    y: Tensor,
    z: Tensor,
    decrease: Tensor,
    n: StepNumbers,
    *,
    decays: bool,
    decays_by_lr: bool,
    is_offset: bool,
) -> None:
    """Subtract a decrease from :func:`propose_` from y, in place; an offset z is updated for the new y."""
    if decays and not decays_by_lr:
        if is_offset:
            z.addcmul_(y, n.decay * n.y_fraction)
        y.mul_(1 - n.decay * n.y_fraction)
    if is_offset:
        z.add_(decrease)
    y.sub_(decrease)


def descend_(y: Tensor, u: Tensor, step: Tensor, n: StepNumbers, *, decays: bool) -> None:
    """Without Schedule-Free: ``y ← (1 − decay)·y − step·u``, in place in y."""
    if decays:
        y.mul_(1 - n.decay)
    y.addcmul_(u, step, value=-1)


def x_from_y(y: Tensor, state: Mapping[str, Tensor], beta1: float, out: Tensor) -> None:
    """Write the average ``x = lerp(y, z, 1 − 1/β1)`` to ``out``, which may be ``y``."""
    if BASE in state:
        _lerp(y, state[BASE], 1 - 1 / beta1, out)
    else:
        torch.add(y, state[OFFSET], alpha=1 - 1 / beta1, out=out)


def y_from_x(x: Tensor, state: Mapping[str, Tensor], beta1: float, out: Tensor) -> None:
    """Write the training weights ``y = lerp(x, z, 1 − β1)`` to ``out``, which may be ``x``."""
    if BASE in state:
        _lerp(x, state[BASE], 1 - beta1, out)
    else:  # since z − y is β1·(z − x)
        torch.add(x, state[OFFSET], alpha=1 / beta1 - 1, out=out)


def _lerp(start: Tensor, end: Tensor, weight: float, out: Tensor) -> None:
    if start.dtype == end.dtype:
        torch.lerp(start, end, weight, out=out)
    else:
        wide = torch.promote_types(torch.promote_types(start.dtype, end.dtype), torch.float32)
        out.copy_(torch.lerp(start.to(wide), end.to(wide), weight))
