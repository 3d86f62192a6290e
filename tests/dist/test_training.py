"""Real training with every way to wrap a model: how far it is from one process, compared with AdamW."""

import functools

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import whole
from tests.dist.sharding import WRAPS, ranks, wrap
from tests.models import Transformer, Walks, distance, fit

STEPS = 60


def train(model, called, make, number=0, count=1):
    optimizer = make(model.parameters())
    d = fit(called, optimizer, Walks(), STEPS, number, count)
    return [whole(p) for p in model.parameters()], d


def in_one_process(make):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = Transformer()
        return train(model, model, make)
    finally:
        torch.set_num_threads(threads)


@functools.cache
def ours():
    return in_one_process(ProdigyPlusScheduleFree)


@functools.cache
def adamw():
    """AdamW at the learning rate that Prodigy found, so that both move the weights as far."""
    return in_one_process(functools.partial(torch.optim.AdamW, lr=ours()[1][-1]))


def wrapped(name, lr):
    runs = []
    for make in (ShardedProdigyPlusScheduleFree, functools.partial(torch.optim.AdamW, lr=lr)):
        model, called, number, count = wrap(name)
        runs.append(train(model, called, make, number, count))
    return runs


@pytest.mark.parametrize("name", WRAPS)
def test_no_further_from_one_process_than_twice_adamw(pool, name):
    weights, d = ours()
    first, *others = pool.run(ranks(name), wrapped, name, d[-1])
    (found, found_d), (found_adamw, _) = first
    for other in others:
        assert other[0][1] == found_d
    floor = distance(found_adamw, adamw()[0])

    assert distance(found, weights) <= 2 * floor
    assert max(abs(a / b - 1) for a, b in zip(found_d, d, strict=True)) <= 1e-5
