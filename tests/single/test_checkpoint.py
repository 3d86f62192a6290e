"""A run that is saved, loaded and continued equals, to the bit, the run that did not stop."""

import copy
import io
import json
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from prodigyplus import ProdigyPlusScheduleFree
from tests import option_table as table
from tests.single.problems import Fed, assert_same, pair, run, snapshot

OPTIONS = [{}, *table.packed(table.alone() + table.together(), most=10)]


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(problem, optimizer, **options):
    """A new problem and optimiser that continue the given ones from what was saved, and nothing else."""
    other = Fed(*(p.shape for p in problem.parameters), dtype=problem.parameters[0].dtype)
    other.random.set_state(problem.random.get_state())
    with torch.no_grad():
        for ours, theirs in zip(other.parameters, problem.parameters, strict=True):
            ours.copy_(theirs)
    other_optimizer = ProdigyPlusScheduleFree(other.parameters, **options)
    other_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    return other, other_optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_resume(options, mode, dtype):
    problem, optimizer = pair((40, 12), (12, 40), (9,), (), dtype=dtype, **options)
    run(optimizer, problem, 15)
    getattr(optimizer, mode)()
    other, other_optimizer = resumed(problem, optimizer, **options)
    assert_same(other_optimizer.state_dict(), optimizer.state_dict())
    for p, o in ((problem, optimizer), (other, other_optimizer)):
        o.train()
        run(o, p, 10)
    assert_same(snapshot(other_optimizer), snapshot(optimizer))


def test_a_fresh_and_a_loaded_group_have_the_same_keys():
    problem, optimizer = pair((40, 12))
    fresh = optimizer.param_groups[0].keys()
    run(optimizer, problem, 1)
    _, loaded = resumed(problem, optimizer)
    assert fresh == loaded.param_groups[0].keys()


def test_numbers_are_plain_and_exact():
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, 40)
    (group,) = optimizer.state_dict()["param_groups"]
    assert not any(isinstance(value, torch.Tensor) for value in group.values())
    assert group["d"] == optimizer.metrics()[0]["d"].item()
    assert type(group["k"]) is int


def test_numbers_of_a_parameter_are_those_of_the_call():
    """A state dict holds copies of 0-dim tensors: torch's asynchronous save does not copy 0-dim DTensors."""
    problem, optimizer = pair((40, 12), (), use_speed="relative")
    run(optimizer, problem, 10)
    saved = optimizer.state_dict()["state"]
    numbers = [
        (value, value.clone()) for state in saved.values() for value in state.values() if not value.ndim
    ]
    assert len(numbers) == 2 * 3 + 2  # SPEED's three for each parameter; the scalar's z and second moment
    run(optimizer, problem, 10)
    for value, before in numbers:
        assert_same(value, before)


def test_a_load_shares_nothing_with_what_was_loaded():
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, 10)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    _, other_optimizer = pair((40, 12))
    other_optimizer.load_state_dict(saved)
    run(optimizer, problem, 3)
    assert_same(other_optimizer.state_dict(), kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64, torch.int64])
def test_a_dtype_that_cannot_hold_the_state_is_refused(dtype):
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, 10)
    saved, before = optimizer.state_dict(), snapshot(optimizer)
    saved["state"][0]["z"] = saved["state"][0]["z"].to(dtype)
    with pytest.raises(ValueError, match=rf"'z' of the state dict is {dtype}"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_a_model_of_another_dtype_goes_on(before, after):
    problem, optimizer = pair((40, 12), (9,), dtype=before)
    run(optimizer, problem, 30)
    other = Fed((40, 12), (9,), dtype=after)
    optimizer_other = ProdigyPlusScheduleFree(other.parameters)
    optimizer_other.load_state_dict(optimizer.state_dict())
    assert optimizer_other.state[other.parameters[0]]["z"].dtype == before
    run(optimizer_other, other, 10)
    optimizer_other.eval()
    with optimizer_other.averaged_parameters():
        pass
    optimizer_other.train()
    run(optimizer_other, other, 1)


@pytest.mark.parametrize("options", [{}, {"bfloat16_z": True}], ids=table.text_of)
def test_a_model_that_was_converted_while_it_was_trained_is_saved_and_loaded(options):
    problem, optimizer = pair((40, 12), (9,), **options)
    run(optimizer, problem, 10)
    for p in problem.parameters:
        p.data = p.data.bfloat16()
        p.grad = None
    run(optimizer, problem, 5)
    other, other_optimizer = resumed(problem, optimizer, **options)
    assert other.parameters[0].dtype == torch.bfloat16
    for p, o in ((problem, optimizer), (other, other_optimizer)):
        run(o, p, 5)
        o.eval()
    assert_same(snapshot(other_optimizer), snapshot(optimizer))


def test_lists_where_tuples_were():
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, 2)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = list(saved["param_groups"][0]["betas"])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    run(optimizer, problem, 1)


