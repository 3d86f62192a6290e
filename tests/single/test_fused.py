"""The fused backward pass: the same step as otherwise, with each gradient freed as soon as it is used."""

import copy
import gc
import threading
import time
import weakref

import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from tests import option_table as table
from tests.models import Transformer, Walks, loss_of
from tests.single.problems import assert_same, snapshot

STEPS = 25

# Only options that change passes: the numbers that passes take are no different when fused. Left out are
# options with which d does not move in both dtypes.
NAMES = table.named("passes", but=("prodigy_steps", "stochastic_rounding", "factored_fp32"))
TOGETHER = ("factored", "weight_decay", "use_adopt", "use_bias_correction", "betas", "use_cautious")
TOGETHER += (*table.MUON, "use_schedulefree")
OPTIONS = [{}, *table.packed(table.alone(NAMES) + table.together(TOGETHER), most=8)]


def model_and_optimizer(dtype=torch.float32, fused=True, **options):
    torch.manual_seed(0)
    model = Transformer(1).to(dtype)
    model.unused = nn.Parameter(torch.ones(3, dtype=dtype))
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    others = [(name, p) for name, p in model.named_parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": others, "use_muon_pp": False}]
    optimizer = ProdigyPlusScheduleFree(
        groups if options.get("use_muon_pp") else model.named_parameters(), fused_back_pass=fused, **options
    )
    if fused:
        optimizer.fuse_backward(model)
    return model, optimizer


def train(model, optimizer, data, steps=STEPS):
    for _ in range(steps):
        loss_of(model, data.next()).backward()
        optimizer.step()
        optimizer.zero_grad()


def without(state, *keys):
    for group in state[1]["param_groups"]:
        for key in keys:
            del group[key]
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_the_same_bits_as_the_plain_step(options, dtype):
    states = []
    for fused in (False, True):
        model, optimizer = model_and_optimizer(dtype, fused, **options)
        train(model, optimizer, Walks(4))
        states.append(without(snapshot(optimizer), "fused_back_pass"))
    assert states[0][1]["param_groups"][0]["d"] > 1e-6
    assert states[0][1]["param_groups"][0]["k"] == STEPS
    assert_same(states[1], states[0])


def test_a_learning_rate_that_starts_at_zero():
    states = []
    for fused in (False, True):
        model, optimizer = model_and_optimizer(fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
        data = Walks(4)
        for _ in range(20):
            train(model, optimizer, data, 1)
            schedule.step()
        states.append(without(snapshot(optimizer), "fused_back_pass"))
    assert states[0][1]["param_groups"][0]["k"] == 20
    assert_same(states[1], states[0])


def test_a_run_that_was_not_fused_goes_on_fused():
    model, optimizer = model_and_optimizer(fused=False)
    train(model, optimizer, Walks(4), 5)
    fused_model, fused_optimizer = model_and_optimizer()
    fused_model.load_state_dict(model.state_dict())
    fused_optimizer.load_state_dict(optimizer.state_dict())
    assert fused_optimizer.param_groups[0]["fused_back_pass"]
    for its, called in ((optimizer, model), (fused_optimizer, fused_model)):
        train(called, its, Walks(4), 5)
    assert_same(*(without(snapshot(its), "fused_back_pass") for its in (fused_optimizer, optimizer)))


def test_gradients_are_gone_after_backward_without_zero_grad():
    model, optimizer = model_and_optimizer()
    loss_of(model, Walks(4).next()).backward()
    assert optimizer.param_groups[0]["fused_back_pass"]
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()


def test_each_group_for_itself():
    """One group is fused and the other is not: the same bits as when neither is."""
    states = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Transformer(1)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = ProdigyPlusScheduleFree(
            [{"params": matrices, "fused_back_pass": fused}, {"params": others}]
        )
        if fused:
            assert len(optimizer.fuse_backward(model)) == len(matrices)
        train(model, optimizer, Walks(4))
        states.append(without(snapshot(optimizer), "fused_back_pass"))
    assert_same(states[1], states[0])


def test_what_backward_has_not_moved_step_moves():
    """Gradients that were set by hand are moved by step(), which also frees them."""
    results = []
    for fused in (False, True):
        model, optimizer = model_and_optimizer(fused=fused)
        train(model, optimizer, Walks(4), 5)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        assert not fused or all(p.grad is None for p in model.parameters())
        results.append(without(snapshot(optimizer), "fused_back_pass"))
    assert_same(results[1], results[0])


def test_what_is_frozen_at_first_is_moved_by_step_later():
    states = []
    for fused in (False, True):
        model, optimizer = model_and_optimizer(fused=False)
        optimizer.param_groups[0]["fused_back_pass"] = fused
        model.blocks[0].requires_grad_(False)
        if fused:
            optimizer.fuse_backward(model)
        data = Walks(4)
        for trains in (False, True):
            model.blocks[0].requires_grad_(trains)
            train(model, optimizer, data, 5)
        states.append(without(snapshot(optimizer), "fused_back_pass"))
    assert_same(*states)


def test_a_bad_gradient_skips_its_parameter_and_the_step_size():
    model, optimizer = model_and_optimizer()
    data = Walks(4)
    train(model, optimizer, data, 20)
    before, d = {name: p.detach().clone() for name, p in model.named_parameters()}, optimizer.metrics()[0]
    z, state = (
        optimizer.state[model.head.weight]["z"].clone(),
        copy.deepcopy(optimizer.state[model.head.weight]),
    )
    handle = model.head.weight.register_hook(lambda grad: grad * float("nan"))
    loss_of(model, data.next()).backward()
    optimizer.step()
    handle.remove()

    now = optimizer.metrics()[0]
    for name in ("d", "numerator", "denominator"):
        assert now[name] == d[name]
    assert (now["skipped_steps"], now["step"]) == (1, 21)
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(optimizer.state[model.head.weight]["z"], z)
    assert_same(dict(optimizer.state[model.head.weight]), dict(state))
    assert not torch.equal(model.blocks[0].up.weight, before["blocks.0.up.weight"])
    train(model, optimizer, data, 5)
    assert all(p.isfinite().all() for p in model.parameters())


def test_only_bad_gradients_are_a_step_that_did_not_happen():
    """If all of a group's gradients are bad, the step counts as skipped; if it has none, not at all."""
    model = nn.Linear(3, 2, bias=False)
    groups = [{"params": model.parameters()}, {"params": [nn.Parameter(torch.ones(3))]}]
    optimizer = ProdigyPlusScheduleFree(groups, fused_back_pass=True)
    optimizer.fuse_backward(model)
    for scale in (1.0, float("inf"), 1.0):
        (model(torch.ones(4, 3)).sum() * scale).backward()
        optimizer.step()
    counts = [(int(group["step"]), int(group["skipped_steps"])) for group in optimizer.metrics()]
    assert counts == [(2, 1), (0, 0)]


def test_gradient_accumulation_is_refused_before_anything_moves():
    model, _optimizer = model_and_optimizer()
    data = Walks(4)
    loss_of(model, data.next()).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"second gradient.*fused_back_pass.*optimizer\.step\(\)"):
        loss_of(model, data.next()).backward()
    assert_same([p.detach() for p in model.parameters()], before)


def test_eval_mode_is_refused():
    model, optimizer = model_and_optimizer()
    data = Walks(4)
    train(model, optimizer, data, 1)
    optimizer.eval()
    with pytest.raises(
        RuntimeError, match=r"parameter '.*' has a gradient in eval mode.*optimizer\.train\(\)"
    ):
        loss_of(model, data.next()).backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda optimizer, saved: optimizer.state_dict(),
        lambda optimizer, saved: optimizer.eval(),
        lambda optimizer, saved: optimizer.load_state_dict(saved),
        lambda optimizer, saved: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        lambda optimizer, saved: copy.deepcopy(optimizer),
        lambda optimizer, saved: optimizer.averaged_parameters().__enter__(),
    ],
)
def test_between_backward_and_step_nothing_can_be_saved(call):
    model, optimizer = model_and_optimizer()
    data = Walks(4)
    train(model, optimizer, data, 1)
    saved = optimizer.state_dict()
    loss_of(model, data.next()).backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) first"):
        call(optimizer, saved)
    optimizer.train()  # allowed, since it already is in train mode
    optimizer.step()
    optimizer.state_dict()


