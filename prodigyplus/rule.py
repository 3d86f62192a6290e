"""One parameter's step, from its gradient to its new weights, as a coroutine.

It reads top to bottom like the algorithm and knows nothing of processes: where it needs a number that
spans the whole tensor it yields the sums over the piece that it holds and is sent back the sums over
the whole (see :mod:`prodigyplus.layout`). Between two yields stand pure functions on tensors.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from prodigyplus import averaging, directions, moments, rounding, samples, stepsize
from prodigyplus.layout import Layout, Sum
from prodigyplus.options import Options
from prodigyplus.stepsize import GroupStep

Rule = Generator[dict[str, Sum], dict[str, Tensor], None]

# What Prodigy remembers of a parameter, as samples; freed once the step size is frozen.
PRODIGY_STATE = ("p0", "s")


@dataclass(slots=True)
class Part:
    """What one parameter brings to a step: plain local tensors, and its place in the whole."""

    weight: Tensor  # y, changed in place
    grad: Tensor  # of the same shape and dtype; zeros where there is none here, but may be elsewhere
    state: dict[str, Tensor]  # as new_state() makes it, changed in place
    layout: Layout
    group: GroupStep
    number: int  # of the parameter in the optimiser
    # Whether a gradient is here; None where nobody needs to ask, since every piece's is here if one's is.
    present: bool | None = None


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that the arithmetic on a tensor is done in: never below float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def new_state(weight: Tensor, grad: Tensor, layout: Layout, options: Options) -> dict[str, Tensor]:
    """What the optimiser remembers of one parameter, before its first step.

    ========================================  ======================  ================================
    key                                       dtype                   shape
    ========================================  ======================  ================================
    ``z`` (Schedule-Free)                     the weight's            the weight's
    ``exp_avg`` (otherwise)                   the gradient's          the weight's
    ``exp_avg_sq_row``, ``_col``, ``_mean``   float32, see options    1 in the averaged dimensions
    ``exp_avg_sq`` (where not factored)       the gradient's          the weight's
    ``p0``, ``s`` (until ``prodigy_steps``)   bfloat16; float64 for   (ceil(elements / ``slice_p``),)
                                              float64 gradients
    ========================================  ======================  ================================
    """
    dtype = torch.float32 if options.factored_fp32 else grad.dtype
    if grad.dtype == torch.float64:
        dtype = torch.float64
    state = moments.new_state(grad, layout, factored=options.factored, dtype=dtype)
    if options.use_schedulefree:
        state["z"] = weight.detach().clone(memory_format=torch.preserve_format)
    else:
        state["exp_avg"] = torch.zeros_like(grad)
    storage = torch.float64 if grad.dtype == torch.float64 else torch.bfloat16
    state["p0"] = layout.sample(weight.detach(), options.slice_p).to(storage, copy=True)
    state["s"] = torch.zeros_like(state["p0"])
    return state


def saved_form(key: str, shape: tuple[int, ...], every: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How an entry of the state is saved, for a parameter of this global shape.

    Returns:
        The global shape that it is saved in, and the dimensions in which every shard has the whole.
    """
    if key in PRODIGY_STATE:
        return samples.rows_shape(shape, every), (max(0, len(shape) - 1),)
    whole = moments.averaged_dims(key, shape)
    return tuple(1 if dim in whole else size for dim, size in enumerate(shape)), whole


def update(part: Part) -> Rule:
    """One step of one parameter, as SPEC's "One step with the defaults" has it."""
    weight, state, layout, o = part.weight, part.state, part.layout, part.group.options
    dtype = compute_dtype(weight)
    factored = "exp_avg_sq" not in state

    # The raw gradient's squares. With the answer it is known whether the step happens at all.
    asked = moments.squares(part.grad, layout, factored=factored, dtype=dtype)
    if part.present is not None:
        asked["present"] = Sum(torch.full_like(asked["total"].local, part.present), layout.dims, copies=True)
    squares = yield asked
    n = part.group.scalars(weight.device, dtype)
    if part.present is False:
        n = n.only_if(squares["present"] > 0)

    if not part.group.moved_before:
        _anchor(weight, state, layout, o)
    base = state["z"] if o.use_schedulefree else weight
    sums: dict[str, Sum] = {}

    # Prodigy's statistics: the raw gradient, before this step's move. Once freed, they do not come back.
    adapts = part.group.adapts and "s" in state
    if adapts:
        product, norm = stepsize.advance_statistics(
            layout.sample(part.grad, o.slice_p),
            state["p0"],
            layout.sample(base, o.slice_p),
            state["s"],
            o.prodigy_beta,
            n,
        )
        sums |= {"product": Sum(product, layout.dims), "norm": Sum(norm, layout.dims)}

    # Second moment.
    u = n.admit(part.grad.to(dtype))
    if factored:
        admitted = {name: n.admit(squares[name]) for name in ("row", "col", "mean")}
        moments.advance_factors(state, admitted, layout, n.beta2, n.square)
    else:
        moments.advance_full(state, u, n.beta2, n.square)

    # Direction.
    if not o.use_schedulefree:
        u = moments.advance_first(state, u, n.beta1, n.gradient).div_(n.d)
    deviation = moments.deviation(state, n.d, n.eps, dtype)
    u = directions.atan2(u, deviation) if o.eps is None else directions.adam(u, deviation)
    del deviation
    if o.use_stableadamw:
        sums["square"] = Sum(torch.linalg.vector_norm(u).square(), layout.dims)

    whole = (yield sums) if sums else {}

    if adapts:
        part.group.observe(n.admit(whole["product"]), n.admit(whole["norm"]))
    step = n.dlr
    if o.use_stableadamw:
        step = step * directions.stable_scale(whole["square"], layout.numel)

    # The move: Schedule-Free, or decoupled weight decay and a plain step.
    y, z = weight.to(dtype), base.to(dtype)
    if o.use_schedulefree:
        if o.weight_decay:
            u.mul_(step).addcmul_(y, n.decay)
            step = n.unit
        averaging.move(y, z, u, n.c, z_step=step, y_step=step * n.xy)
    else:
        if o.weight_decay:
            y.mul_(1 - n.decay)
        y.addcmul_(u, step, value=-1)

    _write(part, y, z, n)


def _anchor(weight: Tensor, state: dict[str, Tensor], layout: Layout, options: Options) -> None:
    """Start from the weights as they are at the first real step.

    torch's checkpoint helpers create state by a step with ``lr=0``, after which weights may be loaded.
    """
    if "z" in state:
        state["z"].copy_(weight)
    if "p0" in state:
        state["p0"].copy_(layout.sample(weight, options.slice_p))


def _write(part: Part, y: Tensor, z: Tensor, n: stepsize.Scalars) -> None:
    """Write y and z back where they are not what was computed on."""
    targets = [(part.weight, y, rounding.low_half)]
    if "z" in part.state:
        targets.append((part.state["z"], z, rounding.high_half))
    bits = None
    for target, source, half in targets:
        noise = None
        widened = target.dtype == torch.bfloat16 and source.dtype == torch.float32
        if widened and part.group.options.stochastic_rounding:
            if bits is None:
                bits = rounding.noise(part.layout.positions(target.device), n.step, part.number)
            noise = half(bits)
        rounding.write(target, source, noise)
