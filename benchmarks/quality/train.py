"""One run: a task, an optimiser, a setting and a seed; the same loop for all."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from . import peers
from .peers import Built, Entry, Setting
from .task import Problem, Setup, Task

FRACTIONS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # of training, after which the model is evaluated
UNTRAINED = 0.0  # the fraction at which it is evaluated too


def evaluated_after(steps: int) -> dict[int, float]:
    """The steps after which the model is evaluated, and the fraction of training after each of them."""
    return {max(1, round(fraction * steps)): fraction for fraction in FRACTIONS}


def train(task: Task, setup: Setup, entry: Entry, setting: Setting) -> dict[str, Any]:
    """Train, and return what was measured; a run whose loss is not finite ends there."""
    problem = task.build(setup)
    built = entry.build(problem.model, setting, setup.scale.steps)
    began, of_cpu = time.perf_counter(), time.process_time()
    curve = list(points(task, setup, problem, entry, setting, built))
    last = curve[-1]
    done = last["fraction"] == 1.0 and last["loss"] is not None
    return {
        "curve": curve,
        "loss": last["loss"] if done else None,
        "accuracy": last["accuracy"] if done else None,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - of_cpu, 2),  # the same on a shared machine
    }


def points(
    task: Task, setup: Setup, problem: Problem, entry: Entry, setting: Setting, built: Built
) -> Iterator[dict[str, Any]]:
    """Take all steps; yields the points of the anytime curve, the first for the untrained model."""
    steps = setup.scale.steps
    yield {"fraction": UNTRAINED, "step": 0, **evaluate(problem, ())}
    at = evaluated_after(steps)
    first = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in built]
    for optimizer in built:
        if hasattr(optimizer, "train"):
            optimizer.train()
    factor = 1.0
    for k in range(steps):
        before, factor = factor, entry.factor(setting, k, steps)
        if factor != before:  # optimisers without a schedule are left alone
            for optimizer, groups in zip(built, first, strict=True):
                for group, rate in zip(optimizer.param_groups, groups, strict=True):
                    group["lr"] = rate * factor
        take_step(task, setup, problem, built, k)
        if k + 1 in at:
            point = evaluate(problem, built)
            yield {"fraction": at[k + 1], "step": k + 1, **point}
            if point["loss"] is None:
                return


def take_step(task: Task, setup: Setup, problem: Problem, built: Built, k: int) -> None:
    """Take step ``k``."""
    torch.manual_seed(setup.seed * 1_000_003 + k)  # for dropout, the same whatever an optimiser draws
    problem.model.train()
    with torch.autocast(
        setup.device.type, torch.bfloat16, enabled=task.autocast and setup.device.type == "cuda"
    ):
        loss = problem.loss(k)
    for optimizer in built:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in built:
        peers.step(optimizer, loss)


@torch.no_grad()
def evaluate(problem: Problem, built: Built) -> dict[str, Any]:
    """Loss, accuracy and rates now; the loss is None where it is not finite."""
    problem.model.eval()
    with peers.evaluating(built):
        loss, accuracy = problem.evaluate()
    rates = [rate if math.isfinite(rate) else None for rate in peers.rates(built)]
    return {"loss": loss if math.isfinite(loss) else None, "accuracy": accuracy, "rates": rates}
