"""Addition modulo 59, by a transformer that reads both numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..task import Evaluation, Problem, Scale, Setup, Task

MODULUS = 59
TRAINED_ON = 0.6  # of all pairs of numbers
HEAD_WIDTH = 32


class Adder(nn.Module):
    """A transformer over the two numbers and a place for their sum."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(MODULUS + 1, width)
        self.position = nn.Parameter(torch.randn(3, width) * width**-0.5)
        layer = nn.TransformerEncoderLayer(
            width, width // HEAD_WIDTH, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        # Its fast path, for evaluation only, rounds differently from training.
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, MODULUS)

    def forward(self, pairs: Tensor) -> Tensor:
        """Scores of the sum, (batch, 59), of pairs (batch, 2)."""
        place = torch.full_like(pairs[:, :1], MODULUS)
        x = self.embedding(torch.cat([pairs, place], dim=1)) + self.position
        scores: Tensor = self.head(self.norm(self.blocks(x)[:, -1]))
        return scores


def build(setup: Setup) -> Problem:
    """All pairs of numbers, some of them never trained on."""
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS)).to(setup.device)
    sums = pairs.sum(dim=1) % MODULUS
    order = torch.randperm(len(pairs), generator=setup.generator(1)).to(setup.device)
    training, held_out = order.tensor_split([int(TRAINED_ON * len(pairs))])
    torch.manual_seed(setup.seed)
    model = Adder(setup.scale.shape["layers"], setup.scale.shape["width"]).to(setup.device)

    def loss(step: int) -> Tensor:
        batch = training[setup.draw(len(training), step)]
        return cross_entropy(model(pairs[batch]), sums[batch])

    def evaluate() -> Evaluation:
        right = model(pairs[held_out]).argmax(dim=1) == sums[held_out]
        value = cross_entropy(model(pairs[training]), sums[training])
        return Evaluation(value.item(), right.float().mean().item())

    return Problem(model, loss, evaluate)


TASKS = (
    Task(
        "addition",
        build,
        {
            "small": Scale(600, 256, {"layers": 1, "width": 128}),
            "large": Scale(4000, 512, {"layers": 2, "width": 256}),
        },
        loss="cross entropy of all pairs trained on",
        accuracy="pairs never trained on",
    ),
)
