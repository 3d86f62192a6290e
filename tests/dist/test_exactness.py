"""The sharded run is the one-process run, cut up: every option on every mesh, on gradients that are fed."""

import functools

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree, progress
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import MESHES, Placed, whole
from tests.single.problems import Fed

STEPS = 100

OPTIONS = {
    "default": {},
    "unfactored": {"factored": False},
    "groups_mean": {},
    "groups_apart": {"split_groups_mean": False},
    "groups_pooled": {"split_groups": False},
    "weight_decay": {"weight_decay": 0.1},
    "beta4": {"beta4": 0.5},
    "adam": {"use_schedulefree": False, "weight_decay": 0.1},
    "atan2": {"eps": None, "use_stableadamw": False},
}


def play(optimizer_class, problem, name):
    """The weights and the state of the end, and ``d`` at every step."""
    parameters = problem.parameters
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2]}] if "groups" in name else parameters
    optimizer = optimizer_class(groups, **OPTIONS[name])
    d = []
    for _ in range(STEPS):
        problem.backward()
        optimizer.step()
        d.append([group["d"] for group in optimizer.metrics()])
    tensors = {}
    for number, p in enumerate(parameters):
        tensors[f"weight.{number}"] = whole(p)
        for key, value in optimizer.state[p].items():
            if key not in progress.SAMPLED:
                tensors[f"{key}.{number}"] = whole(value)
    return tensors, torch.tensor(d, dtype=torch.float64)


@functools.cache
def in_one_process(shapes, name):
    return play(ProdigyPlusScheduleFree, Fed(*shapes), name)


def on_mesh(mesh_name, names):
    mesh = MESHES[mesh_name]
    return {name: play(ShardedProdigyPlusScheduleFree, Placed(Fed(*mesh.shapes), mesh), name) for name in names}


@pytest.mark.parametrize("mesh_name", MESHES)
def test_exactness(pool, mesh_name):
    mesh = MESHES[mesh_name]
    # Nine ranks are for the layouts that they make; on two cores they are slow.
    names = ("default", "groups_mean", "adam") if mesh_name == "nine" else tuple(OPTIONS)
    first, *others = pool.run(mesh.ranks, on_mesh, mesh_name, names, limit=250)
    for name in names:
        expected, expected_d = in_one_process(mesh.shapes, name)
        found, d = first[name]
        assert (expected_d[-1] > 100 * expected_d[0]).all(), name
        for other in others:
            assert torch.equal(other[name][1], d), name
        assert (d / expected_d - 1).abs().max() <= 1e-5, name
        for key, value in expected.items():
            # A z that passes through zero is no measure of itself; the weight beside it is.
            scale = max(value.norm(), expected[key.replace("z.", "weight.")].norm())
            assert (found[key] - value).norm() <= 1e-6 * scale, (name, key)
            for other in others:
                assert torch.equal(other[name][0][key], found[key]), (name, key)
