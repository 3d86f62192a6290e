"""Ways to wrap a model after which a step's parameters are not the objects that were passed at first."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

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


def looked_at(optimizer_class, before_step, options):
    """The losses of a run; with ``before_step``, a forward pass comes between backward pass and step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_class(model.parameters(), **options)
    x, losses = torch.randn(16, 8), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        if before_step:
            with torch.no_grad():
                model(x)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_forward_pass_between_backward_pass_and_step(pool):
    """FSDP2 keeps what it has gathered for it, which the step makes old."""
    for optimizer, options in (
        (ShardedProdigyPlusScheduleFree, {"d0": 1e-3}),
        (torch.optim.AdamW, {"lr": 1e-2}),
    ):
        expected, found = (pool.run(2, looked_at, optimizer, each, options) for each in (False, True))
        # torch's own optimisers train on at the old weights; when they no longer do, so need not we.
        assert (found == expected) == (optimizer is ShardedProdigyPlusScheduleFree)


def trained_in_wrappers(wrapper, fuses):
    """The weights and the average of a run whose inner layer recomputes activations, or is compiled."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 33), torch.nn.Sequential(torch.nn.Linear(33, 33), torch.nn.Tanh())]
    if wrapper == "checkpoint":
        layers[1] = checkpoint_wrapper(layers[1])
    if wrapper == "compile":
        layers[1] = torch.compile(layers[1], backend="aot_eager")
    model = torch.nn.Sequential(*layers)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = ShardedProdigyPlusScheduleFree(
        model.parameters(), step_size="balance", d0=1e-2, fused_back_pass=fuses
    )
    if fuses:
        optimizer.fuse_backward(model)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.full((4, 40), 0.3)).square().sum().backward()
        optimizer.step()
    with optimizer.averaged_parameters(), torch.no_grad():
        at_average = model(torch.full((4, 40), 0.3))
    return [whole(p) for p in model.parameters()], at_average, optimizer.averaged_state_dict(model, full=True)


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("wrapper", ["checkpoint", "compile"])
def test_layers_that_recompute_activations_or_are_compiled(pool, wrapper, fuses):
    found, expected = (pool.run(2, trained_in_wrappers, each, fuses) for each in (wrapper, None))
    assert_same(found, expected)  # with the names of the unwrapped model


def trained_in_bfloat16():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(40, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), step_size="balance", d0=1e-3)
    model.to_empty(device="cpu")  # keeps the parameters, so the optimiser may have been built before
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(torch.full((4, 40), 0.3)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.check_replicas()
    dtypes = {value.dtype for p in model.parameters() for value in (p, p.grad, *optimizer.state[p].values())}
    return losses, dtypes


def test_a_model_made_on_meta_that_computes_in_bfloat16(pool):
    for losses, dtypes in pool.run(2, trained_in_bfloat16):
        assert losses[-1] < losses[0]
        assert dtypes == {torch.float32}
