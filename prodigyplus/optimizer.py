"""The optimiser for one process: parameter groups, ``step``, ``train``/``eval``, checkpoints."""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prodigyplus import averaging, checkpoint, driver, options, progress, samples, stepsize
from prodigyplus.checkpoint import name_of
from prodigyplus.constraints import Constraint, Projection
from prodigyplus.isolation import isolated, isolated_from_compiler
from prodigyplus.layout import Layout, Sum
from prodigyplus.monitor import Monitor
from prodigyplus.options import Options, StateOptions
from prodigyplus.reporting import is_called_from, warn_caller
from prodigyplus.rule import Member, anchor, compute_dtype, freed_state, new_state
from prodigyplus.scalars import Constants
from prodigyplus.step import Step
from prodigyplus.stepsize import GroupStep

# float16 has not the range for the squares of d·g.
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

_EVALUATING = (
    "in eval mode: the model holds the averaged weights. Call optimizer.train() before the training "
    "steps, and optimizer.eval() before evaluating or saving."
)


class Place(NamedTuple):
    """Where a parameter stands."""

    p: Tensor
    group: int
    place: int  # in its group
    number: int  # in the optimiser, from 1


class ProdigyPlusScheduleFree(Optimizer):
    r"""Adam without a learning rate (Prodigy) or a schedule (Schedule-Free), with factored moments.

    Call :meth:`train` before training and :meth:`eval` before evaluating or saving the model, as with
    every Schedule-Free optimiser: the model holds the weights to train at, or their average.

    >>> optimizer = ProdigyPlusScheduleFree(model.parameters())
    >>> optimizer.train()
    >>> loss_of(model, batch).backward()
    >>> optimizer.step()
    >>> optimizer.eval()

    Use a constant learning rate schedule and no gradient clipping: StableAdamW does its work. A step
    that meets an inf or NaN in any gradient changes nothing, and no step waits for the device.

    Every option may be set per parameter group. Those that say what state there is (``use_schedulefree``,
    ``use_focus``, ``use_muon_pp``, ``use_speed="relative"``, ``factored``, ``factored_fp32``,
    ``bfloat16_z``, ``slice_p``) hold from a parameter's first step on; the others may be changed between
    steps, and are checked then.

    What a training loop would do to weights after a step (clamp them, renormalise rows) goes through
    :meth:`constrain`: otherwise the average that is evaluated knows nothing of it.

    Args:
        params: Parameters, named parameters, or parameter groups, as for every torch optimiser:
            float32, bfloat16 or float64 tensors of any shape.
        lr: Multiplies the step size that Prodigy finds. Leave it at 1, or let a schedule move it.
        betas: β1, the weight of the average x in the training weights y (without Schedule-Free, the
            decay of the first moment), and β2, the decay of the second moment.
        beta3: Decay of Prodigy's statistics. None: sqrt(β2).
        weight_decay: Decoupled weight decay λ, taken at y.
        weight_decay_by_lr: Multiply λ with the step size, as AdamW does.
        use_bias_correction: RAdam's correction of the second moment, and its warm-up.
        d0: First step size, to be chosen too small.
        d_coef: Multiplies the estimate of the step size.
        prodigy_steps: Stop adapting the step size, and free the memory for it, at this call of ``step`` (0
            or None: never), for good. Calls count whose step was skipped, not those with ``lr=0``.
        use_speed: SPEED. True: judge progress by signs alone, and let d grow to d^0.975 at most. "relative":
            by its average, over how far the weights have come (what 2.0.1 calls SPEED).
        eps: Added to the denominator, relative to the step size. None: Adam-atan2, which needs none;
            StableAdamW is then off.
        split_groups: A step size for each parameter group. False: one, from the statistics of all
            groups for which it is False, under the options of the first of these.
        split_groups_mean: With ``split_groups``, every group moves by the harmonic mean of the step sizes of
            the groups with evidence, whose d has grown tenfold (see docs/options.md).
        factored: Second moments of rank one for tensors of two or more dimensions.
        factored_fp32: Keep the factors in float32. False: in the gradient's dtype.
        fused_back_pass: Move parameters within the backward pass, and free each gradient at once: see
            :meth:`fuse_backward`.
        use_stableadamw: Divide an update by the square root of its rms where that exceeds 1.
        use_muon_pp: Muon: move matrices by their whole gradient, orthogonalised, at Adam's scale. For groups
            of hidden matrices, see :func:`prodigyplus.muon_groups`. Excludes ADOPT and OrthoGrad.
        use_cautious: Drop what of a move disagrees in sign with its gradient, and scale up the rest.
            Excludes Grams.
        use_grams: Take a move's magnitudes, and its gradient's signs.
        use_adopt: ADOPT: normalise a gradient by the second moment of those before it.
        use_orthograd: Take what of a direction is orthogonal to the weights, at its full length.
        use_focus: FOCUS: the sign of a gradient, and a pull from the weights' average. Excludes factored,
            ``eps=None`` and Muon.
        stochastic_rounding: Round bfloat16 weights, and z in bfloat16, stochastically.
        beta4: Decay of a step size that moves both ways, as a running average. 0: it never shrinks.
            None: β2.
        d_limiter: Let the step size grow by at most 2^¼ a step.
        schedulefree_c: Averaging strength of Schedule-Free; above 0, c is
            ``min(1, c·(1−β1)·schedulefree_c)``.
        use_schedulefree: False: Adam's first moment and decoupled weight decay instead; bring a
            schedule.
        slice_p: Prodigy's statistics are taken of every ``slice_p``-th element.
        muon_fp32: Orthogonalise in float32. False: in bfloat16. Those of float64 weights always in float64.
        muon_quintic: Orthogonalise by the first Muon's polynomial. False: by Polar Express's.
        muon_batched: Parameters of three or more dimensions are batches of matrices, their last two, as
            experts are. False: one matrix, their first dimension by all others, as convolutions are.
        bfloat16_z: Of float32 weights, keep z as its distance from them, in bfloat16, rounded stochastically:
            2.6 bytes of state per parameter in the place of 4.6.
        compile: Run passes over whole tensors through ``torch.compile``: those of the default options. Groups
            with Cautious, Grams, ADOPT, OrthoGrad, FOCUS, Muon or ``use_schedulefree=False`` run without.

    Raises:
        ValueError: An option has a value it cannot have, or a parameter is of another dtype.
    """

    _exchange: driver.Exchange = driver.OneProcess()
    _warned: frozenset[str] = frozenset()
    _under_way: Step | None = None  # a step that a backward pass has begun
    _fuses = False  # whether fuse_backward() has been called
    _lends_average = False  # whether averaged_parameters() has put the average into the model

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        beta3: float | None = None,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        prodigy_steps: int | None = 0,
        use_speed: bool | Literal["relative"] = False,
        eps: float | None = 1e-8,
        split_groups: bool = True,
        split_groups_mean: bool = True,
        factored: bool = True,
        factored_fp32: bool = True,
        fused_back_pass: bool = False,
        use_stableadamw: bool = True,
        use_muon_pp: bool = False,
        use_cautious: bool = False,
        use_grams: bool = False,
        use_adopt: bool = False,
        use_focus: bool = False,
        stochastic_rounding: bool = True,
        *,
        use_orthograd: bool = False,
        beta4: float | None = 0.0,
        d_limiter: bool = True,
        schedulefree_c: float = 0.0,
        use_schedulefree: bool = True,
        slice_p: int = 11,
        muon_fp32: bool = False,
        muon_quintic: bool = False,
        muon_batched: bool = False,
        bfloat16_z: bool = False,
        compile: bool = False,  # noqa: A002
    ) -> None:
        given = locals()
        self._check_owner()
        # Every key of a group is a default, so that a fresh and a loaded optimiser have the same.
        super().__init__(params, {**options.plain(given), **checkpoint.new_entries(1.0)})

    def _check_owner(self) -> None:
        """Refuse to be made by what gives every process an optimiser of other parameters."""
        if is_called_from("torch.distributed.optim.zero_redundancy_optimizer"):
            raise ValueError(
                f"ZeroRedundancyOptimizer gives each rank a {type(self).__name__} of other parameters, which "
                "finds a step size of its own. Pass optimizer_class=ShardedProdigyPlusScheduleFree (of "
                "prodigyplus_dist) and process_group=dist.group.WORLD, by which they share one; or shard "
                "the model with fully_shard."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters: ``{"params": …}`` and any options that differ; see the class.

        Where it is to be fused with the backward pass, call :meth:`fuse_backward` after it.
        """
        self._check_no_step_is_under_way()
        if not isinstance(param_group, dict):
            raise TypeError(f'add_param_group: {param_group!r} is no dict of "params" and options.')
        options.check_keys(param_group, checkpoint.ENTRIES)
        values = options.plain({**self.defaults, **param_group})
        param_group |= {name: values[name] for name in options.NAMES if name in param_group}
        # Also where the group was another optimiser's. It is in the mode of the others.
        param_group |= checkpoint.new_entries(values["d0"]) | {"train_mode": not self._evaluating}
        super().add_param_group(param_group)
        self._resolve(self.param_groups[-1])
        try:
            self._check_parameters(len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise
        self._lift()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds an option of its own optimisers, with which later groups would not be like those before.
        self.defaults.pop("differentiable", None)

    def _check_parameters(self, index: int) -> None:
        """Refuse parameters of a group that cannot be trained as it says; what is frozen may be anything."""
        group = self.param_groups[index]
        for number, p in enumerate(group["params"]):
            if p.requires_grad or p.grad is not None:
                self._check_parameter(p, Options.of(group), name_of(group, index, number))

    @staticmethod
    def _check_parameter(p: Tensor, o: Options, name: str) -> None:
        wrong = None
        if p.dtype not in _DTYPES:
            wrong = (
                f"{p.dtype}; the optimiser trains {', '.join(map(str, _DTYPES))}. Leave it out of params, "
                "convert it, or freeze it (requires_grad=False)."
            )
        elif o.use_muon_pp and p.ndim < 2:
            wrong = (
                f"of shape {tuple(p.shape)}, no matrix, but its group has use_muon_pp=True: put it into a "
                "group without, as prodigyplus.muon_groups(model) does."
            )
        if wrong is not None:
            raise ValueError(f"{name} is {wrong}")

    def _resolve(self, group: dict[str, Any]) -> None:
        for note in options.resolve_exclusions(group):
            self._warn_once(note)

    # ------------------------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient.

        Args:
            closure: Evaluates the model anew, with gradients, and returns the loss.

        Returns:
            The loss of the closure, if there is one.

        Raises:
            RuntimeError: The optimiser is in eval mode, or a gradient is sparse.
            ValueError: An option was given a value that it cannot have.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @isolated_from_compiler
    def _take_step(self) -> None:
        self._finish_backward()
        step, self._under_way = self._under_way or self._begin(in_backward=False), None
        if self._evaluating and not step.only_makes_state:
            raise RuntimeError(f"step() {_EVALUATING}")
        fused = [group for group in self.param_groups if group["fused_back_pass"]]
        if fused and not (self._fuses or step.only_makes_state):
            raise RuntimeError(
                "fused_back_pass=True, but no backward pass moves any parameter: call "
                "optimizer.fuse_backward(model) once, when the model is wrapped as it will be trained."
            )
        members = self._members(step)
        if not self._evaluating:
            step.close(members)
            if not step.only_makes_state:
                self._hold(step)
                self._monitor.end(self, step.groups)
        for group in fused:
            for p in group["params"]:
                p.grad = None

    @property
    def _evaluating(self) -> bool:
        return any(group["use_schedulefree"] and not group["train_mode"] for group in self.param_groups)

    def _begin(self, *, in_backward: bool) -> Step:
        self._check_average_is_not_lent()
        self._monitor.begin(self)
        self._lift()
        step = Step(self.param_groups, self._exchange, self._constants, in_backward=in_backward)
        for its in step.groups:
            if its.numbers["frozen"] and not its.options.freezes(its.numbers["calls"]):
                self._warn_once(
                    "prodigy_steps was raised, or set to 0, after it had passed: the step size stays "
                    "frozen, since what it would go by has been freed."
                )
            if its.numbers["calls"] == 0:  # state, if there is any, may be older than the weights
                for p in its.numbers["params"]:
                    if self.state.get(p):
                        state = {key: self._local(value) for key, value in self.state[p].items()}
                        anchor(self._local(p), state, self._layout(p), its.options)
        return step

    @isolated
    def _lift(self) -> None:
        """Make the numbers of the groups tensors, where the parameters are that are trained."""
        trained = (p for p, _ in self._parameters() if p.requires_grad or p.grad is not None)
        others = (p for p, _ in self._parameters() if p.device.type != "meta")
        homes = (self._local(p).device for parameters in (trained, others) for p in parameters)
        home = next(homes, torch.device("cpu"))
        for group in self.param_groups:
            stepsize.lift(group, home)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned |= {message}
            warn_caller(message)

    @property
    def _monitor(self) -> Monitor:
        monitor: Monitor = self.__dict__.setdefault("_monitor_kept", Monitor())
        return monitor

    def own_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters that only the optimiser should change, as its state goes with them; local tensors."""
        held = {p for constraint in self._constraints.values() for p in constraint.parameters}
        for p, state in self.state.items():
            if isinstance(p, Tensor) and p not in held and averaging.is_averaged(state):
                weight = self._local(p)
                if not weight.is_inference():
                    yield p, weight

    def name_of(self, p: Tensor) -> str:
        """What to call a parameter in a message."""
        return next(self._name(place) for place in self._numbered() if place.p is p)

    # ---------------------------------------------------------------------------------- constraints

    def constrain(self, parameters: Tensor | Iterable[Tensor], project: Projection) -> RemovableHandle:
        """Hold parameters in a set: in every step the weights that it moves are projected onto it.

        >>> optimizer.constrain(model.logit_scale, lambda w: w.clamp_(0, math.log(100)))
        >>> optimizer.constrain(words.weight, lambda w: torch.renorm(w, 2, 0, maxnorm=1.0))

        Use it where a training loop would change weights after each step. Changed so, only the weights of
        training obey; here z does, and with it the average, and Prodigy sees how far the weights have really
        come. The weights are projected now, in every step, and where their average is put into the model.

        Args:
            parameters: One or more of the optimiser's parameters.
            project: Gets a copy of the weights of each, of its shape (a DTensor, if the parameter is one),
                and changes it in place or returns what it makes of it. Every rank calls it for the same
                parameters in the same order.

        Returns:
            A handle, whose ``remove()`` lifts the constraint.

        Raises:
            ValueError: A tensor is not one of the optimiser's parameters, or ``project`` gives another shape.
        """
        self._check_no_step_is_under_way()
        self._check_average_is_not_lent()
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        own = {p for p, _ in self._parameters()}
        if not tensors or any(p not in own for p in tensors):
            raise ValueError(
                "constrain: pass parameters that the optimiser was given, as they are after the model is "
                "wrapped."
            )
        constraint = Constraint(tensors, project)
        self._put_into_set(constraint)
        handle = RemovableHandle(self._constraints)
        self._constraints[handle.id] = constraint
        return handle

    @isolated
    def _put_into_set(self, constraint: Constraint) -> None:
        for p in constraint.parameters:
            p.copy_(constraint.projected(p))
            base = self.state.get(p, {}).get(averaging.BASE)
            if base is not None:
                base.copy_(constraint.projected(base))
        self._has_changed_weights()

    def _hold(self, step: Step) -> None:
        """Put what a step has moved back into the sets that hold it."""
        if self._constraints:
            group_of = {p: group for group in step.groups for p in group.numbers["params"]}
        for constraint in self._constraints.values():
            for p in constraint.parameters:
                if p in group_of and self.state.get(p):
                    weight = self._local(p)
                    n = group_of[p].scalars(weight.device, compute_dtype(weight))
                    constraint.hold_(p, self.state[p], n.xy)

    @property
    def _constraints(self) -> OrderedDict[int, Constraint]:
        constraints: OrderedDict[int, Constraint] = self.__dict__.setdefault(
            "_constraints_kept", OrderedDict()
        )
        return constraints

    def _holding(self, p: Tensor) -> list[Constraint]:
        """The constraints that hold a parameter."""
        return [its for its in self._constraints.values() if any(held is p for held in its.parameters)]

    def _has_changed_weights(self) -> None:
        """The model holds other weights now: what was made of those before is out of date."""
        self._monitor.forget_weights()

    def fuse_backward(self, model: nn.Module) -> list[RemovableHandle]:
        """Let backward passes move the parameters of ``model``, those in groups with ``fused_back_pass``.

        Call it once, when the model is wrapped as it will be trained. Each gradient is then consumed and
        freed as soon as it is there, and :meth:`step` ends the step: it moves the step size, and whatever no
        backward pass has moved. The loop stays as it is, but every backward pass needs its :meth:`step`.

        A gradient with an inf or NaN skips its parameter alone, since others have moved already, and so do
        those of groups that are not fused; the step size then keeps its value, and the step counts as
        skipped. What changes gradients after the backward pass, as clipping does, comes too late.

        Returns:
            A handle for each parameter's hook, whose ``remove()`` takes it off again. Under DDP there are
            none: its communication hook stays.

        Raises:
            ValueError: No parameter of the model is in such a group, or its gradients are summed over
                processes elsewhere than where a hook sees them.
        """
        parameters = self._fusable(model)
        handles = self._attach(model, parameters)
        self._fuses = True
        return handles

    def _fusable(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of a model, by their names, that are to be moved in a backward pass."""
        ours = {p for p, group in self._parameters() if group["fused_back_pass"]}
        parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p in ours}
        if not parameters:
            raise ValueError(
                "fuse_backward: no parameter of the model is in a group with fused_back_pass=True. Pass "
                "fused_back_pass=True to the optimiser, and the model whose parameters it was given."
            )
        return parameters

    def _attach(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[RemovableHandle]:
        # What sums gradients over processes after a hook has seen them; a launcher tells of it beforehand.
        wrapped = any(hasattr(module, "register_comm_hook") for module in model.modules())
        processes = os.environ.get("WORLD_SIZE", "1")
        if wrapped or processes != "1":
            raise ValueError(
                "fuse_backward: gradients are summed over processes"
                + (" (DistributedDataParallel)" if wrapped else f" (WORLD_SIZE={processes})")
                + ", which a hook of a parameter does not see: use ShardedProdigyPlusScheduleFree, of the "
                "package beside this one, which waits for it."
            )
        return self._hooked(parameters)

    def _hooked(self, parameters: Mapping[str, Tensor]) -> list[RemovableHandle]:
        take = self._weak_take()

        def consume(p: Tensor) -> None:
            if p.grad is not None and take(p, p.grad):
                p.grad = None

        return [
            p.register_post_accumulate_grad_hook(consume)  # type: ignore[no-untyped-call]
            for p in parameters.values()
        ]

    def _weak_take(self) -> Callable[[Tensor, Tensor], bool]:
        """:meth:`_take` for a hook: whoever drops the optimiser is done with it, hooks or not."""
        optimizer = weakref.ref(self)

        def take(p: Tensor, grad: Tensor) -> bool:
            alive = optimizer()
            return alive is not None and alive._take(p, grad)

        return take

    def _finish_backward(self) -> None:
        """Take the gradients that a backward pass has left waiting."""

    @isolated_from_compiler
    def _take(self, p: Tensor, grad: Tensor) -> bool:
        """Move a parameter by its gradient, now or soon. Returns whether it is one to be moved so."""
        if self._under_way is None:
            self._places = {place.p: place for place in self._numbered()}
        place = self._places.get(p)
        if place is None or not self.param_groups[place.group]["fused_back_pass"]:
            return False
        if self._evaluating:
            raise RuntimeError(f"{self._name(place)} has a gradient {_EVALUATING}")
        step = self._under_way = self._under_way or self._begin(in_backward=True)
        if p in step.taken:
            raise RuntimeError(
                f"{self._name(place)} has a second gradient, but no step() came after the first: "
                "fused_back_pass=True moves a parameter by the gradient of one backward pass, and cannot add "
                "up several. Call optimizer.step() after each, also after one that failed, or set "
                "fused_back_pass=False."
            )
        step.take(p, self._member(place, grad, step.groups[place.group]))
        return True

    def _numbered(self) -> Iterator[Place]:
        number = 0
        for index, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                number += 1
                yield Place(p, index, place, number)

    def _members(self, step: Step) -> list[Member]:
        """The parameters that are left of a step, with their state, made where there is none yet."""
        if len(self._made_for) > 2 * len(self.state):  # parameters that were replaced are not to be held
            self._made_for.clear()
        return [
            self._member(place, place.p.grad, step.groups[place.group])
            for place in self._numbered()
            if self._takes_part(place.p) and place.p not in step.taken
        ]

    def _takes_part(self, p: Tensor) -> bool:
        return p.grad is not None

    def _member(self, place: Place, grad: Tensor | None, group: GroupStep) -> Member:
        """What a parameter brings to a step.

        Raises:
            RuntimeError: Something cannot be right; by what every rank knows, so that none is left waiting.
        """
        assert grad is not None
        return self._make_member(place, grad, group, None)

    def _make_member(self, place: Place, grad: Tensor, group: GroupStep, present: bool | None) -> Member:
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{self._name(place)} has a sparse gradient, which this optimiser cannot use: build its "
                "layer with sparse=False."
            )
        p, state = place.p, self.state[place.p]
        weight, grad, layout = self._local(p), self._local(grad), self._layout(p)
        made_for = layout, group.state_options
        if not state:
            self._check_kind(place)
            self._check_parameter(p, group.options, self._name(place))
        arithmetic = compute_dtype(p)
        if grad.dtype not in _DTYPES or torch.promote_types(grad.dtype, arithmetic) != arithmetic:
            raise RuntimeError(
                f"{self._name(place)} is {p.dtype}, but its gradient {grad.dtype}: give it one of the "
                "parameter's dtype, or of bfloat16 beside float32."
            )
        if not state:
            state.update(self._kept(p, new_state(weight, grad, layout, group.options), group.options))
        elif self._made_for.get(p) != made_for:
            self._check_state(place, weight, grad, layout, group)
        self._made_for[p] = made_for
        if not group.adapts:
            for key in progress.STATE:
                state.pop(key, None)
        return Member(weight, grad, self._local_state(state), layout, group, place.number, present)

    @property
    def _made_for(self) -> dict[Tensor, tuple[Layout, StateOptions]]:
        """What the state of each parameter is known to fit: where it is, and the options that it hangs on."""
        made_for: dict[Tensor, tuple[Layout, StateOptions]] = self.__dict__.setdefault("_made_for_kept", {})
        return made_for

    def _check_state(
        self, place: Place, weight: Tensor, grad: Tensor, layout: Layout, group: GroupStep
    ) -> None:
        """Refuse a state that was made for other options, or for a parameter of another shape.

        Raises:
            RuntimeError: It was.
        """
        before = self._made_for.get(place.p)
        if before is not None:
            for name, old, new in zip(StateOptions._fields, before[1], group.state_options, strict=True):
                if old != new:
                    raise RuntimeError(
                        f"{name}={self.param_groups[place.group][name]!r} in param_groups[{place.group}], "
                        "whose state was made under another value: build another optimiser to change it."
                    )
        state = self._local_state(self.state[place.p])
        like, grad_like = (torch.empty_like(tensor, device="meta") for tensor in (weight, grad))
        needed = {
            key: tuple(value.shape)
            for key, value in new_state(like, grad_like, layout, group.options).items()
            if key in state or group.adapts or key not in progress.STATE
        }
        found = {key: tuple(value.shape) for key, value in state.items()}
        if found != needed:
            key = next(key for key in [*needed, *found] if found.get(key) != needed.get(key))
            was = "" if before is None else f", and was of shape {before[0].shape} when its state was made"
            raise RuntimeError(
                f"{self._name(place)} is of shape {layout.shape}{was}: it needs {key!r} of shape "
                f"{needed.get(key)} and has {found.get(key)}. A parameter that is cut or grown starts anew: "
                "put a new nn.Parameter in its place in param_groups, and take the state of the old one out "
                "with optimizer.state.pop(old)."
            )

    def _check_kind(self, place: Place) -> None:
        """Refuse a parameter that this optimiser cannot train, by what every rank knows."""
        if getattr(place.p, "_fsdp_flattened", False):
            raise RuntimeError(
                f"{self._name(place)} is a flat parameter of FSDP1, which has lost the shapes of the tensors "
                "in it: shard the model with FSDP2's fully_shard instead."
            )
        if hasattr(place.p, "placements"):
            raise RuntimeError(
                f"{self._name(place)} is a DTensor, a piece of a sharded parameter: use "
                "ShardedProdigyPlusScheduleFree, of the package beside this one."
            )

    def _name(self, place: Place) -> str:
        return name_of(self.param_groups[place.group], place.group, place.place)

    def _kept(self, p: Tensor, local: Mapping[str, Tensor], o: Options) -> dict[str, Tensor]:
        """Entries of the state as they are kept, from their local pieces: samples stay as they are."""
        return {
            key: value if key in progress.SAMPLED else self._placed(p, value, key, o)
            for key, value in local.items()
        }

    # What a subclass whose parameters are pieces of tensors has to say about them.

    def _local(self, tensor: Tensor) -> Tensor:
        """The local tensor of a parameter, a gradient or an entry of the state, sharing its memory."""
        return tensor

    def _local_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def _layout_key(self, p: Tensor) -> Hashable:
        """What says where a parameter's local tensor sits in its global one; it may change."""
        return p.shape

    def _new_layout(self, p: Tensor) -> Layout:
        return Layout(tuple(p.shape))

    def _layout(self, p: Tensor) -> Layout:
        # Kept, since a layout may keep where its samples are, and parameters of one layout move together.
        layouts, key = self._layouts, self._layout_key(p)
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = self._new_layout(p)
        return layout

    @property
    def _layouts(self) -> dict[Hashable, Layout]:
        layouts: dict[Hashable, Layout] = self.__dict__.setdefault("_layouts_by_key", {})
        return layouts

    @property
    def _constants(self) -> Constants:
        constants: Constants = self.__dict__.setdefault("_constants_kept", Constants())
        return constants

    def _placed(self, p: Tensor, local: Tensor, key: str, o: Options) -> Tensor:
        """An entry of the state in :func:`prodigyplus.rule.saved_form`, from the local piece of it."""
        return local

    def _piece(self, p: Tensor, saved: Tensor, key: str, o: Options) -> Tensor:
        """The local piece of a saved entry of the state, new memory: undoes :meth:`_placed`."""
        if hasattr(saved, "full_tensor"):  # a DTensor, saved by the sharded optimiser
            saved = saved.full_tensor()
        return saved.to(self._local(p).device, copy=True)

    # ------------------------------------------------------------------------- train, eval, average

    def train(self) -> None:
        """Put the training weights y into the model. Free when they are there already."""
        self._swap(train=True)

    def eval(self) -> None:
        """Put the averaged weights x into the model. Free when they are there already.

        Between them :meth:`eval` and :meth:`train` cost no memory, and a rounding of the weights;
        :meth:`averaged_parameters` costs a copy, and nothing of the weights.
        """
        self._swap(train=False)

    def __getstate__(self) -> dict[str, Any]:
        self._check_no_step_is_under_way()  # which a copy would not have
        self._check_average_is_not_lent()
        # Of what torch does not know, a copy keeps the constraints: without them it would train otherwise.
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_constraints_kept": self._constraints}

    def _check_no_step_is_under_way(self) -> None:
        if self._under_way is not None:
            raise RuntimeError(
                "a backward pass has moved parameters (fused_back_pass=True), and no step() has ended that "
                "step yet: call optimizer.step() first."
            )

    @property
    def holds_average(self) -> bool:
        """Whether the model holds the weights to evaluate and to save.

        It does in eval mode, within :meth:`averaged_parameters`, and always without Schedule-Free.
        """
        training = any(group["use_schedulefree"] and group["train_mode"] for group in self.param_groups)
        return self._lends_average or not training

    def _check_average_is_not_lent(self) -> None:
        if self._lends_average:
            raise RuntimeError(
                "within averaged_parameters() the model holds the averaged weights, to be evaluated or saved "
                "by itself; the optimiser goes with those of training: leave the with-block first."
            )

    @isolated
    def _swap(self, *, train: bool) -> None:
        self._check_average_is_not_lent()
        groups = [g for g in self.param_groups if g["use_schedulefree"] and g["train_mode"] != train]
        if groups:
            self._check_no_step_is_under_way()
        for group in groups:
            # A schedule may have moved β1 since: y comes back by what x was made with.
            beta1 = group["average_beta1"] if train else None
            beta1 = group["betas"][0] if beta1 is None else beta1
            for p, state in self._averaged(group):
                if train:
                    self._put_back(p, state, beta1)
                else:
                    self._put_average(p, state, beta1)
            group["train_mode"], group["average_beta1"] = train, None if train else beta1
        if groups:
            self._has_changed_weights()

    def _put_average(self, p: Tensor, state: Mapping[str, Tensor], beta1: float) -> None:
        if self._holding(p):  # from what is projected, y may not be found again
            self._weights_of_training[p] = p.detach().clone()
        averaging.x_from_y(self._local(p), state, beta1, out=self._local(p))
        for constraint in self._holding(p):
            p.copy_(constraint.projected(p))

    def _put_back(self, p: Tensor, state: Mapping[str, Tensor], beta1: float) -> None:
        before = self._weights_of_training.pop(p, None)
        if before is not None:
            p.copy_(before)
        else:
            averaging.y_from_x(self._local(p), state, beta1, out=self._local(p))

    @property
    def _weights_of_training(self) -> dict[Tensor, Tensor]:
        """In eval mode, y of the parameters whose average was projected."""
        weights: dict[Tensor, Tensor] = self.__dict__.setdefault("_weights_of_training_kept", {})
        return weights

    def _averaged(self, group: Mapping[str, Any]) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        """The parameters of a group that are not their own average, with their local states."""
        for p in group["params"]:
            # Before the first step there may be state, but the weights are their own average.
            if group["calls"] and averaging.is_averaged(self.state.get(p, {})):
                yield p, self._local_state(self.state[p])

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """A context in which the model holds the averaged weights x.

        On leaving it, every weight is what it was on entering, bit for bit, whatever mode the
        optimiser is in; the state is not touched. Costs a copy of the weights meanwhile.

        >>> with optimizer.averaged_parameters():
        ...     evaluate(model)
        """
        if self._lends_average:
            yield
            return
        before: list[tuple[Tensor, Tensor]] = []
        try:
            self._lend_average(before)
            yield
        finally:
            self._lends_average = False
            self._take_back(before)

    @isolated
    def _lend_average(self, before: list[tuple[Tensor, Tensor]]) -> None:
        for p, x in self._averages():
            before.append((p, p.detach().clone()))
            p.copy_(x)
        self._lends_average = True
        self._has_changed_weights()

    @isolated
    def _take_back(self, before: Sequence[tuple[Tensor, Tensor]]) -> None:
        for p, y in before:
            p.copy_(y)
        self._has_changed_weights()

    @isolated
    def averaged_state_dict(self, model: nn.Module, *, full: bool = False) -> dict[str, Any]:
        """``model.state_dict()`` with the averaged weights x: what to save as the trained model.

        Changes nothing. What the optimiser averages is new tensors; the rest are the model's own. Tied
        weights are one tensor for each name, as ``safetensors`` needs.

        Args:
            model: The model whose parameters the optimiser was given, wrapped in what it may be.
            full: Copies on the CPU, under the names that they have in the model that is not wrapped.

        Raises:
            ValueError: The model has none of the optimiser's parameters.
        """
        entries = self._entries(model)
        if not full:
            return entries
        return {
            checkpoint.unwrapped(name): value.to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }

    def _entries(self, model: nn.Module) -> dict[str, Any]:
        self._check_model(model)
        averages = {id(p): x for p, x in self._averages()}
        entries: dict[str, Any] = {}
        seen: set[int] = set()
        for name, value in model.state_dict(keep_vars=True).items():
            entry = averages.get(id(value), value.detach() if isinstance(value, Tensor) else value)
            if isinstance(value, Tensor):
                entry = entry.clone() if id(value) in seen else entry
                seen.add(id(value))
            entries[name] = entry
        return entries

    def _check_model(self, model: nn.Module) -> None:
        own = {p for p, _ in self._parameters()}
        if own and own.isdisjoint(model.parameters()):
            raise ValueError(
                "averaged_state_dict: none of the model's parameters is one of the optimiser's, which has "
                "the average of no other: pass the model whose parameters it was given, not a copy of it."
            )

    def check_replicas(self) -> None:
        """Nothing to compare in one process; see ``ShardedProdigyPlusScheduleFree``, of the package beside
        this.

        Raises:
            RuntimeError: A backward pass has moved parameters, and no ``step()`` has ended that step. Or
                there are several processes, of which this class does not know.
        """
        self._check_no_step_is_under_way()
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise RuntimeError(
                f"there are {processes} processes (WORLD_SIZE), of which this optimiser does not know: call "
                "prodigyplus_dist.check_replicas(optimizer)."
            )

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter that does not hold x now, with its x, a new tensor."""
        self._check_no_step_is_under_way()
        for group in self.param_groups:
            if group["use_schedulefree"] and group["train_mode"] and not self._lends_average:
                for p, state in self._averaged(group):
                    x = torch.empty_like(p, requires_grad=False)
                    averaging.x_from_y(self._local(p), state, group["betas"][0], out=self._local(x))
                    for constraint in self._holding(p):
                        x = constraint.projected(x)
                    yield p, x

    # ------------------------------------------------------------------------------------- metrics

    @isolated
    def metrics(self, *, as_numbers: bool = False) -> list[dict[str, Any]]:
        """What the step size does: one dict for each parameter group, of tensors without dimensions.

        They stay on the device, and their values are those of now; reading one waits for the device. With
        ``as_numbers`` they are plain Python numbers, as loggers want them, for which it waits once.

        =================  =============================================================================
        ``d``              step size of the group
        ``d_hat``          Prodigy's last estimate of it, numerator / denominator, before the limiter
        ``effective_lr``   lr·(1 − β1(1 − c)): what a step moves the model, in units of the step size; times
                           RAdam's rectification with ``use_bias_correction``
        ``step_size``      the step size in use (see ``split_groups_mean``) × ``effective_lr``
        ``numerator``      Prodigy's decayed sum of ⟨g, p0 − z⟩, weighted with d²/sqrt(d0)
        ``denominator``    Prodigy's ‖s‖₁
        ``step``           steps made
        ``skipped_steps``  steps skipped for an inf or NaN in a gradient
        =================  =============================================================================
        """

        def read(group: Mapping[str, Any]) -> dict[str, Any]:
            numbers = {
                name: value.clone()
                if isinstance(value := group[name], Tensor)
                else stepsize.as_number(name, value)
                for name in stepsize.NUMBERS
            }
            return {
                "d": numbers["d"],
                "d_hat": numbers["d_hat"],
                "effective_lr": numbers["effective_lr"],
                "step_size": numbers["shared_d"] * numbers["effective_lr"],
                "numerator": numbers["d_numerator"],
                "denominator": numbers["d_denom"],
                "step": numbers["k"],
                "skipped_steps": numbers["skipped"],
            }

        groups = [read(group) for group in self.param_groups]
        if as_numbers:
            stepsize.make_plain(groups, groups[0] if groups else ())
        return groups

    # --------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimiser; a group's numbers are plain Python numbers in it.

        The model's weights are not in it: save them too, in the same mode, and load them before going on.
        """
        self._check_no_step_is_under_way()
        self._check_average_is_not_lent()

        # Before the hooks of others, which are to see what is saved.
        def finish(optimizer: Optimizer, saved: dict[str, Any]) -> None:
            stepsize.make_plain(saved["param_groups"])
            others = {key: value for key, value in self.state.items() if not isinstance(key, Tensor)}
            saved["state"] = {**self._saved_states(), **others}

        hook = self.register_state_dict_post_hook(finish, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    @isolated
    def _saved_states(self) -> dict[int, dict[str, Tensor]]:
        """The states of all parameters by their numbers, Prodigy's samples as rows."""
        kept = []
        numbers = {p: number for number, (p, _) in enumerate(self._parameters())}  # given twice, its last
        for number, (p, group) in enumerate(self._parameters()):
            if p in self.state and numbers[p] == number:
                o, state = Options.of(group), self.state[p]
                if state and checkpoint.is_frozen(group):
                    state = {**state, **self._kept(p, freed_state(self._local(p), self._layout(p), o), o)}
                kept.append((number, p, o, state))
        asked: list[driver.Asked] = []
        for _, p, o, state in kept:
            layout = self._layout(p)
            last = layout.dims[-1:]
            rows = {
                key: samples.spread(state[key], layout, o.slice_p) for key in progress.SAMPLED if key in state
            }
            asked.append((layout, {key: Sum(value, last) for key, value in rows.items()}))
        # Where torch copies a state to write it while training goes on, it takes a DTensor without dimensions
        # as it is, and fails at a view; rows that others have completed are views into one buffer.
        return {
            number: {
                **{key: value if value.ndim else value.clone() for key, value in state.items()},
                **{key: self._placed(p, value.clone(), key, o) for key, value in rows.items()},
            }
            for (number, p, o, state), rows in zip(kept, self._exchange.complete(asked)(), strict=True)
        }

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Every parameter with its group, in the order of their numbers in a state dict."""
        return ((p, group) for group in self.param_groups for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, every tensor in the dtype it was saved in.

        Args:
            state_dict: What :meth:`state_dict` gave. It is not changed, nor shared.

        Raises:
            ValueError: It is of other groups, other parameters or another optimiser. The optimiser
                is then as it was before.
        """
        self._check_no_step_is_under_way()
        self._check_average_is_not_lent()
        # torch's loader casts all state to the parameter's dtype. So it does not get to see it.
        loaded: dict[int, dict[str, Tensor]] = {}

        def take_out(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups = checkpoint.checked_groups(state_dict, self.param_groups, self.defaults)
            saved = state_dict["state"]
            states = checkpoint.checked_states(saved, groups, self.param_groups)
            group_of = [group for group in groups for _ in group["params"]]
            for number, (p, _) in enumerate(self._parameters()):
                if number in states:
                    loaded[number] = self._loaded_state(p, states[number], group_of[number])
            keys = {key for group in groups for key in group["params"]}
            others = {key: value for key, value in saved.items() if key not in keys}
            return {"state": others, "param_groups": groups}

        def put_in(optimizer: Optimizer) -> None:
            self._made_for.clear()
            self._weights_of_training.clear()
            self._has_changed_weights()
            self._lift()
            for number, (p, group) in enumerate(self._parameters()):
                if number in loaded:
                    self.state[p] = loaded[number]
                    self._made_for[p] = self._layout(p), Options.of(group).of_state

        hooks = (
            self.register_load_state_dict_pre_hook(take_out),
            self.register_load_state_dict_post_hook(put_in, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    @isolated
    def _loaded_state(
        self, p: Tensor, saved: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        o = Options.of(group)
        frozen = checkpoint.is_frozen(group)
        needed = {key: value for key, value in saved.items() if not (frozen and key in progress.STATE)}
        pieces = {key: self._piece(p, value, key, o) for key, value in needed.items()}
        if "p0" in pieces:  # which was once kept in bfloat16
            pieces["p0"] = pieces["p0"].to(torch.promote_types(pieces["p0"].dtype, p.dtype))
        return {
            key: samples.collect(piece, self._layout(p), o.slice_p)
            if key in progress.SAMPLED
            else self._placed(p, piece, key, o)
            for key, piece in pieces.items()
        }
