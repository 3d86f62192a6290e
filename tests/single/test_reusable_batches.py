"""Batches are reused from step to step while only gradients change; any other change makes new ones."""

import copy
import itertools
import weakref

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.device import jit
from prodigyplus.device.launches import Launches
from prodigyplus.engine.reusable_batches import ReusableBatches
from tests.single.problems import Fed

pytest.importorskip("triton")
if jit.interprets():
    import tests.interpreting  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((4, 3), (3,), (2, 4))


class Pair:
    """Two equal problems: one may reuse its batches, the other makes new ones in every step."""

    def __init__(self, **options):
        self._fed = Fed(*SHAPES)
        self.both = []
        for _ in range(2):
            parameters = [torch.nn.Parameter(p.detach().to(DEVICE, copy=True)) for p in self._fed.parameters]
            self.both.append(
                (parameters, ProdigyPlusScheduleFree(parameters, d0=1e-3, fused=True, **options))
            )

    def step(self, change=lambda parameters, optimizer: None):
        """Apply a change to both, and step both; return whether the first reused its batches."""
        self._fed.backward()
        found = [optimizer._cache.steps.reusable for _, optimizer in self.both]
        for parameters, optimizer in self.both:
            for p, fed in zip(parameters, self._fed.parameters, strict=True):
                p.grad = fed.grad.to(DEVICE, copy=True)
            change(parameters, optimizer)
        self.both[1][1]._cache.steps.reusable = None
        for _, optimizer in self.both:
            optimizer.step()
        return found[0] is not None and self.both[0][1]._cache.steps.reusable is found[0]

    def assert_same(self):
        (ours, reusing), (theirs, anew) = self.both
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            for key, value in anew.state[q].items():
                assert torch.equal(reusing.state[p][key], value), key


def without(parameters, missing):
    for index in missing:
        parameters[index].grad = None


def no_gradient(parameters, optimizer):
    parameters[1].grad = None


def gradient_by_columns(parameters, optimizer):
    parameters[0].grad = parameters[0].grad.t().contiguous().t()


def gradient_of_other_dtype(parameters, optimizer):
    for p in parameters:
        grad, p.grad = p.grad.bfloat16(), None
        p.grad_dtype = torch.bfloat16
        p.grad = grad


