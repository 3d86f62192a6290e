"""Schedule-Free (arXiv 2405.15682): the weights of training y, of the base iterate z, the average x.

    y = (1−β1) z + β1 x

Only y (in the model) and z (in the state) are kept. Pure functions on tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prodigyplus.scalars import Scalars


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


def taken(y: Tensor, z: Tensor, update: Tensor, c: Tensor, y_step: Tensor) -> Tensor:
    """What :func:`move` takes off y, ``c·(y − z) + y_step·u``, a new tensor; changes nothing."""
    return (y - z).mul_(c).addcmul_(update, y_step)


def x_from_y(y: Tensor, z: Tensor, beta1: float, out: Tensor) -> None:
    """Write the average ``x = lerp(y, z, 1 − 1/β1)`` to ``out``, which may be ``y``."""
    _lerp(y, z, 1 - 1 / beta1, out)


def y_from_x(x: Tensor, z: Tensor, beta1: float, out: Tensor) -> None:
    """Write the weights of training ``y = lerp(x, z, 1 − β1)`` to ``out``, which may be ``x``."""
    _lerp(x, z, 1 - beta1, out)


def _lerp(start: Tensor, end: Tensor, weight: float, out: Tensor) -> None:
    if start.dtype == end.dtype:
        torch.lerp(start, end, weight, out=out)
    else:
        wide = torch.promote_types(torch.promote_types(start.dtype, end.dtype), torch.float32)
        out.copy_(torch.lerp(start.to(wide), end.to(wide), weight))
