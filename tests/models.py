"""A small transformer, and something for it to learn: random walks on a graph of symbols."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, SYMBOLS, LENGTH = 64, 4, 96, 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        attended = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, blocks: int = 2):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embed(symbols)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """A norm, and the two linear layers that tensor parallelism cuts."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(20)
        self.up = nn.Linear(20, 30)
        self.down = nn.Linear(30, 20)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """A network for short runs, partly frozen; few numbers of ranks divide its sizes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, 20)
        self.lens = nn.Linear(20, 20).requires_grad_(False)
        self.blocks = nn.ModuleList([Layer()])
        self.blocks[0].norm.bias.requires_grad_(False)
        self.head = nn.Linear(20, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embed(symbols)
        x = x + self.lens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Walks:
    """Batches of walks, the same on every rank; each symbol has three successors.

    A ``seed`` gives other walks on the same graph.
    """

    def __init__(self, batch: int = 16, length: int = LENGTH, seed: int | None = None):
        self._random = torch.Generator().manual_seed(1)
        self._successors = torch.randint(SYMBOLS, (SYMBOLS, 3), generator=self._random)
        self._batch, self._length = batch, length
        if seed is not None:
            self._random.manual_seed(seed)

    def next(self) -> Tensor:
        walk = [torch.randint(SYMBOLS, (self._batch,), generator=self._random)]
        for _ in range(self._length):
            choice = torch.randint(3, (self._batch,), generator=self._random)
            walk.append(self._successors[walk[-1], choice])
        return torch.stack(walk, dim=1)


def loss_of(model: nn.Module, walks: Tensor) -> Tensor:
    predicted = model(walks[:, :-1])
    return F.cross_entropy(predicted.flatten(0, 1).float(), walks[:, 1:].flatten())


def fit(called, optimizer, data, steps, number=0, count=1):
    """Train on part ``number`` of ``count`` of each batch.

    Returns ``d`` after every step; an empty list for an optimiser that has none.
    """
    d = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(called, data.next().chunk(count)[number]).backward()
        optimizer.step()
        if hasattr(optimizer, "metrics"):
            d.append(optimizer.metrics()[0]["d"].item())
    return d


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The relative distance between two lists of weights: the 2-norm over all of them."""
    one, other = (torch.cat([p.detach().flatten() for p in weights]).double() for weights in (ours, theirs))
    return float((one - other).norm() / other.norm())
