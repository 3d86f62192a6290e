"""Passes that torch.compile fuses, and steps that could be captured and replayed."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.engine import compiled
from prodigyplus.engine.kind import Kind
from prodigyplus.options import Options
from tests import option_table as table
from tests.single.problems import assert_same, pair, run, snapshot
from tests.watching import Watch

pytestmark = [
    pytest.mark.xdist_group("compile"),  # in one worker, which has what it has compiled
    # A warning from torch.compile's own imports.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

# Compiling takes seconds. All tests use these shapes, so that each reuses what another has compiled.
VECTORS = ((60,),) * 3
MATRICES = ((48, 33),) * 2  # 48 rows: a multiple of 16, as no other size here
SHAPES = (*MATRICES, *VECTORS, (50, 45), (), (12, 4, 3, 5))

# A step size large enough to move the weights by about their own size.
LARGE = {"d0": 1e-2}

STEPS = 20

COMPILED = [
    ({}, SHAPES),
    ({"weight_decay": 0.1}, VECTORS),
    pytest.param({"weight_decay": 0.1}, MATRICES, marks=pytest.mark.slow),  # half a minute
    ({"eps": None, "use_stableadamw": False}, VECTORS),
    ({"use_stableadamw": False}, VECTORS),
    ({"use_speed": True}, VECTORS),
    ({"prodigy_steps": 8}, VECTORS),
]


def graphs():
    """How many graphs have been compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def pairs(*shapes, dtype=torch.float32, **options):
    """The same problem twice: compiled, and not compiled."""
    return [pair(*shapes, dtype=dtype, compile=compiles, **options) for compiles in (True, False)]


def plain(state):
    """A snapshot without the option ``compile``."""
    for group in state[1]["param_groups"]:
        del group["compile"]
    return state


def assert_close(found, expected, tolerance):
    """Assert that two optimisers agree: tensors relative to their norms, numbers relative to themselves.

    A step rounds each element a handful of times, each time by at most 6e-8 of it. Over 20 steps that would
    come to some 1e-5 if all errors had one sign; since they have not, it stays below 1e-6.
    """
    (weights, state), (expected_weights, expected_state) = snapshot(found), snapshot(expected)
    tensors = [("weight", pair) for pair in zip(weights, expected_weights, strict=True)]
    assert state["state"].keys() == expected_state["state"].keys()
    for number, its in expected_state["state"].items():
        assert state["state"][number].keys() == its.keys()
        tensors += [(f"{number}.{key}", (state["state"][number][key], its[key])) for key in its]
    for name, (value, other) in tensors:
        assert value.dtype == other.dtype
        assert (value.double() - other.double()).norm() <= tolerance * other.double().norm(), name
    for group, other in zip(state["param_groups"], expected_state["param_groups"], strict=True):
        for name in ("d", "d_hat", "d_numerator", "d_denom", "effective_lr", "weight_sum"):
            assert group[name] == pytest.approx(other[name], rel=tolerance), name
        assert (group["k"], group["skipped"]) == (other["k"], other["skipped"])


# -------------------------------------------------------------------------- compiled, or not


@pytest.mark.parametrize(("options", "shapes"), COMPILED, ids=str)
def test_the_same_within_rounding(options, shapes):
    (problem, optimizer), (problem_eager, eager) = pairs(*shapes, **LARGE, **options)
    start = [p.detach().clone() for p in problem.parameters]
    before = graphs()
    run(optimizer, problem, STEPS)
    assert graphs() > before
    before = graphs()
    run(eager, problem_eager, STEPS)
    assert graphs() == before
    for p, weight in zip(problem_eager.parameters, start, strict=True):
        assert (p - weight).norm() > 0.1 * weight.norm()
    assert eager.metrics()[0]["d"] > 1e-2
    assert_close(optimizer, eager, 1e-6)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"bfloat16_z": True}], ids=str)
def test_bfloat16_is_rounded_by_the_same_noise(options):
    """With different noise, every second element would differ."""
    (problem, optimizer), (problem_eager, eager) = pairs(*MATRICES, **options, **LARGE)
    both = list(zip(problem.parameters, problem_eager.parameters, strict=True))
    for _ in range(5):
        run(optimizer, problem, 1)
        run(eager, problem_eager, 1)
        for p, q in both:
            key = "z" if "z" in eager.state[q] else "z_minus_y"
            for value, other in ((p, q), (optimizer.state[p][key], eager.state[q][key])):
                if value.dtype == torch.bfloat16:
                    # One last bit may decide how an element is rounded, once in tens of thousands.
                    assert (value != other).sum() <= value.numel() * 1e-3
                else:
                    assert (value - other).norm() <= 1e-6 * other.norm()
        assert_close(optimizer, eager, 1e-4)
        with torch.no_grad():  # compare single steps: both start each step from the same numbers
            for p, q in both:
                p.copy_(q)
                for key, value in eager.state[q].items():
                    optimizer.state[p][key].copy_(value)