def test_numbers_of_numpy_that_a_schedule_has_set():
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, 2)
    optimizer.param_groups[0].update(lr=np.float64(0.5), warmup_steps=np.int64(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    (group,) = torch.load(file, weights_only=True)["param_groups"]
    assert (type(group["lr"]), group["lr"]) == (float, 0.5)
    assert (type(group["warmup_steps"]), group["warmup_steps"]) == (int, 3)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("value", [0, torch.ones(40, 12)], ids=["number", "tensor"])
def test_entries_of_the_users_in_a_state_are_refused(steps, value):
    """Saved, they could not be loaded."""
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, steps)
    optimizer.state[problem.parameters[0]]["slow"] = value
    with pytest.raises(RuntimeError, match=r"the state of parameter 0 .* has \['slow'\]"):
        run(optimizer, problem, 1)
    del optimizer.state[problem.parameters[0]]["slow"]
    run(optimizer, problem, 1)


def test_options_that_came_since_it_was_saved():
    problem, optimizer = pair((40, 12), (9,))
    run(optimizer, problem, 5)
    saved = optimizer.state_dict()
    for name in [name for name in saved["param_groups"][0] if "muon" in name]:
        del saved["param_groups"][0][name]
    other = Fed((40, 12), (9,))
    optimizer_other = ProdigyPlusScheduleFree(other.parameters)
    optimizer_other.load_state_dict(saved)
    assert_same(optimizer_other.state_dict(), optimizer.state_dict())
    run(optimizer_other, other, 1)


def test_options_that_came_since_it_was_saved_stay_those_of_the_group():
    _, optimizer = pair((40, 12), (9,))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["warmup_steps"]
    other = Fed((40, 12), (9,))
    optimizer_other = ProdigyPlusScheduleFree([{"params": other.parameters, "warmup_steps": 10}])
    optimizer_other.load_state_dict(saved)
    assert optimizer_other.param_groups[0]["warmup_steps"] == 10


@pytest.mark.parametrize("before", [False, True])
def test_a_state_with_muon_and_one_without(before):
    problem, optimizer = pair((40, 12), use_muon_pp=before)
    run(optimizer, problem, 1)
    saved = optimizer.state_dict()
    other, optimizer_other = pair((40, 12), use_muon_pp=not before)
    optimizer_other.load_state_dict(saved)  # its options are now those that were saved
    assert optimizer_other.param_groups[0]["use_muon_pp"] is before
    run(optimizer_other, other, 1)
    saved["param_groups"][0]["use_muon_pp"] = not before
    with pytest.raises(ValueError, match="with other options"):
        optimizer_other.load_state_dict(saved)


def test_hooks_see_the_whole_state():
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, 2)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append(len(saved["state"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [1, 1]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(copier):
    problem, optimizer = pair((40, 12), (9,))
    run(optimizer, problem, 20)
    twin = copier(optimizer)
    random = problem.random.get_state()
    run(optimizer, problem, 10)
    problem.random.set_state(random)
    problem.parameters = twin.param_groups[0]["params"]
    run(twin, problem, 10)
    assert_same(snapshot(twin), snapshot(optimizer))


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.full((4, 40), 0.5)).square().sum().backward()
        optimizer.step()


def model_and_optimizer(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, ProdigyPlusScheduleFree(model.parameters(), **options)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("flatten", [False, True])
def test_checkpoint_helpers_of_torch(flatten, mode):
    """They make a step with zero gradients and lr=0, to create state; it must change nothing else."""
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = model_and_optimizer()
    weights = [p.detach().clone() for p in model.parameters()]
    getattr(optimizer, mode)()
    get_optimizer_state_dict(model, optimizer, options=how)
    optimizer.train()
    assert_same([p.detach() for p in model.parameters()], weights)
    assert int(optimizer.metrics()[0]["step"]) == 0

    untouched, optimizer_untouched = model_and_optimizer()
    train(model, optimizer, 30)
    train(untouched, optimizer_untouched, 30)
    assert_same(snapshot(optimizer), snapshot(optimizer_untouched))

    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    other, optimizer_other = model_and_optimizer()
    other.load_state_dict(model.state_dict())
    getattr(optimizer_other, mode)()
    set_optimizer_state_dict(other, optimizer_other, saved, options=how)
    assert_same(snapshot(optimizer_other), snapshot(optimizer))
    train(model, optimizer, 10)
    train(other, optimizer_other, 10)
    assert_same(snapshot(optimizer_other), snapshot(optimizer))


def test_weights_loaded_after_state_was_made_are_where_the_run_starts():
    model, optimizer = model_and_optimizer()
    get_optimizer_state_dict(model, optimizer)
    expected, optimizer_expected = model_and_optimizer()
    with torch.no_grad():
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            q.copy_(p.mul_(2))
    train(model, optimizer, 20)
    train(expected, optimizer_expected, 20)
    assert_same(snapshot(optimizer), snapshot(optimizer_expected))


def test_state_that_is_older_than_the_weights():
    """A helper makes state before weights are loaded. The new weights are what eval() shows.

    A parameter whose first gradient comes late starts from them, too.
    """
    model, optimizer = model_and_optimizer()
    get_optimizer_state_dict(model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(5.0)
    optimizer.eval()
    assert all((p == 5).all() for p in model.parameters())
    optimizer.train()
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if step == 3 or p.ndim > 1 else None
        optimizer.step()
    late = model[0].bias
    torch.testing.assert_close(late, optimizer.state[late]["z"], rtol=1e-4, atol=0)
    assert (optimizer.state[late]["p0"] == 5).all()


def test_warm_up_from_zero_is_a_step_like_any_other():
    problem, optimizer = pair((40, 12), lr=0.0)
    weights = problem.parameters[0].detach().clone()
    run(optimizer, problem, 3)
    assert_same(problem.parameters[0].detach(), weights)
    assert int(optimizer.metrics()[0]["step"]) == 3
    assert (optimizer.state[problem.parameters[0]]["exp_avg_sq_row"] > 0).all()
    optimizer.param_groups[0]["lr"] = 1.0
    run(optimizer, problem, 40)
    assert float(optimizer.metrics()[0]["d"]) > 1e-5


def named(order, shapes=((4, 4), (4, 4))):
    """An optimiser of parameters in this order of names; each has weights of its own."""
    parameters = {name: nn.Parameter(torch.full(shape, float(i))) for i, (name, shape) in enumerate(
        zip(("a", "b"), shapes, strict=True), 1
    )}  # fmt: skip
    return ProdigyPlusScheduleFree([(name, parameters[name[-1]]) for name in order]), parameters


def steps(optimizer, parameters, count=3):
    for _ in range(count):
        for p in parameters.values():
            p.grad = p.detach().clone()
        optimizer.step()


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("module.b", "module.a"), ("_orig_mod.b", "a")])
def test_states_go_to_the_parameters_of_their_names(order):
    optimizer, parameters = named(("a", "b"))
    steps(optimizer, parameters)
    other, others = named(order)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == list(order)
    for name in "ab":
        assert_same(other.state[others[name]], dict(optimizer.state[parameters[name]]))
        with torch.no_grad():
            others[name].copy_(parameters[name])
    steps(other, others)
    steps(optimizer, parameters)
    for name in "ab":
        assert_same(others[name].detach(), parameters[name].detach())


def test_states_of_parameters_of_other_names():
    optimizer, parameters = named(("a", "b"))
    steps(optimizer, parameters)
    saved = optimizer.state_dict()
    other, _ = named(("head.a", "b"))
    with pytest.raises(ValueError, match=r"it lacks head\.a, and it has a\. .*delete \"param_names\""):
        other.load_state_dict(saved)
    del saved["param_groups"][0]["param_names"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["head.a", "b"]
    unnamed = ProdigyPlusScheduleFree([nn.Parameter(torch.ones(4, 4)) for _ in "ab"])
    unnamed.load_state_dict(optimizer.state_dict())  # one side has no names


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_helpers_of_torch_and_names_in_another_order(order):
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.full((4, 4), i)) for name, i in (("a", 1.0), ("b", 2.0))}
    )
    optimizer = ProdigyPlusScheduleFree(list(model.named_parameters()))
    steps(optimizer, dict(model.items()))
    saved = get_optimizer_state_dict(model, optimizer)
    other = copy.deepcopy(model)
    other_optimizer = ProdigyPlusScheduleFree([(name, other[name]) for name in order])
    other.zero_grad()
    set_optimizer_state_dict(other, other_optimizer, copy.deepcopy(saved))
    for name in "ab":
        assert_same(other_optimizer.state[other[name]], dict(optimizer.state[model[name]]))


