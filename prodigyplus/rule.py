"""One parameter's step, from its gradient to its new weights, as a coroutine.

It reads top to bottom like the algorithm and knows nothing of processes: where it needs a number that
spans the whole tensor it yields the sums over the piece that it holds and is sent back the sums over
the whole (see :mod:`prodigyplus.layout`). Between two yields stand pure functions on tensors.

Small parameters of one shape are moved as one, so every tensor here is a stack of theirs, with a dimension
more before its own (see :mod:`prodigyplus.stacks`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus import (
    averaging,
    compiled,
    directions,
    moments,
    muon,
    progress,
    rounding,
    samples,
    stacks,
    variants,
)
from prodigyplus.layout import Layout, Sum
from prodigyplus.muon import Matrices
from prodigyplus.options import Options
from prodigyplus.scalars import Scalars
from prodigyplus.stepsize import GroupStep

Requests = Mapping[str, Sum | Matrices]
Rule = Generator[Requests, dict[str, Tensor], None]
Directed = Generator[Requests, dict[str, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
Evidence = Callable[[], dict[str, Sum]]
Changed = Generator[Requests, dict[str, Tensor], Tensor]


class Member(NamedTuple):
    """What a parameter brings to a step: plain local tensors, and where they are."""

    weight: Tensor  # y, changed in place
    grad: Tensor  # of the same shape; zeros where there is none here, but may be elsewhere
    state: dict[str, Tensor]  # as new_state() makes it, changed in place
    layout: Layout
    group: GroupStep
    number: int  # of the parameter in the optimiser
    # Whether its gradient is here; None where nobody needs to ask, since every piece's is here if one's is.
    present: bool | None

    @property
    def likeness(self) -> tuple[object, ...]:
        """Members of equal likeness may be one; the same on all ranks."""
        dtypes = [tensor.dtype for tensor in self.state.values()]
        weight, grad = self.weight, self.grad
        return id(self.group), id(self.layout), weight.device, weight.dtype, grad.dtype, *self.state, *dtypes

    @property
    def is_matrix(self) -> bool:
        """Whether the direction is that of whole matrices, orthogonalised."""
        return self.group.options.use_muon_pp

    @property
    def nbytes(self) -> int:
        """How many bytes its direction has at most, on the rank that has most of it."""
        return self.layout.most * compute_dtype(self.weight).itemsize


@dataclass(slots=True)
class Part:
    """A member, or several alike, that move as one."""

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    layout: Layout
    group: GroupStep
    numbers: list[int]
    present: list[bool] | None
    nbytes: int
    is_matrix: bool

    @classmethod
    def of(cls, members: Sequence[Member]) -> Part:
        """Members of equal likeness."""
        first = members[0]
        return cls(
            [member.weight for member in members],
            [member.grad for member in members],
            [member.state for member in members],
            first.layout,
            first.group,
            [member.number for member in members],
            None if first.present is None else [bool(member.present) for member in members],
            len(members) * first.nbytes,
            first.is_matrix,
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return compute_dtype(self.weights[0])

    def share_state(self) -> dict[str, Tensor]:
        """The states as stacks, to be changed in place, and then given to :meth:`keep_state`."""
        return {key: stacks.share([state[key] for state in self.states]) for key in self.states[0]}

    def keep_state(self, stacked: Mapping[str, Tensor]) -> None:
        """Write the states back, where they have not been changed in place."""
        for key, values in stacked.items():
            stacks.keep([state[key] for state in self.states], values)

    @property
    def cost(self) -> tuple[int, int, int]:
        """What it costs to orthogonalise a matrix of it, and its shape: by that they are ordered."""
        _, rows, columns = muon.sizes(self.layout.shape, batched=self.group.options.muon_batched)
        return muon.cost(rows, columns), rows, columns


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that the arithmetic on a tensor is done in: never below float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def new_state(weight: Tensor, grad: Tensor, layout: Layout, options: Options) -> dict[str, Tensor]:
    """What the optimiser remembers of one parameter, before its first step.

    ========================================  ======================  ================================
    key                                       dtype                   shape
    ========================================  ======================  ================================
    ``z`` (Schedule-Free)                     the weight's            the weight's
    ``z_minus_y`` (instead: ``bfloat16_z``)   bfloat16                the weight's
    ``exp_avg`` (otherwise)                   the gradient's          the weight's
    ``exp_avg_sq_row``, ``_col``, ``_mean``   float32, see options    1 in the averaged dimensions
    ``exp_avg_sq`` (where not factored)       the gradient's          the weight's
    ``exp_avg_weight`` (FOCUS, instead)       the gradient's          the weight's
    nothing (Muon, instead)
    ``p0`` (until ``prodigy_steps``)          the weight's            (ceil(elements / ``slice_p``),)
    ``s`` (likewise)                          bfloat16; float64 for   (ceil(elements / ``slice_p``),)
                                              float64 weights
    ``exp_avg_product``, ``max_l1``,          float64                 ()
    ``max_l2`` (SPEED "relative", for ``s``)
    ========================================  ======================  ================================
    """
    dtype = torch.float32 if options.factored_fp32 else grad.dtype
    if grad.dtype == torch.float64:
        dtype = torch.float64
    state: dict[str, Tensor] = {}
    if options.use_focus:
        state = {"exp_avg_weight": torch.zeros_like(grad)}
    elif not options.use_muon_pp:
        state = moments.new_state(grad, layout, factored=options.factored, dtype=dtype)
    if options.use_schedulefree and options.bfloat16_z and weight.dtype == torch.float32:
        state[averaging.OFFSET] = torch.zeros_like(weight, dtype=torch.bfloat16)
    elif options.use_schedulefree:
        state[averaging.BASE] = weight.detach().clone()
    else:
        state["exp_avg"] = torch.zeros_like(grad)
    return state | progress.new_state(weight, layout, options)


def freed_state(weight: Tensor, layout: Layout, options: Options) -> dict[str, Tensor]:
    """What is saved in the place of what Prodigy has freed: zeros.

    torch's checkpoint helpers fill the state of a new optimiser, and fail at what of it is not in the file.
    """
    return {
        key: torch.zeros_like(value) for key, value in progress.new_state(weight, layout, options).items()
    }


def anchor(weight: Tensor, state: dict[str, Tensor], layout: Layout, options: Options) -> None:
    """Start from the weights as they are at the first real step.

    torch's checkpoint helpers create state by a step with ``lr=0``, after which weights may be loaded.
    """
    if averaging.BASE in state:
        state[averaging.BASE].copy_(weight)
    if averaging.OFFSET in state:
        state[averaging.OFFSET].zero_()
    if "p0" in state:
        state["p0"].copy_(layout.sample(weight, options.slice_p))


def saved_form(key: str, shape: tuple[int, ...], every: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How an entry of the state is saved, for a parameter of this global shape.

    Returns:
        The global shape that it is saved in, and the dimensions in which every shard has the whole.
    """
    if key in progress.NUMBERS:
        return (), tuple(range(len(shape)))
    if key in progress.SAMPLED:
        return samples.rows_shape(shape, every), (max(0, len(shape) - 1),)
    whole = moments.averaged_dims(key, shape)
    return tuple(1 if dim in whole else size for dim, size in enumerate(shape)), whole


