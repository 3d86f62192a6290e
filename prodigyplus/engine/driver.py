"""Advance the rules of all bundles in lock-step, so that their requests to other ranks go out together.

Communication overlaps with computation: the sums of one bucket are completed while the directions of the next
are computed, and while parameters that are whole on this rank move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from prodigyplus.engine.batches import Batch, batch_key
from prodigyplus.engine.bundle import Bundle
from prodigyplus.engine.param_step import ParamStep
from prodigyplus.engine.rule import Rule, update
from prodigyplus.engine.stack import Stack
from prodigyplus.exchange import Exchange, split_by_bytes
from prodigyplus.terms.requests import Answers, Asked, Matrices, Requests, Sum

# The largest parameter, in elements, that is worth copying into a stack; and the largest stack, in bytes.
SMALL = 1 << 17
STACK_BYTES = 4 << 20


class Running(NamedTuple):
    """A bundle in the middle of its step: its rule, and the answers to be sent to it next."""

    bundle: Bundle
    rule: Rule
    answers: Answers


class Asking(NamedTuple):
    """Rules that have made requests, and the function that waits for the answers."""

    rules: list[tuple[Bundle, Rule]]
    wait: Callable[[], list[Answers]]


def start(bundles: Sequence[Bundle], exchange: Exchange, step_sizes: Callable[[], Tensor]) -> list[Running]:
    """Begin a step of all parameters: the first round, the sums of the raw gradients' squares.

    It covers all bundles at once, since its answers are small, and since nothing may move before it is known
    whether all gradients are finite. The numbers of the groups must be set before :func:`finish`.

    Args:
        bundles: What moves.
        exchange: Completes the sums.
        step_sizes: Returns the step sizes of the last step, which every rank should have; float32, (groups,).
    """
    rules = list(map(update, bundles))
    asked = [_sums_among(next(rule)) for rule in rules]
    return list(map(Running, bundles, rules, exchange.complete_and_compare(asked, step_sizes)))


def finish(running: Sequence[Running], exchange: Exchange) -> None:
    """Finish the step that :func:`start` began, in buckets, so that few directions are alive at a time."""
    # Matrices travel to their owners while all other parameters move.
    orthogonalized = _orthogonalize([one for one in running if one.bundle.is_matrix], exchange)
    # In reverse order: the last gradients have just been read, and may still be in a cache.
    elementwise = [one for one in reversed(running) if not one.bundle.is_matrix]
    buckets = _buckets([one for one in elementwise if one.bundle.is_sharded], exchange.bucket_bytes)
    under_way = _ask(next(buckets, []), exchange)
    for one in elementwise:
        if not one.bundle.is_sharded:  # there is nothing to wait for
            _run_out(_ask([one], exchange), exchange)
    for bucket in buckets:
        following = _ask(bucket, exchange)
        _run_out(under_way, exchange)
        under_way = following
    _run_out(under_way, exchange)
    for bucket in orthogonalized:
        _run_out(_ask(bucket, exchange), exchange)


def bundled(params: Sequence[ParamStep], bucket_bytes: int) -> list[Bundle]:
    """Split parameters into bundles: batches for kernels, and stacks of small parameters.

    The result is the same on all ranks, ordered by the first parameter of each.
    """
    # Stacks copy weights and gradients, so they are kept small compared with the updates that may be alive.
    limit = min(STACK_BYTES, bucket_bytes // 8)
    by_key: dict[Hashable, list[int]] = {}
    batches: dict[Hashable, list[int]] = {}
    for index, param in enumerate(params):
        if (key := batch_key(param)) is not None:
            batches.setdefault(key, []).append(index)
            continue
        alone = param.layout.max_local_numel > SMALL or param.is_matrix
        by_key.setdefault(index if alone else param.stack_key, []).append(index)
    bundles: dict[int, Bundle] = {
        run[0]: Batch([params[index] for index in run])
        for indices in batches.values()
        for run in _batch_runs(params, indices, bucket_bytes)
    }
    for indices in by_key.values():
        count = max(1, limit // max(1, params[indices[0]].nbytes))
        for first in range(0, len(indices), count):
            bundles[indices[first]] = Stack([params[index] for index in indices[first : first + count]])
    return [bundles[index] for index in sorted(bundles)]


def _batch_runs(params: Sequence[ParamStep], indices: list[int], limit: int) -> Iterator[list[int]]:
    """Split the parameters of one key into batches: one; for matrices, one per wave of ``limit`` bytes."""
    if not params[indices[0]].is_matrix:
        yield indices
        return
    # In the order in which they are orthogonalised, since they then move.
    ordered = sorted(indices, key=lambda index: params[index].cost, reverse=True)
    for wave in split_by_bytes([(params[index].sent_bytes, 0) for index in ordered], limit):
        yield [ordered[number] for number in wave]


def _sums_among(asked: Requests) -> dict[str, Sum]:
    return {name: request for name, request in asked.items() if isinstance(request, Sum)}


def _matrices_among(asked: Requests) -> list[tuple[str, Matrices]]:
    return [(name, request) for name, request in asked.items() if isinstance(request, Matrices)]


def _orthogonalize(running: Sequence[Running], exchange: Exchange) -> Iterable[list[Running]]:
    """Begin to orthogonalise all matrices; returns their bundles with the answers, as they are done."""
    if not running:
        return ()
    # Equal shapes together, the most expensive first, so that ranks share the work evenly.
    running = sorted(running, key=lambda one: one.bundle.cost, reverse=True)
    asked = [one.rule.send(one.answers) for one in running]
    wanted = [
        (index, name, layout, request)
        for index, (one, requests) in enumerate(zip(running, asked, strict=True))
        for layout, (name, request) in zip(one.bundle.layouts, _matrices_among(requests), strict=True)
    ]
    done = exchange.orthogonalize([(layout, request) for _, _, layout, request in wanted])
    answers = [dict(sums) for sums in exchange.complete(list(map(_sums_among, asked)))()]
    return _completed(running, answers, [(index, name) for index, name, _, _ in wanted], done)


def _completed(
    running: Sequence[Running],
    answers: Sequence[Answers],
    wanted: Sequence[tuple[int, str]],
    done: Iterable[tuple[Sequence[int], Sequence[Tensor]]],
) -> Iterator[list[Running]]:
    """Yield the bundles whose matrices are all done, with their answers, as soon as they are.

    Args:
        running: Bundles whose rules have asked for matrices.
        answers: For each of them, the answers to its sums; the matrices are added.
        wanted: For each matrix, the index of its bundle in ``running``, and its name there.
        done: Waves of indices into ``wanted`` and their results.
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
    """Split bundles into buckets whose directions take at most half of ``limit`` bytes, or one bundle's.

    Half, since two buckets are alive at a time: one whose sums are in flight, and one that is computed. Sizes
    are those of the largest piece on any rank, so that all ranks make the same buckets.
    """
    sizes = [one.bundle.nbytes for one in running]
    several = sum(sizes) > limit
    for bucket in split_by_bytes([(size, 0) for size in sizes], limit // 2 if several else limit):
        yield [running[index] for index in bucket]


def _ask(running: Sequence[Running], exchange: Exchange) -> Asking:
    """Run rules up to their next requests, or to their ends, and begin to answer the requests."""
    rules: list[tuple[Bundle, Rule]] = []
    asked: list[Asked] = []
    for bundle, rule, answers in running:
        try:
            asked.append(_sums_among(rule.send(answers)))
        except StopIteration:
            continue
        rules.append((bundle, rule))
    return Asking(rules, exchange.complete(asked))


def _run_out(asking: Asking, exchange: Exchange) -> None:
    """Run rules to their ends, one round of requests and answers at a time."""
    while asking.rules:
        running = [
            Running(bundle, rule, answers)
            for (bundle, rule), answers in zip(asking.rules, asking.wait(), strict=True)
        ]
        asking = _ask(running, exchange)
