"""A step is isolated from its caller's modes: autocast, inference mode, default device, compilation."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.formulas import muon
from prodigyplus.terms.layout import Layout
from tests import option_table as table
from tests.single.problems import Fed, assert_same, pair, run, snapshot

OPTIONS = [{}, *table.packed(table.alone() + table.together(), most=10)]

MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "no such device": lambda: torch.device("cuda:9999999"),
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def act(options, mode):
    """Call everything that an optimiser does within a mode; return what results."""
    problem, optimizer = pair((40, 33), (16, 8), **options)
    model = nn.ParameterList(problem.parameters)
    for _ in range(4):
        problem.backward()
        with mode():
            optimizer.step()
    with mode():
        optimizer.eval()
        optimizer.train()
        with optimizer.averaged_parameters():
            pass
        average = optimizer.averaged_state_dict(model)
        metrics = optimizer.scalars()
        optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, problem, 2)
    with mode():
        other = ProdigyPlusScheduleFree(problem.parameters, **options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(other, problem, 2)
    return snapshot(other), average, metrics


@functools.cache
def without_modes(number):
    return act(OPTIONS[number], nullcontext)


@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_a_run_has_the_same_bits_in_any_mode(options, mode):
    assert_same(act(options, mode), without_modes(OPTIONS.index(options)))


def test_a_closure_keeps_its_modes():
    seen = []

    def closure():
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        problem.backward()
        return 1.0

    problem, optimizer = pair((4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert optimizer.step(closure) == 1.0
    assert seen == [(True, True)]


def test_a_default_dtype():
    before = torch.get_default_dtype()
    expected = act({}, nullcontext)
    try:
        torch.set_default_dtype(torch.float64)
        problem = Fed((40, 33), (16, 8))
        assert problem.parameters[0].dtype == torch.float32
        found = act({}, nullcontext)
    finally:
        torch.set_default_dtype(before)
    assert_same([value.dtype for value in found[0][0]], [value.dtype for value in expected[0][0]])
    for key, state in expected[0][1]["state"].items():
        assert {name: value.dtype for name, value in found[0][1]["state"][key].items()} == {
            name: value.dtype for name, value in state.items()
        }


def test_newton_schulz_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert muon.newton_schulz(torch.eye(8).unsqueeze(0)).dtype == torch.float32


def test_positions_are_on_the_host():
    with torch.device("meta"):
        assert Layout((4, 8)).positions().device.type == "cpu"


@pytest.mark.parametrize("whole", [False, True])
def test_what_compiles_a_step_leaves_it_as_it_is(whole):
    """torch.compile of ``step`` itself, or of a function that calls it."""

    def act(compiles):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3))
        optimizer = ProdigyPlusScheduleFree(model.parameters())
        data = torch.randn(16, 12)

        def train_step():
            optimizer.zero_grad()
            model(data).square().mean().backward()
            if whole:
                optimizer.step()

        step = optimizer.step
        if compiles:
            train_step, step = (torch.compile(f, backend="eager") for f in (train_step, step))
        for _ in range(5):
            train_step()
            if not whole:
                step()
        return snapshot(optimizer)

    assert_same(act(compiles=True), act(compiles=False))