def update(part: Part) -> Rule:
    """One step of a part, from its gradients to its new weights."""
    layout, o = part.layout, part.group.options

    # The raw gradient's squares. With the answer it is known whether the step happens at all.
    grad = stacks.read(part.grads)
    compiles = compiled.applies(o)
    asked = moments.squares(
        grad,
        layout,
        factored=moments.is_factored(part.states[0]),
        dtype=part.dtype,
        square_sums=compiled.square_sums if compiles else moments.square_sums,
    )
    if part.present is not None:
        asked["present"] = Sum(_present(part.present, asked["total"].local), layout.dims, copies=True)
    del grad
    squares = yield asked
    n = part.group.scalars(part.weights[0].device, part.dtype)
    if part.group.alone:
        n = n.only_if(squares["total"].isfinite())
    if part.present is not None and not all(part.present):
        n = n.only_if(squares["present"] > 0)
    if compiles:
        yield from _compiled(part, squares, n)
        return

    grad = stacks.read(part.grads)
    state = part.share_state()
    base = stacks.read(part.weights)
    if o.use_schedulefree:
        base = averaging.base_iterate(base, state)

    # The direction, and what spans it; and before the move, the raw gradient's evidence for the step size.
    held = _Held(part, state, n.across(len(layout.shape)))
    evidence = functools.partial(_evidence, part, grad, base, state, n.across(1))
    if part.is_matrix:
        direct = _orthogonal(held, grad, evidence)
    else:
        direct = _elementwise(held, grad, squares, base, evidence)
    del grad, base, evidence
    u, scale, whole = yield from direct
    if _adapts(part):
        part.group.observe(part.numbers, *progress.observed(whole, state, o, n))
    step = held.n.dlr * scale

    # The move.
    if not o.use_schedulefree:
        _descend(held, u, step)
    elif o.use_cautious or o.use_grams:
        u, agreeing, z = _propose(held, u, step)
        u = yield from _scaled_up(held, u, agreeing)
        _accept(held, u, z)
    else:
        _average(held, u, step)
    part.keep_state(state)


