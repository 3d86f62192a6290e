"""What cannot be right is refused, in words that name it and say what to do."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.options import NAMES
from tests.single.problems import assert_same, pair, run, snapshot

NUMBERS = (math.nan, math.inf, "1", None, True)

BAD = {
    "lr": (-1.0, *NUMBERS, torch.ones(2)),
    "betas": ((0.9,), (0.9, 1.0), (-0.1, 0.9), 0.9, (0.9, None), (0.0, 0.9), None),
    "beta3": (1.0, -0.1, math.nan, "x", True),
    "beta4": (1.0, -0.1, math.nan),
    "weight_decay": (-0.1, *NUMBERS),
    "d0": (0.0, -1e-6, *NUMBERS),
    "d_coef": (0.0, *NUMBERS),
    "prodigy_steps": (-1, 2.5, True),
    "eps": (0.0, -1e-8, math.nan, True),
    "schedulefree_c": (-1.0, *NUMBERS),
    "slice_p": (0, -11, 2.0, True, None),
    "use_speed": ("fast", None, 2),
    **{
        name: (None, 1, "yes")
        for name in NAMES
        if name.startswith(("use_", "split", "factored", "fused", "muon"))
        or name in ("weight_decay_by_lr", "d_limiter", "stochastic_rounding", "bfloat16_z", "compile")
        if name != "use_speed"
    },
}


def parameters():
    return [nn.Parameter(torch.ones(3))]


def test_every_option_is_listed():
    assert set(BAD) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=name) as error:
        ProdigyPlusScheduleFree(parameters(), **{name: value})
    assert repr(value) in str(error.value)
    with pytest.raises(ValueError, match=name):
        ProdigyPlusScheduleFree([{"params": parameters(), name: value}])


@pytest.mark.parametrize("shape", [(), (5,)])
@pytest.mark.parametrize("named", [True, False])
def test_what_is_no_matrix_cannot_take_muon(shape, named):
    def group(shape):
        p = nn.Parameter(torch.zeros(shape))
        return [(str(shape), p)] if named else [p]

    optimizer = ProdigyPlusScheduleFree(group((3, 4)))
    name = re.escape(repr(str(shape)) if named else "1 of param_groups[1]")
    with pytest.raises(
        ValueError, match=rf"parameter {name} is of shape {re.escape(str(shape))}.*muon_groups"
    ):
        optimizer.add_param_group({"params": [*group((5, 6)), *group(shape)], "use_muon_pp": True})
    assert len(optimizer.param_groups) == 1


def test_unknown_options():
    with pytest.raises(TypeError, match="momentum"):
        ProdigyPlusScheduleFree(parameters(), momentum=0.9)
    with pytest.raises(ValueError, match=r"'weight_decays'.*'weight_decay'"):
        ProdigyPlusScheduleFree([{"params": parameters(), "weight_decays": 0.1}])
    ProdigyPlusScheduleFree([{"params": parameters(), "name": "head", "initial_lr": 1.0, "lr_scale": 0.5}])


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float16, torch.float8_e4m3fn])
def test_parameters_of_other_dtypes(dtype):
    bad = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    ProdigyPlusScheduleFree([*parameters(), bad])  # frozen, it may be of any
    if not (dtype.is_floating_point or dtype.is_complex):
        return
    bad.requires_grad_()
    with pytest.raises(ValueError, match=rf"parameter 1 of param_groups\[0\] is {dtype}"):
        ProdigyPlusScheduleFree([*parameters(), bad])
    with pytest.raises(ValueError, match=rf"parameter 'bad' is {dtype}"):
        ProdigyPlusScheduleFree([("good", parameters()[0]), ("bad", bad)])
    optimizer = ProdigyPlusScheduleFree(parameters())
    with pytest.raises(ValueError, match="float32"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"use_schedulefree": False}),
        ({"use_schedulefree": False}, {"use_schedulefree": True}),
        ({}, {"use_focus": True}),
        ({"use_focus": True, "factored": False}, {"use_focus": False}),
        ({}, {"use_speed": "relative"}),
        ({"use_speed": "relative"}, {"use_speed": True}),
        ({}, {"slice_p": 5}),
        ({}, {"factored": False}),
        ({}, {"factored_fp32": False}),
    ],
)
def test_options_that_hold_from_the_first_step_on(before, after):
    problem, optimizer = pair((40, 12), (9,), **before)
    run(optimizer, problem, 3)
    optimizer.param_groups[0].update(after)
    weights = [p.detach().clone() for p in problem.parameters]
    ((name, value),) = after.items()
    with pytest.raises(RuntimeError, match=f"{name}={value!r}.*build another optimiser"):
        run(optimizer, problem, 1)
    assert_same([p.detach() for p in problem.parameters], weights)


def test_options_that_may_change_between_steps():
    problem, optimizer = pair((40, 12), (9,))
    (group,) = optimizer.param_groups
    for options in (
        {"use_speed": True}, {"use_cautious": True}, {"use_grams": True},
        {"use_orthograd": True}, {"use_adopt": True}, {"use_bias_correction": True}, {"eps": None},
    ):  # fmt: skip
        group.update(options)
        run(optimizer, problem, 3)
    assert int(optimizer.metrics()[0]["step"]) == 21


def test_sparse_gradients():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = ProdigyPlusScheduleFree(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 of param_groups\[0\].*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "named", "left"),
    [
        ({"eps": None}, ("eps=None", "use_stableadamw"), {"eps": None, "use_stableadamw": False}),
        (
            {"use_cautious": True, "use_grams": True},
            ("use_cautious", "use_grams"),
            {"use_cautious": True, "use_grams": False},
        ),
        ({"use_focus": True}, ("use_focus", "factored"), {"use_focus": True, "factored": False}),
        (
            {"use_focus": True, "factored": False, "eps": None, "use_stableadamw": False},
            ("use_focus", "eps=None"),
            {"use_focus": True, "use_stableadamw": False, "eps": 1e-8},
        ),
    ],
)
def test_exclusions_are_said_once(options, named, left):
    groups = [{"params": parameters()} for _ in range(3)]
    with pytest.warns(UserWarning, match="excludes") as caught:
        optimizer = ProdigyPlusScheduleFree(groups, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(name in str(caught[0].message) for name in named)
    for group in optimizer.param_groups:
        assert {name: group[name] for name in left} == left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProdigyPlusScheduleFree(parameters(), **{**options, **left})


def test_exclusions_of_one_group_alone():
    with pytest.warns(UserWarning, match="use_grams"):
        optimizer = ProdigyPlusScheduleFree(
            [{"params": parameters(), "use_cautious": True}, {"params": parameters()}], use_grams=True
        )
    assert [group["use_grams"] for group in optimizer.param_groups] == [False, True]


def test_a_correction_that_would_never_end():
    with pytest.raises(ValueError, match=r"betas=\(0\.9, 0\.5\).*use_bias_correction.*0\.6"):
        ProdigyPlusScheduleFree(parameters(), betas=(0.9, 0.5), use_bias_correction=True)


def state_after_a_step(*shapes, **options):
    problem, optimizer = pair(*shapes, **options)
    run(optimizer, problem, 1)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (lambda: state_after_a_step((40, 12)), r"param_groups\[0\].*1 parameters.*2"),
        (lambda: state_after_a_step((40, 12), (8,)), r"parameter 1 of param_groups\[0\].*\(8,\).*\(9,\)"),
        (lambda: state_after_a_step((12, 40), (9,)), r"parameter 0 of param_groups\[0\].*\(40, 12\)"),
        (lambda: {"state": {}, "param_groups": [{}, {}]}, "2 parameter groups, the optimiser 1"),
        (
            lambda: torch.optim.Adam(pair((40, 12), (9,))[0].parameters).state_dict(),
            "not of this optimiser",
        ),
        (lambda: {"param_groups": []}, "'state'"),
    ],
)
def test_state_dicts_of_something_else(saved, message):
    problem, optimizer = pair((40, 12), (9,))
    run(optimizer, problem, 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved())
    assert_same(snapshot(optimizer), before)
    run(optimizer, problem, 1)


def test_a_state_of_another_kind():
    _, optimizer = pair((40, 12), (9,))
    saved = state_after_a_step((40, 12), (9,), factored=False)
    saved["param_groups"][0]["factored"] = True
    with pytest.raises(ValueError, match=r"parameter 0.*exp_avg_sq"):
        optimizer.load_state_dict(saved)


def test_a_state_dict_with_an_option_out_of_range():
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, 3)
    before = snapshot(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["d_coef"] = -1.0
    with pytest.raises(ValueError, match=r"d_coef=-1\.0"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)
