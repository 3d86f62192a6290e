"""The sharded run is the one-process run, cut up: every option on every mesh, on gradients that are fed."""

import functools

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.formulas.prodigy import AVERAGES
from prodigyplus.state import SAMPLED
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import MESHES, Placed, for_muon, whole
from tests.single.problems import Fed

_VARIANTS = (
    {"use_speed": True},
    {"use_speed": "relative"},
    {"use_bias_correction": True, "betas": (0.9, 0.95)},  # the larger β2, the longer it warms up
    {"use_cautious": True},
    {"use_grams": True},
    {"use_adopt": True},
    {"use_orthograd": True},
    {"use_focus": True, "factored": False},
)
VARIANTS = [{**options, "use_schedulefree": sf} for options in _VARIANTS for sf in (True, False)]
# Of matrices; what is no matrix is in groups of its own.
MUON = [
    {},
    {"use_schedulefree": False},
    {"muon_fp32": True, "muon_quintic": True, "weight_decay": 0.1},
    {"use_cautious": True},
    {"use_cautious": True, "use_schedulefree": False},
    {"use_speed": True, "use_bias_correction": True, "betas": (0.9, 0.95)},
]
_TWO = [{}, {}]

# What is played: the options, and those of each group. Where there are groups, each has its own d.
RUNS = {
    "default": ({}, [{}]),
    "unfactored": ({"factored": False}, [{}]),
    "groups_mean": ({}, _TWO),
    "groups_apart": ({"split_groups_mean": False}, _TWO),
    "groups_pooled": ({"split_groups": False}, _TWO),
    "weight_decay": ({"weight_decay": 0.1}, [{}]),
    "beta4": ({"beta4": 0.5}, [{}]),
    "adam": ({"use_schedulefree": False, "weight_decay": 0.1}, [{}]),
    "atan2": ({"eps": None, "use_stableadamw": False}, [{}]),
    # One run of all, since what takes the time is the messages, and their number is that of one.
    "variants": ({"split_groups_mean": False}, VARIANTS),
    "muon": ({"split_groups_mean": False}, MUON),
}
# Of groups that differ, each has all shapes.
REPEATS = {"variants": len(VARIANTS), "muon": len(MUON)}


def shapes_of(mesh, name):
    return mesh.shapes * REPEATS.get(name, 1)


def groups_of(parameters, name):
    _, groups = RUNS[name]
    if name not in REPEATS:
        return [{"params": parameters[i :: len(groups)], **group} for i, group in enumerate(groups)]
    each = len(parameters) // len(groups)
    parts = [(parameters[i * each : (i + 1) * each], group) for i, group in enumerate(groups)]
    if name == "muon":
        return [its for part, group in parts for its in for_muon(part, **group)]
    return [{"params": part, **group} for part, group in parts]


def play(optimizer_class, problem, name):
    """The weights and the state of the end, and ``d`` at every step."""
    parameters = problem.parameters
    optimizer = optimizer_class(groups_of(parameters, name), **RUNS[name][0])
    d = []
    for _ in range(45 if name in REPEATS else 100):
        problem.backward()
        optimizer.step()
        d.append([group["d"] for group in optimizer.metrics()])
    tensors = {}
    for number, p in enumerate(parameters):
        tensors[f"weight.{number}"] = whole(p)
        for key, value in optimizer.state[p].items():
            if key not in SAMPLED:
                tensors[f"{key}.{number}"] = whole(value)
    return tensors, torch.tensor(d, dtype=torch.float64)


@functools.cache
def in_one_process(shapes, name):
    return play(ProdigyPlusScheduleFree, Fed(*shapes), name)


def on_mesh(mesh_name, names):
    mesh = MESHES[mesh_name]
    return {
        name: play(ShardedProdigyPlusScheduleFree, Placed(Fed(*shapes_of(mesh, name)), mesh), name)
        for name in names
    }


@pytest.mark.parametrize("mesh_name", MESHES)
def test_exactness(pool, mesh_name):
    mesh = MESHES[mesh_name]
    # Nine ranks are for the layouts that they make; on two cores they are slow.
    names = ("default", "groups_mean", "variants", "muon") if mesh_name == "nine" else tuple(RUNS)
    first, *others = pool.run(mesh.ranks, on_mesh, mesh_name, names)
    for name in names:
        expected, expected_d = in_one_process(shapes_of(mesh, name), name)
        found, d = first[name]
        assert (expected_d[-1] > 10 * expected_d[0]).all(), name
        for other in others:
            assert torch.equal(other[name][1], d), name
        assert (d / expected_d - 1).abs().max() <= 1e-5, name
        for key, value in expected.items():
            # A z that passes through zero is no measure of itself, nor is a distance; the weight is.
            kind, number = key.split(".")
            of_weights = kind in ("z", *AVERAGES)
            scale = max(value.norm(), expected[f"weight.{number}"].norm() if of_weights else 0.0)
            assert (found[key] - value).norm() <= 1e-6 * scale, (name, key)
            for other in others:
                assert torch.equal(other[name][0][key], found[key]), (name, key)
