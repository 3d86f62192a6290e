"""Schedule-Free (arXiv 2405.15682): the weights of training y, of the base iterate z, the average x.

    y = (1−β1) z + β1 x

Only y (in the model) and z (in the state) are kept. In place of z, its distance from y may be kept: rounded
to bfloat16, that has a relative error of its own, where z would have one of the weights. Pure functions on
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prodigyplus.scalars import Scalars

# The names of z in a parameter's state, and of z − y.
BASE, OFFSET = "z", "z_minus_y"


def is_averaged(state: Mapping[str, Tensor]) -> bool:
    """Whether a parameter's state has z, in either form."""
    return BASE in state or OFFSET in state


def base_iterate(y: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The base iterates z: those in ``state`` themselves, or new ones where their distance from y is kept."""
    return state[BASE] if BASE in state else y + state[OFFSET]


def move(y: Tensor, z: Tensor, update: Tensor, step: Tensor, n: Scalars, *, decays: bool) -> None:
    """One step, in place in y and z: ``y ← lerp(y, z, c) − step·(1−β1(1−c))·u``, ``z ← z − step·u``.

    This moves x to ``lerp(x, z, c)``. With weight decay, which is taken at y, ``step·u`` has it added.

    Args:
        y, z: Weights and base iterates.
        update: The directions u, overwritten.
        step: The step size; 0-dim, or a number for each tensor of a stack, in a shape to be multiplied.
        n: The numbers of the step.
        decays: Whether there is weight decay.
    """
    if decays:
        update.mul_(step).addcmul_(y, n.decay)
        step = n.unit
    y.lerp_(z, n.c).addcmul_(update, step * n.xy, value=-1)
    z.addcmul_(update, step, value=-1)


def move_apart(y: Tensor, offset: Tensor, update: Tensor, step: Tensor, n: Scalars, *, decays: bool) -> None:
    """:func:`move` in terms of y and z − y: ``z − y ← (1−c)·(z − y) − step·β1(1−c)·u``, in place in all.

    Args:
        offset: z − y.
        y, update, step, n, decays: As for :func:`move`.
    """
    if decays:
        update.mul_(step).addcmul_(y, n.decay)
        step = n.unit
    y.addcmul_(offset, n.c).addcmul_(update, step * n.xy, value=-1)
    offset.addcmul_(offset, n.c, value=-1).addcmul_(update, step * (1 - n.xy), value=-1)


def taken(away: Tensor, update: Tensor, c: Tensor, y_step: Tensor) -> Tensor:
    """What :func:`move` takes off y, ``c·(y − z) + y_step·u``, in place in ``away``, which is y − z."""
    return away.mul_(c).addcmul_(update, y_step)


def x_from_y(y: Tensor, state: Mapping[str, Tensor], beta1: float, out: Tensor) -> None:
    """Write the average ``x = lerp(y, z, 1 − 1/β1)`` to ``out``, which may be ``y``."""
    if BASE in state:
        _lerp(y, state[BASE], 1 - 1 / beta1, out)
    else:
        torch.add(y, state[OFFSET], alpha=1 - 1 / beta1, out=out)


def y_from_x(x: Tensor, state: Mapping[str, Tensor], beta1: float, out: Tensor) -> None:
    """Write the weights of training ``y = lerp(x, z, 1 − β1)`` to ``out``, which may be ``x``."""
    if BASE in state:
        _lerp(x, state[BASE], 1 - beta1, out)
    else:  # z − y is β1·(z − x)
        torch.add(x, state[OFFSET], alpha=1 / beta1 - 1, out=out)


def _lerp(start: Tensor, end: Tensor, weight: float, out: Tensor) -> None:
    if start.dtype == end.dtype:
        torch.lerp(start, end, weight, out=out)
    else:
        wide = torch.promote_types(torch.promote_types(start.dtype, end.dtype), torch.float32)
        out.copy_(torch.lerp(start.to(wide), end.to(wide), weight))
