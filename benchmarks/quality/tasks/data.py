"""Data that several families read, once per process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import corpus
import mnist_data
import torch
from torch import Tensor

from ..task import Setup

LONGEST_CONTEXT = 1024  # so that the held-out text is the same for all contexts
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels
EVALUATED_AT_ONCE = 1000  # images


class Images(NamedTuple):
    """Normalised images (n, 1, 28, 28), and their labels."""

    images: Tensor
    labels: Tensor

    def at(self, indices: Tensor) -> Images:
        """Some of them."""
        return Images(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return Images(self.images.to(device), self.labels.to(device))

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them, in the batches that are evaluated."""
        yield from zip(*(torch.split(tensor, EVALUATED_AT_ONCE) for tensor in self), strict=True)


@cache
def mnist() -> tuple[Images, Images]:
    """MNIST's training and test set."""
    folder = mnist_data.cache_folder()
    mnist_data.fetch(folder)
    data = mnist_data.load(folder)

    def prepared(images: mnist_data.Bytes, labels: mnist_data.Bytes) -> Images:
        pixels = torch.from_numpy(images).unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
        return Images(pixels, torch.from_numpy(labels).long())

    return prepared(*data[:2]), prepared(*data[2:])


@cache
def library(*, with_prose: bool) -> corpus.Corpus:
    """The source of Python's standard library as training and held-out text, with or without its prose."""
    paths = corpus.standard_library()
    return corpus.read(
        (path for path in paths if with_prose or path.parent.name != "pydoc_data"), LONGEST_CONTEXT
    )


@cache
def prose() -> corpus.Corpus:
    """The Python documentation that comes with the standard library, cut into parts of a few pages."""
    (path,) = (path for path in corpus.standard_library() if path.name == "topics.py")
    text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    parts = torch.split(text, 8 * LONGEST_CONTEXT)
    training = torch.cat([part for index, part in enumerate(parts) if index % corpus.HELD_OUT_EVERY])
    return corpus.Corpus(training, torch.cat(parts[:: corpus.HELD_OUT_EVERY]), path.name)


def text_batches(text: Tensor, setup: Setup) -> Callable[[int], corpus.Batch]:
    """Random windows of a text for each step."""
    context = setup.scale.shape["context"]
    text = text.to(setup.device)
    return lambda step: corpus.random_windows(text, context, setup.scale.batch, setup.seed, step)


def text_to_evaluate(text: Tensor, setup: Setup) -> list[corpus.Batch]:
    """Windows spread evenly over a text, in batches."""
    inputs, targets = corpus.even_windows(
        text.to(setup.device), setup.scale.shape["context"], setup.scale.shape["windows"]
    )
    return list(zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True))


def folder(path: Path) -> Path:
    """A folder, which is made if it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    return path
