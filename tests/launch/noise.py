"""Runs mnist_ddp.py with a small network on random images, which need no download."""

import mnist_data
import mnist_ddp
import numpy as np
from torch import nn


def network():
    hidden = nn.Linear(28 * 28, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, 10), nn.LogSoftmax(dim=1))


def main():
    draw = np.random.default_rng(0).integers
    images, labels = draw(256, size=(93, 28, 28), dtype=np.uint8), draw(10, size=93, dtype=np.uint8)
    mnist_data.fetch = lambda cache: None
    mnist_data.load = lambda folder: mnist_data.Mnist(images, labels, images, labels)
    mnist_ddp.network = network
    mnist_ddp.main()