def other_option(parameters, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.1


def other_state(parameters, optimizer):
    state = optimizer.state[parameters[0]]
    optimizer.state[parameters[0]] = dict(state)


def no_state(parameters, optimizer):
    del optimizer.state[parameters[2]]


def other_entry(parameters, optimizer):
    state = optimizer.state[parameters[0]]
    state["z"] = state["z"].clone()


def entry_moved(parameters, optimizer):
    entry = optimizer.state[parameters[0]]["z"]
    entry.data = entry.data.clone()


def weight_moved(parameters, optimizer):
    parameters[0].data = parameters[0].data.clone()


def weight_turned(parameters, optimizer):
    """The same shape and values, with other strides."""
    parameters[0].data = parameters[0].data.t().contiguous().t()


def loaded(parameters, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def other_parameter(parameters, optimizer):
    p = torch.nn.Parameter(parameters[0].detach().clone())
    p.grad = parameters[0].grad
    optimizer.param_groups[0]["params"][0] = p


def other_group(parameters, optimizer):
    p = torch.nn.Parameter(torch.ones(2, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer.add_param_group({"params": [p]})


CHANGES = (
    (no_gradient, gradient_by_columns, other_option, other_state, no_state, other_entry, entry_moved)
    + (weight_moved, weight_turned, loaded, other_group, other_parameter)
    + ((gradient_of_other_dtype,) if hasattr(torch.Tensor, "grad_dtype") else ())
)


@pytest.fixture
def _without_launches(monkeypatch):
    """Launch no kernels: these tests look at which batches there are, not at what they compute."""
    monkeypatch.setattr(jit, "launch", lambda *_, **__: None)


@pytest.mark.usefixtures("_without_launches")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_has_them_found_anew(change):
    pair = Pair()
    assert not pair.step()
    assert pair.step()
    assert not pair.step(change)


def test_they_stand():
    pair = Pair(prodigy_steps=4)
    start = pair.both[0][0][0].detach().clone()
    assert [pair.step() for _ in range(6)] == [False, True, True, False, True, True]
    pair.assert_same()
    assert not torch.equal(pair.both[0][0][0], start)


@pytest.mark.usefixtures("_without_launches")
def test_a_gradient_that_comes_later():
    pair = Pair()
    assert not pair.step(no_gradient)
    assert pair.step(no_gradient)
    assert not pair.step()
    assert pair.step()


@pytest.mark.usefixtures("_without_launches")
def test_tables_do_not_pile_up():
    """Of experts that are not hit there are no gradients, so that every step may move another set."""
    pair = Pair()
    (_, optimizer), _ = pair.both

    def made():
        kept = optimizer._cache.steps.constants._made.values()
        return [one for one in kept if isinstance(one, Launches)]

    def sets(count):
        for missing in itertools.combinations(range(len(SHAPES)), count):
            pair.step(lambda parameters, _, missing=missing: without(parameters, missing))

    for _ in range(5):
        sets(1)
    first = made()
    assert len(first) == 3
    sets(1)
    assert made() == first  # they came again before they were forgotten
    sets(0)
    sets(2)
    sets(2)
    assert len(made()) == 3
    assert not {*made()} & {*first}


@pytest.mark.usefixtures("_without_launches")
def test_in_eval_mode_and_back():
    pair = Pair()
    pair.step()
    for _, optimizer in pair.both:
        optimizer.eval()
        optimizer.train()
    assert pair.step()


@pytest.mark.usefixtures("_without_launches")
def test_gradients_are_let_go():
    """Batches that are kept for the next step hold no gradients: their memory is free meanwhile."""
    pair = Pair()
    for _ in range(2):
        pair.step()
    grads = []
    for parameters, optimizer in pair.both:
        grads += [weakref.ref(p.grad) for p in parameters]
        optimizer.zero_grad()
    assert not any(grad() for grad in grads)


def all_loaded(parameters, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def all_weights_moved(parameters, optimizer):
    for p in parameters:
        p.data = p.data.clone()


@pytest.mark.usefixtures("_without_launches")
@pytest.mark.parametrize("replace", [other_entry, all_loaded, all_weights_moved])
def test_what_is_replaced_is_let_go(replace):
    """As where a trainer moves state and weights to the host between steps, to have their memory."""
    pair = Pair()
    for _ in range(2):
        pair.step()
    parameters, optimizer = pair.both[0]
    old = parameters[0].data if replace is all_weights_moved else optimizer.state[parameters[0]]["z"]
    storage = weakref.ref(old.untyped_storage())
    del old
    replace(parameters, optimizer)
    assert storage() is None


@pytest.mark.usefixtures("_without_launches")
def test_state_on_another_device_is_refused():
    pair = Pair()
    pair.step()
    (parameters, optimizer), _ = pair.both
    state = optimizer.state[parameters[0]]
    state["z"] = state["z"].to("meta")
    with pytest.raises(RuntimeError, match=r"different devices .*meta.*: move the state to the weights"):
        pair.step()


@pytest.mark.usefixtures("_without_launches")
def test_not_where_something_else_moves():
    """If kernels do not move one of the parameters, nothing is reused: all are examined in every step."""
    parameters = [
        torch.nn.Parameter(torch.ones(3, device=DEVICE, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    ]
    optimizer = ProdigyPlusScheduleFree(
        [{"params": [parameters[0]], "fused": True}, {"params": [parameters[1]]}]
    )
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer._cache.steps.reusable is None
    assert ReusableBatches.of(optimizer._placement, [], [], {}, []) is None


@pytest.mark.usefixtures("_without_launches")
def test_a_step_that_fails_leaves_nothing_to_reuse(monkeypatch):
    pair = Pair()
    pair.step()
    optimizer = pair.both[0][1]

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(jit, "launch", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert optimizer._cache.steps.reusable is None
    assert not pair.step()
    assert pair.step()


@pytest.mark.usefixtures("_without_launches")
def test_state_that_is_made_in_eval_mode():
    """torch's checkpoint helpers make state in this way. Nothing moves, and the batches are not reused."""
    pair = Pair(lr=0.0)
    for _, optimizer in pair.both:
        optimizer.eval()
    pair.step()
    assert pair.both[0][1].state
    for _, optimizer in pair.both:
        optimizer.train()
    assert not pair.step()
    assert pair.step()


def test_what_is_kept_does_not_grow_with_the_sets_of_gradients():
    """As in a model that skips layers at random: almost every step has gradients of other parameters."""
    parameters = [torch.nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(8)]
    optimizer = ProdigyPlusScheduleFree(parameters, fused=False)
    kept = []
    for step in range(1, 60):
        for bit, p in enumerate(parameters):
            p.grad = torch.ones_like(p) if step >> bit & 1 else None
        optimizer.step()
        kept.append(len(optimizer._cache.steps.constants._made))
    assert kept[-1] <= max(kept[:10])
