"""Rounding to bfloat16, and compiled passes, on shards: as in one process."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import MESHES, Placed, whole
from tests.single.problems import Fed

KINDS = {"weights": (torch.bfloat16, {}), "z": (torch.float32, {"bfloat16_z": True})}


def play(optimizer_class, problem, options, steps):
    optimizer = optimizer_class(problem.parameters, **options)
    for _ in range(steps):
        problem.backward()
        optimizer.step()
    found = {}
    for number, p in enumerate(problem.parameters):
        found[f"weight.{number}"] = whole(p)
        state = optimizer.state[p]
        found[f"z.{number}"] = whole(state["z"] if "z" in state else state["z_minus_y"])
    return found, optimizer.metrics()[0]["d"]


def on_mesh(mesh_name, kind, steps):
    dtype, options = KINDS[kind]
    mesh = MESHES[mesh_name]
    placed = Placed(Fed(*mesh.shapes, dtype=dtype), mesh)
    return play(ShardedProdigyPlusScheduleFree, placed, {"d0": 1e-3, **options}, steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh_name", ["fsdp2", "uneven", "fsdp_tp"])
def test_a_shard_draws_the_noise_that_the_whole_draws(pool, mesh_name, kind):
    """Compares one step: two runs diverge from the first rounding that a last bit decides."""
    mesh, (dtype, options) = MESHES[mesh_name], KINDS[kind]
    expected, _ = play(ProdigyPlusScheduleFree, Fed(*mesh.shapes, dtype=dtype), {"d0": 1e-3, **options}, 1)
    first, *others = pool.run(mesh.ranks, on_mesh, mesh_name, kind, 1)
    seen = rounded = 0
    for key, value in expected.items():
        found = first[0][key]
        assert found.dtype == value.dtype
        if value.dtype == torch.bfloat16:
            seen, rounded = seen + value.numel(), rounded + (found != value).sum().item()
        for other in others:
            assert torch.equal(other[0][key], found), key
    # With different noise, at least every tenth would differ.
    assert rounded <= 0.002 * seen


def compiled_and_not(mesh_name):
    mesh = MESHES[mesh_name]
    runs = []
    for compile_ in (False, True):
        placed = Placed(Fed(*mesh.shapes), mesh)
        runs.append(play(ShardedProdigyPlusScheduleFree, placed, {"compile": compile_}, 40))
    return runs


def test_compiled_shards(pool):
    first, *others = pool.run(2, compiled_and_not, "fsdp2")
    (plain, plain_d), (compiled, compiled_d) = first
    assert abs(compiled_d / plain_d - 1) <= 1e-6
    for key, value in plain.items():
        assert (compiled[key] - value).norm() <= 1e-6 * value.norm(), key
    for other in others:
        assert torch.equal(other[1][1], compiled_d)
        for key, value in compiled.items():
            assert torch.equal(other[1][0][key], value), key
