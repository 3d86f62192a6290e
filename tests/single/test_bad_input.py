"""Bad input is refused with a message that names it and says what to do."""

import copy
import math
import re
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree, options
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests import option_table as table
from tests.single.problems import Fed, assert_same, pair, run, snapshot

BAD = {name: row.bad for name, row in table.TABLE.items()}


def parameters():
    return [nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=name) as error:
        ProdigyPlusScheduleFree(parameters(), **{name: value})
    assert repr(value) in str(error.value)
    with pytest.raises(ValueError, match=name):
        ProdigyPlusScheduleFree([{"params": parameters(), name: value}])


@pytest.mark.parametrize("value", [-1, 1e6, "64M", None, True])
def test_bucket_bytes(value):
    with pytest.raises(ValueError, match=re.escape(f"bucket_bytes={value!r}: must be")):
        ShardedProdigyPlusScheduleFree(parameters(), bucket_bytes=value)


def test_names_in_the_place_of_a_prefix():
    optimizer = ProdigyPlusScheduleFree(parameters())
    with pytest.raises(TypeError, match=r"prefix=\['d'\] is no string.*names="):
        optimizer.scalars(["d"])


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
    ProdigyPlusScheduleFree([*parameters(), bad])  # while frozen, it may have any dtype
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


def test_a_model_that_becomes_float16_in_mid_run():
    layer = nn.Linear(3, 2)
    optimizer = ProdigyPlusScheduleFree(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    layer.half()  # the gradients too
    with pytest.raises(ValueError, match=r"parameter 0 of param_groups\[0\] is torch.float16; the optimiser"):
        optimizer.step()


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
    for changes in (
        {"use_speed": True}, {"use_cautious": True}, {"use_grams": True},
        {"use_orthograd": True}, {"use_adopt": True}, {"use_bias_correction": True}, {"eps": None},
    ):  # fmt: skip
        group.update(changes)
        run(optimizer, problem, 3)
    assert int(optimizer.metrics()[0]["step"]) == 21


def test_sparse_gradients():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = ProdigyPlusScheduleFree(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 of param_groups\[0\].*sparse=False"):
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch lets none in")
@pytest.mark.parametrize(
    ("weight", "grad"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.complex64),
    ],
)
def test_gradients_of_other_dtypes(weight, grad):
    """State takes the gradient's dtype: float16 would underflow, and a wider one would fit no later step."""
    p = nn.Parameter(torch.ones(4, dtype=weight))
    optimizer = ProdigyPlusScheduleFree([p])
    p.grad_dtype = None
    p.grad = torch.ones(4, dtype=grad)
    with pytest.raises(RuntimeError, match=f"parameter 0 .* is {weight}, but its gradient {grad}"):
        optimizer.step()
    p.grad = torch.ones(4, dtype=weight)
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].dtype == weight


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


# The first bad value of each option, but all bad values of lr.
LATER = {name: values if name == "lr" else values[:1] for name, values in BAD.items()}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in LATER.items() for value in values]
)
def test_options_out_of_range_that_were_set_later(name, value):
    problem, optimizer = pair((40, 12), (9,))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    run(optimizer, problem, 3)
    before = snapshot(optimizer)
    for index in (0, 1):
        good = optimizer.param_groups[index][name]
        optimizer.param_groups[index][name] = value
        with pytest.raises(ValueError, match=name):
            run(optimizer, problem, 1)
        optimizer.param_groups[index][name] = good
    assert_same(snapshot(optimizer), before)
    run(optimizer, problem, 1)


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_a_tensor_lr_whose_value_turns_bad(value):
    lr = torch.tensor(1.0)
    problem = Fed((4, 4))
    optimizer = ProdigyPlusScheduleFree(problem.parameters, lr=lr)
    run(optimizer, problem, 3)
    lr.fill_(value)
    with pytest.raises(ValueError, match="lr=tensor"):
        run(optimizer, problem, 1)
    with pytest.raises(ValueError, match="lr=tensor"):
        ProdigyPlusScheduleFree(problem.parameters, lr=lr)


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_a_tensor_lr_that_the_host_does_not_know(value, monkeypatch):
    """As on a GPU, nothing can be raised; instead the step changes nothing and counts as skipped."""
    monkeypatch.setattr(options, "_is_on_host", lambda lr: False)
    lr = torch.tensor(1.0)
    problem = Fed((4, 4), (5,))
    optimizer = ProdigyPlusScheduleFree(
        [{"params": problem.parameters[:1], "lr": lr}, {"params": problem.parameters[1:]}]
    )
    run(optimizer, problem, 3)
    weights, state = snapshot(optimizer)
    lr.fill_(value)
    run(optimizer, problem, 2)
    after, state_after = snapshot(optimizer)
    assert_same(after[0], weights[0])
    assert_same(state_after["state"][0], state["state"][0])
    assert [int(group["skipped_steps"]) for group in optimizer.metrics()] == [2, 0]
    lr.fill_(1.0)
    run(optimizer, problem, 2)
    assert all(p.isfinite().all() for p in problem.parameters)


