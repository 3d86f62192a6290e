"""What a step on a GPU may cost: no waiting, few launches, no memory that stays allocated."""

import contextlib

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests import option_table
from tests.cuda.feeding import ADMITTED, GPU, OTHERS, begun, trained
from tests.single.problems import run

# The most launches, of kernels and operators, in a step with 148 matrices and vectors.
LAUNCHES = 25

OURS = {"squares", "add_parts", "add_up", "factors", "sweep", "begin", "end"}


@contextlib.contextmanager
def never_waiting():
    """A context in which it is an error if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take_steps(options, steps, **how):
    """Make steps that must not wait, after some that may."""
    problem, optimizer = begun(options, **how)
    run(optimizer, problem, 3)
    gradients = []
    for _ in range(steps):
        problem.backward()
        gradients.append([p.grad for p in problem.parameters])
    with never_waiting():
        for of_step in gradients:
            for p, grad in zip(problem.parameters, of_step, strict=True):
                p.grad = grad
            optimizer.step()
        optimizer.eval()
        optimizer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ADMITTED + OTHERS[:6], ids=option_table.text_of)
def test_a_step_waits_for_nothing(options, dtype):
    take_steps(options, 4, dtype=dtype)


def test_a_look_at_the_numbers_waits_for_nothing():
    """The monitor sends the groups' numbers to the host every 50 steps."""
    take_steps({}, 110, shapes=((33, 70), (70,)))


def test_the_check_can_fail():
    with pytest.raises(RuntimeError, match="synchroniz"), never_waiting():
        torch.ones((), device=GPU).item()


def launched(shapes):
    """The names of the kernels that a step launches."""
    problem, optimizer = trained({}, 3, shapes=shapes, moves=False)
    problem.backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watch:
        optimizer.step()
        torch.cuda.synchronize()
    names = [event.name for event in watch.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


def test_launches_of_a_step():
    few, many = (launched(((64, 48), (32,)) * count) for count in (2, 74))
    assert set(many) >= OURS
    assert len(many) <= LAUNCHES
    assert len(many) == len(few)


@pytest.mark.parametrize(
    "options", [{}, {"bfloat16_z": True}, {"use_cautious": True}, {"use_muon_pp": True}], ids=str
)
def test_memory_stays(options):
    problem, optimizer = begun(options)
    allocated = []
    for step in range(1, 201):
        problem.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 60:  # the numbers have been sent to the host once, which keeps a little memory
            torch.cuda.reset_peak_memory_stats()
        if step in (60, 65, 200):
            allocated.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
    (first, _), (_, peak), last = allocated
    assert first > 0
    assert last == (first, peak)
