"""The parameters of language models, large ones from their published configurations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Kind = Literal["column", "row", "vector", "expert"]
"""How parallelism treats a weight: tensor parallelism cuts what a column-wise one puts out and what a
row-wise one takes in, and leaves vectors whole; expert parallelism deals out the experts, the first
dimension of their tensors."""


class Weight(NamedTuple):
    """One parameter tensor: its global shape, and its kind."""

    shape: tuple[int, ...]
    kind: Kind


class Llama3(NamedTuple):
    """Llama 3 (arXiv 2407.21783, table 3): grouped-query attention, and heads of 128."""

    layers: int
    hidden: int
    ffn: int
    vocabulary: int = 128256
    kv: int = 8 * 128  # heads of keys and values x their size

    def weights(self) -> Iterator[Weight]:
        """All parameters: the embedding, the layers, the last norm, the output head."""
        yield Weight((self.vocabulary, self.hidden), "column")
        for _ in range(self.layers):
            yield Weight((self.hidden, self.hidden), "column")  # wq
            yield Weight((self.kv, self.hidden), "column")  # wk
            yield Weight((self.kv, self.hidden), "column")  # wv
            yield Weight((self.hidden, self.hidden), "row")  # wo
            yield Weight((self.ffn, self.hidden), "column")  # w1
            yield Weight((self.hidden, self.ffn), "row")  # w2
            yield Weight((self.ffn, self.hidden), "column")  # w3
            yield from (Weight((self.hidden,), "vector"),) * 2
        yield Weight((self.hidden,), "vector")
        yield Weight((self.vocabulary, self.hidden), "column")


class DeepSeekV3(NamedTuple):
    """DeepSeek-V3 (arXiv 2412.19437, section 4.2): latent attention, 256 experts; without the MTP module."""

    layers: int = 61
    dense_layers: int = 3
    hidden: int = 7168
    dense_ffn: int = 18432
    expert_ffn: int = 2048
    experts: int = 256
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    head: int = 128  # size of a head, for queries and keys without their rotated part
    rotated: int = 64
    vocabulary: int = 129280

    def weights(self) -> Iterator[Weight]:
        """All parameters that have a gradient; the experts of a layer are one tensor for each matrix."""
        yield Weight((self.vocabulary, self.hidden), "column")
        for layer in range(self.layers):
            yield from self._attention()
            yield from (Weight((self.hidden,), "vector"),) * 2
            if layer < self.dense_layers:
                yield from self._feed_forward(self.dense_ffn)
            else:
                yield Weight((self.experts, self.hidden), "column")  # the router
                yield from self._feed_forward(self.expert_ffn)  # the shared expert
                for matrix in self._feed_forward(self.expert_ffn):
                    yield Weight((self.experts, *matrix.shape), "expert")
        yield Weight((self.hidden,), "vector")
        yield Weight((self.vocabulary, self.hidden), "column")

    def _attention(self) -> Iterator[Weight]:
        yield Weight((self.q_rank, self.hidden), "column")
        yield Weight((self.q_rank,), "vector")
        yield Weight((self.heads * (self.head + self.rotated), self.q_rank), "column")
        yield Weight((self.kv_rank + self.rotated, self.hidden), "column")
        yield Weight((self.kv_rank,), "vector")
        yield Weight((self.heads * 2 * self.head, self.kv_rank), "column")
        yield Weight((self.hidden, self.heads * self.head), "row")

    def _feed_forward(self, width: int) -> Iterator[Weight]:
        yield Weight((width, self.hidden), "column")
        yield Weight((self.hidden, width), "row")
        yield Weight((width, self.hidden), "column")


MODELS: dict[str, Llama3 | DeepSeekV3] = {
    "Llama-3-8B": Llama3(layers=32, hidden=4096, ffn=14336),
    "Llama-3-70B": Llama3(layers=80, hidden=8192, ffn=28672),
    "Llama-3-405B": Llama3(layers=126, hidden=16384, ffn=53248),
    "DeepSeek-V3": DeepSeekV3(),
}


Shape = tuple[int, ...]


def gpt(width: int = 512, layers: int = 8, vocabulary: int = 8192, context: int = 512) -> list[Shape]:
    """A GPT-2, its head tied to its embedding; by default of 29.7 M parameters in 100 tensors."""
    linear = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    layer = [shape for matrix in linear for shape in (matrix, matrix[:1])] + [(width,)] * 4
    return [(vocabulary, width), (context, width), *layer * layers, (width,), (width,)]


def llama_1b() -> list[Shape]:
    """Llama-3.2-1B, its head tied: 1,236 M parameters in 146 tensors."""
    return [w.shape for w in Llama3(layers=16, hidden=2048, ffn=8192, kv=512).weights()][:-1]


def numel(shapes: Iterable[Shape]) -> int:
    """How many elements tensors have."""
    return sum(map(math.prod, shapes))