def test_bfloat16_rounds_to_the_nearest_too():
    (problem, optimizer), (problem_eager, eager) = pairs(
        *VECTORS, dtype=torch.bfloat16, stochastic_rounding=False, **LARGE
    )
    for its, other in ((problem, optimizer), (problem_eager, eager)):
        run(other, its, 3)
    assert_close(optimizer, eager, 1e-4)


def is_compiled(options):
    return all(table.TABLE[name].is_compiled for name in options)


@pytest.mark.parametrize("options", table.alone(), ids=table.text_of)
def test_what_is_compiled(options):
    problem, optimizer = pair((40, 33), **options)
    run(optimizer, problem, 1)
    (p,) = problem.parameters
    kind = Kind.of(Options.of(optimizer.param_groups[0]), optimizer.state[p], p.numel())
    assert compiled.admits(kind) == is_compiled(options)


@pytest.mark.parametrize("options", [its for its in table.alone() if not is_compiled(its)], ids=table.text_of)
def test_what_is_not_compiled_is_the_same_to_the_bit(options):
    before = graphs()
    found, expected = pairs(*SHAPES, **options)
    for problem, optimizer in (found, expected):
        run(optimizer, problem, 8)
    assert graphs() == before
    assert_same(plain(snapshot(found[1])), plain(snapshot(expected[1])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("number", [1, 3, 6])
def test_a_bad_gradient_changes_nothing(number, bad):
    problem, optimizer = pair(*SHAPES, compile=True, **LARGE)
    for steps in (0, 4):
        run(optimizer, problem, steps)
        problem.backward()
        if not steps:  # first a step with gradients of zero, which creates the state
            for p in problem.parameters:
                p.grad.zero_()
            optimizer.step()
            problem.backward()
        before = snapshot(optimizer)
        grad = problem.parameters[number].grad
        grad[(-1,) * grad.ndim] = bad
        optimizer.step()
        weights, state = snapshot(optimizer)
        for name in ("skipped", "calls"):
            assert state["param_groups"][0].pop(name) == before[1]["param_groups"][0].pop(name) + 1
        assert_same((weights, state), before)
    run(optimizer, problem, 1)
    assert all(p.isfinite().all() for p in problem.parameters)


def test_a_compiled_run_goes_on_without():
    """A compiled run continues uncompiled, and the reverse; the states are saved in eval mode."""
    (problem, optimizer), (problem_eager, eager) = pairs(*MATRICES, *VECTORS, **LARGE)
    run(optimizer, problem, 6)
    run(eager, problem_eager, 6)
    saved = []
    for its in (optimizer, eager):
        its.eval()
        saved.append(copy.deepcopy(its.state_dict()))
        its.train()
    weights = [[p.detach().clone() for p in its.parameters] for its in (problem, problem_eager)]
    for its, other in ((optimizer, saved[1]), (eager, saved[0])):
        compiles = its.param_groups[0]["compile"]
        its.eval()
        its.load_state_dict(other)
        assert its.param_groups[0]["compile"] == compiles  # the run's own, not the state dict's
        its.train()
    with torch.no_grad():
        for its, other in ((problem, weights[1]), (problem_eager, weights[0])):
            for p, weight in zip(its.parameters, other, strict=True):
                p.copy_(weight)
    run(optimizer, problem, 6)
    run(eager, problem_eager, 6)
    assert_close(optimizer, eager, 1e-6)


def test_no_direction_is_written():
    """All that is copied are samples of the gradient and of z, each an eleventh of the parameter."""
    problem, optimizer = pair((608, 501), compile=True)
    run(optimizer, problem, 3)
    problem.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        optimizer.step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak = max(itertools.accumulate(sizes))
    assert 2 / 11 < peak / problem.parameters[0].nbytes < 0.25


# ------------------------------------------------------------------------ nothing is compiled again


@pytest.mark.filterwarnings(r"ignore:betas\[0\]")
def test_nothing_is_compiled_again():
    """No change between steps compiles anything again: numbers, members of stacks, storages, sizes."""
    problem, optimizer = pair(*SHAPES, compile=True, **LARGE)
    run(optimizer, problem, 1)
    problem.backward()
    problem.parameters[0].grad = None  # leaves a stack of one, which gets a graph of its own
    optimizer.step()
    with torch.compiler.set_stance("fail_on_recompile"):
        group = optimizer.param_groups[0]
        for step in range(4):
            group["lr"] = 1 / (step + 1)
            group["betas"] = (0.9 - 0.01 * step, 0.99 + 0.001 * step)
            run(optimizer, problem, 1)
        group["lr"] = torch.tensor(1.0)
        for _ in range(3):
            group["lr"].mul_(0.9)
            group["d_coef"] *= 0.9
            run(optimizer, problem, 1)
        # Stacks of two that start elsewhere or must be copied; then also a stack of one.
        for absent in ((2,), (3,), (0, 4)):
            problem.backward()
            for number in absent:
                problem.parameters[number].grad = None
            optimizer.step()
        optimizer.eval()
        optimizer.train()
        copied_problem, copied = copy.deepcopy((problem, optimizer))
        run(optimizer, problem, 2)
        run(copied, copied_problem, 2)
        assert optimizer.metrics()[0]["step"] == 14

        sizes = (*[(52, 37)] * 7, *[(90,)] * 11, (300, 200), (), (9, 3, 7, 2))
        other, its = pair(*sizes, compile=True, **LARGE)
        run(its, other, 3)


def test_nothing_is_compiled_again_after_loading():
    problem, optimizer = pair(*SHAPES, compile=True, **LARGE)
    run(optimizer, problem, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(optimizer, problem, 2)


def test_nothing_is_compiled_again_for_another_weight_decay():
    problem, optimizer = pair(*MATRICES, *VECTORS, compile=True, weight_decay=0.1, **LARGE)
    run(optimizer, problem, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(4):
            optimizer.param_groups[0]["weight_decay"] = 0.01 * (step + 1)
            run(optimizer, problem, 1)


def test_compiling_would_be_seen():
    problem, optimizer = pair(*VECTORS, compile=True, **LARGE)
    run(optimizer, problem, 1)
    problem, optimizer = pair((3, 3, 4, 5, 2), compile=True, **LARGE)
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="fail_on_recompile"),
    ):
        run(optimizer, problem, 1)


# -------------------------------------------------------------------------- in the backward pass


def fused_run(*, compiles, bad=None):
    """An optimiser after ten steps: two vectors move in the backward pass, then three as a stack."""
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(60)) for _ in range(5))
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True, compile=compiles, **LARGE)
    optimizer.fuse_backward(model)
    for step in range(10):
        target = torch.randn(60)
        sum((p - target).square().sum() for p in list(model)[:2]).backward()
        for number, p in enumerate(list(model)[2:], 2):
            p.grad = p.detach() - target
            if (number, step) == (bad, 5):
                p.grad[7] = float("nan")
        before = [p.detach().clone() for p in model]
        optimizer.step()
        moved = [not torch.equal(p, weight) for p, weight in zip(model, before, strict=True)]
        assert moved == [False] * 2 + [(number, step) != (bad, 5) for number in (2, 3, 4)]
    return optimizer


