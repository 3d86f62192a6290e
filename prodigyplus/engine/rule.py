"""One step of a stack of parameters, from their gradients to their new weights, as a generator.

``update`` is the only place that states the order of a step: passes over memory (see
:mod:`prodigyplus.engine.passes`), and between them requests for what they need to know about whole tensors.
It knows nothing of processes: it yields sums over local pieces, and is sent the sums over whole tensors.

Small parameters of one shape move as one stack, so every tensor here has an extra leading dimension,
(count, *local shape).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prodigyplus.device import launches
from prodigyplus.engine import compiled, passes
from prodigyplus.engine.groups import GroupStep
from prodigyplus.engine.passes import Kind, Moments, Noise, Samples
from prodigyplus.formulas import balance, moments, muon, prodigy, stochastic_rounding, variants
from prodigyplus.terms import stacks
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Matrices, Method, Requests, Sum
from prodigyplus.terms.scalars import Constants, Scalars

Answers = dict[str, Tensor]
Rule = Generator[Requests, Answers, None]


class ParamStep(NamedTuple):
    """What a parameter brings to a step: plain local tensors, and their layout."""

    weight: Tensor  # y, changed in place
    grad: Tensor  # of the same shape; zeros if there is none here, but may be on other ranks
    state: dict[str, Tensor]  # see prodigyplus/state.py; changed in place
    layout: Layout
    group: GroupStep
    number: int  # of the parameter in the optimiser, from 1
    # Whether this rank has its gradient; None if nobody needs to ask: all shards have one, or none has.
    present: bool | None

    @property
    def stack_key(self) -> tuple[object, ...]:
        """Parameters with equal keys may be stacked; the same on all ranks."""
        dtypes = [tensor.dtype for tensor in self.state.values()]
        weight, grad = self.weight, self.grad
        # Groups and layouts live as long as the step, and equal layouts are one object.
        return id(self.group), id(self.layout), weight.device, weight.dtype, grad.dtype, *self.state, *dtypes

    @property
    def is_matrix(self) -> bool:
        """Whether Muon moves it, whose direction needs whole matrices."""
        return self.group.options.use_muon_pp

    @property
    def cost(self) -> tuple[int, int, int]:
        """See :attr:`Moving.cost`."""
        return _cost(self.layout, self.group)

    @property
    def nbytes(self) -> int:
        """The bytes of its direction on the rank with the largest piece."""
        return self.layout.max_local_numel * compute_dtype(self.weight).itemsize

    @property
    def sent_bytes(self) -> int:
        """The bytes of its direction in the dtype of orthogonalising, on the rank with the largest piece."""
        dtype = orthogonalized_in(self.group, compute_dtype(self.weight))
        return self.layout.max_local_numel * dtype.itemsize


class Moving(Protocol):
    """Parameters of one group that move as one: a :class:`Stack`, or a ``Batch`` of ``engine/batches.py``."""

    weights: list[Tensor]
    group: GroupStep
    numbers: list[int]
    present: list[bool] | None  # for each, as ``ParamStep.present``; None if nobody needs to ask
    nbytes: int  # bytes of directions that are alive while sums are completed
    is_matrix: bool

    def squares(self, constants: Constants) -> Requests:
        """Requests for sums of the raw gradients' squares; among them ``total``, one for each parameter."""
        ...

    def work(self, squares: Answers, n: Scalars, constants: Constants) -> Work:
        """The backend that runs the passes.

        Args:
            squares: The sums of the gradients' squares, completed.
            n: The numbers of the step.
            constants: The optimiser's.
        """
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def layouts(self) -> Sequence[Layout]:
        """The layouts of the tensors whose matrices are asked for, in that order."""
        ...

    @property
    def cost(self) -> tuple[int, int, int]:
        """The cost of orthogonalising the largest matrix, and its rows and columns: a sort key."""
        ...

    @property
    def axes(self) -> tuple[Hashable, ...]: ...

    @property
    def is_sharded(self) -> bool: ...


