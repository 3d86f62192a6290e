"""Advance many rules in lock-step, so that what they ask of each other's shards goes out together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from prodigyplus.layout import Layout, Sum
from prodigyplus.rule import Part, Rule, compute_dtype, update

Asked = tuple[Layout, dict[str, Sum]]
Answer = dict[str, Tensor]


class Exchange(Protocol):
    """Completes sums over shards; see :class:`OneProcess`."""

    # How many bytes of directions may be alive at once, while their sums are completed.
    bucket_bytes: int

    def complete(self, asked: Sequence[Asked]) -> list[Answer]:
        """The sums over the whole tensors, in the order and under the names in which they were asked."""
        ...

    def everywhere(self, values: Tensor) -> Tensor:
        """Sums over all who hold other parameters of the same optimiser, of a few numbers."""
        ...


class OneProcess:
    """The exchange of a process that holds whole tensors: every sum is complete."""

    bucket_bytes = 0

    def complete(self, asked: Sequence[Asked]) -> list[Answer]:
        return [{name: sum_.local for name, sum_ in sums.items()} for _, sums in asked]

    def everywhere(self, values: Tensor) -> Tensor:
        return values


def run(parts: Sequence[Part], exchange: Exchange, open_groups: Callable[[Sequence[Answer]], None]) -> None:
    """One step of all ``parts``.

    The first round, the statistics of the raw gradients, is of all parts at once: its answers are
    small, and nothing may move before it is known whether all gradients are finite. The later rounds
    run in buckets, so that few directions are alive at a time.

    Args:
        parts: The parameters that take part.
        exchange: Who completes their sums.
        open_groups: Called between the first round and the others with the answers of the first, in the
            order of ``parts``: the numbers of the parts' groups must be fixed when it returns.
    """
    rules = [update(part) for part in parts]
    answers = exchange.complete([(part.layout, next(rule)) for part, rule in zip(parts, rules, strict=True)])
    open_groups(answers)
    for bucket in _buckets(parts, exchange.bucket_bytes):
        _advance([(parts[i], rules[i], answers[i]) for i in bucket], exchange)


def size_of(part: Part) -> int:
    """How many bytes the direction of a parameter has at most, on the rank that has most of it."""
    return part.layout.most * compute_dtype(part.weight).itemsize


def _buckets(parts: Sequence[Part], limit: int) -> Iterator[list[int]]:
    """The numbers of ``parts`` in runs whose directions have ``limit`` bytes at most, or one part's.

    By the largest piece that any rank has of each, so that all ranks cut alike. Parts that nobody has cut
    have nothing to wait for, and go one by one.
    """
    yield from ([number] for number, part in enumerate(parts) if not part.layout.cuts)
    bucket: list[int] = []
    size = 0
    for number, part in enumerate(parts):
        if not part.layout.cuts:
            continue
        if bucket and size + size_of(part) > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(number)
        size += size_of(part)
    if bucket:
        yield bucket


def _advance(running: list[tuple[Part, Rule, Answer]], exchange: Exchange) -> None:
    """Run rules to their ends, one round of questions and answers at a time."""
    while running:
        asking: list[tuple[Part, Rule]] = []
        asked: list[Asked] = []
        for part, rule, answer in running:
            try:
                asked.append((part.layout, rule.send(answer)))
            except StopIteration:
                continue
            asking.append((part, rule))
        completed = exchange.complete(asked)
        running = [(part, rule, answer) for (part, rule), answer in zip(asking, completed, strict=True)]
