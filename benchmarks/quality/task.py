"""What a task is: a model, its batches, its loss and its evaluation, for a seed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

LARGEST_SEED = 2**63


class Evaluation(NamedTuple):
    """What is reported of a model; None for an accuracy that the task does not have."""

    loss: float
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A task that has been built.

    Attributes:
        model: Its parameters that require gradients are trained.
        loss: The training loss of the batch of a step. Batches depend on the seed and the step alone, so that
            all optimisers see the same.
        evaluate: Called with the weights to evaluate in the model.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    evaluate: Callable[[], Evaluation]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a task is; ``shape`` has whatever else its family needs."""

    steps: int
    batch: int
    shape: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a task is built for.

    Attributes:
        scale: One of the task's scales.
        seed: Of initialisation, of batches and of what is drawn once for a task.
        device: Where the model and the data lie.
        cache: A folder for what takes long to make and is the same for all runs.
    """

    scale: Scale
    seed: int
    device: torch.device
    cache: Path

    def generator(self, *keys: int) -> torch.Generator:
        """Random numbers on the CPU, which depend on the seed and the keys alone."""
        number = self.seed
        for key in keys:
            number = (number * 1_000_003 + key + 1) % LARGEST_SEED
        return torch.Generator().manual_seed(number)

    def draw(self, count: int, step: int) -> Tensor:
        """The batch of a step: indices below ``count``, with replacement."""
        drawn = torch.randint(0, count, (self.scale.batch,), generator=self.generator(0, step))
        return drawn.to(self.device)


@dataclass(frozen=True, slots=True)
class Task:
    """A task that optimisers are compared on.

    Attributes:
        name: As the command line and the report have it.
        build: Makes model, batches, loss and evaluation.
        scales: By the name of the size: "small" for a CPU core, "large" for a GPU, and for some tasks
            "long", what a training script does.
        loss: What the reported loss is, in words.
        accuracy: What the reported accuracy is; empty where there is none.
        held_out: Not to be looked at when a rule or a default is chosen.
        autocast: Whether GPUs compute the loss in bfloat16.
        needs: The module of a package that has to be installed.
    """

    name: str
    build: Callable[[Setup], Problem]
    scales: Mapping[str, Scale]
    loss: str
    accuracy: str = ""
    held_out: bool = False
    autocast: bool = False
    needs: str = "torch"

    @property
    def is_available(self) -> bool:
        """Whether what it needs is installed."""
        return importlib.util.find_spec(self.needs) is not None
