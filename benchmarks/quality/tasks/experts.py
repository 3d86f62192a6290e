"""A byte-level GPT whose MLPs are mixtures of experts."""

from __future__ import annotations

import torch
from gpt import GPT, SwiGLU
from torch import Tensor, nn

from ..task import Problem, Scale, Setup, Task
from . import data, text

CHOSEN = 2  # experts per position
BALANCE = 0.01  # weight of the loss that spreads positions over experts


class Experts(nn.Module):
    """Some of several MLPs, chosen for every position by a router."""

    imbalance: Tensor  # of the last forward pass: 1 if all experts are chosen equally often, more otherwise

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the experts to every position."""
        positions = x.flatten(0, 1)
        shares = self.router(positions).float().softmax(dim=-1)
        weights, chosen = shares.topk(CHOSEN, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        taken = torch.zeros_like(shares).scatter(1, chosen, 1.0).mean(dim=0)
        self.imbalance = len(self.experts) / CHOSEN * (taken * shares.mean(dim=0)).sum()
        out = torch.zeros_like(positions)
        for number, expert in enumerate(self.experts):
            where, rank = (chosen == number).nonzero(as_tuple=True)
            mixed = expert(positions[where]) * weights[where, rank].unsqueeze(1)
            out = out.index_add(0, where, mixed.to(out.dtype))
        return out.view_as(x)


def model_of(setup: Setup) -> GPT:
    """A GPT with experts; the rest is initialised by the seed as it would be without them."""
    model = text.model_of(setup)
    shape = setup.scale.shape
    width = shape["width"]
    for block in model.blocks:
        block.mlp = experts = Experts(width, shape["experts"])
        for name, weight in experts.named_parameters():
            scale = (2 * shape["layers"]) ** -0.5 if name.endswith("down.weight") else 1.0
            nn.init.normal_(weight, std=width**-0.5 * scale)
    return model


def build(setup: Setup) -> Problem:
    """Next bytes, on files that are not trained on."""
    model = model_of(setup).to(setup.device)
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    batch = data.text_batches(data.library(with_prose=False).training, setup)
    windows = data.text_to_evaluate(data.library(with_prose=False).held_out, setup)

    def loss(step: int) -> Tensor:
        value: Tensor = model(*batch(step))
        return value + BALANCE * torch.stack([its.imbalance for its in mixtures]).sum()

    return Problem(model, loss, lambda: text.bits_per_byte(model, windows))


def shape(width: int, layers: int, context: int) -> dict[str, int]:
    """The shape of a scale."""
    return {"width": width, "layers": layers, "context": context, "windows": 128, "experts": 8}


TASKS = (
    Task(
        "experts",
        build,
        {"small": Scale(400, 8, shape(64, 2, 64)), "large": Scale(1500, 32, shape(256, 4, 256))},
        loss="bits per byte, held out",
        held_out=True,
        autocast=True,
    ),
)
