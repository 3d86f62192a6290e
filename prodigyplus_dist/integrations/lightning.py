"""The optimiser in Lightning: the average x is evaluated and saved, and a run resumes from y, bit for bit.

>>> from prodigyplus_dist.integrations.lightning import ScheduleFreeCallback
>>> trainer = Trainer(callbacks=[ScheduleFreeCallback()])

Needs ``lightning``, or ``pytorch_lightning`` alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prodigyplus import ProdigyPlusScheduleFree, checkpoint
from prodigyplus.checkpoint import WEIGHTS
from prodigyplus.formulas import schedule_free
from prodigyplus.placement import memory_of


def _framework() -> str:
    """The name of the package to use: the one that is imported already, or else the one that is installed."""
    # Two copies of one code, with different classes; pip installs the second with the first.
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in names:
        if name in sys.modules:
            return name
    return names[0] if importlib.util.find_spec("lightning") else names[1]


_pl: Any = importlib.import_module(_framework())
_rank_zero_warn: Any = importlib.import_module(f"{_pl.__name__}.utilities.rank_zero").rank_zero_warn


class ScheduleFreeCallback(_pl.Callback):
    """Evaluate and save the averaged weights x, train with y, and log the step size.

    It serves every ``ProdigyPlusScheduleFree`` among the trainer's optimisers, sharded ones too, and leaves
    others alone. Put it before callbacks that look at weights, so that they see x too.

    - Validation, its sanity check included, runs at x; afterwards every weight is what it was, bit for bit.
    - The ``state_dict`` of every checkpoint holds x, also if only weights are saved. y is in the optimiser's
      state, under ``"weights"``; ``trainer.fit(ckpt_path=…)`` resumes from it.
    - From ``on_train_end`` on the model holds x. Fitted again without a checkpoint, it starts from x.

    Stages other than ``fit`` have no optimisers, and the callback does nothing in them.

    Args:
        log: The names of :meth:`prodigyplus.ProdigyPlusScheduleFree.scalars` to log at every
            ``log_every_n_steps``, as ``prodigyplus/d``; with several optimisers as ``prodigyplus/0/d``.

    Raises:
        ValueError: In ``fit``, if the trainer would train wrongly, or ``log`` has an unknown name.
    """

    def __init__(self, log: Sequence[str] = ("d", "step_size", "skipped_steps")) -> None:
        self._names = tuple(log)
        self._optimizers: list[ProdigyPlusScheduleFree] = []
        self._lent, self._is_lent = ExitStack(), False
        self._unwrap = ExitStack()  # restores the strategy's own methods

    # ---------------------------------------------------------------------------- from fit to fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()  # of a fit that an exception has cut short
        if stage == "fit":
            _check_trainer(trainer)
            _warn_of_others_before(self, trainer.callbacks)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # The optimisers are there now, and no strategy has loaded a checkpoint into them yet.
        found = [o for o in trainer.optimizers if isinstance(o, ProdigyPlusScheduleFree)]
        if not found:
            _rank_zero_warn(
                "ScheduleFreeCallback has nothing to do: none of the trainer's optimisers is a "
                f"ProdigyPlusScheduleFree, but {[type(o).__name__ for o in trainer.optimizers]}."
            )
        _check_optimizers(trainer, found)
        self._optimizers = found
        for optimizer in found:
            _keep_weights_in_state(optimizer, self._trains)
        self._wrap(trainer.strategy)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in self._optimizers:
            optimizer.train()  # a state saved after a fit is in eval mode

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # Lent, since a checkpoint may still be saved. Later the strategy moves weights and state to the host.
        self._lend()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._take_back()

    def _end_after_exception(self) -> None:
        """Leave the model with x, if this rank can do so alone: others may not have met the exception."""
        if any(optimizer._constraints for optimizer in self._optimizers):
            return  # a projection of DTensors may communicate
        try:
            self._end()
        except RuntimeError as error:  # a backward pass has begun a step, or a device has failed
            _rank_zero_warn(f"ScheduleFreeCallback: the model is left with the training weights y: {error}")

    def _end(self) -> None:
        """Leave the model with x for good."""
        self._take_back()
        self._unwrap.close()
        ended, self._optimizers = self._optimizers, []  # also if one of them raises
        for optimizer in ended:
            optimizer.eval()

    def _trains(self, optimizer: Optimizer) -> bool:
        return any(optimizer is one for one in self._optimizers)

    # ---------------------------------------------------------------------------------- evaluation

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._lend()

    def _lend(self) -> None:
        for optimizer in self._optimizers:
            self._lent.enter_context(optimizer.averaged_parameters())
        self._is_lent = True

    def _take_back(self) -> None:
        self._lent.close()
        self._is_lent = False

    # --------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """A state that is not empty, so that Lightning warns if a run is resumed without this callback."""
        return {"weights": f"optimizer_states: {WEIGHTS}"}

    def _wrap(self, strategy: Any) -> None:
        """Make a strategy return the model's state with x, and the optimisers' with y, at any moment.

        And make it end the validation, or after an exception the fit, when all others have been called.
        """
        # Not in on_save_checkpoint, which is not called if only weights are saved, and otherwise after the
        # strategy has gathered them.
        model_state, optimizer_state = strategy.lightning_module_state_dict, strategy.optimizer_state
        # Lightning calls these after the hooks of the module and of all callbacks.
        on_exception, on_validation_end = strategy.on_exception, strategy.on_validation_end

        def averaged_model_state() -> dict[str, Any]:
            with ExitStack() as stack:
                for optimizer in self._optimizers:
                    stack.enter_context(optimizer.averaged_parameters())
                return _without_sharing(model_state(), self._optimizers)

        def training_state(optimizer: Optimizer) -> Any:
            with self._training_weights():
                return optimizer_state(optimizer)

        def after_exception(exception: BaseException) -> None:
            on_exception(exception)
            self._end_after_exception()

        def after_validation() -> None:
            on_validation_end()
            self._take_back()

        methods = {
            "lightning_module_state_dict": averaged_model_state,
            "optimizer_state": training_state,
            "on_exception": after_exception,
            "on_validation_end": after_validation,
        }
        for name, method in methods.items():
            setattr(strategy, name, method)
            self._unwrap.callback(strategy.__dict__.pop, name)

    @contextmanager
    def _training_weights(self) -> Iterator[None]:
        """A context in which the model holds y, also within a validation."""
        was_lent = self._is_lent
        self._take_back()
        try:
            yield
        finally:
            if was_lent:
                self._lend()

    # ---------------------------------------------------------------------------------------- logs

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Private, but Lightning's own monitors use it too: at other steps the numbers are not read.
        due = trainer._logger_connector.should_update_logs
        if due and self._names and self._optimizers and not trainer.barebones:
            pl_module.log_dict(self._scalars(), on_step=True, on_epoch=False)

    def _scalars(self) -> dict[str, float]:
        alone = len(self._optimizers) == 1
        return {
            f"prodigyplus/{name}" if alone else f"prodigyplus/{index}/{name}": value
            for index, optimizer in enumerate(self._optimizers)
            for name, value in optimizer.scalars(names=self._names).items()
        }


# ------------------------------------------------------------------------------ weights in the state


# Of each optimiser, the hooks of its last fit.
_hooks: WeakKeyDictionary[Optimizer, tuple[RemovableHandle, ...]] = WeakKeyDictionary()


def _keep_weights_in_state(optimizer: ProdigyPlusScheduleFree, trains: Callable[[Optimizer], bool]) -> None:
    """Save the weights in the state of the optimiser, and load them from it.

    There every strategy saves and loads them, in shards or in full.

    Args:
        optimizer: Gets hooks, which stay until the next fit.
        trains: Returns whether to put loaded weights into the model. If not, they are dropped: a strategy may
            load the optimiser's state for testing too, where the model keeps its own weights.
    """
    for handle in _hooks.pop(optimizer, ()):  # of an earlier fit, whose callback would drop the weights
        handle.remove()
    loaded: list[tuple[Tensor, Tensor]] = []

    def add_weights(optimizer: Optimizer, saved: dict[str, Any]) -> None:
        for keys, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            for key, p in zip(keys["params"], group["params"], strict=True):
                if key in saved["state"]:
                    # A copy: torch's distributed checkpoint loads into what it is given here.
                    saved["state"][key][WEIGHTS] = p.detach().clone()

    def take_weights(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        loaded.clear()
        groups = checkpoint.checked_groups(saved, optimizer.param_groups)
        states = dict(saved["state"])
        for saved_group, own_group in zip(groups, optimizer.param_groups, strict=True):
            for key, p in zip(saved_group["params"], own_group["params"], strict=True):
                if WEIGHTS in states.get(key, ()):
                    states[key] = dict(states[key])
                    loaded.append((p, states[key].pop(WEIGHTS)))
        return {**saved, "state": states}

    def put_weights(optimizer: Optimizer) -> None:
        if trains(optimizer):
            placement = optimizer._placement  # type: ignore[attr-defined]
            with torch.no_grad():
                for p, weights in loaded:
                    # Loaded like z, which has the same shape and placements.
                    placement.local(p).copy_(placement.load(p, weights, schedule_free.BASE, 1))
        loaded.clear()

    _hooks[optimizer] = (
        optimizer.register_state_dict_post_hook(add_weights),
        optimizer.register_load_state_dict_pre_hook(take_weights),
        optimizer.register_load_state_dict_post_hook(put_weights),
    )


def _without_sharing(
    entries: Mapping[str, Any], optimizers: Sequence[ProdigyPlusScheduleFree]
) -> dict[str, Any]:
    """A model's state dict that keeps its values when the optimisers' parameters change."""
    lent = {_memory(p)[0] for o in optimizers for group in o.param_groups for p in group["params"]}
    copies: dict[tuple[Any, ...], Tensor] = {}

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor) or (memory := _memory(value))[0] not in lent:
            return value
        if memory not in copies:  # tied weights stay one tensor
            copies[memory] = value.detach().clone()
        return copies[memory]

    return {name: own(value) for name, value in entries.items()}


def _memory(tensor: Any) -> tuple[Any, ...]:
    """Where a tensor lies; of a DTensor, its local piece."""
    return memory_of(tensor.to_local() if hasattr(tensor, "to_local") else tensor)


# ------------------------------------------------------------------------------------------- checks


def _is_a(thing: object, *names: str) -> bool:
    # By name, as there are two packages with the same classes, and a check should import neither.
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def _check_trainer(trainer: Any) -> None:
    """Refuse what cannot train correctly, on all ranks alike, before anything is set up.

    Raises:
        ValueError: The trainer has a strategy, a precision or a callback that does not go with Schedule-Free.
    """
    strategy, precision = trainer.strategy, trainer.precision
    if _is_a(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"strategy={type(strategy).__name__}: it flattens parameters, and the optimiser needs their "
            "shapes. Use ModelParallelStrategy, and fully_shard in configure_model."
        )
    if precision == "16-true":
        raise ValueError(
            'precision="16-true": float16 weights have not the range that the optimiser needs. Use '
            '"bf16-true", "bf16-mixed" or "16-mixed".'
        )
    for callback in trainer.callbacks:
        if _is_a(callback, "StochasticWeightAveraging", "WeightAveraging"):
            raise ValueError(
                f"callbacks: {type(callback).__name__} puts an average of its own into the model, from which "
                "the optimiser would go on. Leave it out: Schedule-Free's own is what is evaluated and saved."
            )
        if _is_a(callback, "LearningRateFinder"):
            raise ValueError(
                f"callbacks: {type(callback).__name__} looks for a learning rate, by which the step size "
                "that the optimiser finds would be multiplied. Leave it out, and lr at 1."
            )


def _warn_of_others_before(callback: ScheduleFreeCallback, callbacks: Sequence[Any]) -> None:
    """Warn of callbacks that might put other weights into the model before ``callback`` puts in x."""
    hooks = "on_validation_start", "on_validation_end"
    for other in callbacks[: callbacks.index(callback)]:
        is_lightnings = type(other).__module__.startswith(("lightning.", "pytorch_lightning."))
        if not is_lightnings and any(
            getattr(type(other), hook) != getattr(_pl.Callback, hook) for hook in hooks
        ):
            _rank_zero_warn(
                f"callbacks: {type(other).__name__} stands before ScheduleFreeCallback. If it puts other "
                "weights into the model for a validation, such as an EMA, training goes on from these. Put "
                "ScheduleFreeCallback first."
            )


def _check_optimizers(trainer: Any, optimizers: Sequence[ProdigyPlusScheduleFree]) -> None:
    """Refuse clipping and unscaling, which come too late for a fused backward pass.

    Raises:
        ValueError: Gradients would be clipped or unscaled after the backward pass has used them.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if any(group["fused_back_pass"] for group in groups):
        if trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val={trainer.gradient_clip_val!r}: with fused_back_pass=True the backward "
                "pass moves the weights, before anything could clip. Leave it out: StableAdamW does its work."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"precision={trainer.precision!r}: with fused_back_pass=True the backward pass moves the "
                'weights, before the scaler could unscale gradients. Use "bf16-mixed".'
            )
