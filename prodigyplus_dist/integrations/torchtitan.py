"""torchtitan 0.3: a trainer's configuration with this optimiser, evaluated and exported at its average.

The one function to call is :func:`with_prodigyplus`; docs/guides/torchtitan.md shows where.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer.utils import init_optim_state
from torchtitan.components.validate import Validator
from torchtitan.config.override import derive
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from prodigyplus import muon_groups
from prodigyplus_dist.optimizer import ShardedProdigyPlusScheduleFree


def with_prodigyplus(
    config: Trainer.Config,
    *,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    muon: bool = False,
    **options: Any,
) -> Trainer.Config:
    """A trainer's configuration with this optimiser instead of its own.

    The learning rate stays constant, validation uses the averaged weights x, interval checkpoints resume bit
    for bit, a last checkpoint with only the model holds x, and ``d`` is among the metrics.

    >>> def debugmodel() -> Trainer.Config:
    ...     return with_prodigyplus(llama3_debugmodel(), step_size="balance")

    Args:
        config: The configuration, which is not changed.
        groups: Options that differ for some parameters, by a regular expression that is searched for in their
            names: ``{r"norm": {"weight_decay": 0.0}}``. The first match decides.
        muon: Train hidden matrices with Muon, as :func:`prodigyplus.muon_groups` chooses them. Each group
            then has a step size of its own, unless ``options`` say otherwise.
        options: Options of ``ShardedProdigyPlusScheduleFree``.

    Raises:
        ValueError: A component of the configuration is not torchtitan's own, and would be lost; or both
            ``groups`` and ``muon`` are given.
    """
    if groups and muon:
        raise ValueError(
            f"groups={dict(groups)!r} and muon=True: Muon makes the parameter groups itself. Leave one out."
        )
    if config.model_spec is None:
        raise ValueError("config.model_spec is None: set it before with_prodigyplus(config).")
    return replace(
        config,
        optimizer=Optimizers.Config(
            options=options, groups={k: dict(v) for k, v in (groups or {}).items()}, muon=muon
        ),
        lr_scheduler=ConstantSchedule.Config(),
        validator=_as_ours(config.validator, "validator", Validator, AveragedValidator),
        checkpoint=_as_ours(config.checkpoint, "checkpoint", CheckpointManager, AveragedCheckpoints),
        metrics=_as_ours(config.metrics, "metrics", MetricsProcessor, StepSizeMetrics),
        model_spec=replace(
            config.model_spec,
            post_optimizer_build_fn=_TellParallelDims(config.model_spec.post_optimizer_build_fn),
        ),
    )


def _as_ours(config: Any, name: str, theirs: type[Any], ours: type[Any]) -> Any:
    """The configuration of our subclass of a component, with the values of torchtitan's."""
    if isinstance(config, ours.Config):
        return config
    if type(config) is not theirs.Config:
        raise ValueError(
            f"config.{name} is a {type(config).__qualname__}, where {theirs.__name__}.Config was expected: "
            f"set it to one before with_prodigyplus(config), or to that of a subclass of {ours.__name__}."
        )
    return derive(config, ours.Config)


@dataclass(frozen=True)
class _TellParallelDims:
    """A ``post_optimizer_build_fn``: builds the optimiser, knowing the pipeline; then calls the model's."""

    then: Callable[..., None] | None

    def __call__(
        self, optimizers: Optimizers, model_parts: list[nn.Module], parallel_dims: ParallelDims
    ) -> None:
        pipeline = parallel_dims.get_optional_mesh("pp")
        optimizers.build_(None if pipeline is None else pipeline.get_group())
        if self.then is not None:
            self.then(optimizers, model_parts, parallel_dims)