@pytest.mark.parametrize("bad", [None, 3])
def test_fused(bad):
    found, expected = (fused_run(compiles=compiles, bad=bad) for compiles in (True, False))
    assert found.metrics()[0]["skipped_steps"] == (bad is not None)
    assert_close(found, expected, 1e-6)


# ------------------------------------------------------------------------------------ capturable


@torch.no_grad()
def replay(calls):
    """Repeat calls of operators on the same memory, as a CUDA graph does.

    Each result is written where it was before. Tensor arguments are read anew; numbers are those of the
    recording.
    """
    for call in calls:
        memories = {tensor.untyped_storage().data_ptr() for tensor in call.tensors}
        again = call.func(*call.args, **call.kwargs)
        for old, new in zip(tree_leaves(call.result), tree_leaves(again), strict=True):
            # A view, or a tensor changed in place, is up to date already.
            if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in memories:
                old.copy_(new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "use_speed": "relative"}], ids=str)
def test_a_step_played_again_is_the_next_step(options, dtype):
    """Nothing in a step depends on a value on the host: not d, the step's number or what is finite."""
    shapes = (*SHAPES, (0, 3))
    (problem, optimizer), (again, replayed) = (pair(*shapes, dtype=dtype, **options) for _ in range(2))
    grads = [torch.empty_like(p) for p in again.parameters]

    def backward(bad=False):
        for its in (problem, again):
            its.backward()
            if bad:
                its.parameters[3].grad[5] = float("nan")
        for p, grad in zip(again.parameters, grads, strict=True):
            grad.copy_(p.grad)
            p.grad = grad

    for _ in range(3):
        backward()
        optimizer.step()
        replayed.step()
    backward()
    optimizer.step()
    with Watch() as watch:
        replayed.step()
    assert len(watch.calls) > 100
    assert_same(snapshot(replayed), snapshot(optimizer))
    for step in range(5):
        backward(bad=step == 2)
        optimizer.step()
        replay(watch.calls)
        for group in replayed.param_groups:  # the one count that is kept on the host
            group["calls"] += 1
        assert_same(snapshot(replayed), snapshot(optimizer))
    metrics = optimizer.metrics()[0]
    assert (metrics["step"], metrics["skipped_steps"]) == (8, 1)
    assert metrics["d"] > 1e-6
    assert_same(replayed.metrics(), optimizer.metrics())


def test_what_the_host_knows_is_seen():
    """Check of ``replay``: a number that the host had read is replayed with its old value."""
    number, result = torch.ones(()), torch.zeros(())
    with Watch() as watch:
        result.copy_(number * number.item())
    number.fill_(3)
    replay(watch.calls)
    assert result == 3
