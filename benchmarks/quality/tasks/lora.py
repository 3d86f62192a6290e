"""LoRA: a GPT that knows source code learns prose through matrices of low rank."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from gpt import GPT, Attention, SwiGLU
from torch import Tensor, nn
from torch.nn.functional import linear

from ..task import Problem, Scale, Setup, Task
from . import data, text

PRETRAINING_SEED = 0
PRETRAINING_RATE = 2e-3  # of AdamW with warm-up and cosine, about the best for this size
WARM_UP = 0.05


class LowRank(nn.Module):
    """A linear layer that is frozen, with a correction of low rank that is trained and starts at zero."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the correction, scaled as with α = 2 · rank."""
        out: Tensor = self.layer(x) + 2 * linear(linear(x, self.down), self.up)
        return out


def build(setup: Setup) -> Problem:
    """Next bytes of the Python documentation, learnt by corrections to all layers of the blocks."""
    model = pretrained(setup)
    model.requires_grad_(False)
    torch.manual_seed(setup.seed)
    for parent in [its for its in model.blocks.modules() if isinstance(its, (Attention, SwiGLU))]:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, LowRank(layer, setup.scale.shape["rank"]))
    model.to(setup.device)
    batch = data.text_batches(data.prose().training, setup)
    windows = data.text_to_evaluate(data.prose().held_out, setup)

    def loss(step: int) -> Tensor:
        value: Tensor = model(*batch(step))
        return value

    return Problem(model, loss, lambda: text.bits_per_byte(model, windows))


def pretrained(setup: Setup) -> GPT:
    """A GPT trained on source code, from the cache if it has one."""
    shape = setup.scale.shape
    scale = Scale(
        shape["pretraining"],
        shape["pretraining_batch"],
        {key: shape[key] for key in ("width", "layers", "context")},
    )
    settings = json.dumps(
        [asdict(scale), PRETRAINING_RATE, data.library(with_prose=False).summary, torch.__version__]
    )
    name = f"gpt-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.pt"
    path = data.folder(setup.cache) / name
    if not path.exists():
        pretrain(Setup(scale, PRETRAINING_SEED, setup.device, setup.cache), path)
    model = text.model_of(Setup(scale, PRETRAINING_SEED, setup.device, setup.cache))
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def pretrain(setup: Setup, path: Path) -> None:
    """Train a GPT and save its weights; the file appears only when it is complete."""
    model = text.model_of(setup).to(setup.device)
    batch = data.text_batches(data.library(with_prose=False).training, setup)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE, betas=(0.9, 0.99))
    steps = setup.scale.steps
    for step in range(steps):
        warm_up = min(1.0, (step + 1) / (WARM_UP * steps))
        optimizer.param_groups[0]["lr"] = (
            PRETRAINING_RATE * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        optimizer.zero_grad()
        model(*batch(step)).backward()
        optimizer.step()
    partial = path.with_suffix(".partial")
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, partial)
    partial.replace(path)


def shape(width: int, layers: int, context: int, pretraining: int, pretraining_batch: int) -> dict[str, int]:
    """The shape of a scale."""
    return {
        "width": width,
        "layers": layers,
        "context": context,
        "windows": 128,
        "rank": 8,
        "pretraining": pretraining,
        "pretraining_batch": pretraining_batch,
    }


TASKS = (
    Task(
        "lora",
        build,
        {
            "small": Scale(300, 16, shape(128, 3, 64, 600, 16)),
            "large": Scale(1000, 32, shape(384, 6, 256, 4000, 32)),
        },
        loss="bits per byte, held out",
        autocast=True,
    ),
)
