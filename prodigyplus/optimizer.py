"""The optimiser: the methods of ``torch.optim``, and those that training loops need."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prodigyplus import checkpoint, eval_mode, options
from prodigyplus import metrics as metrics_
from prodigyplus.constraints import Constraint, Constraints, Projection
from prodigyplus.engine.columns import to_python_numbers_
from prodigyplus.engine.in_backward import Hooks, ParameterHooks, fusable
from prodigyplus.engine.parameters import check_parameter
from prodigyplus.engine.step import Step
from prodigyplus.eval_mode import AverageSwap
from prodigyplus.exchange import Exchange, OneProcess
from prodigyplus.monitor import Monitor
from prodigyplus.options import Options
from prodigyplus.placement import Placement, WholeTensors, name_of
from prodigyplus.reporting import Warner, is_called_from
from prodigyplus.steps import Steps
from prodigyplus.terms.dtypes import compute_dtype
from prodigyplus.terms.isolation import isolated, isolated_from_compiler
from prodigyplus.view import View

_EVALUATING = (
    "in eval mode: the model holds the averaged weights. Call optimizer.train() before the training "
    "steps, and optimizer.eval() before evaluating or saving."
)


class _Cache:
    """What an optimiser keeps from step to step; its copies start with an empty one."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.warner = Warner()
        self.monitor = Monitor(self.warner)
        self.average = AverageSwap()
        self.fuses_backward = False  # whether fuse_backward() has been called
        self.lock = threading.Lock()  # held while a backward pass moves a parameter


