"""Regression by a network of one tanh layer, with noise on the targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..task import Evaluation, Problem, Scale, Setup, Task

INPUTS, HIDDEN, OUTPUTS = 40, 8, 4  # of the function that is learnt
EVALUATED = 4000
NOISE = 0.1


def build(setup: Setup) -> Problem:
    """Targets come from a function of the same kind as the network, drawn by the seed."""
    device = setup.device
    generator = setup.generator(1)
    first = torch.randn(INPUTS, HIDDEN, generator=generator).to(device)
    second = torch.randn(HIDDEN, OUTPUTS, generator=generator).to(device)
    inputs = torch.randn(EVALUATED, INPUTS, generator=generator).to(device)
    width = setup.scale.shape["width"]
    torch.manual_seed(setup.seed)
    model = nn.Sequential(nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, OUTPUTS)).to(device)

    def function(x: Tensor) -> Tensor:
        return torch.tanh(x @ first / 3) @ second

    def loss(step: int) -> Tensor:
        generator = setup.generator(0, step)
        x = torch.randn(setup.scale.batch, INPUTS, generator=generator).to(device)
        noise = torch.randn(setup.scale.batch, OUTPUTS, generator=generator).to(device)
        return mse_loss(model(x), function(x) + NOISE * noise)

    return Problem(model, loss, lambda: Evaluation(mse_loss(model(inputs), function(inputs)).item()))


TASKS = (
    Task(
        "tanh-regression",
        build,
        {"small": Scale(3000, 64, {"width": 96}), "large": Scale(10_000, 256, {"width": 384})},
        loss="mean squared error, without the noise",
    ),
)
