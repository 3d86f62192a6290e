"""What one batch with far too large gradients does to a run: with StableAdamW, with clipping, with both.

    PYTHONPATH=. python benchmarks/spike.py

A small network fits a function. In one of its steps the gradients are multiplied by a factor. The table has
the loss of the weights to evaluate, before that step and later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from harness.tables import head, parser, row
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from prodigyplus import ProdigyPlusScheduleFree

SPIKE, AFTER = 300, (-1, 10, 50, 200, 700)  # the step, and how long after it the loss is taken
FACTORS = (1.0, 1e2, 1e4, 1e6)


def balance(parameters: Any, **options: Any) -> Optimizer:
    """Ours."""
    return ProdigyPlusScheduleFree(parameters, step_size="balance", **options)


def adamw(parameters: Any) -> Optimizer:
    """AdamW of torch."""
    return torch.optim.AdamW(parameters, 1e-2)


ARMS: tuple[tuple[str, Callable[..., Optimizer], dict[str, Any], bool], ...] = (
    ("balance", balance, {}, False),
    ("balance, clipped", balance, {}, True),
    ("balance, clipped, use_stableadamw=False", balance, {"use_stableadamw": False}, True),
    ("balance, use_stableadamw=False", balance, {"use_stableadamw": False}, False),
    ("AdamW, rate 0.01", adamw, {}, False),
    ("AdamW, rate 0.01, clipped", adamw, {}, True),
)


def losses(
    make: Callable[..., Optimizer], options: dict[str, Any], factor: float, *, clips: bool
) -> list[float]:
    """The losses of a run in which the gradients of one step are multiplied by ``factor``."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True).sin()
    model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    optimizer = make(model.parameters(), **options)
    averaged = getattr(optimizer, "averaged_parameters", nullcontext)
    found = []
    for step in range(SPIKE + max(AFTER) + 1):
        optimizer.zero_grad()
        (F.mse_loss(model(x), y) * (factor if step == SPIKE else 1.0)).backward()  # type: ignore[no-untyped-call]
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step - SPIKE in AFTER:
            with torch.no_grad(), averaged():
                found.append(F.mse_loss(model(x), y).item())
    return found


def main() -> None:
    """See the module."""
    parser(__doc__).parse_args()
    torch.set_num_threads(1)
    print(head("factor | optimiser | before: | " + " | ".join(f"{n} steps later:" for n in AFTER[1:])))
    for factor in FACTORS:
        for name, make, options, clips in ARMS:
            found = losses(make, options, factor, clips=clips)
            print(row(f"{factor:g}", name, *(f"{loss:.1e}" for loss in found)), flush=True)


if __name__ == "__main__":
    main()
