"""torch's checkpoint helpers with frozen parameters, empty groups, and state that comes and goes.

Where they fail, they also fail for AdamW. ``optimizer.state_dict()`` and ``load_state_dict()`` always work.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from prodigyplus import ProdigyPlusScheduleFree
from tests.single.problems import assert_same

STEPS = 10

LAST, MIDDLE, FIRST = "last", "middle", "first"


def model_and_optimizer(make, empty=(), **options):
    """A model and an optimiser with a frozen parameter among others, and a frozen group.

    ``empty`` says where to put groups without parameters.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 6), nn.Linear(6, 4))
    model[0].bias.requires_grad_(False)
    model[1].requires_grad_(False)
    groups = [{"params": [*model[0].parameters(), *model[2].parameters()]}, {"params": model[1].parameters()}]
    places = {FIRST: 0, MIDDLE: 1, LAST: len(groups)}
    for place in empty:
        groups.insert(places[place], {"params": []})
    return model, make(groups, **options)


def train(model, optimizer, steps=STEPS):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.full((8, 20), 0.5)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def through_helpers(path, trained, fresh, flat=False, full=False):
    """Save and load with torch's helpers: through a sharded file, or with ``full``, in memory."""
    how = StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=full)

    def states(model, optimizer):
        return {
            "model": get_model_state_dict(model, options=how),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=how),
        }

    saved = copy.deepcopy(states(*trained))
    if not full:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is only one process
            dcp.save(saved, checkpoint_id=path, no_dist=True)
            saved = states(*fresh)
            dcp.load(saved, checkpoint_id=path, no_dist=True)
    model, optimizer = fresh
    set_model_state_dict(model, saved["model"], options=how)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=how)


def directly(trained, fresh):
    for one, other in zip(trained, fresh, strict=True):
        other.load_state_dict(copy.deepcopy(one.state_dict()))


BOTH = [torch.optim.AdamW, ProdigyPlusScheduleFree]


def pair_of(make, *args, **options):
    trained, fresh = (model_and_optimizer(make, *args, **options) for _ in range(2))
    train(*trained)
    return trained, fresh


def assert_alike(trained, fresh):
    assert_same(fresh[1].state_dict(), trained[1].state_dict())
    train(*trained)
    train(*fresh)
    assert_same([p.detach() for p in fresh[0].parameters()], [p.detach() for p in trained[0].parameters()])


@pytest.mark.parametrize(
    ("empty", "flat", "full"),
    [
        ((), False, False),
        ((), False, True),
        ((), True, False),
        ((LAST,), False, False),
        ((LAST,), False, True),
    ],
)
@pytest.mark.parametrize("make", BOTH)
def test_frozen_parameters_and_empty_groups(tmp_path, make, empty, flat, full):
    trained, fresh = pair_of(make, empty)
    through_helpers(tmp_path, trained, fresh, flat, full)
    assert_alike(trained, fresh)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("empty", "flat", "error"),
    [
        ((LAST,), True, IndexError),  # a flattened state dict has no trace of an empty group
        ((MIDDLE,), True, IndexError),
        ((LAST, LAST), False, ValueError),  # not flattened, one empty group is allowed
    ],
)
@pytest.mark.parametrize("make", BOTH)
def test_empty_groups_that_torch_refuses(tmp_path, make, empty, flat, full, error):
    with pytest.raises(error):
        through_helpers(tmp_path, *pair_of(make, empty), flat, full)


@pytest.mark.parametrize("make", BOTH)
def test_flattened_and_full_is_refused_by_torch(tmp_path, make):
    with pytest.raises(KeyError):
        through_helpers(tmp_path, *pair_of(make), flat=True, full=True)


@pytest.mark.parametrize("empty", [FIRST, MIDDLE])
def test_an_empty_group_that_is_not_the_last(tmp_path, empty):
    """torch's helpers mix up the groups: AdamW silently loses options, our optimiser raises an error."""
    trained, fresh = pair_of(torch.optim.AdamW, (empty,))
    through_helpers(tmp_path, trained, fresh)
    assert any("betas" not in group for group in fresh[1].param_groups)

    with pytest.raises(ValueError, match="group without parameters has, unless it is the last"):
        through_helpers(tmp_path, *pair_of(ProdigyPlusScheduleFree, (empty,)))


