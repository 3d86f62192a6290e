"""The optimiser in Hugging Face's ``Trainer`` and classes derived from it; see docs/guides/huggingface.md."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from prodigyplus.optimizer import ProdigyPlusScheduleFree
from prodigyplus.reporting import warn_caller
from prodigyplus_dist.optimizer import ShardedProdigyPlusScheduleFree

# ProdigyPlusTrainer is made by __getattr__.
__all__ = ["ProdigyPlusMixin", "ProdigyPlusTrainer"]  # noqa: F822

_SCHEDULES = ("constant", "constant_with_warmup")
_LOGGED = ("d", "step_size")
_OVERRIDDEN = ("train", "evaluate", "evaluation_loop", "save_model", "log", "create_optimizer",
               "_load_best_model", "_load_from_checkpoint")  # fmt: skip
_Base: Any = object  # in classes that use the mixin, a Trainer follows it


class ProdigyPlusMixin(_Base):
    """A mixin before ``Trainer``, or a class derived from it, that trains with this optimiser.

    >>> class Trained(ProdigyPlusMixin, SFTTrainer): ...
    >>> trainer = Trained(model, args, optimizer_options={"step_size": "balance"})

    Evaluations, checkpoints, ``load_best_model_at_end`` and ``save_model`` have the averaged weights x, and
    so has the model when ``train()`` returns. Logs have ``prodigyplus/d`` and ``prodigyplus/step_size``. A
    run resumed from a checkpoint equals the run that was not stopped, bit for bit.

    Evaluating does not change a run. Saving a checkpoint for resuming does, by a rounding of the weights: it
    holds x, and the run goes on from y as computed from x and z, like a resumed run.

    Args:
        args, kwargs: As for the ``Trainer``. ``learning_rate`` has to be left alone, or be 1.0;
            ``lr_scheduler_type`` has to be "constant" or "constant_with_warmup".
        optimizer_options: Options of :class:`prodigyplus_dist.ShardedProdigyPlusScheduleFree`. Of these,
            ``split_groups`` is False here by default: all parameters share one step size.
            ``{"params": groups}`` replaces the ``Trainer``'s two parameter groups, one of them without weight
            decay. ``weight_decay`` is set in ``args``, or in such groups.

    Raises:
        ValueError: Something in ``args`` would spoil the step size, a ``weight_decay`` in
            ``optimizer_options`` would be overridden, or the ``Trainer`` was given another optimiser,
            DeepSpeed or FSDP1.
        RuntimeError: This version of ``transformers`` lacks a method that is overridden here.
    """

    optimizer: Any  # these two are the Trainer's
    optimizer_cls_and_kwargs: Any

    def __init__(self, *args: Any, optimizer_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        base = super()
        missing = [name for name in _OVERRIDDEN if not hasattr(base, name)]
        if missing:
            raise RuntimeError(
                f"ProdigyPlusMixin: {type(self).__name__} has no {', '.join(missing)} to override. Write "
                "`class Mine(ProdigyPlusMixin, Trainer)`, in this order, with a version of transformers that "
                "pyproject.toml names."
            )
        super().__init__(*args, **kwargs)
        options = {"split_groups": False, **(optimizer_options or {})}
        if "weight_decay" in options and "params" not in options:
            raise ValueError(
                f"optimizer_options has weight_decay={options['weight_decay']}, which the groups that the "
                "Trainer makes would override. Set it in TrainingArguments; or pass groups of your own, with "
                'their weight decay, as optimizer_options={"params": …}.'
            )
        if self.optimizer is None:
            if self.optimizer_cls_and_kwargs is not None:
                raise ValueError(
                    f"optimizer_cls_and_kwargs={self.optimizer_cls_and_kwargs!r}: ProdigyPlusMixin has an "
                    "optimiser of its own. Pass its options as optimizer_options."
                )
            if "params" in options and kwargs.get("model_init") is not None:
                raise ValueError(
                    'optimizer_options has "params", but model_init makes a new model for each training, '
                    "which has other parameters: pass the model itself, or leave out the groups."
                )
            self.optimizer_cls_and_kwargs = (ShardedProdigyPlusScheduleFree, options)
        elif not isinstance(self.optimizer, ProdigyPlusScheduleFree) or optimizer_options is not None:
            raise ValueError(
                f"optimizers=({type(self.optimizer).__name__}, …): pass one of this package, without "
                "optimizer_options, or none."
            )
        self._check_rates()
        _check_backend(self)
        # Before all other callbacks, so that those that save or publish the model at the end find x in it.
        self.callback_handler.callbacks.insert(0, _average_at_end())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        given = self.optimizer_cls_and_kwargs
        if given is not None:  # a copy, since the Trainer takes "params" out of it
            self.optimizer_cls_and_kwargs = (given[0], dict(given[1]))
        self._check_rates()  # again: a search for hyperparameters, among others, changes args
        try:
            made = super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = given
        if not isinstance(inner := _unwrapped(made), ProdigyPlusScheduleFree):
            raise ValueError(
                f"{type(self).__name__}.create_optimizer has made {type(inner).__name__}: let it make the "
                "optimiser that self.optimizer_cls_and_kwargs names."
            )
        return made

    def _check_rates(self) -> None:
        given = {} if self.optimizer_cls_and_kwargs is None else self.optimizer_cls_and_kwargs[1]
        groups = [given] if self.optimizer is None else self.optimizer.param_groups
        if self.lr_scheduler is None and any(group.get("use_schedulefree", True) for group in groups):
            _check_schedule(self.args)
        _check_learning_rate(self.args)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except BaseException:  # a KeyboardInterrupt too
            self._end_after_exception()
            raise

    def _end_after_exception(self) -> None:
        """Leave the model with x, if this rank can do so alone: others may not have met the exception."""
        optimizer = _unwrapped(self.optimizer)
        if not isinstance(optimizer, ProdigyPlusScheduleFree) or optimizer._constraints:
            return  # a projection of DTensors may communicate
        try:
            optimizer.eval()
        except RuntimeError as error:  # a backward pass has begun a step, or a device has failed
            warn_caller(f"ProdigyPlusMixin: the model is left with the training weights y: {error}")

    def _averaged(self) -> AbstractContextManager[None]:
        optimizer = _unwrapped(self.optimizer)
        return nullcontext() if optimizer is None else optimizer.averaged_parameters()

    def _hold_average(self) -> None:
        """Put x into the model, until the next training step puts y back."""
        if self.optimizer is not None:
            self.optimizer.eval()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._averaged():  # also during callbacks, which may generate from the model
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._averaged():
            # Hidden, since the loop would call optimizer.eval(), which rounds the training weights.
            optimizer, self.optimizer = self.optimizer, None
            try:
                return super().evaluation_loop(*args, **kwargs)
            finally:
                self.optimizer = optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call and not self.args.save_only_model:
            # The optimiser's state is saved next. In eval mode it goes with x, which the model's file holds.
            self._hold_average()
        with self._averaged():
            super().save_model(output_dir, _internal_call=_internal_call)

    def _load_best_model(self) -> None:
        self._hold_average()  # in train mode, the best x would be taken for y
        super()._load_best_model()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._hold_average()  # as above, if this Trainer has trained before
        super()._load_from_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (optimizer := _unwrapped(self.optimizer)) is not None:
            logs.update(_scalars(optimizer))
        super().log(logs, *args, **kwargs)


def __getattr__(name: str) -> Any:
    if name != "ProdigyPlusTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import Trainer  # takes seconds, which users of the mixin may have spent already

    trainer = type(name, (ProdigyPlusMixin, Trainer), {"__module__": __name__, "__doc__": _TRAINER})
    globals()[name] = trainer
    return trainer


_TRAINER = "``transformers.Trainer`` with :class:`ProdigyPlusMixin`."


def _unwrapped(optimizer: Any) -> ProdigyPlusScheduleFree | None:
    """The optimiser inside accelerate's, which forwards only torch's methods, train() and eval()."""
    inner: ProdigyPlusScheduleFree | None = getattr(optimizer, "optimizer", optimizer)
    return inner


def _scalars(optimizer: ProdigyPlusScheduleFree) -> dict[str, float]:
    scalars = optimizer.scalars("prodigyplus/", _LOGGED)
    if any(group["split_groups"] for group in optimizer.param_groups):
        return scalars
    # All groups share one d: log the first group's.
    return {
        key.removesuffix("/0"): value
        for key, value in scalars.items()
        if key.endswith("/0") or not key[-1].isdigit()
    }


def _check_schedule(args: Any) -> None:
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if kind not in _SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type={kind!r}: a learning rate that falls takes the step size away that the "
            "optimiser finds, and the average that it keeps does the work of a schedule. Set "
            'lr_scheduler_type="constant", or "constant_with_warmup".'
        )


def _check_learning_rate(args: Any) -> None:
    default = next(field.default for field in dataclasses.fields(args) if field.name == "learning_rate")
    if args.learning_rate not in (default, 1.0):
        raise ValueError(
            f"learning_rate={args.learning_rate}: the optimiser finds its step size, and this would be for "
            "another. Leave learning_rate out, or set it to 1.0; to multiply the step size that is found, "
            'pass optimizer_options={"lr": …}.'
        )


def _check_backend(trainer: Any) -> None:
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            f"deepspeed={trainer.args.deepspeed!r}: ZeRO hands the optimiser flat pieces of many parameters, "
            "which have no shape. Use FSDP2: fsdp=True, and no deepspeed."
        )
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        warn_caller(
            "fsdp is set, but accelerate does not shard here: it does so on accelerators alone, and falls "
            "back to DDP with use_cpu=True."
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and trainer.args.world_size == 1:
        warn_caller(
            f"WORLD_SIZE={processes}, but to accelerate this process is the only one: each trains a model of "
            "its own, and all write to the same folder. Without a GPU, set use_cpu=True for DDP over gloo."
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "fsdp_config has version=1: FSDP1 hands the optimiser flat pieces of many parameters, which have "
            "no shape. Set version=2."
        )


def _average_at_end() -> Any:
    """A callback that has every step begin from y, and puts x into the model when training ends."""
    from transformers import TrainerCallback

    class AverageAtEnd(TrainerCallback):
        _hook: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # A checkpoint may be saved between the backward pass and the step (enable_jit_checkpoint).
            self._remove_hook()  # of a training that an exception has ended
            if (optimizer := _unwrapped(kwargs["optimizer"])) is not None:
                self._hook = optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.train())

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # After a checkpoint the model holds x. The Trainer's own training_step() calls this too, but not
            # all those that replace it do.
            kwargs["optimizer"].train()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._remove_hook()
            kwargs["optimizer"].eval()

        def _remove_hook(self) -> None:
            if self._hook is not None:
                self._hook.remove()

    return AverageAtEnd()
