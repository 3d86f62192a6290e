"""MNIST as it is, by the network of Schedule-Free's example and by a perceptron."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..task import Evaluation, Problem, Scale, Setup, Task
from . import data
from .data import Images
from .networks import CLASSES

HELD_OUT = "cross entropy, held out"


def evaluation(model: nn.Module, test: Images) -> Evaluation:
    """Mean loss and accuracy."""
    loss = right = 0.0
    for images, labels in test.parts():
        scores = model(images)
        loss += cross_entropy(scores, labels, reduction="sum").item()
        right += (scores.argmax(dim=1) == labels).sum().item()
    return Evaluation(loss / len(test.labels), right / len(test.labels))


def convolutional_network() -> nn.Module:
    """The network of Schedule-Free's example."""
    from mnist_ddp import network  # here, since it imports what the scripts of launch/ need

    return network()


def perceptron() -> nn.Module:
    """Three layers without convolutions."""
    sizes = (28 * 28, 256, 128)
    hidden = (module for pair in pairwise(sizes) for module in (nn.Linear(*pair), nn.ReLU()))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], CLASSES))


def build_mnist(setup: Setup, *, network: Callable[[], nn.Module]) -> Problem:
    """All of MNIST, in whole epochs whose order the seed draws."""
    training, test = (images.to(setup.device) for images in data.mnist())
    test = test.at(torch.arange(setup.scale.shape["evaluated"]).to(setup.device))
    torch.manual_seed(setup.seed)
    model = network().to(setup.device)
    count, batch = len(training.labels), setup.scale.batch
    per_epoch = count // batch

    def loss(step: int) -> Tensor:
        epoch, number = divmod(step, per_epoch)
        order = torch.randperm(count, generator=setup.generator(0, epoch))
        images, labels = training.at(order[number * batch :][:batch].to(setup.device))
        return cross_entropy(model(images), labels)  # of log-probabilities: log-softmax keeps them

    return Problem(model, loss, lambda: evaluation(model, test))


TASKS = (
    Task(
        "mnist",
        partial(build_mnist, network=convolutional_network),
        {
            "small": Scale(250, 64, {"evaluated": 1000}),
            "large": Scale(3 * 938, 64, {"evaluated": 10_000}),
            "long": Scale(14 * 938, 64, {"evaluated": 10_000}),  # half an hour on a CPU core
        },
        HELD_OUT,
        "held out",
    ),
    Task(
        "mnist-mlp",
        partial(build_mnist, network=perceptron),
        {
            "small": Scale(1400, 64, {"evaluated": 10_000}),
            "large": Scale(10 * 938, 64, {"evaluated": 10_000}),
        },
        HELD_OUT,
        "held out",
    ),
)
