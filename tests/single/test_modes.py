"""train() and eval(), and access to the averaged weights without either."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.formulas import schedule_free
from tests.single.problems import assert_same, pair, run, snapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_and_train_come_back_to_the_weights(dtype):
    problem, optimizer = pair((40, 40), (5,), dtype=dtype)
    run(optimizer, problem, 50)
    y = [p.detach().clone() for p in problem.parameters]
    optimizer.eval()
    x = [p.detach().clone() for p in problem.parameters]
    optimizer.eval()
    assert_same([p.detach() for p in problem.parameters], x)
    assert all((a != b).any() for a, b in zip(x, y, strict=True))
    optimizer.train()
    optimizer.train()
    eps = torch.finfo(dtype).eps
    for p, before in zip(problem.parameters, y, strict=True):
        torch.testing.assert_close(p.detach(), before, rtol=4 * eps, atol=eps)


def test_average_is_the_average_of_z():
    """x is the mean of all z so far, weighted by dlr²."""
    problem, optimizer = pair((40, 40), dtype=torch.float64)
    (p,) = problem.parameters
    total, weights = torch.zeros_like(p), 0.0
    for _ in range(60):
        weight = float(optimizer.metrics()[0]["d"]) ** 2
        run(optimizer, problem, 1)
        total, weights = total + weight * optimizer.state[p]["z"], weights + weight
    optimizer.eval()
    torch.testing.assert_close(p.detach(), total / weights)


def average_after_many_steps(dtype, **options):
    """How far the average moves, as a mean over elements, in steps that follow a hundred thousand others."""
    random = torch.Generator().manual_seed(0)
    p = nn.Parameter((1 + 0.5 * torch.rand(512, generator=random)).to(dtype))
    optimizer = ProdigyPlusScheduleFree([p], d0=1e-5, prodigy_steps=1, **options)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state, (group,) = optimizer.state[p], optimizer.param_groups
    key = "z" if "z" in state else "z_minus_y"
    state[key] += 5e-3
    group["k"].fill_(100_000)
    group["weight_sum"].fill_(100_000 * 1e-5**2)
    averages = []
    for step in range(41):
        if step in (0, 40):
            with optimizer.averaged_parameters():
                averages.append(p.detach().clone().double())
        p.grad = torch.randn(512, generator=random, dtype=torch.float64).to(dtype)
        optimizer.step()
    return float((averages[1] - averages[0]).mean())


@pytest.mark.parametrize("options", [{}, {"bfloat16_z": True}, {"fused": True}], ids=str)
def test_the_average_still_moves_late_in_a_run(options):
    """Its move towards z, alone, is less than half of a weight's last bit."""
    if options.get("fused"):
        pytest.importorskip("triton")
    expected = average_after_many_steps(torch.float64)
    assert expected > 1e-6
    assert average_after_many_steps(torch.float32, **options) == pytest.approx(expected, rel=0.2)


def test_a_large_tensor_steps_in_pieces_to_the_same_bits(monkeypatch):
    found = []
    for at_once in (1 << 40, 1000):
        monkeypatch.setattr(schedule_free, "_AT_ONCE", at_once)
        problem, optimizer = pair((700, 301), (5000,), weight_decay=0.1)
        run(optimizer, problem, 3)
        found.append(snapshot(optimizer))
    assert_same(*found)


def test_step_in_eval_mode_says_what_to_call():
    problem, optimizer = pair((4, 4))
    run(optimizer, problem, 1)
    optimizer.eval()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_a_step_of_checkpoint_helpers_in_eval_mode():
    """With lr=0, a step in eval mode is allowed, and changes nothing whatever the gradients are."""
    problem, optimizer = pair((4, 4), (3,))
    run(optimizer, problem, 5)
    optimizer.eval()
    before = snapshot(optimizer)
    problem.backward()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    assert_same(snapshot(optimizer), before)


