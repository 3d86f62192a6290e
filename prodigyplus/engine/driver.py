"""Advance the rules of all stacks in lock-step, so that what they ask of other ranks goes out together.

Requests travel while something else is computed: a bucket's sums while the next bucket's directions are, and
while whatever is whole here moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

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


def start(stacks: Sequence[Moving], exchange: Exchange, constants: Constants) -> list[Running]:
    """Begin a step of all parameters: their first round, the statistics of the raw gradients.

    Its answers are small, so it is of all at once; and nothing may move before it is known whether all
    gradients are finite. The numbers of the groups must be set before :func:`finish`.
    """
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


def stacked(params: Sequence[ParamStep], bucket_bytes: int) -> list[Moving]:
    """What moves as one: batches, for kernels; and stacks of small ones of one key.

    So do all ranks; in the order of the first of each: buckets are then as full as that order lets them be.
    """
    # Stacks are copies, of weights and gradients: they are small beside the updates that may be alive.
    limit = min(STACK_BYTES, bucket_bytes // 8)
    by_key: dict[Hashable, list[int]] = {}
    batches: dict[Hashable, list[int]] = {}
    for index, param in enumerate(params):
        if (key := batch_key(param)) is not None:
            batches.setdefault(key, []).append(index)
            continue
        alone = param.layout.max_local_numel > SMALL or param.is_matrix
        by_key.setdefault(index if alone else param.stack_key, []).append(index)
    moving: dict[int, Moving] = {
        run[0]: Batch([params[index] for index in run])
        for indices in batches.values()
        for run in _batch_runs(params, indices, bucket_bytes)
    }
    for indices in by_key.values():
        count = max(1, limit // max(1, params[indices[0]].nbytes))
        for first in range(0, len(indices), count):
            moving[indices[first]] = Stack.of([params[index] for index in indices[first : first + count]])
    return [moving[index] for index in sorted(moving)]


def _batch_runs(params: Sequence[ParamStep], indices: list[int], limit: int) -> Iterator[list[int]]:
    """What of one key makes a batch: all; of matrices, what is orthogonalised at once, in ``limit`` bytes."""
    if not params[indices[0]].is_matrix:
        yield indices
        return
    # As they are orthogonalised, which is when they move.
    ordered = sorted(indices, key=lambda index: params[index].cost, reverse=True)
    for wave in muon.waves([(params[index].sent_bytes, 0) for index in ordered], limit):
        yield [ordered[number] for number in wave]


def _sums(asked: Requests) -> dict[str, Sum]:
    return {name: request for name, request in asked.items() if isinstance(request, Sum)}


def _matrices(asked: Requests) -> list[tuple[str, Matrices]]:
    return [(name, request) for name, request in asked.items() if isinstance(request, Matrices)]


def _orthogonalize(running: Sequence[Running], exchange: Exchange) -> Iterable[list[Running]]:
    """Begin with all matrices; gives them in buckets, with their answers, as they are done."""
    if not running:
        return ()
    # Equal shapes together, the largest first, so that ranks share them evenly.
    running = sorted(running, key=lambda one: one.stack.cost, reverse=True)
    asked = [one.rule.send(one.answers) for one in running]
    wanted = [
        (index, name, layout, request)
        for index, (one, requests) in enumerate(zip(running, asked, strict=True))
        for layout, (name, request) in zip(one.stack.layouts, _matrices(requests), strict=True)
    ]
    done = exchange.orthogonalize([(layout, request) for _, _, layout, request in wanted])
    answers = [dict(sums) for sums in exchange.complete(list(map(_sums, asked)))()]
    return _completed(running, answers, [(index, name) for index, name, _, _ in wanted], done)


def _completed(
    running: Sequence[Running],
    answers: Sequence[Answers],
    wanted: Sequence[tuple[int, str]],
    done: Iterable[tuple[Sequence[int], Sequence[Tensor]]],
) -> Iterator[list[Running]]:
    """Those of ``running`` that have all of their matrices, as these are done.

    Args:
        running: Rules that have asked for matrices.
        answers: Of each, the sums that it has asked for; changed.
        wanted: Of each matrix, the index of its rule, and its name there.
        done: Indices of ``wanted`` and their results, of all in turn.
    """
    missing = Counter(index for index, _ in wanted)
    for numbers, pieces in done:
        complete = []
        for number, piece in zip(numbers, pieces, strict=True):
            index, name = wanted[number]
            answers[index][name] = piece
            missing[index] -= 1
            if not missing[index]:
                complete.append(running[index]._replace(answers=answers[index]))
        yield complete


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
