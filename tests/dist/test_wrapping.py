"""Ways to wrap a model after which a step's parameters are not the objects that were passed at first."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import whole
from tests.single.problems import assert_same


def trained(after_construction=False, offload=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    mesh = init_device_mesh("cpu", (2,))
    policy = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    if not after_construction:
        fully_shard(model, mesh=mesh, offload_policy=policy)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters())
    if after_construction:
        fully_shard(model, mesh=mesh, offload_policy=policy)
        optimizer.param_groups[0]["params"] = list(model.parameters())
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.full((4, 40), 0.3)).square().sum().backward()
        optimizer.step()
    return [whole(p) for p in model.parameters()], float(optimizer.metrics()[0]["d"])


def test_parameters_swapped_after_construction(pool):
    assert_same(pool.run(2, trained, True), pool.run(2, trained, False))


def evaluated_before_it_is_saved(full):
    """What is saved right after a forward pass that no backward pass follows, and right after a step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), d0=1e-2)
    inputs = torch.full((4, 40), 0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    expected = optimizer.averaged_state_dict(model, full=full)
    with torch.no_grad():
        model(inputs)
    found = optimizer.averaged_state_dict(model, full=full)
    return [{name: whole(value) for name, value in each.items()} for each in (found, expected)]


@pytest.mark.parametrize("full", [False, True])
def test_the_average_is_saved_after_an_evaluation(pool, full):
    """FSDP2 keeps the root's weights gathered, in the place of the model's parameters."""
    results = pool.run(2, evaluated_before_it_is_saved, full)
    for found, expected in results:
        assert_same(found, expected)
    assert results[0][0]


def test_parameters_offloaded_to_the_cpu(pool):
    assert_same(pool.run(2, trained, False, True), pool.run(2, trained, False))
