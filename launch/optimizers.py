"""What the scripts know of the optimisers they offer."""

from __future__ import annotations

from torch.optim import Optimizer

from prodigyplus import ProdigyPlusScheduleFree

LEARNING_RATES = {"prodigyplus": 1.0, "adamw": 1e-3}


def step_size(optimizer: Optimizer) -> dict[str, float]:
    """How far the optimiser goes now."""
    numbers = {"lr": float(optimizer.param_groups[0]["lr"])}
    if isinstance(optimizer, ProdigyPlusScheduleFree):
        metrics = optimizer.metrics()[0]
        numbers |= {name: metrics[name].item() for name in ("d", "d_hat", "effective_lr", "step_size")}
    return numbers