class Pair(Sequence):
    """A sequence that is neither a list nor a tuple, like OmegaConf's lists."""

    def __getitem__(self, index):
        return (0.8, 0.95)[index]

    def __len__(self):
        return 2


@pytest.mark.parametrize("later", [False, True])
def test_options_of_other_types(later):
    """Values of numpy's types, or from configuration files, act as the plain Python values do."""
    found = {
        "betas": Pair(),
        "lr": np.float32(0.5),
        "d0": np.float64(1e-3),
        "weight_decay": np.float32(0.125),
        "slice_p": np.int64(3),
        "prodigy_steps": np.int32(7),
        "use_cautious": np.bool_(True),
        "d_coef": 2,
    }
    plain = {"betas": (0.8, 0.95), "lr": 0.5, "d0": 1e-3, "weight_decay": 0.125, "slice_p": 3}
    plain |= {"prodigy_steps": 7, "use_cautious": True, "d_coef": 2.0}

    def act(values):
        problem, optimizer = pair((40, 12), (9,), **({} if later else values))
        if later:
            values = {name: value for name, value in values.items() if name not in ("slice_p", "d0")}
            optimizer.param_groups[0].update(values)
        run(optimizer, problem, 9)
        return snapshot(optimizer)

    (weights, state), (expected_weights, expected) = act(found), act(plain)
    assert_same(weights, expected_weights)
    assert_same(state["state"], expected["state"])
    if not later:
        assert_same(state, expected)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_lr_as_a_tensor_of_one_element(shape):
    def act(lr):
        problem = Fed((40, 12), (9,))
        optimizer = ProdigyPlusScheduleFree(
            [{"params": problem.parameters[:1], "lr": lr}, {"params": problem.parameters[1:], "lr": 2.0}]
        )
        run(optimizer, problem, 3)
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.25)  # as schedulers do
        else:
            optimizer.param_groups[0]["lr"] = 0.25
        run(optimizer, problem, 3)
        return snapshot(optimizer)[0]

    assert_same(act(torch.full(shape, 0.5)), act(0.5))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("use_muon", True, "use_muon_pp"),
        ("use_muon", False, "use_muon_pp"),
        ("wd", 0.0, "weight_decay"),
        ("learning_rate", 1e-3, "lr"),
        ("momentum", 0.9, "betas"),
        ("weight_decays", 0.1, "weight_decay"),
        ("nesterov", True, "this optimiser has no option of that name"),
        ("amsgrad", True, "this optimiser has no option of that name"),
        ("maximize", True, "this optimiser has no option of that name"),
    ],
)
def test_keys_that_nobody_reads(key, value, told):
    with pytest.raises(ValueError, match=f"unknown option '{key}'.*{told}"):
        ProdigyPlusScheduleFree([{"params": parameters(), key: value}])
    optimizer = ProdigyPlusScheduleFree(parameters())
    with pytest.raises(ValueError, match=f"unknown option '{key}'.*{told}"):
        optimizer.add_param_group({"params": parameters(), key: value})
    assert len(optimizer.param_groups) == 1


