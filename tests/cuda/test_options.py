"""Every option on a GPU against the CPU, with kernels and without, for given gradients."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from tests import option_table
from tests.cuda.feeding import (
    ADMITTED,
    CPU,
    GPU,
    OTHERS,
    SHAPES,
    assert_near,
    assert_same,
    begun,
    trained,
)
from tests.single.problems import run
from tests.single.test_kernels import used_kernels

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ADMITTED + OTHERS, ids=option_table.text_of)
def test_as_on_the_cpu(options, dtype, monkeypatch):
    batches = used_kernels(monkeypatch)
    found = trained(options, dtype=dtype)
    assert set(batches) == ({len(SHAPES)} if options in ADMITTED else set())
    expected = trained({**options, "fused": False}, dtype=dtype, device=CPU)
    assert_near(found, expected)
    for p, start in zip(found[0].parameters, begun(options, dtype=dtype)[0].parameters, strict=True):
        if p.numel() > 1:  # a single bfloat16 element may be rounded back in every step
            assert not torch.equal(p, start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ADMITTED[:4], ids=option_table.text_of)
def test_fused_or_not(options, dtype):
    by_default = trained(options, dtype=dtype)
    assert_same(trained({**options, "fused": True}, dtype=dtype), by_default)
    assert_near(trained({**options, "fused": False}, dtype=dtype), by_default)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # from torch.compile's imports
def test_passes_that_are_compiled():
    found = trained({"compile": True, "fused": False})
    assert_near(found, trained({"fused": False}, device=CPU))


@pytest.mark.parametrize(
    ("p", "options", "reason"),
    [
        (torch.ones(3), {}, "the kernels run on GPUs, not on cpu"),
        (torch.ones(3, dtype=torch.float64), {}, "the kernels move"),
        *((torch.ones(3, 3), options, "the kernels have no") for options in OTHERS),
    ],
    ids=lambda value: option_table.text_of(value) if isinstance(value, dict) else "",
)
def test_what_is_not_for_kernels_is_refused(p, options, reason):
    p = p if "on cpu" in reason else p.to(GPU)
    with pytest.raises(ValueError, match=f"fused=True.*{reason}"):
        ProdigyPlusScheduleFree([torch.nn.Parameter(p)], **options, fused=True)


@pytest.mark.parametrize("options", [{}, {"factored": False}, {"use_schedulefree": False}], ids=str)
def test_bfloat16_is_rounded_by_the_noise_of_the_cpu(options):
    """With different noise, every second element would differ."""
    shapes = ((64, 48), (33, 70))
    found, expected = (
        trained(options, 1, shapes=shapes, dtype=torch.bfloat16, device=device) for device in (GPU, CPU)
    )
    for p, q in zip(found[0].parameters, expected[0].parameters, strict=True):
        # One last bit may decide how an element is rounded, once in tens of thousands.
        assert (p.cpu() != q).sum() <= 1e-3 * q.numel()


@pytest.mark.parametrize("options", [{}, {"bfloat16_z": True}, {"use_grams": True}], ids=str)
def test_wherever_gradients_lie(options):
    """At the same address in each step, at others, at no multiple of 16 bytes, and column by column."""
    expected = trained(options, moves=False)
    assert_same(trained(options), expected)
    # Below, threads read other elements, so sums differ in last bits.
    problem, optimizer = begun(options)
    for step in range(expected[1].param_groups[0]["calls"]):
        problem.backward()
        for p in problem.parameters:
            if step % 2 and p.ndim == 2:
                p.grad = p.grad.t().contiguous().t()
            else:
                memory = torch.empty(p.numel() + 1, device=p.device)
                p.grad = memory[1:].view(p.shape).copy_(p.grad)
        optimizer.step()
    assert_near((problem, optimizer), expected)


def test_gradients_that_come_and_go():
    """Gradients' memory is freed between steps and given to others, so the next ones lie elsewhere."""
    problem, optimizer = begun({})
    other = []
    for step in range(8):
        problem.backward()
        if step == 3:
            problem.parameters[2].grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        other.append(torch.full((64 * 48,), torch.nan, device=GPU))
    expected, reference = begun({"fused": False}, device=CPU)
    for step in range(8):
        expected.backward()
        if step == 3:
            expected.parameters[2].grad = None
        reference.step()
    assert_near((problem, optimizer), (expected, reference))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("options", [{}, {"use_grams": True}], ids=str)
def test_on_a_gpu_that_is_not_the_current_one(options):
    assert torch.cuda.current_device() == 0
    assert_same(trained(options, device=torch.device("cuda", 1)), trained(options))


def test_a_nan_is_skipped():
    problem, optimizer = trained({}, 3)
    before = [p.detach().clone() for p in problem.parameters]
    problem.backward()
    problem.parameters[1].grad[3] = torch.nan
    optimizer.step()
    assert all(map(torch.equal, problem.parameters, before))
    assert optimizer.metrics()[0]["skipped_steps"] == 1
    run(optimizer, problem, 1)
    assert not any(map(torch.equal, problem.parameters, before))
