"""A sharded run is the one-process run, cut up: with every option, on every mesh, for given gradients."""

import functools
import itertools

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.formulas.prodigy import AVERAGES
from prodigyplus.state_table import SAMPLED_KEYS
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests import option_table as table
from tests.dist.meshes import MESHES, Placed, for_muon, whole
from tests.single.problems import Fed

ADAM = {"use_schedulefree": False}

# Options are played as groups that differ, each with its own d. Left out are those about sharing d; a tensor
# lr, which belongs to one optimiser; bfloat16_z, since a last bit decides how z is rounded (test_rounding.py
# has it); and d0 and d_limiter, with which a last bit decides how d starts (test_property.py has these, in
# float64). step_size has runs of its own below.
OTHERWISE = ("split_groups", "split_groups_mean", "bfloat16_z", "d0", "d_limiter", "step_size")
NAMES = table.named("passes", "numbers", but=OTHERWISE)
ALONE = [options for options in table.alone(NAMES) if not isinstance(options.get("lr"), torch.Tensor)]
# Packed separately, since options that change numbers may hide from d what passes find.
PASSES = [its for its in table.elementwise(ALONE) if table.TABLE[next(iter(its))].acts_on == "passes"]
NUMBERS = [its for its in table.elementwise(ALONE) if its not in PASSES]
VARIANTS = [
    *table.packed([*PASSES, *table.without_schedulefree(PASSES), {"weight_decay": 0.1, **ADAM}], most=3),
    *table.packed(NUMBERS, most=4),
]
# For Muon: a parameter's shape decides whether it is batched, and other parameters get groups of their own.
MUON = [
    {},
    ADAM,
    *(
        {name: value for name, value in options.items() if name not in ("use_muon_pp", "muon_batched")}
        for options in table.packed(table.of_matrices(ALONE + table.together(NAMES)))
    ),
]
# With balance: two groups that share one step size, then groups with one each; for Muon, too.
_APART = {"split_groups_mean": False}
BALANCED = [
    {},
    {"weight_decay": 0.1},
    *(
        {**options, **_APART}
        for options in (
            {},
            {"use_orthograd": True, "weight_decay": 0.1},
            {"use_cautious": True, "eps": None, "use_stableadamw": False},
            {"use_grams": True, "use_adopt": True, "factored": False},
            {"use_focus": True, "factored": False},
            {"use_bias_correction": True, "betas": (0.9, 0.95), "schedulefree_c": 20.0},
        )
    ),
]
BALANCED_MUON = [{"muon_fp32": True}, {**_APART, "use_cautious": True}]
_TWO = [{}, {}]
# An lr so large that, in spite of Prodigy's small first d, weights soon move by more than their rounding.
_FAST = {"lr": 100.0}
_FAST_APART = {**_FAST, **_APART}

# What is played: the optimiser's options, and those of each group.
RUNS = {
    "default": ({}, [{}]),
    "groups_mean": (_FAST, _TWO),
    "groups_apart": (_FAST_APART, _TWO),
    "groups_pooled": ({**_FAST, "split_groups": False}, _TWO),
    # All variants in one run: messages take the time, and many groups send as few as one.
    "variants": (_FAST_APART, VARIANTS),
    "muon": (_FAST_APART, MUON),
    "balanced": ({"step_size": "balance"}, BALANCED),
    "balanced_muon": ({"step_size": "balance"}, BALANCED_MUON),
}
# Options with which d does not grow much here: it is frozen, or waits, or the decay hides all else.
SLOW = {"prodigy_steps", "warmup_steps", "lr", "weight_decay_by_lr"}
# Runs whose groups differ. Groups have one half of the mesh's shapes or the other, in turn.
DIFFER = ("variants", "muon", "balanced", "balanced_muon")
OF_MATRICES = ("muon", "balanced_muon")
# How far tensors may be from one process's, relative to their norms. A last bit of the weights moves
# balance's d by up to 2e-6 of it, and a second moment, which is of d·g, by up to 4e-6.
TOLERANCE = {"balanced": 1e-5, "balanced_muon": 1e-5}


def shapes_of(shapes, name):
    """The shapes of each group, out of a mesh's."""
    count = len(RUNS[name][1])
    return [shapes[i % 2 :: 2] if name in DIFFER else shapes[i::count] for i in range(count)]


def groups_of(parameters, shapes, name):
    parameters = iter(parameters)
    parts = [
        ([next(parameters) for _ in its], group)
        for its, group in zip(shapes_of(shapes, name), RUNS[name][1], strict=True)
    ]
    if name in OF_MATRICES:
        return [its for part, group in parts for its in for_muon(part, **group)]
    return [{"params": part, **group} for part, group in parts]


def play(optimizer_class, problem, shapes, name):
    """The weights and the state at the end, and ``d`` at every step."""
    parameters = problem.parameters
    optimizer = optimizer_class(groups_of(parameters, shapes, name), **RUNS[name][0])
    d = []
    for _ in range(30 if name == "default" else 20):
        problem.backward()
        optimizer.step()
        d.append([group["d"] for group in optimizer.metrics()])
    tensors = {}
    for number, p in enumerate(parameters):
        tensors[f"weight.{number}"] = whole(p)
        for key, value in optimizer.state[p].items():
            if key not in SAMPLED_KEYS:
                tensors[f"{key}.{number}"] = whole(value)
    return tensors, torch.tensor(d, dtype=torch.float64)


def problem_of(shapes, name):
    every = itertools.chain.from_iterable(shapes_of(shapes, name))
    return Fed(*every, turns_after=12 if name.startswith("balanced") else None)


@functools.cache
def in_one_process(shapes, name):
    return play(ProdigyPlusScheduleFree, problem_of(shapes, name), shapes, name)


def on_mesh(mesh_name, names):
    mesh = MESHES[mesh_name]
    return {
        name: play(
            ShardedProdigyPlusScheduleFree, Placed(problem_of(mesh.shapes, name), mesh), mesh.shapes, name
        )
        for name in names
    }


@pytest.mark.parametrize("mesh_name", MESHES)
def test_exactness(pool, mesh_name):
    mesh = MESHES[mesh_name]
    # Nine ranks are slow on two cores, and are there for their layouts: fewer runs are enough.
    names = ("default", "groups_mean", "variants", "muon", "balanced") if mesh_name == "nine" else tuple(RUNS)
    first, *others = pool.run(mesh.ranks, on_mesh, mesh_name, names)
    for name in names:
        expected, expected_d = in_one_process(mesh.shapes, name)
        found, d = first[name]
        groups = groups_of(problem_of(mesh.shapes, name).parameters, mesh.shapes, name)
        # Of a few elements there is a single sample, so that d is down to chance.
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        grows = torch.tensor(
            [not SLOW & group.keys() and size > 11 for group, size in zip(groups, sizes, strict=True)]
        )
        assert (expected_d[-1] > 10 * expected_d[0])[grows].double().mean() > 0.8, name
        for other in others:
            assert torch.equal(other[name][1], d), name
        assert (d / expected_d - 1).abs().max() <= 1e-5, name
        for key, value in expected.items():
            # z and distances may be close to zero, so they are measured by the weight's norm.
            kind, number = key.split(".")
            of_weights = kind in ("z", *AVERAGES)
            scale = max(value.norm(), expected[f"weight.{number}"].norm() if of_weights else 0.0)
            assert (found[key] - value).norm() <= TOLERANCE.get(name, 1e-6) * scale, (name, key)
            for other in others:
                assert torch.equal(other[name][0][key], found[key]), (name, key)
