"""Byte-level GPTs of several widths and batch sizes on the source of Python's standard library."""

from __future__ import annotations

import math
from functools import partial

import torch
from gpt import GPT
from torch import Tensor, nn

from ..task import Evaluation, Problem, Scale, Setup, Task
from . import data

HEAD_WIDTH = 32


def model_of(setup: Setup) -> GPT:
    """A GPT of the scale's shape, initialised by the seed."""
    shape = setup.scale.shape
    torch.manual_seed(setup.seed)
    return GPT(shape["layers"], shape["width"], shape["width"] // HEAD_WIDTH, shape["context"])


def bits_per_byte(model: nn.Module, windows: list[tuple[Tensor, Tensor]]) -> Evaluation:
    """The mean loss, in bits, of a model whose loss is in nats."""
    total = sum(model(inputs, targets).item() * len(inputs) for inputs, targets in windows)
    return Evaluation(total / sum(len(inputs) for inputs, _ in windows) / math.log(2))


def build(setup: Setup, *, with_prose: bool = False) -> Problem:
    """Next bytes, on files that are not trained on."""
    text = data.library(with_prose=with_prose)
    model = model_of(setup).to(setup.device)
    batch = data.text_batches(text.training, setup)
    windows = data.text_to_evaluate(text.held_out, setup)

    def loss(step: int) -> Tensor:
        value: Tensor = model(*batch(step))
        return value

    return Problem(model, loss, lambda: bits_per_byte(model, windows))


def entry(
    width: int,
    layers: int,
    batch: int,
    steps: int,
    large: Scale,
    *,
    context: int = 64,
    windows: int = 128,
    long: int | None = None,
    with_prose: bool = False,
) -> Task:
    """A GPT. Large settings have other sizes; only the order of widths and batch sizes is the same.

    ``long`` is the number of steps of its long setting, where it has one; ``with_prose`` is as for
    :func:`.data.library`.
    """
    shape = {"width": width, "layers": layers, "context": context, "windows": windows}
    scales = {"small": Scale(steps, batch, shape), "large": large}
    if long is not None:
        scales["long"] = Scale(long, batch, shape)
    return Task(
        f"gpt-w{width}-b{batch}" + (f"-c{context}" if context != 64 else "") + "-prose" * with_prose,
        partial(build, with_prose=with_prose),
        scales,
        loss="bits per byte, held out",
        autocast=True,
    )


def on_gpu(width: int, layers: int, batch: int, steps: int) -> Scale:
    """A scale for a GPU."""
    return Scale(steps, batch, {"width": width, "layers": layers, "context": 256, "windows": 512})


TASKS = (
    entry(64, 2, 8, 800, on_gpu(256, 4, 32, 1500), long=8000),
    entry(128, 3, 4, 600, on_gpu(384, 6, 8, 1500)),
    entry(128, 3, 16, 300, on_gpu(384, 6, 32, 700)),
    entry(128, 3, 64, 100, on_gpu(384, 6, 128, 400)),
    entry(192, 4, 16, 150, on_gpu(512, 8, 32, 1000)),
    # Minutes, not seconds: the GPT of 0.67 M parameters that docs/research.md is about; and on the text that
    # its first rates were found on.
    entry(128, 3, 16, 500, on_gpu(384, 6, 64, 700), context=128, windows=256),
    entry(128, 3, 16, 500, on_gpu(384, 6, 32, 700), context=128, windows=256, with_prose=True),
)
