"""Ranks stay in step although they differ: missing gradients, an inf on one rank, ranks that hold nothing."""

import pytest
import torch
import torch.distributed as dist

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import MESHES, Placed, for_muon, pieces_of, whole
from tests.single.problems import Fed, assert_same

STEPS = 42  # in the last step a gradient is missing


def split(parameters, use_muon_pp=False, **options):
    if use_muon_pp:
        return for_muon(parameters, **options)
    return [{"params": its, **options} for its in (parameters[:3], parameters[3:])]


def disturb(step, parameters, rank):
    """Change the gradients of a rank in a step; rank None is the one process, which holds all."""
    if step % 4 == 1:  # missing everywhere
        parameters[0].grad = None
    if step % 4 == 2 and rank in (None, 1):  # not finite on one rank
        local = pieces_of(parameters[1].grad)
        if local.numel():
            local.view(-1)[0] = float("inf")
    if step in (20, 21):  # missing for a whole group
        for p in parameters[3:]:
            p.grad = None


def play(optimizer, problem, rank=None):
    d = []
    for step in range(STEPS):
        problem.backward()
        disturb(step, problem.parameters, rank)
        optimizer.step()
        d.append([float(group["d"]) for group in optimizer.metrics()])
    metrics = [{name: float(value) for name, value in group.items()} for group in optimizer.metrics()]
    return [whole(p) for p in problem.parameters], d, metrics


def on_mesh(name, options):
    placed = Placed(Fed(*MESHES[name].shapes), MESHES[name])
    return play(ShardedProdigyPlusScheduleFree(split(placed.parameters, **options)), placed, dist.get_rank())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("fsdp2", "uneven", "hsdp", "fsdp_tp", "two_meshes")),
        ("uneven", {"use_cautious": True, "use_adopt": True}),
        ("uneven", {"use_cautious": True, "use_schedulefree": False}),
        *((name, {"use_muon_pp": True}) for name in ("uneven", "hsdp", "two_meshes")),
        ("fsdp_tp", {"use_muon_pp": True, "use_schedulefree": False, "use_cautious": True}),
        ("uneven", {"use_speed": "relative", "use_orthograd": True}),
        ("uneven", {"use_focus": True, "factored": False, "use_speed": True}),
        ("uneven", {"use_grams": True, "use_bias_correction": True, "betas": (0.9, 0.95)}),
    ],
    ids=str,
)
def test_missing_and_bad_gradients(pool, name, options):
    mesh = MESHES[name]
    problem = Fed(*mesh.shapes)
    weights, d, metrics = play(ProdigyPlusScheduleFree(split(problem.parameters, **options)), problem)
    assert metrics[0]["skipped_steps"] == 10
    for found in pool.run(mesh.ranks, on_mesh, name, options):
        assert torch.tensor(found[1]).allclose(torch.tensor(d), rtol=1e-6, atol=0)
        for ours, theirs in zip(found[2], metrics, strict=True):
            # d_hat is a quotient of sums over p0 − z, which is small beside the (rounded) weights.
            assert ours == pytest.approx(theirs, rel=4e-6)
        for one, other in zip(found[0], weights, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()


def missing_on_one(name, missing, options):
    placed = Placed(Fed(*MESHES[name].shapes), MESHES[name])
    optimizer = ShardedProdigyPlusScheduleFree(split(placed.parameters, **options))
    for _ in range(STEPS):
        placed.backward()
        for p in placed.parameters[:4]:
            if missing and dist.get_rank() == 1:
                p.grad = None
            elif dist.get_rank() == 1:
                pieces_of(p.grad).zero_()
        optimizer.step()
    return [whole(p) for p in placed.parameters], float(optimizer.metrics()[0]["d"])


@pytest.mark.parametrize("options", [{}, {"use_muon_pp": True}], ids=str)
@pytest.mark.parametrize("name", ["fsdp2", "uneven"])
def test_a_gradient_missing_on_one_rank_is_zero_there(pool, name, options):
    missing = pool.run(MESHES[name].ranks, missing_on_one, name, True, options)
    zeros = pool.run(MESHES[name].ranks, missing_on_one, name, False, options)
    assert_same(missing, zeros)


def nothing_to_do(name):
    placed = Placed(Fed(*MESHES[name].shapes), MESHES[name])
    for p in placed.parameters:
        p.requires_grad_(False)
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters)
    optimizer.step()
    return len(optimizer.state)


def test_all_frozen(pool):
    assert pool.run(2, nothing_to_do, "fsdp2") == [0, 0]