@pytest.mark.parametrize("empty", [(), (FIRST,), (MIDDLE,), (LAST,), (FIRST, LAST, LAST)])
def test_state_dict_of_the_optimizer(empty):
    trained, fresh = pair_of(ProdigyPlusScheduleFree, empty)
    directly(trained, fresh)
    assert_alike(trained, fresh)


def frozen_late(make):
    """A trained pair, and a fresh one to load it into; in both, one weight is frozen afterwards."""
    trained, fresh = pair_of(make)
    for model, _ in (trained, fresh):
        model[0].weight.requires_grad_(False)
    return trained, fresh


@pytest.mark.parametrize("make", BOTH)
def test_torch_drops_the_state_of_what_was_frozen_after_training(tmp_path, make):
    """https://github.com/pytorch/pytorch/issues/192202"""
    trained, fresh = frozen_late(make)
    through_helpers(tmp_path, trained, fresh)
    assert trained[1].state[trained[0][0].weight]
    assert not fresh[1].state[fresh[0][0].weight]

    trained, fresh = frozen_late(make)
    directly(trained, fresh)
    assert_alike(trained, fresh)


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_that_are_there_while_loading(flat):
    """If gradients exist, torch makes no state to load into: a flattened load silently resets AdamW."""
    how = StateDictOptions(flatten_optimizer_state_dict=flat)

    def load(make):
        trained, fresh = pair_of(make)
        fresh[0].load_state_dict(trained[0].state_dict())
        fresh[0](torch.ones(8, 20)).mean().backward()
        saved = copy.deepcopy(get_optimizer_state_dict(*trained, options=how))
        set_optimizer_state_dict(*fresh, saved, options=how)
        return trained, fresh

    if flat:
        assert not any(load(torch.optim.AdamW)[1][1].state.values())
        with pytest.raises(ValueError, match=f"has made {STEPS} steps, but none.*call optimizer.zero_grad"):
            load(ProdigyPlusScheduleFree)
    else:
        assert_alike(*load(ProdigyPlusScheduleFree))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("use_speed", [False, "relative"])
def test_prodigys_state_that_was_freed(tmp_path, use_speed, flat):
    """Freed entries are saved as zeros: torch fails if a file lacks an entry that a new optimiser has."""
    options = {"prodigy_steps": 5, "use_speed": use_speed}
    trained, fresh = pair_of(ProdigyPlusScheduleFree, **options)
    saved = copy.deepcopy(trained[1].state_dict())
    through_helpers(tmp_path, trained, fresh, flat)
    assert_same(fresh[1].state_dict(), saved)
    weight = fresh[0][0].weight
    assert not fresh[1].state[weight].keys() & {"p0", "s", "max_l1"}
    assert_alike(trained, fresh)


@pytest.mark.parametrize("use_speed", [False, "relative"])
def test_back_to_a_checkpoint_from_before_it_was_freed(tmp_path, use_speed):
    options = {"prodigy_steps": 15, "use_speed": use_speed}
    trained, (model, optimizer) = pair_of(ProdigyPlusScheduleFree, **options)
    train(model, optimizer, 20)
    through_helpers(tmp_path, trained, (model, optimizer))
    assert_alike(trained, (model, optimizer))


@pytest.mark.parametrize("flat", [False, True])
def test_a_run_that_is_rolled_back_again_and_again(tmp_path, flat):
    """dcp.load fills the state dict that the helpers give, so a load must add no key that the file lacks."""
    how = StateDictOptions(flatten_optimizer_state_dict=flat)

    def states(model, optimizer):
        return {
            "model": get_model_state_dict(model, options=how),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=how),
        }

    model, optimizer = model_and_optimizer(ProdigyPlusScheduleFree)
    train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is only one process
        dcp.save(states(model, optimizer), checkpoint_id=tmp_path)
        train(model, optimizer)
        expected = copy.deepcopy(model.state_dict())
        for _ in range(4):
            saved = states(model, optimizer)
            dcp.load(saved, checkpoint_id=tmp_path)
            set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=how)
            set_model_state_dict(model, saved["model"], options=how)
            train(model, optimizer)
            assert_same(dict(model.state_dict()), dict(expected))