@dataclass(slots=True)
class Stack:
    """Parameters with one stack key, or a single parameter, that move as one."""

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    layout: Layout
    group: GroupStep
    numbers: list[int]
    present: list[bool] | None
    nbytes: int
    is_matrix: bool
    kind: Kind  # which operators its passes consist of

    @classmethod
    def of(cls, params: Sequence[ParamStep]) -> Stack:
        """The stack of parameters that have equal stack keys."""
        first = params[0]
        return cls(
            [param.weight for param in params],
            [param.grad for param in params],
            [param.state for param in params],
            first.layout,
            first.group,
            [param.number for param in params],
            None if first.present is None else [bool(param.present) for param in params],
            len(params) * first.nbytes,
            first.is_matrix,
            Kind.of(first.group.options, first.state, first.layout.numel, adapts=first.group.adapts),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return compute_dtype(self.weights[0])

    @property
    def compiles(self) -> bool:
        """Whether its passes are compiled."""
        return self.group.options.compile and compiled.admits(self.kind)

    def squares(self, constants: Constants) -> Requests:
        return moments.squares(
            stacks.stack_copy(self.grads),
            self.layout,
            factored=moments.is_factored(self.states[0]),
            dtype=self.dtype,
            square_sums=compiled.square_sums if self.compiles else moments.square_sums,
        )

    def work(self, squares: Answers, n: Scalars, constants: Constants) -> Work:
        return (_CompiledWork if self.compiles else _PlainWork)(self, squares, n, constants)

    @property
    def axes(self) -> tuple[Hashable, ...]:
        """The mesh axes along which ranks hold shards or replicas of its parameters."""
        return self.layout.axes(self.layout.dims, count_replicas=True)

    @property
    def is_sharded(self) -> bool:
        """Whether its sums must be completed over other ranks before it moves."""
        return bool(self.layout.shard_axes)

    @property
    def layouts(self) -> Sequence[Layout]:
        return (self.layout,)

    @property
    def cost(self) -> tuple[int, int, int]:
        return _cost(self.layout, self.group)

    def noise(self, z: str | None, step: Tensor, constants: Constants) -> Noise:
        """The noise that rounds the weights and z; None if they are not rounded stochastically.

        Args:
            z: The key in the state of z or z − y; None without Schedule-Free.
            step: The number of the step.
            constants: The optimiser's.
        """
        kept = [self.weights[0].dtype, *([] if z is None else [self.states[0][z].dtype])]
        if not self.group.options.stochastic_rounding or torch.bfloat16 not in kept:
            return None
        numbers = constants.on(step.device, self.numbers)
        return self.layout.index_terms(self.weights[0].device), stochastic_rounding.seeds(step, numbers)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on a tensor: its own, but at least float32."""
    return _promoted(tensor.dtype, torch.float32)


_promoted = functools.cache(torch.promote_types)  # called for every parameter at every step


def _cost(layout: Layout, group: GroupStep) -> tuple[int, int, int]:
    _, rows, columns = muon.sizes(layout.shape, batched=group.options.muon_batched)
    return muon.cost(rows, columns), rows, columns


def orthogonalized_in(group: GroupStep, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices are orthogonalised; ``dtype`` is that of the arithmetic."""
    # float64 stays, since its finite values may overflow in bfloat16.
    return dtype if group.options.muon_fp32 or dtype == torch.float64 else torch.bfloat16


def matrices(local: Tensor, group: GroupStep, number: int, dtype: torch.dtype) -> Matrices:
    """The request to orthogonalise a parameter's matrices.

    Args:
        local: The local piece of what is orthogonalised: the gradient or the first moment.
        group: The parameter's group.
        number: The number of the parameter in the optimiser.
        dtype: The dtype of the arithmetic.
    """
    o, computed_in = group.options, orthogonalized_in(group, dtype)
    product = None if o.fused is False else launches.symmetric_product(computed_in, local.device)
    return Matrices(
        local, o.muon_batched, Method(computed_in, o.muon_quintic, o.use_stableadamw, product), number
    )


def update(stack: Moving, constants: Constants) -> Rule:
    """One step of a stack.

    Args:
        stack: The stack; its weights and states are changed in place.
        constants: The optimiser's.

    Yields:
        Requests; the caller must send the answers.
    """
    # The sums of the raw gradients' squares decide whether the step happens at all.
    squares = yield {**stack.squares(constants), **_presence(stack)}
    work = stack.work(squares, _numbers(stack, squares), constants)

    if work.kind.has_momentum:
        yield from work.scale_up_(work.momentum_())
    answers = yield from _asked(work.measure_())
    takes_evidence, is_late = work.kind.evidence is not None, work.kind.is_late
    evidence = work.evidence_(answers) if takes_evidence and not is_late else None
    if (agreeing := work.move_(answers)) is not None:
        yield from work.scale_up_(agreeing)
    if is_late:
        answers |= yield from _asked(work.late_sums())
        evidence = work.evidence_(answers)
    if evidence is not None:
        stack.group.observe(stack.numbers, *evidence)
    work.finish_()


def _asked(requests: Requests) -> Generator[Requests, Answers, Answers]:
    """Yield requests, if there are any, and return the answers."""
    return (yield requests) if requests else {}


def _presence(stack: Moving) -> Requests:
    """If ranks may lack gradients, a request for how many ranks have each; shape (count,)."""
    if stack.present is None:
        return {}
    present = torch.ones(len(stack.present), dtype=stack.dtype, device=stack.weights[0].device)
    if not all(stack.present):
        present = torch.stack([torch.full_like(present[0], here) for here in stack.present])
    return {"present": Sum(present, stack.axes)}


def _numbers(stack: Moving, squares: Answers) -> Scalars:
    """The numbers of the step, those of a no-op for parameters that are skipped individually."""
    n = stack.group.scalars(stack.weights[0].device, stack.dtype)
    if stack.group.skips_per_param:
        n = n.where(squares["total"].isfinite())
    if stack.present is not None and not all(stack.present):
        n = n.where(squares["present"] > 0)
    return n


class Work(Protocol):
    """A backend: runs the passes of one stack, and keeps what one pass needs from another."""

    kind: Kind
    n: Scalars

    def momentum_(self) -> Tensor | None:
        """Update the first moment; if Cautious masks it, return how many elements agree, else None."""
        ...

    def scale_up_(self, agreeing: Tensor | None) -> Generator[Requests, Answers, None]:
        """Divide Cautious's result by the fraction of the whole tensor's elements that agree."""
        ...

    def measure_(self) -> Requests:
        """Update the second moment and Prodigy's s; return requests for what the move needs."""
        ...

    def move_(self, answers: Answers) -> Tensor | None:
        """Move y and z; or, if the move is masked, propose it, and return as :meth:`momentum_`."""
        ...

    def late_sums(self) -> Requests:
        """Requests for evidence of directions that came after :meth:`measure_`; see ``Kind.is_late``."""
        ...

    def evidence_(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Each parameter's evidence for the step size, from sums over whole tensors; shapes (count,)."""
        ...

    def finish_(self) -> None:
        """Make a move that was proposed, and write copies back to their tensors."""
        ...


class _PlainWork:
    """The passes of one stack, operator by operator, and what is kept between them.

    Args:
        stack: The stack.
        squares: The sums of its gradients' squares, completed.
        n: The numbers of the step.
        constants: The optimiser's.
    """

    def __init__(self, stack: Stack, squares: Mapping[str, Tensor], n: Scalars, constants: Constants) -> None:
        kind = stack.kind
        self.stack, self.kind, self.n = stack, kind, n
        self.noise = stack.noise(kind.z, n.step, constants)
        self.across = n.across(len(stack.layout.shape))
        keys = stack.states[0]
        self.state = {key: stacks.stack_view([state[key] for state in stack.states]) for key in keys}
        self.y = stacks.stack_copy(stack.weights)
        self.z = None if kind.z is None else self.state[kind.z]
        self.feed = Moments({}, (0, 0))
        if moments.is_factored(self.state):
            sums = {key: squares[key] for key in moments.FACTORS}
            self.feed = Moments(sums, moments.factored_sizes(stack.layout))
        self._grad: Tensor | None = None  # kept from the first pass that reads it to the last
        self._masked: Tensor | None = None  # what scale_up_() scales
        self._kept: tuple[Tensor, ...] = ()  # see passes.measure_
        self._late: dict[str, Tensor] = {}  # see late_sums()
        self._rest: Callable[[], object] | None = None  # finishes a move that is masked

    def grad(self) -> Tensor:
        """The stack of gradients, made at the first call."""
        if self._grad is None:
            self._grad = stacks.stack_copy(self.stack.grads)
        return self._grad

    @property
    def sampled_every(self) -> int:
        """The distance between samples; 0 if none are taken."""
        return self.stack.group.options.slice_p if self.kind.evidence not in (None, "balance") else 0

    def samples(self) -> Samples | None:
        """The samples for Prodigy's evidence; None if it takes none."""
        if not (every := self.sampled_every):
            return None
        layout = self.stack.layout
        return Samples.of(lambda stack: layout.sample(stack, every), self.y, self.grad(), self.z, self.kind)

    def momentum_(self) -> Tensor | None:
        self._masked, agreeing = passes.momentum_(self.y, self.grad(), self.state, self.across, self.kind)
        return agreeing

    def scale_up_(self, agreeing: Tensor | None) -> Generator[Requests, Answers, None]:
        if agreeing is not None:
            layout = self.stack.layout
            whole = yield {"agreeing": layout.sum(agreeing, layout.dims)}
            assert self._masked is not None
            variants.scale_up_(self._masked, whole["agreeing"], layout.numel)

    def measure_(self) -> Requests:
        momentum, self._masked = self._masked, None
        sums, self._kept = passes.measure_(
            self.y,
            self.grad(),
            self.state,
            self.feed,
            self.samples(),
            momentum,
            self.n,
            self.kind,
            keeps_direction=True,
        )
        requests = self._sums(sums)
        if self.kind.direction == "muon":
            return {**requests, "matrices": self._matrices()}
        self._grad = None  # a copy, if the stack is of several
        return requests

    def _sums(self, sums: Mapping[str, Tensor]) -> dict[str, Sum | Matrices]:
        layout = self.stack.layout
        return {name: layout.sum(value, layout.dims) for name, value in sums.items()}

    def _matrices(self) -> Matrices:
        stack = self.stack
        moved_by = self.state["exp_avg"] if self.kind.has_momentum else self.grad()
        assert len(moved_by) == 1, "matrices are stacked by whoever orthogonalises them"
        return matrices(moved_by[0], stack.group, stack.numbers[0], stack.dtype)

    def move_(self, answers: Answers) -> Tensor | None:
        y, z, n, kind, noise = self.y, self.z, self.across, self.kind, self.noise
        u, scale = self._direction(answers)
        if kind.direction == "muon" and kind.has_momentum and kind.mask:
            # Here the direction is masked, which Muon knows only now.
            self._masked, agreeing = passes.mask_(u, n.gated(self.grad().to(u.dtype)), kind)
            self._rest = lambda: passes.move_(y, z, u, scale, n, kind, noise)
            return agreeing
        proposed = passes.move_(y, z, u, scale, n, kind, noise)
        if proposed is None:
            return None
        decrease, agreeing, wide_z = proposed
        self._masked = decrease
        self._rest = lambda: passes.finish_(y, z, decrease, wide_z, n, kind, noise)
        return agreeing

    def _direction(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """The direction, and its factor, which broadcasts; drops what was kept for it."""
        n, kind = self.across, self.kind
        kept, self._kept = self._kept, ()
        if kind.direction == "muon":
            u = n.gated(answers.pop("matrices").unsqueeze(0).to(self.stack.dtype))
            if kind.is_late:
                self._late = {"gu": balance.dot(u, self.grad()), "uu": stacks.square_total(u)}
            return u, n.unit * self._unit_rms
        (u,), (along, factor) = kept, self._scales(answers)
        if along is not None:
            base = passes.base(self.y, self.state, kind).to(u.dtype)
            u.addcmul_(base, stacks.across(along, u), value=-1)
        return u, n.unit if factor is None else n.unit * stacks.across(factor, u)

    @property
    def _unit_rms(self) -> float:
        """The factor that gives orthogonalised matrices an rms of 1."""
        stack = self.stack
        _, rows, columns = muon.sizes(stack.layout.shape, batched=stack.group.options.muon_batched)
        return muon.unit_rms(rows, columns)

    def _scales(self, answers: Answers) -> passes.Scales:
        if self.kind.direction == "muon":
            return passes.Scales(None, self.n.unit * self._unit_rms)
        return passes.scales(answers, self.stack.layout.numel, self.stack.dtype, self.kind)

    def late_sums(self) -> Requests:
        return self._sums(self._late)

    def evidence_(self, answers: Answers) -> tuple[Tensor, Tensor]:
        if self.kind.is_balanced:
            return passes.balance_evidence(answers, self._scales(answers), self.stack.layout.numel, self.n)
        assert self.kind.evidence is not None
        return prodigy.evidence_(answers, self.state, self.kind.evidence, self.n)

    def finish_(self) -> None:
        if self._rest is not None:
            self._rest()
        stacks.unstack_(self.stack.weights, self.y)
        for key, values in self.state.items():
            stacks.write_back_([state[key] for state in self.stack.states], values)


class _CompiledWork(_PlainWork):
    """The passes of one stack, compiled."""

    def measure_(self) -> Requests:
        stack, packed = self.stack, self.n.packed
        if stack.layout.shard_axes:
            samples = self.samples()
            arguments = self.y, self.grad(), self.state, self.feed, samples, packed, self.kind
            sums, self._kept = compiled.measure_(*arguments)
            self._grad = None
        else:  # there is nothing to wait for: move in the same call
            state, feed, numel = self.state, self.feed, stack.layout.numel
            sums = compiled.measure_and_move_(
                self.y, self.grad(), state, feed, self.sampled_every, packed, self.kind, numel, self.noise
            )
        return self._sums(sums)

    def move_(self, answers: Answers) -> Tensor | None:
        if self._kept:
            factor, unit = self._scales(answers).factor, self.n.unit.expand(len(self.y))
            scale = unit if factor is None else unit * factor
            assert self.z is not None
            compiled.move_(
                self.y, self.z, self.grad(), self._kept, scale, self.n.packed, self.kind, self.noise
            )
        return None
