"""Bad placements are refused on every rank, before anything is sent."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree


def message(optimizer):
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return None


def mismatched(kind):
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
    other = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Replicate()]))
    optimizer = ShardedProdigyPlusScheduleFree([("weight", p), ("norm", other)])
    if kind == "other placements":
        # torch refuses to assign some such gradients, but a user's hook may still make them.
        p.grad = distribute_tensor(torch.ones(4, 6), mesh, [Replicate()])
    elif kind == "partial":
        p.grad = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
        other.grad = DTensor.from_local(torch.ones(6), mesh, [Partial()])
    elif kind == "one process":
        p.grad = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
        optimizer = ProdigyPlusScheduleFree([p])
    return message(optimizer)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("other placements", ("'weight'", "Shard(dim=0)", "Replicate()", "redistribute")),
        ("partial", ("'norm'", "Partial(sum)", "redistribute")),
        ("one process", ("DTensor", "ShardedProdigyPlusScheduleFree")),
    ],
)
def test_gradients(pool, kind, expected):
    for text in pool.run(2, mismatched, kind):
        assert all(part in text for part in expected), text


def flat(optimizer_class, use_orig_params):
    model = FullyShardedDataParallel(
        nn.Linear(6, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = optimizer_class(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    return message(optimizer)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("optimizer_class", [ProdigyPlusScheduleFree, ShardedProdigyPlusScheduleFree])
def test_flat_parameters_of_fsdp1(pool, optimizer_class, use_orig_params):
    for text in pool.run(2, flat, optimizer_class, use_orig_params):
        assert "FSDP1" in text
        assert "fully_shard" in text
