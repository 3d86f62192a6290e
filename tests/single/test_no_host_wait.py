"""A step never asks the device for a value."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prodigyplus import ProdigyPlusScheduleFree
from tests.single.problems import pair, run, shapes_for

OPTIONS = [
    {},
    {"factored": False, "weight_decay": 0.1},
    {"use_schedulefree": False},
    {"eps": None, "use_stableadamw": False},
    {"prodigy_steps": 2},
    {"split_groups": False},
    {"bfloat16_z": True},
    {"beta4": 0.9},
    {"use_speed": True},
    {"use_speed": "relative", "use_bias_correction": True},
    {"use_cautious": True, "use_adopt": True},
    {"use_cautious": True, "use_schedulefree": False},
    {"use_grams": True, "use_orthograd": True},
    {"use_focus": True, "factored": False},
    {"use_muon_pp": True, "weight_decay": 0.1},
    {"use_muon_pp": True, "use_cautious": True, "muon_fp32": True, "use_schedulefree": False},
    {"use_muon_pp": True, "muon_batched": True, "muon_quintic": True, "use_speed": "relative"},
]


class NoWait(TorchDispatchMode):
    """Fails on every operation whose result is a value, or a shape, that the host has to wait for."""

    waits = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def forbidden(monkeypatch):
    def fail(name):
        def method(*_args, **_kwargs):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return method

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, fail(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step(options, dtype, forbidden):
    problem, optimizer = pair((40, 12), (9,), (3, 3), dtype=dtype, **options)
    optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(5, 1, dtype=dtype))], "weight_decay": 0.1}
    )
    problem.parameters += optimizer.param_groups[1]["params"]
    with NoWait():
        run(optimizer, problem, 4)
        optimizer.eval()
        optimizer.train()
        run(optimizer, problem, 1)


@pytest.mark.parametrize(
    "reading", [lambda t: t.item(), bool, float, int, lambda t: t.tolist(), lambda t: t.cpu()]
)
def test_the_check_can_fail(reading, forbidden):
    with pytest.raises(AssertionError, match="waits for the device"), NoWait():
        reading(torch.ones(()))


def test_dispatch_check_can_fail():
    with pytest.raises(AssertionError, match="waits for the device"), NoWait():
        torch.ones(3).nonzero()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step_on_a_device_whose_values_nobody_knows(options):
    """Tensors without values: reading one, to whatever end, is an error."""
    shapes = shapes_for(options, ((40, 12), (9,), ()))
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = ProdigyPlusScheduleFree(parameters, **options)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert all(value.device.type == "meta" for value in optimizer.metrics()[0].values())