def test_keys_of_frameworks_and_of_the_owner():
    keys = {"name": "head", "initial_lr": 1.0, "max_lr": 2.0, "min_lr": 0.0, "lr_scale": 0.5, "_mine": [1]}
    keys |= {"foreach": None, "maximize": False, "module": "encoder"}
    optimizer = ProdigyPlusScheduleFree([{"params": parameters(), **keys}])
    assert optimizer.param_groups[0].items() >= keys.items()
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)
    run(optimizer, problem := Fed((3,)), 0)
    problem.parameters = optimizer.param_groups[0]["params"]
    run(optimizer, problem, 2)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["meta", "float16", "uint8"])
def test_what_is_frozen_is_not_inspected(kind, first):
    """A frozen parameter may be on the meta device or quantised, as the base model of a LoRA."""
    frozen = {
        "meta": torch.empty(8, 8, device="meta"),
        "float16": torch.ones(8, 8, dtype=torch.float16),
        "uint8": torch.zeros(32, 1, dtype=torch.uint8),
    }[kind]
    frozen = nn.Parameter(frozen, requires_grad=False)
    alone, optimizer_alone = pair((8, 2))
    run(optimizer_alone, alone, 5)
    problem = Fed((8, 2))
    params = [frozen, *problem.parameters] if first else [*problem.parameters, frozen]
    for make in (lambda: params, lambda: [{"params": [p], "use_muon_pp": True} for p in params]):
        ProdigyPlusScheduleFree(make())
    optimizer = ProdigyPlusScheduleFree(params)
    run(optimizer, problem, 5)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(problem.parameters[0].detach(), alone.parameters[0].detach())
    assert optimizer.metrics()[0]["d"] == optimizer_alone.metrics()[0]["d"]
    if kind == "float16":  # until it is trained
        frozen.requires_grad_()
        frozen.grad = torch.ones_like(frozen)
        with pytest.raises(ValueError, match=rf"parameter {0 if first else 1} .*float16"):
            optimizer.step()


@pytest.mark.parametrize("options", [{}, {"factored": False}, {"use_schedulefree": False}], ids=str)
def test_a_parameter_that_was_grown(options):
    """As in Gaussian splatting. With the old parameter's state it is refused; without, it starts afresh."""
    problem, optimizer = pair((50, 3), **options)
    optimizer.param_groups[0]["param_names"] = ["splats"]
    run(optimizer, problem, 3)
    (old,) = problem.parameters
    new = nn.Parameter(torch.cat([old.detach(), torch.ones(30, 3)]))
    optimizer.param_groups[0]["params"][0] = problem.parameters[0] = new
    state = optimizer.state.pop(old)
    optimizer.state[new] = {
        key: torch.cat([value, torch.zeros(30, 3)]) if value.shape == old.shape else value
        for key, value in state.items()
    }
    with pytest.raises(RuntimeError, match=r"'splats' is of shape \(80, 3\).*state\.pop\(old\)"):
        run(optimizer, problem, 1)
    optimizer.state.pop(new)
    run(optimizer, problem, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, problem, 1)


def test_a_parameter_whose_data_were_cut():
    problem, optimizer = pair((50, 3))
    run(optimizer, problem, 3)
    problem.parameters[0].data = problem.parameters[0].data[:20].clone()
    with pytest.raises(RuntimeError, match=r"of shape \(20, 3\), and was of shape \(50, 3\)"):
        run(optimizer, problem, 1)


def test_groups_that_are_removed_and_parameters_that_are_swapped():
    """Each parameter keeps its own state and options, wherever it now stands."""
    problem = Fed((40, 12), (40, 12), (9,))
    a, b, c = problem.parameters
    optimizer = ProdigyPlusScheduleFree(
        [{"params": [a]}, {"params": [b], "slice_p": 3}, {"params": [c], "factored": False}]
    )
    run(optimizer, problem, 3)
    optimizer.param_groups.pop(0)
    run(optimizer, problem, 2)
    optimizer.param_groups.reverse()
    run(optimizer, problem, 2)
    replaced = nn.Parameter(b.detach().clone())
    optimizer.param_groups[1]["params"][0] = replaced
    optimizer.state[replaced] = optimizer.state.pop(b)
    problem.parameters = [c, replaced]
    run(optimizer, problem, 2)
    optimizer.param_groups[1]["slice_p"] = 11
    with pytest.raises(RuntimeError, match="slice_p=11"):
        run(optimizer, problem, 1)
