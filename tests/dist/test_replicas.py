"""Copies stay the same to the bit, rounding included; and a shard is rounded as the whole tensor is."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import MESHES, Placed, pieces_of, whole
from tests.single.problems import Fed, assert_same

STEPS = 200


def local_bits(name, dtype):
    mesh = MESHES[name]
    placed = Placed(Fed(*mesh.shapes, dtype=dtype), mesh)
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters)
    for _ in range(STEPS):
        placed.backward()
        optimizer.step()
    state = [
        {key: pieces_of(value).clone() for key, value in optimizer.state[p].items()}
        for p in placed.parameters
    ]
    return (
        [pieces_of(p.detach()).clone() for p in placed.parameters],
        state,
        optimizer.state_dict()["param_groups"],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_of_hsdp(pool, dtype):
    results = pool.run(4, local_bits, "hsdp", dtype)
    assert_same(results[2], results[0])
    assert_same(results[3], results[1])
    assert results[0][2][0]["d"] > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_under_tensor_parallelism(pool, dtype):
    one, other = pool.run(2, local_bits, "tp", dtype)
    copied = [number for number, shape in enumerate(MESHES["tp"].shapes) if len(shape) == 1]
    for number in copied:
        assert_same(one[0][number], other[0][number])
        assert_same(one[1][number], other[1][number])


def few_steps(name, sharded):
    mesh = MESHES[name]
    problem = Fed(*mesh.shapes, dtype=torch.bfloat16)
    if sharded:
        problem = Placed(problem, mesh)
    make = ShardedProdigyPlusScheduleFree if sharded else ProdigyPlusScheduleFree
    optimizer = make(problem.parameters, d0=1e-3)
    for _ in range(3):
        problem.backward()
        optimizer.step()
    return [whole(p) for p in problem.parameters], [
        whole(optimizer.state[p]["z"]) for p in problem.parameters
    ]


@pytest.mark.parametrize("name", ["fsdp2", "last_dim", "fsdp_tp", "fsdp_tp_uneven"])
def test_rounding_noise_belongs_to_a_place(pool, name):
    """A shard draws the noise of its place in the whole tensor: the bits agree, but for last bits of sums."""
    expected = few_steps(name, False)
    for found in pool.run(MESHES[name].ranks, few_steps, name, True):
        for ours, theirs in zip(found, expected, strict=True):
            different = sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True))
            assert different <= 2e-3 * sum(a.numel() for a in theirs)
