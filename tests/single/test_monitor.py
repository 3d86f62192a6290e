"""What an optimiser notices about a run and warns of, once, without waiting for the device."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from prodigyplus import ProdigyPlusScheduleFree, monitor
from tests.single.problems import Fed, pair, run
from tests.watching import Watch


@pytest.fixture
def often(monkeypatch):
    """Make the monitor look at the numbers every fifth step, and warn after 20 skipped steps."""
    monkeypatch.setattr(monitor, "_NUMBERS_EVERY", 5)
    monkeypatch.setattr(monitor, "_MOST_SKIPPED", 20)


def poisoned(optimizer, problem, steps):
    for _ in range(steps):
        problem.backward()
        problem.parameters[0].grad.fill_(torch.nan)
        optimizer.step()


def test_steps_skipped_in_a_row(often):
    problem, optimizer = pair((4, 4))
    for _ in range(10):  # not in a row
        poisoned(optimizer, problem, 4)
        run(optimizer, problem, 1)
    with pytest.warns(UserWarning, match="were all skipped") as caught:
        poisoned(optimizer, problem, 100)
    assert len(caught) == 1


def test_no_gradients_at_all():
    """As when a model is wrapped after its parameters were passed to the optimiser."""
    parameters = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)]
    optimizer = ProdigyPlusScheduleFree(parameters)
    for _ in range(9):
        optimizer.step()
    with pytest.warns(UserWarning, match="none of the optimiser's parameters has had a gradient in 10 steps"):
        optimizer.step()
    for _ in range(20):  # it warns only once
        optimizer.step()


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_that_are_rare_or_that_nobody_wants(trained):
    parameter = nn.Parameter(torch.ones(4), requires_grad=trained)
    optimizer = ProdigyPlusScheduleFree([parameter])
    for step in range(30):
        parameter.grad = torch.ones(4) if trained and step % 10 == 9 else None
        optimizer.step()


def test_parameters_that_share_memory():
    """As layers that were tied by ``.data``: the average of both would be computed from the same weights."""
    parameters = [nn.Parameter(torch.ones(2, 4)) for _ in range(3)]
    parameters[2].data = parameters[0].data
    views = [nn.Parameter(row) for row in torch.ones(2, 4)]  # of one storage, but other elements
    optimizer = ProdigyPlusScheduleFree([{"params": parameters}, {"params": views}])
    for p in (*parameters, *views):
        p.grad = torch.ones_like(p)
    expected = r"parameter 0 of param_groups\[0\] and parameter 2 of param_groups\[0\] share memory"
    with pytest.warns(UserWarning, match=expected) as caught:
        optimizer.step()
    assert len(caught) == 1
    optimizer.step()


def test_gradients_that_come_no_more():
    """As under FSDP2 without a backward pass that reduces them."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = ProdigyPlusScheduleFree([parameter])
    parameter.grad = torch.ones(4)
    optimizer.step()
    parameter.grad = None
    for _ in range(9):
        optimizer.step()
    with pytest.warns(UserWarning, match=r"set_requires_gradient_sync\(True\)"):
        optimizer.step()


def test_the_limit_is_500_steps():
    problem, optimizer = pair((4,))
    poisoned(optimizer, problem, 499)
    with pytest.warns(UserWarning, match="were all skipped"):
        poisoned(optimizer, problem, 110)


@pytest.mark.parametrize("options", [{}, {"split_groups_mean": False}, {"split_groups": False}], ids=str)
def test_step_sizes_far_apart(often, options):
    """The monitor warns only of groups that share a mean and both have evidence."""
    problem = Fed((40, 40), (30,))
    groups = [{"params": [p]} for p in problem.parameters]
    optimizer = ProdigyPlusScheduleFree(groups, **options)
    run(optimizer, problem, 40)
    for group in optimizer.param_groups:
        assert group["in_mean"] == (not options)
    optimizer.param_groups[1]["d"] = 1e4 * float(optimizer.param_groups[0]["d"])
    if options:
        run(optimizer, problem, 20)
        return
    with pytest.warns(UserWarning, match=r"d is .* in param_groups\[0\].*split_groups=False") as caught:
        run(optimizer, problem, 20)
    assert len(caught) == 1


def test_a_group_without_evidence_is_not_told_of(often):
    problem = Fed((40, 40), (30,))
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in problem.parameters])
    for _ in range(60):
        problem.backward()
        problem.parameters[1].grad.zero_()
        optimizer.step()


SCHEDULES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 100),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 100),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1.0, 60, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=5),
}


def scheduled(optimizer, problem, scheduler):
    arguments = [1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []
    for _ in range(60):
        run(optimizer, problem, 1)
        scheduler.step(*arguments)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_decays(schedule):
    problem, optimizer = pair((4, 4))
    scheduler = schedule(optimizer)
    with pytest.warns(UserWarning, match=r"lr of param_groups\[0\] has fallen from 1 to") as caught:
        scheduled(optimizer, problem, scheduler)
    assert len(caught) == 1


def test_momentum_that_a_schedule_changes():
    """The averaged weights are computed from β1."""
    problem, optimizer = pair((4, 4))
    optimizer.param_groups[0]["betas"] = (0.95, 0.99)  # a decision, once
    run(optimizer, problem, 5)
    with pytest.warns(UserWarning, match=r"betas\[0\] of param_groups\[0\] has changed") as caught:
        cycled(optimizer, problem)
    assert len(caught) == 1


def test_momentum_that_is_changed_once():
    """A decision, even in many groups."""
    problem = Fed(*((4, 4),) * 5)
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in problem.parameters])
    run(optimizer, problem, 5)
    for group in optimizer.param_groups:
        group["betas"] = (0.95, 0.99)
    run(optimizer, problem, 20)


