"""A stack: small parameters of one shape that move as one tensor, or a single large one; and its passes.

Every tensor of a stack has an extra leading dimension, (count, *local shape).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import Tensor

from prodigyplus.engine import compiled, passes
from prodigyplus.engine.bundle import Backend, Bundle
from prodigyplus.engine.param_step import ParamStep, matrices
from prodigyplus.engine.passes import FactorSums, Noise, Samples
from prodigyplus.formulas import balance, moments, muon, prodigy, stochastic_rounding, variants
from prodigyplus.terms import stacks
from prodigyplus.terms.requests import Answers, Requests
from prodigyplus.terms.step_numbers import StepNumbers


class Stack(Bundle):
    """Parameters with one stack key, or a single parameter, that move as one tensor."""

    def __init__(self, params: Sequence[ParamStep]) -> None:
        super().__init__(params)
        self.states = [param.state for param in params]
        self.layout = params[0].layout
        self.nbytes = len(params) * params[0].nbytes

    @property
    def compiles(self) -> bool:
        """Whether its passes are compiled."""
        return self.group.options.compile and compiled.admits(self.kind)

    def squares(self) -> Requests:
        return moments.squares(
            stacks.stack_copy(self.grads),
            self.layout,
            factored=moments.is_factored(self.states[0]),
            dtype=self.dtype,
            square_sums=compiled.square_sums if self.compiles else moments.square_sums,
        )

    def backend(self, squares: Answers, n: StepNumbers) -> Backend:
        chosen = _MuonBackend if self.is_matrix else _CompiledBackend if self.compiles else _OperatorBackend
        return chosen(self, squares, n)

    def noise(self, step: Tensor) -> Noise:
        """The noise that rounds the weights and z; None if they are not rounded stochastically.

        Args:
            step: The number of the step.
        """
        z = self.kind.z
        kept = [self.weights[0].dtype, *([] if z is None else [self.states[0][z].dtype])]
        if not self.group.options.stochastic_rounding or torch.bfloat16 not in kept:
            return None
        ordinals = self.group.constants.int64(step.device, self.ordinals)
        return self.layout.index_terms(self.weights[0].device), stochastic_rounding.seeds(step, ordinals)


class _OperatorBackend:
    """The passes of one stack, operator by operator, and what is kept between them.

    Args:
        stack: The stack.
        squares: The sums of its gradients' squares, completed.
        n: The numbers of the step.
    """

    def __init__(self, stack: Stack, squares: Mapping[str, Tensor], n: StepNumbers) -> None:
        kind = stack.kind
        self.stack, self.kind, self.n = stack, kind, n
        self.noise = stack.noise(n.step)
        self.across = n.across(len(stack.layout.shape))
        keys = stack.states[0]
        self.state = {key: stacks.stack_view([state[key] for state in stack.states]) for key in keys}
        self.y = stacks.stack_copy(stack.weights)
        self.z = None if kind.z is None else self.state[kind.z]
        self.factor_sums: FactorSums | None = None
        if moments.is_factored(self.state):
            sums = {key: squares[key] for key in moments.FACTORS}
            self.factor_sums = FactorSums(sums, moments.factored_sizes(stack.layout))
        self._grad: Tensor | None = None  # kept from the first pass that reads it to the last
        self._masked: Tensor | None = None  # what scale_up_() scales
        self._kept: tuple[Tensor, ...] = ()  # see passes.measure_
        self._rest: Callable[[], object] | None = None  # finishes a move that is masked

    def grad(self) -> Tensor:
        """The stack of gradients, made at the first call."""
        if self._grad is None:
            self._grad = stacks.stack_copy(self.stack.grads)
        return self._grad

    @property
    def sample_distance(self) -> int:
        """The distance between samples; 0 if none are taken."""
        return self.stack.group.options.slice_p if self.kind.evidence not in (None, "balance") else 0

    def samples(self) -> Samples | None:
        """The samples for Prodigy's evidence; None if it takes none."""
        if not (slice_p := self.sample_distance):
            return None
        layout = self.stack.layout
        return Samples.of(lambda stack: layout.sample(stack, slice_p), self.y, self.grad(), self.z, self.kind)

    def momentum_(self) -> Tensor | None:
        self._masked, agreeing = passes.momentum_(self.y, self.grad(), self.state, self.across, self.kind)
        return agreeing

    def scale_up_(self, agreeing: Tensor | None) -> Generator[Requests, Answers, None]:
        if agreeing is not None:
            whole = yield self.stack.whole_sums({"agreeing": agreeing})
            assert self._masked is not None
            variants.scale_up_(self._masked, whole["agreeing"], self.stack.layout.numel)

    def measure_(self) -> Requests:
        momentum, self._masked = self._masked, None
        sums, self._kept = passes.measure_(
            self.y,
            self.grad(),
            self.state,
            self.factor_sums,
            self.samples(),
            momentum,
            self.n,
            self.kind,
            keeps_direction=True,
        )
        self._grad = None  # a copy, if the stack is of several
        return self.stack.whole_sums(sums)

    def move_(self, answers: Answers) -> Tensor | None:
        y, z, n, kind, noise = self.y, self.z, self.across, self.kind, self.noise
        u, scale = self._direction(answers)
        proposed = passes.move_(y, z, u, scale, n, kind, noise)
        if proposed is None:
            return None
        decrease, agreeing, wide_z = proposed
        self._masked = decrease
        self._rest = lambda: passes.finish_(y, z, decrease, wide_z, n, kind, noise)
        return agreeing

    def _direction(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """The direction, and its factor, which broadcasts; drops what was kept for it."""
        unit = self.across.unit
        (u,), self._kept = self._kept, ()
        along, factor = self._scales(answers)
        if along is not None:
            base = passes.base(self.y, self.state, self.kind).to(u.dtype)
            u.addcmul_(base, stacks.across(along, u), value=-1)
        return u, unit if factor is None else unit * stacks.across(factor, u)

    def _scales(self, answers: Answers) -> passes.Scales:
        return passes.scales(answers, self.stack.layout.numel, self.stack.dtype, self.kind)

    def late_sums(self) -> Requests:
        return {}

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


class _CompiledBackend(_OperatorBackend):
    """The passes of one stack, compiled."""

    def measure_(self) -> Requests:
        stack, packed = self.stack, self.n.packed
        if stack.layout.shard_axes:
            samples = self.samples()
            arguments = self.y, self.grad(), self.state, self.factor_sums, samples, packed, self.kind
            sums, self._kept = compiled.measure_(*arguments)
            self._grad = None
        else:  # there is nothing to wait for: move in the same call
            sums = compiled.measure_and_move_(
                self.y,
                self.grad(),
                self.state,
                self.factor_sums,
                self.sample_distance,
                packed,
                self.kind,
                stack.layout.numel,
                self.noise,
            )
        return stack.whole_sums(sums)

    def move_(self, answers: Answers) -> Tensor | None:
        if self._kept:
            scale = passes.step_factor(self._scales(answers), self.n).expand(len(self.y))
            assert self.z is not None
            compiled.move_(
                self.y, self.z, self.grad(), self._kept, scale, self.n.packed, self.kind, self.noise
            )
        return None


class _MuonBackend(_OperatorBackend):
    """The passes of one parameter that Muon moves, whose matrices are orthogonalised between two of them."""

    _late: dict[str, Tensor]  # see late_sums()

    def measure_(self) -> Requests:
        stack, requests = self.stack, super().measure_()
        moved_by = self.state["exp_avg"] if self.kind.has_momentum else self.grad()
        assert len(moved_by) == 1, "matrices are stacked by whoever orthogonalises them"
        return {**requests, "matrices": matrices(moved_by[0], stack.group, stack.ordinals[0], stack.dtype)}

    def move_(self, answers: Answers) -> Tensor | None:
        y, z, n, kind, noise = self.y, self.z, self.across, self.kind, self.noise
        if not (kind.has_momentum and kind.mask):
            return super().move_(answers)
        # The direction is masked, not the first moment that it is made from.
        u, scale = self._direction(answers)
        self._masked, agreeing = passes.mask_(u, n.gated(self.grad().to(u.dtype)), kind)
        self._rest = lambda: passes.move_(y, z, u, scale, n, kind, noise)
        return agreeing

    def _direction(self, answers: Answers) -> tuple[Tensor, Tensor]:
        u = self.across.gated(answers.pop("matrices").unsqueeze(0).to(self.stack.dtype))
        if self.kind.is_late:
            self._late = {"gu": balance.dot(u, self.grad()), "uu": stacks.square_total(u)}
        return u, self.across.unit * self._unit_rms

    @property
    def _unit_rms(self) -> float:
        """The factor that gives orthogonalised matrices an rms of 1."""
        stack = self.stack
        _, rows, columns = muon.sizes(stack.layout.shape, batched=stack.group.options.muon_batched)
        return muon.unit_rms(rows, columns)

    def _scales(self, answers: Answers) -> passes.Scales:
        return passes.Scales(None, self.n.unit * self._unit_rms)

    def late_sums(self) -> Requests:
        return self.stack.whole_sums(self._late)
