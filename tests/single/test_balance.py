"""``step_size="balance"``: which step size it finds, and what it does when there is none to find.

That its numbers are those of docs/algorithm.md, on every mesh and by every backend, is tested together with
all other options: in ``test_formulas.py``, ``test_exactness.py`` and the other tests that draw from the
table of options.
"""

import math

import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.formulas import balance

CLASSES = 4


def trained(steps, batch_of, loss_of=nn.functional.mse_loss, outputs=3, **options):
    """A small network that has been trained for this many steps, and its optimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, outputs))
    groups = options.pop("groups", lambda model: model.parameters())
    optimizer = ProdigyPlusScheduleFree(groups(model), step_size="balance", **options)
    train(model, optimizer, range(steps), batch_of, loss_of)
    return model, optimizer


def train(model, optimizer, steps, batch_of, loss_of):
    for step in steps:
        inputs, targets = batch_of(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        optimizer.step()


def regression(generator):
    """Inputs, and a function of them with noise."""
    inputs = torch.rand(16, 12, generator=generator) * 2 - 1
    targets = torch.tanh(inputs @ torch.linspace(-1, 1, 36).view(12, 3))
    return inputs, targets + 0.1 * (torch.rand(16, 3, generator=generator) - 0.5)


def no_meaning(generator):
    """Inputs, and random labels that have nothing to do with them."""
    return torch.rand(16, 12, generator=generator), torch.randint(CLASSES, (16,), generator=generator)


def evaluated(model, optimizer, batch_of=regression, loss_of=nn.functional.mse_loss):
    with torch.no_grad(), optimizer.averaged_parameters():
        losses = [
            loss_of(model(x), y)
            for x, y in (batch_of(torch.Generator().manual_seed(-1 - i)) for i in range(50))
        ]
    return torch.stack(losses).mean().item()


def rate(optimizer):
    group = optimizer.param_groups[0]
    return group["d"].item() * group["lr"]


def test_it_finds_a_rate_wherever_it_starts():
    """Whether d0 is 1e-8 or 1e-4, and whatever ``lr`` is, the rates and losses end much the same."""
    untrained = evaluated(*trained(0, regression))
    rates, losses = [], []
    for options in ({}, {"d0": 1e-8}, {"d0": 1e-4}, {"lr": 1 / 3}, {"lr": 3.0}):
        model, optimizer = trained(500, regression, **options)
        rates.append(rate(optimizer))
        losses.append(evaluated(model, optimizer))
    assert max(rates) < 3 * min(rates)
    assert max(losses) < 0.05 * untrained
    assert max(losses) < 1.5 * min(losses)


def test_where_there_is_nothing_to_learn_it_does_not_run_away():
    """With random labels d stops growing and falls; the average predicts no class, which is best."""
    loss_of = nn.functional.cross_entropy
    model, optimizer = trained(700, no_meaning, loss_of, CLASSES)
    highest = rate(optimizer)
    train(model, optimizer, range(700, 1600), no_meaning, loss_of)
    assert rate(optimizer) < highest < 1
    assert optimizer.metrics()[0]["d_hat"] < -balance.TARGET
    assert evaluated(model, optimizer, no_meaning, loss_of) < math.log(CLASSES) * 1.02


def test_gradients_that_end_leave_the_step_size_as_it_is():
    """Gradients of zero are no evidence, so d stays exactly where it was."""
    _, optimizer = trained(50, regression)
    before = rate(optimizer)
    for _ in range(100):
        for p in optimizer.param_groups[0]["params"]:
            p.grad.zero_()
        optimizer.step()
    assert rate(optimizer) == before


def test_state_is_that_of_schedule_free_alone():
    _, optimizer = trained(2, regression)
    kept = {key for state in optimizer.state.values() for key in state}
    assert kept == {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq_mean", "z"}


def in_two(model):
    first, *others = model.parameters()
    return [{"params": [first]}, {"params": others}]


def test_groups_share_what_they_find_together():
    """By default the groups' evidence is summed, so two groups find the d that one would."""
    (one, of_one), (two, of_two) = trained(60, regression), trained(60, regression, groups=in_two)
    for group in of_two.param_groups:
        assert group["d"].item() == pytest.approx(of_one.param_groups[0]["d"].item(), rel=1e-5)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    _, apart = trained(60, regression, groups=in_two, split_groups_mean=False)
    assert apart.param_groups[0]["d"] != apart.param_groups[1]["d"]


def test_a_group_that_comes_late_moves_by_what_the_others_have_found():
    model, optimizer = trained(60, regression)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})
    for step in range(2):
        inputs, targets = regression(torch.Generator().manual_seed(100 + step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs) * late, targets).backward()
        optimizer.step()
    first, second = optimizer.param_groups
    assert first["d"] == second["d"] > 100 * first["d0"]


def test_a_frozen_group_does_not_hold_time_still_for_the_others():
    """The first group of those that share d, as a frozen backbone, may have made no step, or fewer."""
    rates = []
    for order in (1, -1):

        def groups(model, order=order):
            model[0].requires_grad_(False)
            return [{"params": list(layer.parameters())} for layer in (model[0], model[2])[::order]]

        model, optimizer = trained(60, regression, groups=groups)
        model[0].requires_grad_(True)
        train(model, optimizer, range(60, 120), regression, nn.functional.mse_loss)
        rates.append(rate(optimizer))
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)


def test_it_is_frozen_with_prodigy_steps():
    _, optimizer = trained(40, regression, prodigy_steps=20)
    _, until_then = trained(19, regression)
    assert rate(optimizer) == rate(until_then)


def test_what_is_prodigys_is_told():
    with pytest.raises(ValueError, match=r"^step_size='balance': .* use_schedulefree=False"):
        trained(0, regression, use_schedulefree=False)
    for name, value, off in (("use_speed", True, False), ("d_coef", 2.0, 1.0), ("beta4", 0.5, 0.0)):
        with pytest.warns(UserWarning, match=f"step_size='balance' excludes {name}"):
            _, optimizer = trained(0, regression, **{name: value})
        assert optimizer.param_groups[0][name] == off


def test_the_rule_as_it_is_derived():
    """At ρ = −½ or below, d falls as 1/√k; at the target, −¼, it stays; well above, it grows as k³."""
    d, k = torch.ones(4, dtype=torch.float64), torch.full((4,), 1000)
    rho = torch.tensor([-0.5, -balance.TARGET, balance.TARGET, -5.0], dtype=torch.float64)
    averages = balance.Averages(rho.clone(), torch.ones(4, dtype=torch.float64))
    found, seen, _ = balance.next_d(d, k, averages, averages)
    torch.testing.assert_close(seen, rho)
    powers = found.log() * 1000
    torch.testing.assert_close(powers, torch.tensor([-0.5, 0.0, 3.0, -0.5], dtype=torch.float64))
