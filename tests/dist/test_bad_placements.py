"""Bad placements are refused on every rank, before anything is sent."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import whole
from tests.single.problems import assert_same


def message(optimizer):
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return None


def mismatched(kind):
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
    optimizer = ShardedProdigyPlusScheduleFree([("weight", p)])
    if kind == "other mesh":
        grid = init_device_mesh("cpu", (1, 2))
        p.grad = distribute_tensor(torch.ones(4, 6), grid, [Replicate(), Shard(0)])
    elif kind == "one process":
        p.grad = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
        optimizer = ProdigyPlusScheduleFree([p])
    return message(optimizer)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("other mesh", ("'weight'", "DeviceMesh((2,)", "its gradient is on DeviceMesh((1, 2)")),
        ("one process", ("DTensor", "ShardedProdigyPlusScheduleFree")),
    ],
)
def test_gradients(pool, kind, expected):
    for text in pool.run(2, mismatched, kind):
        assert all(part in text for part in expected), text


def brought_along(there):
    """Weights after steps with gradients that lie as the weights do, or elsewhere on their mesh."""
    mesh = init_device_mesh("cpu", (2,))
    draw = torch.Generator().manual_seed(0)
    p, other = (
        nn.Parameter(distribute_tensor(torch.randn(shape, generator=draw), mesh, [placement]))
        for shape, placement in (((4, 6), Shard(0)), ((6,), Replicate()))
    )
    optimizer = ShardedProdigyPlusScheduleFree([p, other], d0=1e-2)
    for _ in range(3):
        p.grad = distribute_tensor(torch.randn(4, 6, generator=draw), mesh, [Shard(0)])
        other.grad = distribute_tensor(torch.randn(6, generator=draw), mesh, [Replicate()])
        if there:
            p.grad = p.grad.redistribute(mesh, [Replicate()])
            other.grad = DTensor.from_local(other.grad.to_local() / 2, mesh, [Partial()])
        optimizer.step()
    optimizer.check_replicas()
    return [whole(p), whole(other)]


def test_gradients_elsewhere_on_the_mesh_are_brought_along(pool):
    """Autograd leaves a gradient as its last operator has made it: as a sum to be completed, for instance."""
    assert_same(pool.run(2, brought_along, True), pool.run(2, brought_along, False))


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
