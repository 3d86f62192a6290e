"""Tasks made from MNIST: rotated images, noisy images, and few images."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from ..task import Problem, Scale, Setup, Task
from . import data
from .data import Images
from .mnist import HELD_OUT, evaluation
from .networks import CLASSES, VisionTransformer, residual_network

WRONG_LABELS = 0.2  # of the noisy training images
NOISE = 1.0  # standard deviations of the pixels


def classify(setup: Setup, model: nn.Module, training: Images, test: Images) -> Problem:
    """The problem of training a network on one set of images and testing it on another."""
    model, training, test = model.to(setup.device), training.to(setup.device), test.to(setup.device)

    def loss(step: int) -> Tensor:
        images, labels = training.at(setup.draw(len(training.labels), step))
        return cross_entropy(model(images), labels)

    return Problem(model, loss, lambda: evaluation(model, test))


def some(setup: Setup) -> tuple[Images, Images]:
    """As many images of MNIST as the scale says, drawn by the seed, and the first ones of its test set."""
    training, test = data.mnist()
    order = torch.randperm(len(training.labels), generator=setup.generator(1))
    return training.at(order[: setup.scale.shape["images"]]), test.at(
        torch.arange(setup.scale.shape["evaluated"])
    )


def build_rotated(setup: Setup) -> Problem:
    """Images, each turned by an angle of its own, for a vision transformer."""
    training, test = (
        Images(rotated(its.images, setup.generator(2, part)), its.labels)
        for part, its in enumerate(some(setup))
    )
    torch.manual_seed(setup.seed)
    shape = setup.scale.shape
    return classify(setup, VisionTransformer(shape["width"], shape["layers"]), training, test)


def rotated(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images turned by random angles of up to half a turn to either side."""
    angles = (torch.rand(len(images), generator=generator) - 0.5) * 2 * math.pi
    zero = torch.zeros_like(angles)
    rows = [
        torch.stack(row, dim=1)
        for row in ((angles.cos(), -angles.sin(), zero), (angles.sin(), angles.cos(), zero))
    ]
    grid = affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False, padding_mode="border")


def build_noisy(setup: Setup) -> Problem:
    """Noise on all pixels, and wrong labels among those trained on, for a residual network."""
    training, test = some(setup)
    generator = setup.generator(3)
    wrong = torch.rand(len(training.labels), generator=generator) < WRONG_LABELS
    drawn = torch.randint(0, CLASSES, training.labels.shape, generator=generator)
    training = training._replace(labels=torch.where(wrong, drawn, training.labels))
    training, test = (
        its._replace(images=its.images + NOISE * torch.randn(its.images.shape, generator=generator))
        for its in (training, test)
    )
    return classify(setup, seeded_residual_network(setup), training, test)


def build_few(setup: Setup) -> Problem:
    """A few images of each class, for a residual network."""
    training, test = some(setup)
    return classify(setup, seeded_residual_network(setup), training, test)


def seeded_residual_network(setup: Setup) -> nn.Module:
    """A residual network of the scale's shape."""
    torch.manual_seed(setup.seed)
    return residual_network(setup.scale.shape["width"], setup.scale.shape["layers"])


def shape(images: int, width: int, layers: int, evaluated: int = 2000) -> Mapping[str, int]:
    """The shape of a scale."""
    return {"images": images, "evaluated": evaluated, "width": width, "layers": layers}


TASKS = (
    Task(
        "rotated-mnist",
        build_rotated,
        {
            "small": Scale(600, 64, shape(12_000, 64, 2)),
            "large": Scale(6000, 256, shape(60_000, 192, 6, 10_000)),
        },
        HELD_OUT,
        "held out",
    ),
    Task(
        "noisy-mnist",
        build_noisy,
        {
            "small": Scale(500, 64, shape(12_000, 16, 1)),
            "large": Scale(3000, 128, shape(60_000, 64, 3, 10_000)),
        },
        HELD_OUT,
        "held out",
    ),
    Task(
        "few-shot-mnist",
        build_few,
        {
            "small": Scale(400, 32, shape(300, 16, 1)),
            "large": Scale(3000, 64, shape(300, 64, 3, 10_000)),
        },
        HELD_OUT,
        "held out",
        held_out=True,
    ),
)
