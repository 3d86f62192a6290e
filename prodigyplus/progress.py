"""One parameter's evidence for the step size: how far it has come from its start, along the gradient.

Prodigy (arXiv 2306.06101) weighs the sum of ⟨g, p0 − z⟩ over the steps against a norm of the sum of the
gradients, on samples: every ``slice_p``-th element. ``use_speed`` changes what is taken of them:

================  ==========================================  =============================================
``use_speed``     of a step's product                         of a step's norm
================  ==========================================  =============================================
``False``         ⟨g, p0 − z⟩                                 ‖s‖₁, with ``s ← β3 s + w·g``
``True``          its sign                                    ‖s‖₁, with ``s ← β3 s + w·sign(g)``
``"relative"``    its average ``m ← (1−k^-¾) m + k^-¾ ⟨…⟩``,  ‖p0 − z‖₂, the largest so far; only to look at
                  over the largest ‖p0 − z‖₁ so far and over
                  ``(1 + ‖p0 − z‖₂)²``
================  ==========================================  =============================================

``w`` is the weight of the step (see :class:`prodigyplus.stepsize.Scalars`), which multiplies the product too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prodigyplus import stacks
from prodigyplus.layout import Layout, wide_dtype
from prodigyplus.options import Options
from prodigyplus.scalars import Scalars

SAMPLED = ("p0", "s")
NUMBERS = ("exp_avg_product", "max_l1", "max_l2")

# All that a parameter may keep for Prodigy: freed once the step size is frozen.
STATE = SAMPLED + NUMBERS

# Distances are not taken to be smaller.
_SMALLEST_DISTANCE = 1e-8


def new_state(weight: Tensor, layout: Layout, options: Options) -> dict[str, Tensor]:
    """What a parameter keeps for Prodigy, before its first step.

    ``p0`` is in the weight's dtype: rounded, its distance to the weights would be progress that nobody made.
    """
    p0 = layout.sample(weight.detach(), options.slice_p).clone(memory_format=torch.contiguous_format)
    if options.use_speed == "relative":
        return {"p0": p0, **{key: weight.new_zeros((), dtype=wide_dtype(weight.device)) for key in NUMBERS}}
    storage = torch.float64 if weight.dtype == torch.float64 else torch.bfloat16
    return {"p0": p0, "s": torch.zeros_like(p0, dtype=storage)}


def local_sums(
    grad: Tensor, base: Tensor, state: Mapping[str, Tensor], use_speed: object, n: Scalars
) -> dict[str, Tensor]:
    """The sums over the samples that are here, under the names :func:`observed` knows; moves ``s`` in place.

    They are taken in float64 over products rounded once, so that they hardly depend on how a tensor is cut
    into shards.

    Args:
        grad, base: The samples of the raw gradient, in the dtype of the numbers, admitted by them; and of z
            (of y without Schedule-Free). Of a stack of parameters; shape (count, samples).
        state: The parameters'.
        use_speed: The option.
        n: The numbers of the step.

    Returns:
        Shapes (count,).
    """
    distance = state["p0"].to(grad.dtype, copy=True).sub_(base)
    if use_speed == "relative":
        distances = {"l1": distance.abs(), "l2_square": distance.square(), "product": distance.mul_(grad)}
        return {name: stacks.total(values, wide_dtype(grad.device)) for name, values in distances.items()}
    product = stacks.total(distance.mul_(grad), wide_dtype(grad.device))
    s = state["s"].mul_(n.beta3).add_((grad.sign() if use_speed else grad) * n.statistic)
    return {"product": product, "norm": stacks.total(s.abs(), wide_dtype(grad.device))}


def observed(
    whole: Mapping[str, Tensor], state: Mapping[str, Tensor], options: Options, n: Scalars
) -> tuple[Tensor, Tensor]:
    """Parameters' products and norms (see the module) from their sums over whole tensors; shapes (count,).

    Zeros where the gradient does not count. Moves what the relative kind keeps in ``state``.
    """
    if options.use_speed == "relative":
        product, norm = _relative(whole, state, n)
    else:
        product, norm = whole["product"], whole["norm"]
    if options.use_speed is True:
        product = product.sign()
    return torch.where(n.observes, product, 0), torch.where(n.observes, norm, 0)


def _relative(whole: Mapping[str, Tensor], state: Mapping[str, Tensor], n: Scalars) -> tuple[Tensor, Tensor]:
    average, l1, l2 = (state[key] for key in NUMBERS)
    new, recent = whole["product"].to(average.dtype), n.recent.to(average.dtype)
    started = l1 > 0  # before, there is no average
    moved = {
        average: torch.lerp(torch.where(started, average, new), new, recent),
        l1: whole["l1"].clamp(min=_SMALLEST_DISTANCE).maximum(l1),
        l2: whole["l2_square"].sqrt().clamp(min=_SMALLEST_DISTANCE).maximum(l2),
    }
    for kept, value in moved.items():
        kept.copy_(torch.where(n.observes, value, kept))
    return average / (l1 * (1 + l2).square()), l2