def _adapts(part: Part) -> bool:
    """Whether the gradient is evidence for the step size; once its state is freed, it is not."""
    return part.group.adapts and "p0" in part.states[0]


def _evidence(
    part: Part, grad: Tensor, base: Tensor, state: Mapping[str, Tensor], n: Scalars
) -> dict[str, Sum]:
    if not _adapts(part):
        return {}
    grads, bases = (part.layout.sample(tensor, part.group.options.slice_p) for tensor in (grad, base))
    grads = n.admit(grads.to(n.d.dtype))
    found = progress.local_sums(grads, bases, state, part.group.options.use_speed, n)
    return {name: Sum(value, part.layout.dims) for name, value in found.items()}


def _compiled(part: Part, squares: Mapping[str, Tensor], n: Scalars) -> Rule:
    """The rest of a step with the default options, in compiled passes; see :mod:`prodigyplus.compiled`."""
    layout, o = part.layout, part.group.options
    kind = compiled.Kind.of(o, apart=averaging.OFFSET in part.states[0])
    state = part.share_state()
    z, grad = state[averaging.OFFSET if kind.apart else averaging.BASE], stacks.read(part.grads)
    moment = compiled.Moment.of(state, squares, layout)
    evidence = {key: state[key] for key in progress.SAMPLED if key in state and _adapts(part)}
    if layout.cuts:
        base = averaging.base_iterate(stacks.read(part.weights), state) if evidence else z
        samples = [layout.sample(tensor, o.slice_p) for tensor in (grad, base) if evidence]
        found, roots = compiled.measure(grad, moment, samples, evidence, n.packed, kind)
        del grad, base, samples
        whole = (yield {name: Sum(value, layout.dims) for name, value in found.items()}) if found else {}
        scale = n.unit.expand(len(part.weights))
        if o.use_stableadamw:
            scale = scale * directions.stable_scale(whole["uu"], layout.numel)
        weights, grad = stacks.read(part.weights), stacks.read(part.grads)
        compiled.move(weights, z, grad, roots, scale, n.packed, kind, _noise(part, n.step))
    else:
        weights, noise = stacks.read(part.weights), _noise(part, n.step)
        whole = compiled.measure_and_move(
            weights, z, grad, moment, o.slice_p, evidence, n.packed, kind, layout.numel, noise
        )
    if _adapts(part):
        part.group.observe(part.numbers, *progress.observed(whole, state, o, n))
    stacks.write(part.weights, weights)
    part.keep_state(state)


class _Held(NamedTuple):
    """What of a part stays from one round to the next."""

    part: Part
    state: dict[str, Tensor]  # shared
    n: Scalars  # in shapes to be multiplied with the parameters

    @property
    def layout(self) -> Layout:
        return self.part.layout

    @property
    def options(self) -> Options:
        return self.part.group.options

    @property
    def is_apart(self) -> bool:
        """Whether z − y is kept in place of z."""
        return averaging.OFFSET in self.state

    @property
    def base_key(self) -> str:
        return averaging.OFFSET if self.is_apart else averaging.BASE


def _present(present: list[bool], like: Tensor) -> Tensor:
    """A number for each parameter, 1 if its gradient is here and 0 if not; shape (count,), as ``like``."""
    if all(present):
        return torch.ones_like(like)
    return torch.stack([torch.full_like(like[0], here) for here in present])


def _elementwise(
    held: _Held, grad: Tensor, squares: Mapping[str, Tensor], base: Tensor, evidence: Evidence
) -> Directed:
    """Adam's direction, or what an option has in its place; asks for the sums of ``evidence`` too.

    Returns:
        The direction, a new tensor; a factor of it, a number for each parameter; and what was answered.
    """
    layout, o, n = held.layout, held.options, held.n
    u = yield from _normalise(held, grad, squares, base)
    # Its samples lie far apart, and are read much faster when the whole has just been.
    sums = evidence()
    del grad, evidence
    projects = o.use_orthograd and math.prod(layout.shape) > 1
    if projects:
        dots = variants.dots(u, base)._asdict()
        sums |= {name: Sum(value, layout.dims) for name, value in dots.items()}
    elif o.use_stableadamw:
        sums["uu"] = Sum(stacks.square_total(u), layout.dims)
    if not projects:
        del base
    whole = (yield sums) if sums else {}

    scale, square = n.unit, whole.get("uu")
    if projects:
        whole_dots = variants.Dots(*(whole[name] for name in variants.Dots._fields))
        along, factor, square = variants.projection(whole_dots, u.dtype)
        u.addcmul_(base.to(u.dtype), stacks.across(along, u), value=-1)
        scale = stacks.across(factor, u)
    if o.use_stableadamw:
        assert square is not None
        scale = scale * stacks.across(directions.stable_scale(square, layout.numel), u)
    return u, scale, whole