def test_without_schedulefree_there_are_no_modes():
    problem, optimizer = pair((4, 4), use_schedulefree=False)
    run(optimizer, problem, 3)
    before = snapshot(optimizer)
    optimizer.eval()
    assert_same(snapshot(optimizer), before)
    run(optimizer, problem, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_averaged_parameters_leave_no_trace(mode, dtype):
    problem, optimizer = pair((40, 40), (5,), dtype=dtype)
    run(optimizer, problem, 50)
    optimizer.eval()
    x = [p.detach().clone() for p in problem.parameters]
    optimizer.train()
    getattr(optimizer, mode)()
    before = snapshot(optimizer)
    with optimizer.averaged_parameters():
        for p, average in zip(problem.parameters, x, strict=True):
            torch.testing.assert_close(p.detach(), average, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert_same(snapshot(optimizer), before)


def test_averaged_parameters_come_back_after_an_error():
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 50)
    before = snapshot(optimizer)

    def evaluate():
        with optimizer.averaged_parameters():
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert_same(snapshot(optimizer), before)


@pytest.mark.filterwarnings("ignore:.*share memory:UserWarning")
def test_averaged_parameters_come_back_where_they_share_memory():
    shared = torch.ones(3)
    parameters = [nn.Parameter(shared), nn.Parameter(shared)]
    optimizer = ProdigyPlusScheduleFree(parameters, d0=0.1)
    for _ in range(5):
        for p in parameters:
            p.grad = torch.ones(3)
        optimizer.step()
    before = shared.clone()
    with optimizer.averaged_parameters():
        assert not torch.equal(shared, before)
    assert torch.equal(shared, before)


def test_a_learning_rate_whose_data_is_replaced():
    p, lr = nn.Parameter(torch.ones(3)), torch.tensor(1.0)
    optimizer = ProdigyPlusScheduleFree([p], lr=lr)
    for rate in (1.0, 0.0):
        lr.data = torch.tensor(rate)
        before, p.grad = p.detach().clone(), torch.ones(3)
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_averaged_state_dict(mode, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight  # tied
    model[2].bias.requires_grad_(False)
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    getattr(optimizer, mode)()
    before = snapshot(optimizer)
    saved = optimizer.averaged_state_dict(model)
    assert_same(snapshot(optimizer), before)
    # Each name has memory of its own: safetensors refuses tensors that share memory.
    assert saved["2.weight"].data_ptr() != saved["0.weight"].data_ptr()
    assert_same(saved["2.weight"], saved["0.weight"])
    save_file(saved, tmp_path / "model.safetensors")
    assert not any(value.requires_grad for value in saved.values())

    optimizer.eval()
    assert_same(dict(saved), dict(model.state_dict()))


@pytest.mark.parametrize("how", ["eval", "context"])
def test_an_averaged_state_dict_stays_the_average(how):
    """One that is taken while the model holds x does not change when the model returns to y."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    if how == "eval":
        optimizer.eval()
        x = copy.deepcopy(dict(model.state_dict()))
        saved = optimizer.averaged_state_dict(model)
        optimizer.train()
    else:
        with optimizer.averaged_parameters():
            x = copy.deepcopy(dict(model.state_dict()))
            saved = optimizer.averaged_state_dict(model)
    assert_same(dict(saved), x)
    assert not torch.equal(model[0].weight, x["0.weight"])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_averaged_state_dict_of_a_model_whose_hooks_make_tensors(mode):
    """Such hooks save a fused matrix in parts, for example: as views of the weight, or as new tensors."""

    def take_apart(module, state, prefix, _):
        first, second = state.pop(f"{prefix}weight").chunk(2)
        state.update({f"{prefix}first": first, f"{prefix}second": second * 2})

    model = nn.Linear(4, 4)
    model.register_state_dict_post_hook(take_apart)
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    getattr(optimizer, mode)()
    before = snapshot(optimizer)
    saved = optimizer.averaged_state_dict(model)
    assert_same(snapshot(optimizer), before)
    optimizer.eval()
    assert_same(dict(saved), dict(model.state_dict()))


def test_within_averaged_parameters_the_model_is_not_to_be_trained_or_gone_on_from():
    """Training would start from the average; a state dict would belong to other weights than the model's."""
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 30)
    x = optimizer.averaged_state_dict(nn.ParameterList(problem.parameters))["0"]
    before, saved = snapshot(optimizer), optimizer.state_dict()
    problem.backward()
    with optimizer.averaged_parameters():
        for call in (
            *(optimizer.step, optimizer.train, optimizer.eval, optimizer.state_dict),
            *(lambda: optimizer.load_state_dict(saved), lambda: copy.deepcopy(optimizer)),
        ):
            with pytest.raises(RuntimeError, match="leave the with-block first"):
                call()
        # Asking for the average again gives the average, not an average of the average.
        with optimizer.averaged_parameters():
            assert_same(problem.parameters[0].detach(), x)
        assert_same(problem.parameters[0].detach(), x)
        assert_same(optimizer.averaged_state_dict(nn.ParameterList(problem.parameters))["0"].detach(), x)
    assert_same(snapshot(optimizer), before)
    run(optimizer, problem, 1)


def test_which_weights_the_model_holds():
    _, optimizer = pair((4, 4))
    assert not optimizer.holds_average
    optimizer.eval()
    assert optimizer.holds_average
    optimizer.train()
    with optimizer.averaged_parameters():
        assert optimizer.holds_average
        with optimizer.averaged_parameters():
            pass
        assert optimizer.holds_average
    assert not optimizer.holds_average
    assert pair((4, 4), use_schedulefree=False)[1].holds_average


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_averaged_state_dict_in_full(mode):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrapped = torch.nn.parallel.DataParallel(model)  # names begin with "module."
    optimizer = ProdigyPlusScheduleFree(wrapped.parameters())
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    getattr(optimizer, mode)()
    saved = optimizer.averaged_state_dict(wrapped, full=True)
    optimizer.eval()
    assert_same(saved, dict(model.state_dict()))
    assert not {value.data_ptr() for value in saved.values()} & {p.data_ptr() for p in model.parameters()}


def test_a_submodule_may_be_called_module():
    """A "module" in a name is removed only where a wrapper has added it."""
    model = nn.Linear(4, 4)
    model.module = nn.Linear(4, 4)
    wrapped = torch.nn.parallel.DataParallel(nn.Sequential(model))
    optimizer = ProdigyPlusScheduleFree(wrapped.parameters())
    saved = optimizer.averaged_state_dict(wrapped, full=True)
    assert [*saved] == ["0.weight", "0.bias", "0.module.weight", "0.module.bias"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_averaged_state_dict_of_another_model(mode):
    """The optimiser does not train a copy of the model, so it has no average for it."""
    model = nn.Linear(4, 4)
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    getattr(optimizer, mode)()
    for full in (False, True):
        with pytest.raises(ValueError, match="not a copy of it"):
            optimizer.averaged_state_dict(copy.deepcopy(model), full=full)
    optimizer.averaged_state_dict(nn.Sequential(model, nn.Linear(4, 4)))  # it trains a part of this one


def test_a_group_added_in_eval_mode_is_in_eval_mode():
    problem, optimizer = pair((4, 4), (3,))
    late = nn.Parameter(torch.ones(3))
    run(optimizer, problem, 5)
    optimizer.eval()
    optimizer.add_param_group({"params": [late]})
    assert optimizer.holds_average
    optimizer.train()
    assert not optimizer.holds_average
    problem.parameters.append(late)
    run(optimizer, problem, 2)
    assert not torch.equal(late, torch.ones(3))


@pytest.mark.parametrize("saved", [False, True])
def test_a_schedule_moves_beta1_in_eval_mode(saved):
    """OneCycleLR does so if stepped after validation. train() must use the β1 that eval() used."""
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 50)
    y = problem.parameters[0].detach().clone()
    optimizer.eval()
    if saved:  # the same in a run that is loaded
        state, other = optimizer.state_dict(), ProdigyPlusScheduleFree(problem.parameters)
        other.load_state_dict(state)
        optimizer = other
    optimizer.param_groups[0]["betas"] = (0.5, 0.99)
    optimizer.train()
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(problem.parameters[0].detach(), y, rtol=4 * eps, atol=eps)


def test_check_replicas_of_one_process(monkeypatch):
    _, optimizer = pair((4, 4))
    optimizer.check_replicas()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"prodigyplus_dist\.check_replicas"):
        optimizer.check_replicas()


def test_weights_that_autocast_has_cast_before():
    """It keeps what it has cast, for all forward passes within it; the average must not meet those of y."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-2)
    x = torch.ones(4, 8)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    with torch.autocast("cpu", torch.bfloat16), optimizer.averaged_parameters():
        expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        at_y = model(x)
        with optimizer.averaged_parameters():
            found = model(x)
        after = model(x)
        optimizer.step()
        moved = model(x)
    assert torch.equal(found, expected)
    assert torch.equal(after, at_y)
    assert not torch.equal(found, at_y)
    assert not torch.equal(moved, at_y)
