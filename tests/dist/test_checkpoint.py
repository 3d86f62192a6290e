"""A run that was saved on some ranks continues on others."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import MESHES, Placed, for_muon, pieces_of, whole
from tests.dist.resuming import whole_state
from tests.dist.sharding import ranks, wrap
from tests.models import Transformer, Walks, fit
from tests.single.problems import Fed, assert_same


def groups(parameters, use_muon_pp=False, **options):
    """One parameter group, or the groups for Muon."""
    parameters = list(parameters)
    return for_muon(parameters, **options) if use_muon_pp else [{"params": parameters, **options}]


def fed_on_mesh(name, saved, weights, draws, steps, options):
    """Continue on a mesh what one process saved; return the state and the weights after that."""
    mesh = MESHES[name]
    problem = Fed(*mesh.shapes)
    problem.random.set_state(draws)
    for p, value in zip(problem.parameters, weights, strict=True):
        p.data.copy_(value)
    placed = Placed(problem, mesh)
    optimizer = ShardedProdigyPlusScheduleFree(groups(placed.parameters, **options))
    optimizer.load_state_dict(saved)
    for _ in range(steps):
        placed.backward()
        optimizer.step()
    return whole_state(optimizer), [whole(p) for p in placed.parameters]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, {})
            for name in ("fsdp2", "last_dim", "hsdp", "fsdp_tp_uneven", "empty", "mixed", "two_meshes")
        ),
        ("fsdp_tp_uneven", {"use_speed": "relative"}),
        ("empty", {"use_speed": "relative", "use_schedulefree": False}),
        ("uneven", {"use_focus": True, "factored": False}),
        ("two_meshes", {"use_muon_pp": True}),
        ("empty", {"use_muon_pp": True, "use_schedulefree": False}),
    ],
    ids=str,
)
def test_what_one_process_saved(pool, name, options):
    """Loaded and saved again, it is the same; trained further, it becomes what it would in one process."""
    problem = Fed(*MESHES[name].shapes)
    optimizer = ProdigyPlusScheduleFree(groups(problem.parameters, **options))
    for _ in range(40):
        problem.backward()
        optimizer.step()
    saved, draws = optimizer.state_dict(), problem.random.get_state()
    weights = [p.detach().clone() for p in problem.parameters]

    for found, found_weights in pool.run(
        MESHES[name].ranks, fed_on_mesh, name, saved, weights, draws, 0, options
    ):
        assert_same(found, saved)
        assert_same(found_weights, weights)

    results = pool.run(MESHES[name].ranks, fed_on_mesh, name, saved, weights, draws, 20, options)
    for _ in range(20):
        problem.backward()
        optimizer.step()
    for found, found_weights in results:
        assert found["param_groups"][0]["d"] == pytest.approx(
            optimizer.state_dict()["param_groups"][0]["d"], rel=1e-6
        )
        for ours, p in zip(found_weights, problem.parameters, strict=True):
            assert (ours - p.detach()).norm() <= 1e-6 * p.detach().norm()


def copied():
    """An optimiser and its copy continue alike, and both still sum with the other rank."""
    placed = Placed(Fed(*MESHES["fsdp2"].shapes), MESHES["fsdp2"])
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters)
    for _ in range(20):
        placed.backward()
        optimizer.step()
    parameters, twin = copy.deepcopy((placed.parameters, optimizer))
    for _ in range(20):
        placed.backward()
        for p, original in zip(parameters, placed.parameters, strict=True):
            if dist.get_rank() == 1:  # by itself, this rank would find no progress
                pieces_of(original.grad).zero_()
            p.grad = original.grad
        optimizer.step()
        twin.step()
    return [[float(o.metrics()[0]["d"]) for o in (optimizer, twin)], [whole(p) for p in parameters]]


def test_a_copy_is_sharded_too(pool):
    first, second = pool.run(2, copied)
    assert_same(first, second)
    assert first[0][0] == first[0][1] > 1e-5


def foreign():
    """A state that one mesh has saved; and the same loaded on another mesh, and in one process."""
    tensor = torch.arange(80.0).view(20, 4)
    lines, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    results = []
    for p in (
        distribute_tensor(tensor, lines, [Shard(0)]),
        distribute_tensor(tensor, square, [Replicate(), Shard(1)]),
        tensor,
    ):
        p = torch.nn.Parameter(p.clone())
        optimizer = (ShardedProdigyPlusScheduleFree if isinstance(p, DTensor) else ProdigyPlusScheduleFree)(
            [p]
        )
        if results:
            optimizer.load_state_dict(results[0])
        else:
            p.grad = torch.ones_like(p)
            optimizer.step()
            results.append(optimizer.state_dict())
        results.append({key: whole(value) for key, value in optimizer.state_dict()["state"][0].items()})
    return results[1:]


def test_from_one_mesh_to_another(pool):
    for first, *others in pool.run(2, foreign):
        for other in others:
            assert_same(other, first)


def averages(name):
    """The averaged weights of a model on a mesh, from every interface that gives them."""
    model, called, number, count = wrap(name)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters())
    fit(called, optimizer, Walks(), 20, number, count)
    with torch.no_grad():
        called(Walks().next()[:, :-1])  # afterwards FSDP2 leaves the root's weights gathered
    before = [whole(p) for p in model.parameters()]
    saved = {name: whole(value) for name, value in optimizer.averaged_state_dict(model).items()}
    full = optimizer.averaged_state_dict(called, full=True)
    with optimizer.averaged_parameters():
        inside = {name: whole(value) for name, value in model.state_dict().items()}
    after = [whole(p) for p in model.parameters()]
    optimizer.eval()
    evaluated = {name: whole(value) for name, value in model.state_dict().items()}
    return before, after, saved, full, inside, evaluated


@pytest.mark.parametrize("name", ["ddp2", "fsdp2", "hsdp", "tp", "fsdp_tp"])
def test_averaged_weights(pool, name):
    (before, after, saved, full, inside, evaluated), *others = pool.run(ranks(name), averages, name)
    assert_same(after, before)
    assert_same(saved, evaluated)
    assert_same(inside, evaluated)
    assert_same(full, evaluated)
    assert all(other[3] == {} for other in others)
    # It loads into the model of one process.
    Transformer().load_state_dict(full)
