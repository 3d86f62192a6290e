"""The one-process optimiser under DDP: replicas agree, although it sends nothing itself."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from prodigyplus import ProdigyPlusScheduleFree
from tests.models import Transformer, Walks, distance, fit
from tests.single.problems import assert_same

STEPS = 100


def train(make, dtype=torch.float32, steps=STEPS, **options):
    """Train on this rank's part of each batch; return the weights, their average, and d at every step."""
    torch.manual_seed(0)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = Transformer().to(dtype)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = make(model.parameters(), **options)
    d = fit(wrapped, optimizer, Walks(), steps, rank, size)
    averages = dict(optimizer.averaged_state_dict(model)) if d else {}
    return [p.detach().clone() for p in model.parameters()], averages, d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_replicas_agree_to_the_bit(pool, size, dtype):
    first, *others = pool.run(size, train, ProdigyPlusScheduleFree, dtype, 2 * STEPS)
    assert first[2][-1] > 100 * first[2][0]
    for other in others:
        assert_same(other, first)


@pytest.mark.parametrize("size", [2, 4])
def test_no_further_from_one_process_than_adamw(pool, size):
    """AdamW runs at the learning rate that Prodigy found, so that both move the weights as far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weights, _, d = train(ProdigyPlusScheduleFree)
        adamw_weights, _, _ = train(torch.optim.AdamW, lr=d[-1])
    finally:
        torch.set_num_threads(threads)
    (sharded_weights, _, sharded_d), *_ = pool.run(size, train, ProdigyPlusScheduleFree)
    (sharded_adamw_weights, _, _), *_ = pool.run(size, _adamw, d[-1])

    floor = distance(sharded_adamw_weights, adamw_weights)
    assert distance(sharded_weights, weights) <= floor
    assert max(abs(a / b - 1) for a, b in zip(sharded_d, d, strict=True)) <= 1e-5


def _adamw(lr):
    return train(torch.optim.AdamW, lr=lr)