def test_forgotten_hooks_are_told():
    model = nn.Linear(3, 2)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    model(torch.ones(3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"fuse_backward\(model\)"):
        optimizer.step()


def test_a_model_that_is_frozen():
    model, optimizer = model_and_optimizer(fused=False)
    optimizer.param_groups[0]["fused_back_pass"] = True
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^fuse_backward: no parameter .* requires gradients"):
        optimizer.fuse_backward(model)


def test_a_model_of_somebody_else():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    with pytest.raises(ValueError, match="fused_back_pass=True"):
        optimizer.fuse_backward(other)
    with pytest.raises(ValueError, match="fused_back_pass=True"):
        ProdigyPlusScheduleFree(other.parameters()).fuse_backward(other)


def test_one_of_several_processes(monkeypatch):
    """With several processes it is refused at once: DDP may be wrapped around the model later."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*ShardedProdigyPlusScheduleFree"):
        model_and_optimizer()


def test_handles_take_the_hooks_off():
    model = nn.Linear(3, 2)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    for handle in optimizer.fuse_backward(model):
        handle.remove()
    model(torch.ones(3)).sum().backward()
    assert model.weight.grad is not None


def test_an_optimizer_that_is_gone_moves_nothing():
    model = nn.Linear(3, 2)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    optimizer.fuse_backward(model)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model(torch.ones(3)).sum().backward()
    assert model.weight.grad is not None


def test_a_step_with_lr_zero_makes_state_only():
    """torch's checkpoint helpers make such a step, with gradients that no backward pass computed."""
    model, optimizer = model_and_optimizer()
    optimizer.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    assert int(optimizer.metrics()[0]["step"]) == 0
    expected, optimizer_expected = model_and_optimizer()
    train(model, optimizer, Walks(4), 20)
    train(expected, optimizer_expected, Walks(4), 20)
    assert optimizer.metrics()[0]["d"] > 1e-6
    assert_same(dict(model.named_parameters()), dict(expected.named_parameters()))


def test_backward_passes_in_several_threads(monkeypatch):
    """As autograd's, which has one for each device: none begins a step that another has begun."""
    towers = [nn.Linear(4, 4, bias=False) for _ in range(2)]
    model = nn.ModuleList(towers)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    optimizer.fuse_backward(model)
    begin = optimizer._begin

    def slowly(*, in_backward):
        time.sleep(0.2)
        return begin(in_backward=in_backward)

    monkeypatch.setattr(optimizer, "_begin", slowly)
    threads = [threading.Thread(target=lambda t=t: t(torch.ones(2, 4)).sum().backward()) for t in towers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert optimizer._cache.steps.current.taken == {*model.parameters()}
    optimizer.step()