def test_loading_again_and_again_adds_nothing():
    """When an optimiser is loaded or copied, torch adds keys of its own optimisers to the defaults."""
    problem, optimizer = pair((40, 40), (5,))
    run(optimizer, problem, 3)
    keys = optimizer.state_dict()["param_groups"][0].keys()
    for how in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), lambda o: o):
        for _ in range(3):
            optimizer = how(optimizer)
            optimizer.load_state_dict(optimizer.state_dict())
            problem.parameters = optimizer.param_groups[0]["params"]
            run(optimizer, problem, 1)
            assert optimizer.state_dict()["param_groups"][0].keys() == keys
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [group.keys() for group in optimizer.state_dict()["param_groups"]] == [keys, keys]


def test_hooks_see_what_is_saved_and_may_change_it():
    problem, optimizer = pair((40, 40), (5,))
    run(optimizer, problem, 3)
    plain = optimizer.state_dict()
    seen = []

    def rename(_, saved):
        return {"state": {f"p{key}": value for key, value in saved["state"].items()}, **{
            key: value for key, value in saved.items() if key != "state"
        }}  # fmt: skip

    handles = [
        optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(copy.deepcopy(saved))),
        optimizer.register_state_dict_post_hook(rename),
    ]
    found = optimizer.state_dict()
    assert_same(seen, [plain])
    assert_same(found, {**plain, "state": {f"p{key}": value for key, value in plain["state"].items()}})
    for handle in handles:
        handle.remove()
    assert_same(optimizer.state_dict(), plain)


