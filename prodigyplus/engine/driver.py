"""Advance the rules of all stacks in lock-step, so that what they ask of other ranks goes out together.

Requests travel while something else is computed: a bucket's sums while the next bucket's directions are, and
while whatever is whole here moves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from prodigyplus.engine.batches import Batch, batch_key
from prodigyplus.engine.rule import Answers, Moving, ParamStep, Rule, Stack, update
from prodigyplus.formulas import muon
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Matrices, Requests, Sum
from prodigyplus.terms.scalars import Constants

Asked = Mapping[str, Sum]
"""The sums that a rule asks for in one round, by their names."""

# How many bytes of updates may be alive at once, unless it is said.
BUCKET_BYTES = 64 << 20

# Up to how many elements it pays to copy a parameter so as to move it with others, and up to how many bytes.
SMALL = 1 << 17
STACK_BYTES = 4 << 20


class Exchange(Protocol):
    """Completes sums over shards, and orthogonalises matrices; see :class:`OneProcess`."""

    # How many bytes of directions may be alive at once, while their sums are completed.
    bucket_bytes: int

    def complete(self, asked: Sequence[Asked]) -> Callable[[], list[Answers]]:
        """Begin to complete sums.

        Returns:
            A function that waits for the sums over the whole tensors, and gives them in the order and under
            the names in which they were asked.
        """
        ...

    def orthogonalize(
        self, asked: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        """Begin to orthogonalise whole matrices.

        Returns:
            Indices of ``asked`` and the local pieces of their results, of all in turn, as they are done.
        """
        ...

    def sum_over_stages(self, values: Tensor) -> Tensor:
        """Sum a few numbers over the ranks that hold other parameters of the same optimiser."""
        ...


class OneProcess:
    """The exchange of a process that holds whole tensors: every sum is complete."""

    bucket_bytes = BUCKET_BYTES

    def complete(self, asked: Sequence[Asked]) -> Callable[[], list[Answers]]:
        answers = [{name: sum_.local for name, sum_ in sums.items()} for sums in asked]
        return lambda: answers

    def orthogonalize(
        self, asked: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        wholes = [(layout.shape, matrices) for layout, matrices in asked]
        return muon.in_one_process(wholes, self.bucket_bytes)

    def sum_over_stages(self, values: Tensor) -> Tensor:
        return values


class Running(NamedTuple):
    """A stack in the middle of its step: its rule, which waits for the answers."""

    stack: Moving
    rule: Rule
    answers: Answers


class Asking(NamedTuple):
    """Rules that have asked, and the function that waits for their answers."""

    rules: list[tuple[Moving, Rule]]
    wait: Callable[[], list[Answers]]


def start(params: Sequence[ParamStep], exchange: Exchange, constants: Constants) -> list[Running]:
    """Begin a step of all parameters: their first round, the statistics of the raw gradients.

    Its answers are small, so it is of all at once; and nothing may move before it is known whether all
    gradients are finite. The numbers of the groups must be set before :func:`finish`.
    """
    # Stacks are copies, of weights and gradients: they are small beside the updates that may be alive.
    stacks = _stacked(params, min(STACK_BYTES, exchange.bucket_bytes // 8))
    rules = [update(stack, constants) for stack in stacks]
    asked = [_sums(next(rule)) for rule in rules]
    return list(map(Running, stacks, rules, exchange.complete(asked)()))


def finish(running: Sequence[Running], exchange: Exchange) -> None:
    """Run what :func:`start` has begun to its end, in buckets, so that few directions are alive at a time."""
    # Matrices are on their way to be orthogonalised while all other parameters move.
    orthogonalized = _orthogonalize([one for one in running if one.stack.is_matrix], exchange)
    # The last first: their gradients have just been read, and may still be in a cache.
    elementwise = [one for one in reversed(running) if not one.stack.is_matrix]
    buckets = _buckets([one for one in elementwise if one.stack.is_sharded], exchange.bucket_bytes)
    under_way = _ask(next(buckets, []), exchange)
    for one in elementwise:
        if not one.stack.is_sharded:  # with nothing to wait for
            _run_out(_ask([one], exchange), exchange)
    for bucket in buckets:
        following = _ask(bucket, exchange)
        _run_out(under_way, exchange)
        under_way = following
    _run_out(under_way, exchange)
    for bucket in orthogonalized:
        _run_out(_ask(bucket, exchange), exchange)


def _stacked(params: Sequence[ParamStep], limit: int) -> list[Moving]:
    """What moves as one: batches, for kernels; and stacks of small ones of one key, of up to ``limit`` bytes.

    So do all ranks; in the order of the first of each: buckets are then as full as that order lets them be.
    """
    by_key: dict[Hashable, list[int]] = {}
    batches: dict[Hashable, list[int]] = {}
    for index, param in enumerate(params):
        if (key := batch_key(param)) is not None:
            batches.setdefault(key, []).append(index)
            continue
        alone = param.layout.max_local_numel > SMALL or param.is_matrix
        by_key.setdefault(index if alone else param.stack_key, []).append(index)
    moving: dict[int, Moving] = {
        indices[0]: Batch([params[index] for index in indices]) for indices in batches.values()
    }
    for indices in by_key.values():
        count = max(1, limit // max(1, params[indices[0]].nbytes))
        for first in range(0, len(indices), count):
            moving[indices[first]] = Stack.of([params[index] for index in indices[first : first + count]])
    return [moving[index] for index in sorted(moving)]


def _sums(asked: Requests) -> dict[str, Sum]:
    return {name: request for name, request in asked.items() if isinstance(request, Sum)}


def _orthogonalize(running: Sequence[Running], exchange: Exchange) -> Iterable[list[Running]]:
    """Begin with all matrices; gives them in buckets, with their answers, as they are done."""
    if not running:
        return ()
    # Equal shapes together, the largest first, so that ranks share them evenly.
    running = sorted(running, key=lambda one: cast("Stack", one.stack).cost, reverse=True)
    layouts = [cast("Stack", one.stack).layout for one in running]
    asked = [one.rule.send(one.answers) for one in running]
    matrices = [cast("Matrices", requests["matrices"]) for requests in asked]
    done = exchange.orthogonalize(list(zip(layouts, matrices, strict=True)))
    sums = exchange.complete(list(map(_sums, asked)))()
    return (
        [
            running[index]._replace(answers={**sums[index], "matrices": piece})
            for index, piece in zip(indices, pieces, strict=True)
        ]
        for indices, pieces in done
    )


def _buckets(running: Sequence[Running], limit: int) -> Iterator[list[Running]]:
    """Runs of stacks whose directions have half of ``limit`` bytes at most, or one stack's.

    Half, since two are alive at a time: the one whose sums are on their way, and the one that is computed.
    By the largest piece that any rank has of each, so that all ranks cut alike.
    """
    sizes = [one.stack.nbytes for one in running]
    several = sum(sizes) > limit
    for bucket in muon.waves([(size, 0) for size in sizes], limit // 2 if several else limit):
        yield [running[index] for index in bucket]


def _ask(running: Sequence[Running], exchange: Exchange) -> Asking:
    """Run rules up to their next requests, or their ends, and begin to answer those."""
    rules: list[tuple[Moving, Rule]] = []
    asked: list[Asked] = []
    for stack, rule, answers in running:
        try:
            asked.append(_sums(rule.send(answers)))
        except StopIteration:
            continue
        rules.append((stack, rule))
    return Asking(rules, exchange.complete(asked))


def _run_out(asking: Asking, exchange: Exchange) -> None:
    """Run rules to their ends, one round of requests and answers at a time."""
    while asking.rules:
        running = [
            Running(stack, rule, answers)
            for (stack, rule), answers in zip(asking.rules, asking.wait(), strict=True)
        ]
        asking = _ask(running, exchange)