def _orthogonal(held: _Held, grad: Tensor, evidence: Evidence) -> Directed:
    """Muon's direction; the rest as in :func:`_elementwise`. Moves the first moment."""
    layout, o, n, dtype = held.layout, held.options, held.n, held.part.dtype
    raw = grad
    if not o.use_schedulefree:
        moments.advance_first(held.state, n.admit(grad.to(dtype)), n.beta1, n.gradient)
        grad = held.state["exp_avg"]
    # What is finite in float64 need not be in bfloat16.
    computed_in = dtype if o.muon_fp32 or dtype == torch.float64 else torch.bfloat16
    kind = muon.Kind(computed_in, o.muon_quintic, o.use_stableadamw)
    # Matrices are stacked by whoever orthogonalises them.
    assert len(grad) == 1
    sums: Requests = evidence()
    del evidence
    whole = yield {**sums, "matrices": Matrices(grad[0], o.muon_batched, kind, held.part.numbers[0])}
    _, rows, columns = muon.sizes(layout.shape, batched=o.muon_batched)
    u = n.admit(whole["matrices"].unsqueeze(0).to(dtype))
    if not o.use_schedulefree:
        u = yield from _scaled_up(held, *_agreeing(u, n.admit(raw.to(dtype)), o))
    return u, n.unit * muon.unit_rms(rows, columns), whole


def _normalise(held: _Held, grad: Tensor, squares: Mapping[str, Tensor], base: Tensor) -> Changed:
    """The gradient, normalised element by element, of about unit scale: a new tensor. Moves the moments."""
    state, layout, o, n = held.state, held.layout, held.options, held.n
    g = grad.to(held.part.dtype)
    del grad

    # ADOPT (arXiv 2411.02853) normalises by the second moment of the gradients before this one.
    denominator = _denominator(state, n, g.dtype, o) if o.use_adopt else None
    if o.use_focus:
        moments.advance_weight(state, base.to(g.dtype), n.beta2, n.square)
    elif moments.is_factored(state):
        moments.advance_factors(state, squares, moments.factored_sizes(layout), n)
    else:
        moments.advance_full(state, g, n)

    # Without Schedule-Free there is a first moment: of the gradients, or with ADOPT, of the normalised ones.
    early = o.use_schedulefree or o.use_adopt
    if early:
        denominator = _denominator(state, n, g.dtype, o) if denominator is None else denominator
        u = n.admit_(_normalised(g, denominator, base, n, o))
        if o.use_schedulefree:
            return u
        del denominator
    g = u.clamp_(-n.bound, n.bound) if o.use_adopt else n.admit(g)
    m = moments.advance_first(state, g, n.beta1, n.gradient).div_(n.d)
    m, agreeing = _agreeing(m, g, o)
    del g
    m = yield from _scaled_up(held, m, agreeing)
    return m if early else _normalised(m, _denominator(state, n, m.dtype, o), base, n, o)


def _agreeing(move: Tensor, grad: Tensor, o: Options) -> tuple[Tensor, Tensor | None]:
    """Cautious and Grams: a move that agrees with a gradient in sign, in the memory of the move.

    Returns:
        The move; and for Cautious, to be divided by the share that they make, how many elements it has left.
    """
    if o.use_cautious:
        return move, variants.drop_disagreeing(move, grad)
    return (variants.grams(move, grad) if o.use_grams else move), None


def _scaled_up(held: _Held, move: Tensor, agreeing: Tensor | None) -> Changed:
    """What :func:`_agreeing` gave, divided by the share; in place."""
    if agreeing is None:
        return move
    whole = yield {"agreeing": Sum(agreeing, held.layout.dims)}
    return move.div_(stacks.across(variants.share(whole["agreeing"], held.layout.numel), move))