def test_state_that_is_no_parameters_is_saved_and_loaded():
    problem, optimizer = pair((4, 4))
    run(optimizer, problem, 2)
    optimizer.state["ema"] = {"decay": torch.tensor(0.5), "count": 3}
    _, other = resumed(problem, optimizer)
    assert_same(other.state["ema"], optimizer.state["ema"])
    run(optimizer, problem, 1)
    assert_same(other.state_dict()["state"]["ema"], optimizer.state["ema"])


def test_a_state_whose_p0_was_kept_in_bfloat16():
    problem, optimizer = pair((40, 40), (5,))
    run(optimizer, problem, 3)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["p0"] = state["p0"].bfloat16()
    _, other = pair((40, 40), (5,))
    other.load_state_dict(saved)
    for state, its in zip(other.state.values(), saved["state"].values(), strict=True):
        assert state["p0"].dtype == torch.float32
        assert_same(
            state["p0"],
            optimizer.state[problem.parameters[len(its["p0"].shape) == 1]]["p0"].bfloat16().float(),
        )


def test_a_state_dict_of_an_earlier_version():
    """A state dict that lacks some entries of a group: they get their defaults."""
    problem, optimizer = pair((40, 40), (5,))
    run(optimizer, problem, 3)
    saved = optimizer.state_dict()
    for name in ("in_mean", "frozen", "average_beta1", "compile"):
        del saved["param_groups"][0][name]
    _, other = pair((40, 40), (5,))
    other.load_state_dict(saved)
    assert_same(other.state_dict(), optimizer.state_dict())


def test_the_numbers_of_a_group_are_tensors_from_the_first_moment_on():
    problem, optimizer = pair((40, 40))
    for act in (
        lambda: None,
        lambda: run(optimizer, problem, 1),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ):
        act()
        assert isinstance(optimizer.param_groups[0]["d"], torch.Tensor)
    assert isinstance(optimizer.state_dict()["param_groups"][0]["d"], float)
    numbers = optimizer.scalars("a/")
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers == {f"a/{name}": value.item() for name, value in optimizer.metrics()[0].items()}


def test_the_numbers_of_several_groups_in_one_dict():
    parameters = Fed((4, 4), (3,)).parameters
    groups = [{"params": [parameters[0]], "d0": 1e-6}, {"params": [parameters[1]], "d0": 1e-5}]
    optimizer = ProdigyPlusScheduleFree(groups)
    numbers = optimizer.scalars()
    assert (numbers["d/0"], numbers["d/1"]) == (1e-6, 1e-5)
    assert len(numbers) == 2 * len(optimizer.metrics()[0])
    assert optimizer.scalars("p/", ("step", "d")) == {
        "p/d/0": 1e-6,
        "p/d/1": 1e-5,
        "p/step/0": 0,
        "p/step/1": 0,
    }
    with pytest.raises(ValueError, match=r"names=\['d', 'rate'\]: \['rate'\] is none of d, d_hat"):
        optimizer.scalars(names=("d", "rate"))


def test_a_state_that_is_loaded_early_keeps_no_parameter_alive():
    """accelerate loads an optimiser's own state, and replaces its parameters before they are sharded."""
    optimizer = ProdigyPlusScheduleFree([nn.Parameter(torch.ones(3))])
    optimizer.load_state_dict(optimizer.state_dict())
    old = weakref.ref(optimizer.param_groups[0]["params"][0])
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))
    assert old() is None
