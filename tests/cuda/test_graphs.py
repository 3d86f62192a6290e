"""Steps that are captured in a CUDA graph, or called from a compiled function."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from tests import option_table
from tests.cuda.feeding import D0, GPU, assert_near, assert_same, begun
from tests.models import Tiny, Walks, loss_of
from tests.single.problems import run

WARM_UP, REPLAYS = 3, 6

OPTIONS = [
    {},
    {"weight_decay": 0.1, "use_speed": "relative"},
    {"bfloat16_z": True},
    {"use_schedulefree": False, "factored": False},
    {"fused": False},
    {"use_cautious": True},
]


def captured(function):
    """Call ``function`` a few times, then capture it, as torch's notes prescribe; return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=option_table.text_of)
def test_a_captured_step(options, dtype):
    """Replays take new gradients at the old addresses; an eager step may follow them."""
    (problem, optimizer), (again, replayed) = (begun(options, dtype=dtype, moves=False) for _ in range(2))
    for its in (problem, again):
        its.backward()
    for _ in range(WARM_UP):
        optimizer.step()
    replay = captured(replayed.step)
    assert_same((again, replayed), (problem, optimizer))
    for step in range(REPLAYS):
        for its in (problem, again):
            its.backward()
            if step == 2:
                its.parameters[1].grad[5] = torch.nan
        optimizer.step()
        replay()
        assert_same((again, replayed), (problem, optimizer))
    assert replayed.metrics()[0]["skipped_steps"] == 1
    for its, steps in ((problem, optimizer), (again, replayed)):
        run(steps, its, 2)
    assert_same((again, replayed), (problem, optimizer))


class Trained:
    """A model, its optimiser, and a train step on walks that stay at one address."""

    def __init__(self, *, set_to_none, **options):
        torch.manual_seed(0)
        self.model = Tiny().to(GPU)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = ProdigyPlusScheduleFree(self.parameters, **{"d0": D0, **options})
        self._walks, self._set_to_none = Walks(), set_to_none
        self.batch = self._walks.next().to(GPU)

    def next(self):
        self.batch.copy_(self._walks.next())

    def step(self):
        self.optimizer.zero_grad(set_to_none=self._set_to_none)
        loss_of(self.model, self.batch).backward()
        self.optimizer.step()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_captured_train_step(set_to_none):
    """With ``set_to_none``, gradients are in the graph's own memory, which the step sees during capture."""
    eager, again = (Trained(set_to_none=set_to_none) for _ in range(2))
    for _ in range(WARM_UP):
        eager.step()
    replay = captured(again.step)
    for _ in range(REPLAYS):
        for its in (eager, again):
            its.next()
        eager.step()
        replay()
    for its in (eager, again):
        its.next()
        its.step()
    assert_near((again, again.optimizer), (eager, eager.optimizer))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # from torch.compile's imports
@pytest.mark.parametrize("options", [{}, {"use_cautious": True}], ids=str)
def test_a_compiled_train_step(options):
    """The model is compiled, the optimiser's step is not; the model's results differ in last bits."""
    eager, again = (Trained(set_to_none=True, **options) for _ in range(2))
    step = torch.compile(again.step)
    for _ in range(REPLAYS):
        for its in (eager, again):
            its.next()
        eager.step()
        step()
    assert again.optimizer.metrics()[0]["step"] == REPLAYS
    for p, q in zip(again.parameters, eager.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
