"""Advance many rules in lock-step, so that what they ask of each other's shards goes out together.

What is asked of others travels while something else is computed: a bucket's sums while the next bucket's
directions are, and while whatever is whole here moves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Protocol, cast

from torch import Tensor

from prodigyplus import muon
from prodigyplus.layout import Layout, Sum
from prodigyplus.muon import Matrices
from prodigyplus.rule import Member, Part, Requests, Rule, update

Asked = tuple[Layout, dict[str, Sum]]
Answer = dict[str, Tensor]
Running = tuple[Part, Rule, Answer]
Asking = tuple[list[tuple[Part, Rule]], Callable[[], list[Answer]]]
"""Rules that have asked, and what waits for their answers."""

# How many bytes of updates may be alive at once, unless it is said.
BUCKET_BYTES = 64 << 20

# Up to how many elements it pays to copy a parameter so as to move it with others, and up to how many bytes.
SMALL = 1 << 17
STACK_BYTES = 4 << 20


class Exchange(Protocol):
    """Completes sums over shards; see :class:`OneProcess`."""

    # How many bytes of directions may be alive at once, while their sums are completed.
    bucket_bytes: int

    def complete(self, asked: Sequence[Asked]) -> Callable[[], list[Answer]]:
        """Begin to complete sums.

        Returns:
            What waits for the sums over the whole tensors, and gives them, in the order and under the names
            in which they were asked.
        """
        ...

    def orthogonalize(
        self, asked: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        """Begin to orthogonalise whole matrices.

        Returns:
            Numbers of ``asked`` and the pieces of them that are here, of all in turn, as they are done.
        """
        ...

    def everywhere(self, values: Tensor) -> Tensor:
        """Sums over all who hold other parameters of the same optimiser, of a few numbers."""
        ...


class OneProcess:
    """The exchange of a process that holds whole tensors: every sum is complete."""

    bucket_bytes = BUCKET_BYTES

    def complete(self, asked: Sequence[Asked]) -> Callable[[], list[Answer]]:
        answers = [{name: sum_.local for name, sum_ in sums.items()} for _, sums in asked]
        return lambda: answers

    def orthogonalize(
        self, asked: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        wholes = [(layout.shape, matrices) for layout, matrices in asked]
        return muon.in_one_process(wholes, self.bucket_bytes)

    def everywhere(self, values: Tensor) -> Tensor:
        return values


def run(
    members: Sequence[Member],
    exchange: Exchange,
    open_groups: Callable[[Sequence[Part], Sequence[Answer]], None],
) -> None:
    """One step of all ``members``.

    The first round, the statistics of the raw gradients, is of all at once: its answers are
    small, and nothing may move before it is known whether all gradients are finite. The later rounds
    run in buckets, so that few directions are alive at a time.

    Args:
        members: The parameters that take part.
        exchange: Who completes their sums.
        open_groups: Called between the first round and the others with the parts that they are moved in, and
            the answers of the first, one for each: the numbers of their groups must be fixed when it returns.
    """
    # Stacks are copies, of weights and gradients: they are small beside the updates that may be alive.
    parts = _stacked(members, min(STACK_BYTES, exchange.bucket_bytes // 8))
    rules = [update(part) for part in parts]
    answers = exchange.complete(
        [(part.layout, _sums(next(rule))) for part, rule in zip(parts, rules, strict=True)]
    )()
    open_groups(parts, answers)
    running = list(zip(parts, rules, answers, strict=True))
    # Matrices are on their way to be orthogonalised while all other parameters move.
    orthogonalized = _orthogonalize([one for one in running if one[0].is_matrix], exchange)
    elementwise = [one for one in reversed(running) if not one[0].is_matrix]
    buckets = _buckets([one for one in elementwise if one[0].layout.cuts], exchange.bucket_bytes)
    under_way = _ask(next(buckets, []), exchange)
    for one in elementwise:
        if not one[0].layout.cuts:  # with nothing to wait for
            _finish(_ask([one], exchange), exchange)
    for bucket in buckets:
        following = _ask(bucket, exchange)
        _finish(under_way, exchange)
        under_way = following
    _finish(under_way, exchange)
    for bucket in orthogonalized:
        _finish(_ask(bucket, exchange), exchange)


def _stacked(members: Sequence[Member], limit: int) -> list[Part]:
    """The members, those of small parameters alike joined, up to ``limit`` bytes: so do all ranks.

    In the order of the first of each: buckets are then as full as that order lets them be.
    """
    alike: dict[Hashable, list[int]] = {}
    for number, member in enumerate(members):
        alone = member.layout.most > SMALL or member.is_matrix
        alike.setdefault(number if alone else member.likeness, []).append(number)
    parts: dict[int, Part] = {}
    for like in alike.values():
        count = max(1, limit // max(1, members[like[0]].nbytes))
        for start in range(0, len(like), count):
            parts[like[start]] = Part.of([members[number] for number in like[start : start + count]])
    return [parts[number] for number in sorted(parts)]


def _sums(asked: Requests) -> dict[str, Sum]:
    return {name: request for name, request in asked.items() if isinstance(request, Sum)}


def _orthogonalize(running: Sequence[Running], exchange: Exchange) -> Iterable[list[Running]]:
    """Begin with all matrices; gives them in buckets, with their answers, as they are done."""
    if not running:
        return ()
    # Equal shapes together, the largest first, so that ranks share them evenly.
    running = sorted(running, key=lambda one: one[0].cost, reverse=True)
    asked = [rule.send(answer) for _, rule, answer in running]
    layouts = [part.layout for part, _, _ in running]
    done = exchange.orthogonalize(
        [(layout, cast("Matrices", its["matrices"])) for layout, its in zip(layouts, asked, strict=True)]
    )
    sums = exchange.complete([(layout, _sums(its)) for layout, its in zip(layouts, asked, strict=True)])()
    return (
        [
            (*running[number][:2], {**sums[number], "matrices": piece})
            for number, piece in zip(numbers, pieces, strict=True)
        ]
        for numbers, pieces in done
    )


def _buckets(running: Sequence[Running], limit: int) -> Iterator[list[Running]]:
    """Runs of parameters whose directions have half of ``limit`` bytes at most, or one parameter's.

    Half, since two are alive at a time: the one whose sums are on their way, and the one that is computed.
    By the largest piece that any rank has of each, so that all ranks cut alike.
    """
    sizes = [part.nbytes for part, *_ in running]
    several = sum(sizes) > limit
    for bucket in muon.waves([(size, 0) for size in sizes], limit // 2 if several else limit):
        yield [running[number] for number in bucket]


def _ask(running: Sequence[Running], exchange: Exchange) -> Asking:
    """Run rules up to their next questions, or their ends, and begin to answer those."""
    asking: list[tuple[Part, Rule]] = []
    asked: list[Asked] = []
    for part, rule, answer in running:
        try:
            asked.append((part.layout, _sums(rule.send(answer))))
        except StopIteration:
            continue
        asking.append((part, rule))
    return asking, exchange.complete(asked)


def _finish(under_way: Asking, exchange: Exchange) -> None:
    """Run rules to their ends, one round of answers and questions at a time."""
    asking, wait = under_way
    while asking:
        running = [(part, rule, answer) for (part, rule), answer in zip(asking, wait(), strict=True)]
        asking, wait = _ask(running, exchange)
