"""Steps as in a CUDA graph: what a step launches is recorded, and run again without the host.

No GPU is needed: these tests record the operators and kernels that a step launches and run them again.
Anything that a step does on the host is then missing, just as in a graph.
"""

import contextlib
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.device import jit
from prodigyplus.device.jit import interprets
from prodigyplus.terms import device_constants

pytest.importorskip("triton")
if interprets():
    import tests.interpreting  # noqa: F401

SHAPES = ((6, 5), (7,), (6, 5), ())


class Recorder(TorchDispatchMode):
    """Records operators and launches of kernels, and runs them again on the same memory."""

    def __init__(self):
        super().__init__()
        self._calls = []
        self._launches = False  # whether a kernel runs, whose interpreter calls operators of its own

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self._launches:
            return result
        self._calls.append(
            (function, args, kwargs, [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
        )
        return result

    def launch(self, real):
        def launch(kernel, grid, *arguments, **constants):
            self._launches = True
            real(kernel, grid, *arguments, **constants)
            self._launches = False
            self._calls.append((real, (kernel, grid, *arguments), constants, []))

        return launch

    @contextlib.contextmanager
    def recording(self):
        with mock.patch.object(jit, "launch", self.launch(jit.launch)), self:
            yield

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, results in self._calls:
                again = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
                for result, value in zip(results, again, strict=True):
                    if result.data_ptr() != value.data_ptr():  # neither a view nor changed in place
                        result.copy_(value)


def drawn(step, index, shape):
    numel = torch.Size(shape).numel()
    return ((torch.arange(numel) * 7 + step * 5 + index) % 11 - 5).float().reshape(shape) / 8


def trained(options, steps, *, replays):
    parameters = [torch.nn.Parameter(drawn(0, 50 + index, shape)) for index, shape in enumerate(SHAPES)]
    lr = torch.tensor(1.0)
    optimizer = ProdigyPlusScheduleFree(parameters, **{"d0": 1e-3, "lr": lr, **options})
    recorder = Recorder()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for step in range(steps):
        for index, p in enumerate(parameters):
            p.grad.copy_(drawn(step, index, p.shape))
        lr.fill_(1.0 - 0.1 * step)
        if not replays or step < 2:
            optimizer.step()
        elif step == 2:
            with recorder.recording():
                optimizer.step()
        else:
            recorder.replay()
    return parameters, optimizer


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True, "use_speed": "relative", "weight_decay": 0.1, "use_bias_correction": True},
        {"fused": True, "factored": False, "bfloat16_z": True, "use_schedulefree": False},
        {"fused": False},
        {"fused": False, "use_cautious": True, "warmup_steps": 4},
    ],
    ids=str,
)
def test_replayed_as_stepped(options):
    found, optimizer = trained(options, 6, replays=True)
    expected, reference = trained(options, 6, replays=False)
    for p, q in zip(found, expected, strict=True):
        assert torch.equal(p, q)
        for key, value in reference.state[q].items():
            assert torch.equal(optimizer.state[p][key], value), key
    for key in ("d", "k", "effective_lr"):
        assert torch.equal(optimizer.param_groups[0][key], reference.param_groups[0][key]), key


def captured(monkeypatch, value):
    monkeypatch.setattr(device_constants, "is_captured", lambda device: value)


def test_nothing_is_made_while_a_graph_is_captured(monkeypatch):
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones_like(p)
    optimizer = ProdigyPlusScheduleFree([p], fused=True)
    captured(monkeypatch, value=True)
    with pytest.raises(RuntimeError, match="before the capture, make at least one step"):
        optimizer.step()
    captured(monkeypatch, value=False)
    optimizer.step()
    captured(monkeypatch, value=True)
    optimizer.step()


def test_what_is_sent_to_a_gpu_is_pinned(monkeypatch):
    """Otherwise the copy would block the host. A table that has not changed is not sent again."""
    captured(monkeypatch, value=False)
    table = mock.Mock()
    sent = device_constants.SentTable(torch.device("cuda", 0))
    for _ in range(2):
        assert sent.of("key", lambda: table) is table.pin_memory().to.return_value
    table.pin_memory().to.assert_called_once_with(torch.device("cuda", 0), non_blocking=True)


def test_what_a_graph_sends_is_sent_again_by_the_next_step(monkeypatch):
    """A copy that is captured runs only when the graph is replayed, so the next step must send again.

    The tables that a graph reads are kept alive.
    """
    table = device_constants.SentTable(torch.device("cpu"))
    first = table.of(1, lambda: torch.ones(1))
    captured(monkeypatch, value=True)
    assert table.of(1, lambda: torch.zeros(1)) is first
    in_graph = table.of(2, lambda: torch.zeros(1))
    assert {id(sent) for _, sent in table._in_graphs} == {id(first), id(in_graph)}
    captured(monkeypatch, value=False)
    assert table.of(2, lambda: torch.full((1,), 2.0)).item() == 2