def _denominator(state: dict[str, Tensor], n: Scalars, dtype: torch.dtype, o: Options) -> Tensor:
    """What a gradient is normalised by, to be read: its deviation, or FOCUS's average of the weights."""
    if o.use_focus:
        return state["exp_avg_weight"].to(dtype, copy=o.use_adopt)  # which moves it before it is used
    return moments.deviation(moments.roots(state, n.d, dtype), n.d, n.eps, dtype)


def _normalised(numerator: Tensor, denominator: Tensor, base: Tensor, n: Scalars, o: Options) -> Tensor:
    """The direction, in place in ``denominator``, or a new tensor."""
    if o.use_focus:
        return variants.focus(numerator, denominator, base.to(numerator.dtype))
    # Where no gradient was before this one, ADOPT has nothing to divide it by.
    unknown = denominator <= n.eps if o.use_adopt else None
    normalise = directions.atan2 if o.eps is None else directions.adam
    u = normalise(numerator, denominator)
    return u if unknown is None else u.masked_fill_(unknown, 0)


def _average(held: _Held, u: Tensor, step: Tensor) -> None:
    """Schedule-Free's move, written to y and z."""
    weights, y, z = _widened(held)
    move = averaging.move_apart if held.is_apart else averaging.move
    move(y, z, u, step, held.n, decays=held.options.weight_decay > 0)
    _write(held, y=(weights, y), z=z)


def _propose(held: _Held, u: Tensor, step: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The same with a second thought on y: moves z, and proposes what to take off y, as :func:`_agreeing`.

    Returns:
        What that gives; and z as it is then (where its distance from y is kept, that from y as it was), to be
        written with y.
    """
    (_, y, z), o, n = _widened(held), held.options, held.n
    if o.weight_decay and o.weight_decay_by_lr:
        u.mul_(step).addcmul_(y, n.decay)
        step = n.unit
    proposed = averaging.taken(-z if held.is_apart else y - z, u, n.c, y_step=step * n.xy)
    z.addcmul_(u, step, value=-1)
    if o.weight_decay and not o.weight_decay_by_lr:
        z.addcmul_(y, n.decay, value=-1)
    return *_agreeing(proposed, u, o), z


def _accept(held: _Held, proposed: Tensor, z: Tensor) -> None:
    """Take what was proposed off y."""
    weights, o, n = stacks.read(held.part.weights), held.options, held.n
    y = weights.to(proposed.dtype)
    if o.weight_decay and not o.weight_decay_by_lr:
        if held.is_apart:
            z.addcmul_(y, n.decay * n.xy)
        y.mul_(1 - n.decay * n.xy)
    if held.is_apart:
        z.add_(proposed)
    _write(held, y=(weights, y.sub_(proposed)), z=z)


def _descend(held: _Held, u: Tensor, step: Tensor) -> None:
    """A plain step, with decoupled weight decay."""
    weights = stacks.read(held.part.weights)
    y = weights.to(u.dtype)
    if held.options.weight_decay:
        y.mul_(1 - held.n.decay)
    _write(held, y=(weights, y.addcmul_(u, step, value=-1)))


def _widened(held: _Held) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, and of y and z the values in the dtype of the computation: themselves, or new tensors.

    Where z − y is kept in place of z, it is that.
    """
    weights, dtype = stacks.read(held.part.weights), held.part.dtype
    return weights, weights.to(dtype), held.state[held.base_key].to(dtype)


def _write(held: _Held, *, y: tuple[Tensor, Tensor] | None = None, z: Tensor | None = None) -> None:
    """Write y, the weights with what was computed on them, and z back."""
    noise = _noise(held.part, held.n.step)
    bits = None if noise is None else rounding.noise(*noise)
    if y is not None:
        rounding.write(*y, bits, rounding.low_half)
        stacks.write(held.part.weights, y[0])
    if z is not None:
        rounding.write(held.state[held.base_key], z, bits, rounding.high_half)


def _noise(part: Part, step: Tensor) -> compiled.Noise:
    """What :func:`prodigyplus.rounding.noise` takes for these weights; None where none is needed."""
    state = part.states[0]
    bases = (state[key].dtype for key in (averaging.BASE, averaging.OFFSET) if key in state)
    kept = [part.weights[0].dtype, *bases]
    if not part.group.options.stochastic_rounding or torch.bfloat16 not in kept:
        return None
    numbers = part.group.constants.on(step.device, part.numbers)
    return part.layout.places(part.weights[0].device), rounding.seeds(step, numbers)
