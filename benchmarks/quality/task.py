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
    """What is reported about a model; the accuracy is None if the task has none."""

    loss: float
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A task that has been built.

    Attributes:
        model: Its parameters that require gradients are trained.
        loss: The training loss on the batch of a step. Batches depend only on the seed and the step, so that
            all optimisers see the same ones.
        evaluate: Called with the weights to evaluate in the model.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    evaluate: Callable[[], Evaluation]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a task is; ``shape`` has anything else that its family needs."""

    steps: int
    batch: int
    shape: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a task is built for.

    Attributes:
        scale: One of the task's scales.
        seed: For initialisation, for batches and for what is drawn once for a task.
        device: Where the model and the data are.
        cache: A folder for what takes long to make and is the same for all runs.
    """

    scale: Scale
    seed: int
    device: torch.device
    cache: Path

    def generator(self, *keys: int) -> torch.Generator:
        """Random numbers on the CPU, which depend only on the seed and the keys."""
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
        name: The name on the command line and in the report.
        build: Makes model, batches, loss and evaluation.
        scales: By the name of the size: "small" for a CPU core, "large" for a GPU, and for some tasks
            "long", as long as a training script.
        loss: What the reported loss is, in words.
        accuracy: What the reported accuracy is; empty where there is none.
        held_out: Not to be looked at when a rule or a default is chosen.
        autocast: Whether GPUs compute the loss in bfloat16.
        needs: A module whose package has to be installed.
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
