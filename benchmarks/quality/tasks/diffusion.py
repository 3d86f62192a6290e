"""A diffusion autoencoder of small digits: an encoder gives a code, a denoiser predicts the noise with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

from ..task import Evaluation, Problem, Scale, Setup, Task
from . import data

SIDE = 8  # pixels
PIXELS = SIDE * SIDE
CODE = 8
FREQUENCIES = 16  # of the time's embedding
EVALUATED = 2000
LEVELS = 4  # times at which each image is evaluated
LATTICE = 97  # number of times, a prime, so that an image has different ones


class Autoencoder(nn.Module):
    """Two networks that are trained together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Unflatten(1, (1, SIDE)),
            nn.Conv2d(1, width // 8, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 8, width // 4, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(width // 4 * PIXELS // 4, CODE),
        )
        self.denoiser = nn.Sequential(
            nn.Linear(PIXELS + CODE + 2 * FREQUENCIES, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, PIXELS),
        )

    def forward(self, images: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """The squared error of the predicted noise, for images (n, 8, 8) and times (n, 1) from 0 to 1."""
        angle = time * math.pi / 2  # so that signal² + noise² is 1
        noisy = angle.cos() * images.flatten(1) + angle.sin() * noise
        waves = time * torch.arange(1, FREQUENCIES + 1, device=time.device) * math.pi
        known = torch.cat([noisy, self.encoder(images), waves.cos(), waves.sin()], dim=1)
        return mse_loss(self.denoiser(known), noise)


def build(setup: Setup) -> Problem:
    """MNIST's digits, shrunk to 8 × 8 pixels."""
    train, test = (shrunk(images.images).to(setup.device) for images in data.mnist())
    torch.manual_seed(setup.seed)
    model = Autoencoder(setup.scale.shape["width"]).to(setup.device)
    images = test[:EVALUATED].repeat(LEVELS, 1, 1)
    # Times are spread evenly, so that chance has little effect on the evaluation.
    times = (torch.arange(len(images)) % LATTICE + 0.5).unsqueeze(1).div(LATTICE).to(setup.device)
    noise = torch.randn(len(images), PIXELS, generator=setup.generator(1)).to(setup.device)

    def loss(step: int) -> Tensor:
        generator = setup.generator(2, step)
        time = torch.rand(setup.scale.batch, 1, generator=generator)
        drawn = torch.randn(setup.scale.batch, PIXELS, generator=generator)
        batch = train[setup.draw(len(train), step)]
        value: Tensor = model(batch, time.to(setup.device), drawn.to(setup.device))
        return value

    return Problem(model, loss, lambda: Evaluation(model(images, times, noise).item()))


def shrunk(images: Tensor) -> Tensor:
    """Images of (n, 8, 8) pixels with a mean near 0 and a deviation near 1."""
    small = adaptive_avg_pool2d(images, SIDE).squeeze(1)
    return (small - small.mean()) / small.std()


TASKS = (
    Task(
        "diffusion",
        build,
        {"small": Scale(1500, 128, {"width": 256}), "large": Scale(20_000, 256, {"width": 1024})},
        loss="squared error of the noise, held out",
        held_out=True,
    ),
)