def cycled(optimizer, problem):
    for step in range(20):
        optimizer.param_groups[0]["betas"] = (0.95 - 0.005 * step, 0.99)
        run(optimizer, problem, 1)


def test_without_the_average_momentum_may_change():
    problem, optimizer = pair((4, 4), use_schedulefree=False)
    cycled(optimizer, problem)


def test_a_group_that_was_removed():
    """Something else may train its parameters, without a word."""
    problem = Fed((4, 4), (3,))
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in problem.parameters])
    run(optimizer, problem, 12)
    optimizer.param_groups.pop()
    for _ in range(60):
        run(optimizer, problem, 1)
        with torch.no_grad():
            problem.parameters[1].add_(0.1)


HARMLESS = {
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 20)),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=30),
    "held still": lambda o: lr_scheduler.LambdaLR(o, lambda step: float(step < 30)),
    "for a moment": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5 if 30 <= step < 38 else 1.0),
}


@pytest.mark.parametrize("schedule", HARMLESS.values(), ids=HARMLESS)
def test_schedules_that_do_not_decay(schedule):
    problem, optimizer = pair((4, 4))
    scheduled(optimizer, problem, schedule(optimizer))


def test_without_the_average_a_schedule_is_right():
    problem, optimizer = pair((4, 4), use_schedulefree=False)
    scheduled(optimizer, problem, SCHEDULES["cosine"](optimizer))


@pytest.mark.parametrize("lr", [5e-5, 1e-3])
def test_a_rate_for_another_optimiser(lr):
    with pytest.warns(UserWarning, match=rf"lr={lr} looks like another.*leave it at 1\.0") as caught:
        ProdigyPlusScheduleFree([{"params": [p]} for p in Fed((4,), (4,)).parameters], lr=lr)
    assert len(caught) == 1


def stays(monkeypatch, steps=40, **options):
    """A run whose gradients are far smaller than eps."""
    monkeypatch.setattr(monitor, "_STEPS_TO_GROW", 20)
    problem = Fed((4, 4), (4,))
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in problem.parameters], **options)
    for _ in range(steps):
        problem.backward()
        for p in problem.parameters:
            p.grad.mul_(1e-12)
        optimizer.step()
    return optimizer


def test_a_step_size_that_stays_at_d0(often, monkeypatch):
    with pytest.warns(
        UserWarning, match=r"after 20 steps the step size is still d0.*lr may be far below 1.*eps=None"
    ) as caught:
        optimizer = stays(monkeypatch)
    assert len(caught) == 1
    assert optimizer.scalars()["d/0"] < 2e-6


GROWS = {"eps": None, "use_stableadamw": False}


@pytest.mark.parametrize("options", [GROWS, {"d0": 1e-3}, {"prodigy_steps": 3}], ids=str)
def test_a_step_size_that_grows_or_was_chosen(often, monkeypatch, options):
    stays(monkeypatch, **options)


CHANGES = {
    "clamp_": lambda p: p.clamp_(-0.1, 0.1),
    "renorm_": lambda p: p.renorm_(2, 0, 0.1),
    "copy_": lambda p: p.copy_(p / p.norm()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_something_else_changes(change):
    problem, optimizer = pair((40, 33), (5,))

    def act():
        for _ in range(100):
            run(optimizer, problem, 1)
            with torch.no_grad():
                change(problem.parameters[0])

    with pytest.warns(UserWarning, match=r"parameter 0 of param_groups\[0\].*\(1 of its") as caught:
        act()
    assert len(caught) == 1


def test_an_embedding_with_max_norm():
    words = nn.Embedding(40, 8, max_norm=1.0)
    optimizer = ProdigyPlusScheduleFree(words.parameters())

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            words(torch.arange(10)).sum().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"optimizer\.constrain"):
        train(60)
    optimizer = ProdigyPlusScheduleFree(words.parameters())
    optimizer.constrain(words.weight, lambda w: torch.renorm(w, 2, 0, 1.0))
    train(60)  # without a warning


@pytest.mark.parametrize("fused", [False, True])
def test_what_the_optimiser_and_its_user_rightly_do(fused):
    """Evaluations, and a checkpoint that is loaded in mid-run, are no reason to warn."""
    model = nn.Linear(4, 4)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=fused)
    if fused:
        optimizer.fuse_backward(model)
    for step in range(120):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.eval()
        optimizer.train()
        with optimizer.averaged_parameters():
            pass
        if step % 60 == 30:
            model.load_state_dict(model.state_dict())
            optimizer.load_state_dict(optimizer.state_dict())


def test_nothing_waits_for_a_device(often):
    """Numbers are sent to the host, and read at a later step when they have arrived; on the CPU, at once."""
    problem, optimizer = pair((4, 4))
    with Watch(reads=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, problem, 4)
        sent = []
        optimizer._cache.monitor._read = sent.append
    run(optimizer, problem, 10)
    assert [one.counts.tolist() for one in sent] == [[[5, 0]], [[10, 0]]]


def test_what_has_not_come_yet_is_read_later(often, monkeypatch):
    class Event:
        def __init__(self, device):
            self.device, self.asked = device, 0

        def record(self, stream):
            assert stream == "the stream of cpu"

        def query(self):
            self.asked += 1
            return self.asked > 3

    problem, optimizer = pair((4, 4))
    seen = []
    monkeypatch.setattr(monitor, "_is_on_host", lambda device: False)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"the stream of {device}")
    run(optimizer, problem, 5)
    optimizer._cache.monitor._read = seen.append
    for step in range(6, 10):
        assert len(seen) == 0, step
        run(optimizer, problem, 1)
    assert [one.counts.tolist() for one in seen] == [[[5, 0]]]
