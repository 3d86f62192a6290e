"""A step never asks the device for a value."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from tests import option_table as table
from tests.single.problems import pair, run, shapes_for
from tests.watching import Watch

# An lr in a tensor on the CPU may be read.
ALONE = [options for options in table.alone() if not isinstance(options.get("lr"), torch.Tensor)]
OPTIONS = [{}, *table.packed(ALONE + table.together(), most=10)]


@pytest.fixture
def forbidden(monkeypatch):
    def fail(name):
        def method(*_args, **_kwargs):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return method

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, fail(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_step(options, dtype, forbidden):
    problem, optimizer = pair((40, 12), (9,), (3, 3), dtype=dtype, **options)
    optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(5, 1, dtype=dtype))], "weight_decay": 0.1}
    )
    problem.parameters += optimizer.param_groups[1]["params"]
    with Watch(reads=False):
        run(optimizer, problem, 4)
        optimizer.eval()
        optimizer.train()
        run(optimizer, problem, 1)


@pytest.mark.parametrize(
    "reading", [lambda t: t.item(), bool, float, int, lambda t: t.tolist(), lambda t: t.cpu()]
)
def test_the_check_can_fail(reading, forbidden):
    with pytest.raises(AssertionError, match="waits for the device"), Watch(reads=False):
        reading(torch.ones(()))


def test_dispatch_check_can_fail():
    with pytest.raises(AssertionError, match="waits for the device"), Watch(reads=False):
        torch.ones(3).nonzero()


@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_step_on_a_device_whose_values_nobody_knows(options):
    """Meta tensors have no values, so that any attempt to read one is an error."""
    shapes = shapes_for(options, ((40, 12), (9,), ()))
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = ProdigyPlusScheduleFree(parameters, **options)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert all(value.device.type == "meta" for value in optimizer.metrics()[0].values())