class Optimizers(OptimizersContainer):
    """One ``ShardedProdigyPlusScheduleFree`` for all model parts of a rank; one ``d`` for a pipeline."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """See :func:`with_prodigyplus`; torchtitan's own fields are not used."""

        options: dict[str, Any] = field(default_factory=dict)
        """Options of ShardedProdigyPlusScheduleFree"""

        groups: dict[str, dict[str, Any]] = field(default_factory=dict)
        """Options that differ for parameters by a regular expression found in their names"""

        muon: bool = False
        """Train hidden matrices with Muon"""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.param_groups or config.optimizer_factory_kwargs_by_name:
            raise ValueError(
                "optimizer.param_groups and optimizer.optimizer_factory_kwargs_by_name are of torchtitan's "
                "optimisers: pass options and groups to with_prodigyplus."
            )
        if config.implementation != "fused":
            raise ValueError(
                f"optimizer.implementation={config.implementation!r}: this optimiser has one of its own. "
                'Leave it at "fused"; fused=False among the options of with_prodigyplus is without kernels.'
            )
        self.config = config
        self.model_parts = model_parts
        self.before_lending: Callable[[], object] = lambda: None
        self.optimizers: list[ShardedProdigyPlusScheduleFree] = []  # until build_ is told of the pipeline
        self._post_init([p for part in model_parts for p in part.parameters() if p.requires_grad])

    def build_(self, pipeline: dist.ProcessGroup | None) -> None:
        """Build the optimiser.

        Args:
            pipeline: The ranks that hold the stages of the model and share ``d``; None without a pipeline.

        Raises:
            ValueError: A regular expression matches no name.
        """
        config = self.config
        groups = _muon_groups(self.model_parts) if config.muon else _groups(self.model_parts, config.groups)
        if pipeline is None:  # stages of a pipeline need equally many groups, even empty ones
            for pattern, group in zip(config.groups, groups, strict=False):
                if not group["params"]:
                    raise ValueError(f"groups: {pattern!r} is found in no name of a trained parameter.")
            groups = [group for group in groups if group["params"]]
        # A step size of its own for Muon's group, which one for all serves badly (docs/muon.md).
        options = ({"split_groups_mean": False} if config.muon else {}) | config.options
        optimizer = ShardedProdigyPlusScheduleFree(groups, process_group=pipeline, **options)
        self.optimizers = [optimizer]
        self._validate_params([p for group in optimizer.param_groups for p in group["params"]])
        for group in optimizer.param_groups:
            logger.info(
                f"Optimizer {type(optimizer).__name__}: {len(group['params'])} parameters, "
                f"step_size={group['step_size']!r} weight_decay={group['weight_decay']} "
                f"use_muon_pp={group['use_muon_pp']}"
            )

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """A context in which the model parts hold the averaged weights x; see the optimiser's method."""
        self.before_lending()
        with self.optimizers[0].averaged_parameters():
            yield

    def scalars(self) -> dict[str, float]:
        """The numbers of the step size, for a logger; see the optimiser's method."""
        return self.optimizers[0].scalars()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, flat: its tensors by names of parameters, its numbers by groups."""
        optimizer = self.optimizers[0]
        init_optim_state(optimizer)  # torch loads a checkpoint into existing tensors
        return {key: value for key, value, _ in _flat(optimizer.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        optimizer = self.optimizers[0]
        init_optim_state(optimizer)
        saved = optimizer.state_dict()
        for name, _, (holder, key) in list(_flat(saved)):
            holder[key] = state_dict[name]
        optimizer.load_state_dict(saved)


def _flat(saved: dict[str, Any]) -> Iterator[tuple[str, Any, tuple[dict[str, Any], str]]]:
    """Yield (name, value, (dict, key)) of each value; the name is the same on every layout of processes."""
    for index, group in enumerate(saved["param_groups"]):
        for key, value in group.items():
            if key not in ("params", "param_names"):
                yield f"param_groups.{index}.{key}", value, (group, key)
        for saved_as, name in zip(group["params"], group["param_names"], strict=True):
            state = saved["state"].get(saved_as, {})
            for key, value in state.items():
                yield f"state.{name}.{key}", value, (state, key)


def _add_(group: dict[str, Any], name: str, p: nn.Parameter) -> None:
    # Not as a pair: torch sees no names in a group without parameters, and refuses it beside named ones.
    group["params"].append(p)
    group["param_names"].append(canonical_fqn(name))


def _groups(
    model_parts: Sequence[nn.Module], options: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A group for each regular expression, and one for the parameters that none matches."""
    groups = [{"params": [], "param_names": [], **of_group} for of_group in (*options.values(), {})]
    for part in model_parts:
        for name, p in part.named_parameters():
            if p.requires_grad:
                found = (
                    index for index, pattern in enumerate(options) if re.search(pattern, canonical_fqn(name))
                )
                _add_(groups[next(found, -1)], name, p)
    return groups


