"""The optimiser beside torchao's FP8 training, in its emulation of FP8 for a CPU."""

import torch
from torch import nn

from tests.integrations.processes import needs, processes

pytestmark = needs("torchao")


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def trained(*, gathers_fp8):
    """The losses of a short run under FSDP2, what it ends with, and the average in whole tensors."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    from prodigyplus_dist import ShardedProdigyPlusScheduleFree

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=gathers_fp8, emulate=True)
    convert_to_float8_training(model, config=config)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    is_wrapper = type(model[0].weight.to_local()) is WeightWithDynamicFloat8CastTensor
    assert is_wrapper == gathers_fp8
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), step_size="balance", d0=1e-3)
    losses = []
    for _ in range(6):
        x = torch.randn(16, 32)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :16]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.check_replicas()
    _, state = get_state_dict(model, optimizer)
    states = {name: {key: whole(value) for key, value in its.items()} for name, its in state["state"].items()}
    with optimizer.averaged_parameters(), torch.no_grad():
        at_average = model(x)
    return losses, states, at_average, optimizer.averaged_state_dict(model, full=True)


@processes(2)
def test_weights_that_are_gathered_in_fp8():
    """They are wrappers of float32 tensors, and train as those do."""
    expected, found = trained(gathers_fp8=False), trained(gathers_fp8=True)
    assert found[0] == expected[0]
    assert found[0][-1] < found[0][0]
    for old, new in zip(expected[1].values(), found[1].values(), strict=True):
        assert old.keys() == new.keys()
        assert all(type(new[key]) is torch.Tensor and torch.equal(old[key], new[key]) for key in old)
    assert torch.equal(found[2], expected[2])
    assert found[3].keys() == expected[3].keys()
    assert all(torch.equal(found[3][name], expected[3][name]) for name in found[3])