class ProdigyPlusScheduleFree(Optimizer):
    r"""Adam without a learning rate (Prodigy) or a schedule (Schedule-Free), with factored moments.

    Call :meth:`train` before training and :meth:`eval` before evaluating or saving the model, as with
    every Schedule-Free optimiser: the model holds either the training weights or the averaged weights.

    >>> optimizer = ProdigyPlusScheduleFree(model.parameters())
    >>> optimizer.train()
    >>> loss_of(model, batch).backward()
    >>> optimizer.step()
    >>> optimizer.eval()

    Keep the learning rate constant. Clip gradients only where single ones may be far too large
    (docs/guides/loops.md). A step that meets an inf or NaN in any gradient changes nothing, and no step waits
    for the device.

    Every option may be set per parameter group. Those that decide what state a parameter has
    (``use_schedulefree``, ``use_focus``, ``use_muon_pp``, ``use_speed="relative"``, ``factored``,
    ``factored_fp32``, ``bfloat16_z``, ``slice_p``, ``step_size``) are fixed from its first step on; the
    others may be changed between steps, and are checked then.

    If a training loop changes weights after steps (clamps them, renormalises rows), pass the change to
    :meth:`constrain` instead: otherwise the average that is evaluated does not obey it.

    Args:
        params: Parameters, named parameters, or parameter groups, as for every torch optimiser:
            float32, bfloat16 or float64 tensors of any shape.
        lr: Multiplies the step size that is found. Leave it at 1, or let a schedule move it.
        betas: β1, the weight of the average x in the training weights y (without Schedule-Free, the
            decay of the first moment), and β2, the decay of the second moment.
        beta3: Decay of Prodigy's statistics. None: sqrt(β2).
        weight_decay: Decoupled weight decay λ, taken at y.
        weight_decay_by_lr: Multiply λ by the step size, as AdamW does.
        use_bias_correction: RAdam's correction of the second moment, and its warm-up.
        d0: Initial step size. Choose it far too small: d grows from it.
        d_coef: Multiplies the estimate of the step size.
        prodigy_steps: Stop adapting the step size for good, and free the memory for it, at this call of
            ``step`` (0 or None: never). Calls whose step is skipped count; those with ``lr=0`` do not.
        use_speed: SPEED. True: judge progress by signs alone, and let d grow to at most d^0.975 in a step.
            "relative": judge progress by its running average, divided by how far the weights have come (what
            2.0.1 calls SPEED).
        eps: Added to the denominator, relative to the step size. None: Adam-atan2, which needs none;
            StableAdamW is then off.
        split_groups: A step size for each parameter group. False: one step size, from the statistics of all
            groups that have False, with the options of the first of these.
        split_groups_mean: With ``split_groups``, every group moves by the harmonic mean of the step sizes of
            the groups with evidence, whose d has grown tenfold (see docs/options.md).
        factored: Second moments of rank one for tensors of two or more dimensions.
        factored_fp32: Keep the factors in float32. False: in the gradient's dtype.
        fused_back_pass: Move parameters within the backward pass, and free each gradient at once: see
            :meth:`fuse_backward`.
        use_stableadamw: Divide an update by the square root of its rms where the rms exceeds 1.
        use_muon_pp: Muon: move each matrix along its orthogonalised gradient, scaled to the rms of Adam's
            direction. For groups of hidden matrices; :func:`prodigyplus.muon_groups` makes them. Excludes
            ADOPT and OrthoGrad.
        use_cautious: Drop the elements of a move that disagree in sign with the gradient, and scale up the
            rest. Excludes Grams.
        use_grams: Keep the magnitudes of a move, but give it the signs of the gradient.
        use_adopt: ADOPT: normalise a gradient by the second moment of the earlier ones.
        use_orthograd: Keep only the part of a direction that is orthogonal to the weights, scaled back to the
            direction's length.
        use_focus: FOCUS: the sign of a gradient, and a pull towards the weights' average. Excludes factored,
            ``eps=None`` and Muon.
        stochastic_rounding: Round bfloat16 weights, and z in bfloat16, stochastically.
        beta4: Let the step size shrink too, as a running average with this decay. 0: it never shrinks.
            None: β2.
        d_limiter: Let d grow by a factor of at most 2^¼ in a step, times ``d_coef`` if that is above 1.
        schedulefree_c: Averaging strength of Schedule-Free; above 0, c is
            ``min(1, c·(1−β1)·schedulefree_c)``.
        use_schedulefree: False: Adam's first moment and decoupled weight decay instead, which need a
            schedule.
        warmup_steps: Let the step size grow linearly over this many steps of a group. As always, a step's
            weight in the average is its step size squared. 0: no warm-up.
        slice_p: Prodigy's statistics are taken over every ``slice_p``-th element.
        muon_fp32: Orthogonalise in float32. False: in bfloat16. For float64 weights always in float64.
        muon_quintic: Orthogonalise by the original Muon's polynomial. False: by Polar Express's.
        muon_batched: Treat parameters of three or more dimensions as batches of matrices (their last two
            dimensions), as for experts. False: as one matrix, their first dimension by all others, as for
            convolutions.
        bfloat16_z: For float32 weights, keep z as its offset from them, in bfloat16, rounded stochastically:
            2.6 bytes of state per parameter instead of 4.6.
        compile: Run a step's passes over tensors through ``torch.compile``. Groups with Cautious, Grams,
            ADOPT, OrthoGrad, FOCUS, Muon or ``use_schedulefree=False`` are not compiled.
        step_size: What finds the step size. "prodigy": Prodigy's estimate. "balance": how Schedule-Free's own
            iterates move (see docs/research.md). Try balance first. It keeps no state of its own, and
            excludes ``use_speed``, ``d_coef``, ``beta4`` and ``use_schedulefree=False``.
        fused: Move a group's parameters by Triton kernels, in a handful of launches for all of them. None: do
            so for float32 and bfloat16 on a GPU, without Cautious, Grams, ADOPT, OrthoGrad or FOCUS.
            True: always, or raise an error. False: never.

    Raises:
        ValueError: An option has an invalid value, or a parameter has an unsupported dtype.
    """

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
        warmup_steps: int = 0,
        slice_p: int = 11,
        muon_fp32: bool = False,
        muon_quintic: bool = False,
        muon_batched: bool = False,
        bfloat16_z: bool = False,
        compile: bool = False,  # noqa: A002
        fused: bool | None = None,
        step_size: Literal["prodigy", "balance"] = "prodigy",
    ) -> None:
        # The signature is the one place that has the defaults: its arguments are taken by their names.
        given = {name: value for name, value in locals().items() if name in options.NAMES}
        if "_placement" not in self.__dict__:  # a subclass has set its own
            self._set_up(WholeTensors(), OneProcess(), ParameterHooks())
        # Every key of a group is a default, so that a fresh and a loaded optimiser have the same.
        super().__init__(params, {**options.plain(given), **checkpoint.first_values(1.0)})

    def _set_up(
        self, placement: Placement, exchange: Exchange, hooks: Hooks, *, shares_d: bool = False
    ) -> None:
        """Set where tensors lie and who completes sums, before any group is added.

        Args:
            placement, exchange, hooks: See their classes.
            shares_d: Whether optimisers of other parameters share the step size with this one.

        Raises:
            ValueError: ``ZeroRedundancyOptimizer`` constructs it, and ``shares_d`` is False.
        """
        if not shares_d and is_called_from("torch.distributed.optim.zero_redundancy_optimizer"):
            raise ValueError(
                f"ZeroRedundancyOptimizer gives each rank a {type(self).__name__} of other parameters, and "
                "each would find a step size of its own. To share one, pass "
                "optimizer_class=functools.partial(ShardedProdigyPlusScheduleFree, "
                "process_group=dist.group.WORLD), from prodigyplus_dist; or shard the model with fully_shard."
            )
        self._placement, self._exchange, self._hooks = placement, exchange, hooks
        self._constraints = Constraints()
        self._cache = _Cache()

    def __getstate__(self) -> dict[str, Any]:
        self._check_no_step_is_under_way()  # which a copy would not have
        self._check_average_is_not_lent()
        # torch leaves out attributes of subclasses; without these, a copy would train differently.
        names = ("_placement", "_exchange", "_hooks", "_constraints")
        state: dict[str, Any] = super().__getstate__()
        return {**state, **{name: self.__dict__[name] for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds an option of its own optimisers, which only groups that are added later would have.
        self.defaults.pop("differentiable", None)
        if "_cache" not in self.__dict__:  # in a copy; torch also calls this to load a state dict
            self._cache = _Cache()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters: ``{"params": …}`` and any options that differ; see the class.

        During a run, a group that shares the step size of others has ``warmup_steps`` of 1/(1 − β2), unless
        it sets them: see :attr:`prodigyplus.options.Options.late_warmup_steps`.

        If it is to be fused with the backward pass, call :meth:`fuse_backward` afterwards. (Under DDP, a call
        before serves new groups too, and another does nothing.)
        """
        self._check_no_step_is_under_way()
        if not isinstance(param_group, dict):
            raise TypeError(f'add_param_group: {param_group!r} is not a dict of "params" and options.')
        options.check_group_keys(param_group, checkpoint.KEYS)
        values = options.plain({**self.defaults, **param_group})
        # A new dict, since another optimiser may have been built from the same one. What that has left in it
        # is replaced. The mode of the group is that of the others.
        given = {name: values[name] for name in options.NAMES if name in param_group}
        if any(group["calls"] for group in self.param_groups) and "warmup_steps" not in given:
            given["warmup_steps"] = max(values["warmup_steps"], Options.of(values).late_warmup_steps)
        new = checkpoint.first_values(values["d0"]) | {"train_mode": not self._view.is_evaluating}
        super().add_param_group({**param_group, **given, **new})
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        for note in (*options.resolve_exclusions_(group), *options.likely_mistakes(group)):
            self._cache.warner.warn(note)
        try:
            for number, p in enumerate(group["params"]):
                if p.requires_grad or p.grad is not None:  # what is frozen may be anything
                    check_parameter(p, Options.of(group), name_of(group, index, number))
        except ValueError:
            self.param_groups.pop()
            raise
        self._cache.steps.columns(self._view)

    # ------------------------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient.

        Args:
            closure: Evaluates the model again, computes its gradients, and returns the loss.

        Returns:
            The loss of the closure, if there is one.

        Raises:
            RuntimeError: The optimiser is in eval mode, or a gradient is sparse.
            ValueError: An option was set to an invalid value.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @isolated_from_compiler
    def _take_step(self) -> None:
        self._hooks.finish()
        steps, view = self._cache.steps, self._view
        step, steps.current = steps.current or self._begin(in_backward=False), None
        if view.is_evaluating and not step.initializes_state:
            raise RuntimeError(f"step() {_EVALUATING}")
        fused = [group for group in self.param_groups if group["fused_back_pass"]]
        if fused and not (self._cache.fuses_backward or step.initializes_state):
            raise RuntimeError(
                "fused_back_pass=True, but no backward pass moves any parameter: call "
                "optimizer.fuse_backward(model) once, when the model is wrapped as it will be trained."
            )
        steps.end(view, step)
        if not (view.is_evaluating or step.initializes_state):
            self._hold_(step)
            self._free_stale_copies()
            self._cache.monitor.end(view, step.groups, self._exchange, in_backward=bool(step.taken))
        for group in fused:
            for p in group["params"]:
                p.grad = None

    def _begin(self, *, in_backward: bool) -> Step:
        self._check_average_is_not_lent()
        self._cache.monitor.begin(self._view)
        step = self._cache.steps.begin(self._view, self._exchange, in_backward=in_backward)
        for group in step.groups.group_steps:
            if group.param_group["frozen"] and not group.options.freezes(group.param_group["calls"]):
                self._cache.warner.warn(
                    "prodigy_steps was raised, or set to 0, after it had passed: the step size stays "
                    "frozen, since the statistics that it is estimated from have been freed."
                )
        return step

    @property
    def _view(self) -> View:
        return View(self.param_groups, self.state, self._placement, self._constraints)

    def _check_no_step_is_under_way(self) -> None:
        if self._cache.steps.current is not None:
            raise RuntimeError(
                "a backward pass has moved parameters (fused_back_pass=True), and no step() has ended that "
                "step yet: call optimizer.step() first."
            )

    def _check_average_is_not_lent(self) -> None:
        if self._cache.average.is_lent:
            raise RuntimeError(
                "within averaged_parameters() the model holds the averaged weights, so the optimiser cannot "
                "step, change mode, or be saved or loaded: leave the with-block first. Only "
                "averaged_state_dict(model) works here too. (Where a trainer's callback evaluates at the "
                "average, leave out train() and eval() of your own.)"
            )

    @isolated
    def _has_changed_weights(self) -> None:
        """Drop what was computed from the weights that the model held before."""
        self._cache.monitor.forget_weights()
        self._free_stale_copies()

    def _free_stale_copies(self) -> None:
        """Free copies of weights that have changed since: what FSDP2 has gathered, and autocast has cast.

        After a forward pass without a backward pass, both would go on with them.
        """
        torch.clear_autocast_cache()
        self._placement.free_gathered(p for group in self.param_groups for p in group["params"])

    # ------------------------------------------------------------------- within the backward pass

    def fuse_backward(self, model: nn.Module) -> list[RemovableHandle]:
        """Let backward passes move the parameters of ``model`` that are in groups with ``fused_back_pass``.

        Call it once, when the model is wrapped as it will be trained. Each gradient is then consumed and
        freed as soon as it is there, and :meth:`step` ends the step: it updates the step size, and moves what
        no backward pass has moved, such as parameters that were frozen when this was called. The loop stays
        as it is, but every backward pass needs its own :meth:`step`.

        An inf or NaN in a gradient skips only the parameter that has it, even in groups that are not fused,
        since others have moved already; the step size then keeps its value, and the step counts as skipped.
        Whatever changes gradients after the backward pass, such as clipping, comes too late.

        Returns:
            A handle for each parameter's hook, whose ``remove()`` detaches it. Under DDP there are none: its
            communication hook stays.

        Raises:
            ValueError: No parameter of the model is in such a group, or gradients are not yet summed over
                processes when a hook sees them.
        """
        # A weak reference, so that the hooks do not keep a dropped optimiser alive.
        alive = weakref.ref(self)

        def take(p: Tensor, grad: Tensor) -> bool:
            optimizer = alive()
            return optimizer is not None and optimizer._take(p, grad)

        handles = self._hooks.attach(model, fusable(model, self.param_groups), take)
        self._cache.fuses_backward = True
        return handles

    @isolated_from_compiler
    def _take(self, p: Tensor, grad: Tensor) -> bool:
        """Move a parameter by its gradient, now or later in the step. Returns whether its group is fused."""
        with self._cache.lock:  # autograd has a thread for each device
            return self._take_alone(p, grad)

    def _take_alone(self, p: Tensor, grad: Tensor) -> bool:
        steps, view = self._cache.steps, self._view
        location = steps.location(view, p)
        if location is None or not self.param_groups[location.group]["fused_back_pass"]:
            return False
        if view.is_evaluating:
            raise RuntimeError(f"{view.name_of(p)} has a gradient {_EVALUATING}")
        step = steps.current = steps.current or self._begin(in_backward=True)
        if p in step.taken:
            raise RuntimeError(
                f"{view.name_of(p)} has a second gradient, but no step() came after the "
                "first: fused_back_pass=True moves a parameter by the gradient of one backward pass, and "
                "cannot add up several. Call optimizer.step() after each, also after one that failed, or "
                "set fused_back_pass=False. (Checkpointing with use_reentrant=True recomputes a layer that "
                "is used several times in as many backward passes: pass use_reentrant=False.)"
            )
        steps.take(view, step, location, grad)
        return True

    # ---------------------------------------------------------------------------------- constraints

    def constrain(self, parameters: Tensor | Iterable[Tensor], project: Projection) -> RemovableHandle:
        """Hold parameters in a set: every step projects the weights that it moves onto the set.

        >>> optimizer.constrain(model.logit_scale, lambda w: w.clamp_(0, math.log(100)))
        >>> optimizer.constrain(words.weight, lambda w: torch.renorm(w, 2, 0, maxnorm=1.0))

        Use it instead of changing weights in the training loop after each step: there, only the training
        weights would obey the constraint. Here z does too, and so does the average, and Prodigy sees how far
        the weights have really come. The weights are projected immediately, and again in every step; the
        average is, whenever the model gets it.

        Args:
            parameters: One or more of the optimiser's parameters.
            project: Takes a copy of the weights of one parameter (a DTensor, if the parameter is one), and
                projects it in place or returns the projection, of the same shape. Every rank calls it for
                the same parameters in the same order.

        Returns:
            A handle, whose ``remove()`` lifts the constraint.

        Raises:
            ValueError: A tensor is not a parameter of the optimiser, or ``project`` returns another shape.
            TypeError: A module was passed in place of its parameters, or ``project`` cannot be called.
        """
        self._check_no_step_is_under_way()
        self._check_average_is_not_lent()
        if isinstance(parameters, nn.Module):
            raise TypeError(
                f"constrain: pass parameters, not a {type(parameters).__name__}: one, as module.weight, or "
                "several, as module.parameters()."
            )
        if not callable(project):
            raise TypeError(
                f"constrain: project={project!r} is no function: pass one that projects a tensor onto the "
                "set, as lambda w: w.clamp_(0, 1)."
            )
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not tensors or not {*tensors} <= {*self._view.parameters}:
            raise ValueError(
                "constrain: pass parameters that the optimiser was given, as they are after the model is "
                "wrapped."
            )
        constraint, is_evaluating = Constraint(tensors, project), self._view.is_evaluating
        self._swap(train=True)
        try:
            self._project_(constraint)
            return self._constraints.add(constraint)
        finally:
            self._has_changed_weights()
            if is_evaluating:
                self._swap(train=False)

    @isolated
    def _project_(self, constraint: Constraint) -> None:
        """Project parameters onto their set, which they may be far from; the model is in train mode.

        Every parameter is projected before any is changed, so that nothing is if a projection fails.
        """
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        has_average = {p for group in self.param_groups for p, _ in self._view.averaged(group)}
        changes = []
        for p in constraint.parameters:  # in their order, which is the same on all ranks
            state = self.state[p] if p in has_average else {}
            changes += constraint.changes(p, state, self._placement, group_of[p]["betas"][0])
        for target, values in changes:
            target.copy_(values)

    def _hold_(self, step: Step) -> None:
        """After a step, project the constrained parameters onto their sets."""
        if not self._constraints:
            return
        group_of = {p: group for group in step.groups.group_steps for p in group.param_group["params"]}
        for constraint, p in self._constraints:
            if p not in group_of:
                self._cache.warner.warn(
                    f"constrain() was given a parameter of shape {tuple(p.shape)} that is no longer in "
                    "param_groups: nothing holds what is in its place. Remove the constraint by its handle, "
                    "and call constrain() again with the parameters as they are now."
                )
            elif self.state.get(p):
                weight = self._placement.local(p)
                n = group_of[p].step_numbers(weight.device, compute_dtype(weight))
                constraint.hold_(p, self.state[p], self._placement, n.y_fraction, n.gate != 0)

    # ------------------------------------------------------------------------- train, eval, average

    def train(self) -> None:
        """Put the training weights y into the model. Does nothing if they are there already."""
        self._swap(train=True)

    def eval(self) -> None:
        """Put the averaged weights x into the model. Does nothing if they are there already.

        :meth:`eval` followed by :meth:`train` needs no memory, but rounds the weights;
        :meth:`averaged_parameters` needs a copy of the weights, and restores them exactly.
        """
        self._swap(train=False)

    def _swap(self, *, train: bool) -> None:
        self._check_average_is_not_lent()
        if self._view.in_other_mode(train=train):
            self._check_no_step_is_under_way()
            self._cache.average.swap_(self._view, train=train)
            self._has_changed_weights()

    @property
    def holds_average(self) -> bool:
        """Whether the model holds the weights to evaluate and to save.

        It does in eval mode, within :meth:`averaged_parameters`, and always without Schedule-Free.
        """
        training = any(group["use_schedulefree"] and group["train_mode"] for group in self.param_groups)
        return self._cache.average.is_lent or not training

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """A context in which the model holds the averaged weights x.

        On leaving it, every weight is what it was on entering, bit for bit, whatever mode the
        optimiser is in; the state is not touched. Needs memory for a copy of the weights.

        >>> with optimizer.averaged_parameters():
        ...     evaluate(model)
        """
        if self._cache.average.is_lent:
            yield
            return
        self._check_no_step_is_under_way()
        with self._cache.average.lent(self._view, self._has_changed_weights):
            yield

    def averaged_state_dict(self, model: nn.Module, *, full: bool = False) -> dict[str, Any]:
        """``model.state_dict()`` with the averaged weights x: what to save as the trained model.

        Changes nothing. Averaged weights are new tensors, also in eval mode and within
        :meth:`averaged_parameters`, so that they stay x; the others are the model's own. Tied weights get
        one tensor for each name, as ``safetensors`` needs.

        Args:
            model: The model whose parameters the optimiser was given, wrapped or not.
            full: Return copies on the CPU, under their names in the unwrapped model.

        Raises:
            ValueError: The model has none of the optimiser's parameters.
        """
        self._check_no_step_is_under_way()
        eval_mode.check_model(self._view, model)
        entries = self._cache.average.state_dict_of(self._view, model, self._has_changed_weights)
        return checkpoint.exported(entries.items(), model) if full else entries

    def check_replicas(self) -> None:
        """Does nothing in a single process; compares ranks in ``ShardedProdigyPlusScheduleFree``.

        Raises:
            RuntimeError: A backward pass has moved parameters, and no ``step()`` has ended that step. Or
                there are several processes, which this class cannot compare.
        """
        self._check_no_step_is_under_way()
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise RuntimeError(
                f"there are {processes} processes (WORLD_SIZE), which this optimiser cannot compare: call "
                "prodigyplus_dist.check_replicas(optimizer)."
            )

    # ----------------------------------------------------------------------- metrics, checkpoints

    def metrics(self) -> list[dict[str, Tensor]]:
        """The numbers of the step size: a dict of 0-dim tensors for each parameter group.

        They stay on the device, and later steps do not change them; reading one waits for the device. For
        loggers, :meth:`scalars` returns them as plain numbers.

        =================  =============================================================================
        ``d``              step size of the group
        ``d_hat``          Prodigy's last estimate of it, numerator / denominator, before the limiter; with
                           ``step_size="balance"`` the ρ of docs/research.md
        ``effective_lr``   lr·(1 − β1(1 − c)): how far a step moves the model, in units of the step size; with
                           ``use_bias_correction``, times RAdam's rectification
        ``step_size``      the step size in use (see ``split_groups_mean``) × ``effective_lr``
        ``numerator``      Prodigy's decayed sum of ⟨g, p0 − z⟩, weighted with d²/sqrt(d0); with
                           ``use_speed=True``, of its signs, weighted with d0·sqrt(d). With balance, the
                           running average of weight × step size × ρ, summed over tensors
        ``denominator``    Prodigy's ‖s‖₁. With balance, the same average without the factor ρ
        ``step``           steps made
        ``skipped_steps``  steps skipped for an inf or NaN in a gradient
        =================  =============================================================================
        """
        return metrics_.metrics(self.param_groups)

    def scalars(self, prefix: str = "", names: Collection[str] | None = None) -> dict[str, float]:
        """The numbers of :meth:`metrics` as one flat dict of floats, for loggers. Waits for the device once.

        >>> wandb.log(optimizer.scalars("prodigyplus/"), step=step)

        Args:
            prefix: Put before each name.
            names: Which of the numbers, such as ``names=["d", "step_size"]``. None: all.

        Returns:
            Under ``d``, ``d_hat`` and so on; with several groups, under ``d/0``, ``d/1`` and so on.

        Raises:
            ValueError: There is no number of that name.
            TypeError: ``prefix`` is not a string, for instance because names were passed.
        """
        return metrics_.scalars(self.param_groups, prefix, names)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimiser; a group's numbers are plain Python numbers in it.

        The model's weights are not in it: save them too, in the same mode, and load them before going on.
        """
        self._check_no_step_is_under_way()
        self._check_average_is_not_lent()

        # Runs before users' hooks, which are to see the final state dict.
        def finish(optimizer: Optimizer, saved: dict[str, Any]) -> None:
            to_python_numbers_(saved["param_groups"])
            for group in saved["param_groups"]:
                group |= options.plain(group)  # a schedule may have put in numbers of numpy
            states = checkpoint.saved_states(self.param_groups, self.state, self._placement, self._exchange)
            others = {key: value for key, value in self.state.items() if not isinstance(key, Tensor)}
            saved["state"] = {**states, **others}

        hook = self.register_state_dict_post_hook(finish, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, every tensor in the dtype it was saved in.

        Args:
            state_dict: The result of :meth:`state_dict`; neither changed nor shared.

        Raises:
            ValueError: It is of other groups, other parameters or another optimiser. This optimiser is then
                unchanged.
        """
        self._check_no_step_is_under_way()
        self._check_average_is_not_lent()
        # torch's loader would cast all state to the parameter's dtype, so the state bypasses it.
        loaded: dict[Tensor, dict[str, Tensor]] = {}

        def take_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups, others, states = checkpoint.checked_parts(state_dict, self.param_groups, self._placement)
            loaded.update(states)
            return {"state": others, "param_groups": groups}

        def put_states(optimizer: Optimizer) -> None:
            self._cache.average.forget()
            self._has_changed_weights()
            self._cache.steps.columns(self._view)
            self.state.update(loaded)
            self._cache.steps.note_loaded(self._view, loaded)

        hooks = (
            self.register_load_state_dict_pre_hook(take_states),
            self.register_load_state_dict_post_hook(put_states, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