def _muon_groups(model_parts: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """The three groups of :func:`prodigyplus.muon_groups`, each over all model parts."""
    merged: list[dict[str, Any]] = []
    for part in model_parts:
        # In a pipeline, a part without the head has None instead.
        has_head = getattr(part, "lm_head", part) is not None
        groups = muon_groups(part, has_head=has_head, keep_empty=True)
        merged = merged or [{**group, "params": [], "param_names": []} for group in groups]
        for group, of_part in zip(merged, groups, strict=True):
            for name, p in of_part["params"]:
                if p.requires_grad:
                    _add_(group, name, p)
    return merged


class ConstantSchedule(LRSchedulersContainer):
    """A learning rate that is constant, after a warm-up if there is one."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """torchtitan's, constant by default."""

        warmup_steps: int = 0
        decay_ratio: float | None = 0.0

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> LRSchedulersContainer:
            """The schedule.

            Raises:
                ValueError: The learning rate would decay.
            """
            if self.decay_ratio != 0 and self.min_lr_factor != 1:
                raise ValueError(
                    f"lr_scheduler.decay_ratio={self.decay_ratio}: Schedule-Free averages its weights, which "
                    "does what a decay is for, and the step size is found at a constant rate; with a decay "
                    "as well, runs end at a much higher loss. Set lr_scheduler.decay_ratio=0.0."
                )
            if not optimizers.optimizers:
                raise ValueError(
                    "config.model_spec was replaced after with_prodigyplus(config), by which the optimiser "
                    "learns of the pipeline: set it before."
                )
            return LRSchedulersContainer.Config.build(
                self, optimizers=optimizers, training_steps=training_steps
            )


class AveragedValidator(Validator):
    """Validates the averaged weights x, and leaves the training weights as they were."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        """torchtitan's."""

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        with self.metrics_processor.optimizers.averaged_parameters():
            super().validate(model_parts, step)


class AveragedCheckpoints(CheckpointManager):
    """Checkpoints that resume training; a last one with only the model holds x."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """torchtitan's."""

    def __init__(self, config: Config, *, optimizers: Optimizers, **others: Any) -> None:
        super().__init__(config, optimizers=optimizers, **others)
        if self.enable:
            self._optimizers = optimizers
            # An asynchronous checkpoint may still be reading the model's own weights.
            optimizers.before_lending = self.maybe_wait_for_staging

    def _save_last_step(self, curr_step: int) -> None:
        if not self.last_save_model_only:
            super()._save_last_step(curr_step)
            return
        with self._optimizers.averaged_parameters():
            super()._save_last_step(curr_step)


class StepSizeMetrics(MetricsProcessor):
    """Logs the numbers of the step size too."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """torchtitan's."""

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        numbers = self.optimizers.scalars()
        ours = {f"prodigyplus/{name}": value for name, value in numbers.items()}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **ours})
        shown = (
            f"{name}: {value:.3e}"
            for name, value in numbers.items()
            if name.partition("/")[0] in ("d", "step_size")
        )
        logger.info(f"step: {step:2}  {'  '.join(shown)}")
