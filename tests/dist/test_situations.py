"""What users do with sharded models: constraints, evaluations, frozen parameters, other wrappers."""

import functools
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from prodigyplus import ProdigyPlusScheduleFree, monitor
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import MESHES, Placed, whole
from tests.single.problems import Fed, assert_same


def unit_rows(values):
    return values / (values * values).sum(-1, keepdim=True).sqrt()


def constrained(optimizer_class, problem):
    optimizer = optimizer_class(problem.parameters, d0=1e-2)
    clamped, normed = problem.parameters[0], problem.parameters[2]
    optimizer.constrain(clamped, lambda values: values.clamp_(-0.5, 0.5))
    optimizer.constrain(normed, unit_rows)
    for _ in range(20):
        problem.backward()
        optimizer.step()
    found = [whole(p) for p in problem.parameters]
    optimizer.eval()
    found += [whole(p) for p in problem.parameters]
    optimizer.train()
    return found, float(optimizer.metrics()[0]["d"])


def constrained_on_mesh(name):
    mesh = MESHES[name]
    return constrained(ShardedProdigyPlusScheduleFree, Placed(Fed(*mesh.shapes), mesh))


@pytest.mark.parametrize("name", ["fsdp2", "hsdp", "fsdp_tp", "uneven"])
def test_constraints_on_shards(pool, name):
    mesh = MESHES[name]
    expected, d = constrained(ProdigyPlusScheduleFree, Fed(*mesh.shapes))
    first, *others = pool.run(mesh.ranks, constrained_on_mesh, name)
    assert first[1] == pytest.approx(d, rel=1e-6)
    for found, value in zip(first[0], expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    for other in others:
        assert_same(other, first)
    assert 0.49 < expected[0].abs().max() <= 0.5
    torch.testing.assert_close(expected[2].norm(dim=-1), torch.ones(len(expected[2])))


def losses(evaluates, root):
    """The losses of steps between which the average is evaluated.

    By default FSDP2 leaves the root's weights gathered after a forward pass.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh, **({} if root is None else {"reshard_after_forward": root}))
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), d0=1e-2)
    data = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(data) - data[:, :5]).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        if evaluates:
            with torch.no_grad(), optimizer.averaged_parameters():
                average = model(data)
            if evaluates == "swap":
                with torch.no_grad():
                    optimizer.eval()
                    again = model(data)
                    optimizer.train()
                torch.testing.assert_close(again, average)
    return found


@pytest.mark.parametrize("root", [None, True])
@pytest.mark.parametrize("how", ["swap", "context"])
def test_a_step_after_an_evaluation_trains_the_weights_of_training(pool, how, root):
    plain = pool.run(2, losses, None, root)
    # eval() and train() round; averaged_parameters() does not.
    bound = 0 if how == "context" else 1e-5
    for found, expected in zip(pool.run(2, losses, how, root), plain, strict=True):
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= bound


def main_copies(optimizer_class):
    """Train a wrapper's own copies of weights, which require no gradient but are given one."""
    problem = Fed((16, 16), (5,))
    problem.parameters = [p.detach().clone() for p in problem.parameters]
    optimizer = optimizer_class([nn.Parameter(p) for p in problem.parameters], d0=1e-2)
    optimizer.param_groups[0]["params"] = problem.parameters
    for _ in range(5):
        problem.backward()
        optimizer.step()
    return [p.clone() for p in problem.parameters]


def test_what_is_given_a_gradient_is_trained(pool):
    expected = main_copies(ProdigyPlusScheduleFree)
    assert not torch.equal(expected[0], Fed((16, 16), (5,)).parameters[0])
    for found in pool.run(2, main_copies, ShardedProdigyPlusScheduleFree):
        assert_same(found, expected)


def frozen_after_backward(sharded):
    """Parameters are frozen between a backward pass and its step; one rank lacks a gradient of one."""
    mesh = MESHES["fsdp2"]
    problem = Fed(*mesh.shapes)
    if sharded:
        problem = Placed(problem, mesh)
    optimizer = (ShardedProdigyPlusScheduleFree if sharded else ProdigyPlusScheduleFree)(
        problem.parameters, d0=1e-2
    )
    for step in range(8):
        problem.backward()
        if step == 3:
            for p in problem.parameters[:3]:
                p.requires_grad_(False)
            if sharded and dist.get_rank() == 1:
                problem.parameters[1].grad = None
            elif not sharded:
                rows = mesh.shapes[1][0]
                problem.parameters[1].grad[rows // 2 :] = 0
        if step > 3:
            for p in problem.parameters[:3]:
                p.grad = None
        optimizer.step()
    return [whole(p) for p in problem.parameters], float(optimizer.metrics()[0]["d"])


def test_ranks_agree_on_what_is_frozen_between_backward_and_step(pool):
    expected, d = frozen_after_backward(sharded=False)
    one, other = pool.run(2, frozen_after_backward, True)
    assert_same(other, one)
    assert one[1] == pytest.approx(d, rel=1e-6)
    for found, value in zip(one[0], expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def sequence_parallel(ranks):
    """Tensor parallelism whose norms get a part of the sequence: their gradients are sums to be completed."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"norm": nn.LayerNorm(12), "up": nn.Linear(12, 20), "down": nn.Linear(20, 12)})
    if ranks > 1:
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan)
    optimizer = (ShardedProdigyPlusScheduleFree if ranks > 1 else ProdigyPlusScheduleFree)(
        model.parameters(), d0=1e-3
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(10):
        optimizer.zero_grad()
        part = torch.randn(3, 8, 12, generator=draw).chunk(ranks, 1)[dist.get_rank() if ranks > 1 else 0]
        (model["down"](model["up"](model["norm"](part)).tanh()) - part).square().sum().backward()
        optimizer.step()
    if ranks > 1:
        optimizer.check_replicas()
    return [whole(p) for p in model.parameters()], float(optimizer.metrics()[0]["d"])


def test_norms_under_sequence_parallelism(pool):
    expected, d = sequence_parallel(1)
    for found in pool.run(2, sequence_parallel, 2):
        assert found[1] == pytest.approx(d, rel=1e-5)
        for p, value in zip(found[0], expected, strict=True):
            assert (p - value).norm() <= 1e-5 * value.norm()


def zero_redundancy(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch compiles something at this import, and warns
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(*args, **options)


def with_zero(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    data = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    try:
        if make == "one process":
            optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-4, d_limiter=False)
        elif make == "shared":
            optimizer = zero_redundancy(
                nn.parallel.DistributedDataParallel(model).parameters(),
                functools.partial(ShardedProdigyPlusScheduleFree, process_group=dist.group.WORLD),
                d0=1e-4,
                d_limiter=False,
            )
        else:
            zero_redundancy(model.parameters(), make)
            return "made"
    except ValueError as error:
        return str(error)
    for _ in range(40):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("make", [ProdigyPlusScheduleFree, ShardedProdigyPlusScheduleFree])
def test_zero_redundancy_optimizer_is_refused(pool, make):
    """It would find a step size of its own on every rank."""
    for found in pool.run(2, with_zero, make):
        assert "functools.partial(ShardedProdigyPlusScheduleFree, process_group=" in found
        assert make.__name__ in found


def saved_with_a_frozen_stage():
    stage = nn.Linear(4, 4)
    stage.requires_grad_(dist.get_rank() == 1)
    optimizer = ShardedProdigyPlusScheduleFree(stage.parameters(), process_group=dist.group.WORLD)
    for _ in range(3):
        for p in stage.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    optimizer.zero_grad()
    return [get_optimizer_state_dict(stage, optimizer)["param_groups"][0]["k"] for _ in range(2)]


def test_torchs_checkpoint_helpers_where_one_stage_is_frozen(pool):
    """They make a step wherever there is no state, at every call: here on the first stage alone."""
    assert pool.run(2, saved_with_a_frozen_stage) == [[3, 3], [3, 3]]


def test_zero_redundancy_optimizer_with_a_shared_step_size(pool):
    expected = with_zero("one process")
    for found in pool.run(2, with_zero, "shared"):
        for p, value in zip(found, expected, strict=True):
            assert (p - value).norm() <= 1e-5 * value.norm()


def average_in_full(tied):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if tied:
        model[1].weight = model[0].weight
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), d0=1e-2)
    model(torch.ones(4, 8)).square().sum().backward()
    optimizer.step()
    saved = optimizer.averaged_state_dict(model, full=True)
    return {name: (value.data_ptr(), value) for name, value in saved.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_are_saved_under_each_name(pool, tied):
    """Each has memory of its own, as safetensors requires."""
    saved, nothing = pool.run(2, average_in_full, tied)
    assert nothing == {}
    assert saved.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert len({pointer for pointer, _ in saved.values()}) == 4
    assert torch.equal(saved["0.weight"][1], saved["1.weight"][1]) == tied


def with_weights_of_others():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters())
    loaded = {
        name: distribute_tensor(torch.ones(p.shape), p.device_mesh, p.placements)
        for name, p in model.named_parameters()
    }
    model.load_state_dict(loaded, assign=True)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"on the meta device.* Build the optimiser afterwards"):
        optimizer.step()
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters())
    optimizer.step()


def test_parameters_that_others_have_replaced(pool):
    pool.run(2, with_weights_of_others)


def averages_of_a_pipeline():
    """The whole average of this rank's stage, of a pipeline of two stages, each on two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, _ = mesh.get_coordinate()
    torch.manual_seed(stage)
    model = nn.ModuleDict({f"{stage}": nn.Linear(4, 4)})
    fully_shard(model[f"{stage}"], mesh=mesh["dp"])
    optimizer = ShardedProdigyPlusScheduleFree(
        model.parameters(), d0=1e-2, process_group=mesh.get_group("pp")
    )
    model[f"{stage}"](torch.ones(4, 4)).square().sum().backward()
    optimizer.step()
    in_shards = {name: whole(value) for name, value in optimizer.averaged_state_dict(model).items()}
    return in_shards, optimizer.averaged_state_dict(model, full=True)


def test_the_first_rank_of_each_stage_has_its_whole_average(pool):
    for rank, (expected, found) in enumerate(pool.run(4, averages_of_a_pipeline)):
        assert found.keys() == (set() if rank % 2 else {f"{rank // 2}.weight", f"{rank // 2}.bias"})
        assert_same(found, {name: expected[name] for name in found})


def disagreeing(mesh_name, what, options):
    """The warnings of a run in which rank 1 differs from the others in ``what``."""
    mesh, rank = MESHES[mesh_name], dist.get_rank()
    placed = Placed(Fed(*mesh.shapes), mesh)
    plain = nn.Parameter(torch.ones(3))
    optimizer = ShardedProdigyPlusScheduleFree([*placed.parameters, plain], d0=1e-2, **options)
    with warnings.catch_warnings(record=True) as caught, mock.patch.object(monitor, "_NUMBERS_EVERY", 5):
        warnings.simplefilter("always")
        for step in range(30):
            if what == "lr" and rank == 1 and step == 10:
                optimizer.param_groups[0]["lr"] = 0.995
            placed.backward()
            plain.grad = torch.full((3,), 1.0 + 100 * rank * (what == "gradients"))
            optimizer.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("options", [{}, {"step_size": "balance"}], ids=str)
@pytest.mark.parametrize("what", ["lr", "gradients", "nothing"])
@pytest.mark.parametrize("mesh_name", ["fsdp2", "hsdp"])
def test_ranks_that_disagree_are_told(pool, mesh_name, what, options):
    for rank, messages in enumerate(pool.run(MESHES[mesh_name].ranks, disagreeing, mesh_name, what, options)):
        if what == "nothing":
            assert not messages
        elif rank == 1:  # the ranks that are alike may not see it
            (message,) = messages
            assert what == "lr" or "plain tensors" in message
            assert what == "gradients" or "step size of param_groups[0] differs between ranks" in message
