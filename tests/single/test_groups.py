"""Parameter groups that are added late, frozen, empty, unused or have their own options; unusual tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.engine.alike_groups import AlikeGroups
from tests import option_table as table
from tests.single.problems import Fed, assert_same, pair, run, snapshot


def d(optimizer):
    return [float(group["d"]) for group in optimizer.metrics()]


def test_published_import_path():
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Published

    assert Published is ProdigyPlusScheduleFree


def test_groups_adapt_apart_and_move_by_their_harmonic_mean():
    problem = Fed((40, 40), (30,))
    first, second = problem.parameters
    optimizer = ProdigyPlusScheduleFree([{"params": [first]}, {"params": [second], "d_coef": 1.1}])
    run(optimizer, problem, 40)
    one, two = d(optimizer)
    assert one != two
    for group in optimizer.metrics():
        mean = 2 / (1 / one + 1 / two)
        assert float(group["step_size"] / group["effective_lr"]) == pytest.approx(mean, rel=1e-12)


def test_a_group_alone_and_in_company_without_mean_are_the_same():
    alone, optimizer_alone = pair((40, 40))
    run(optimizer_alone, alone, 40)

    problem = Fed((40, 40))
    other = nn.Parameter(torch.ones(7))
    optimizer = ProdigyPlusScheduleFree(
        [{"params": problem.parameters}, {"params": [other]}], split_groups_mean=False
    )
    for step in range(40):
        problem.backward()
        other.grad = torch.full((7,), 0.1 + step)
        optimizer.step()
    assert_same(problem.parameters[0].detach(), alone.parameters[0].detach())
    assert d(optimizer)[0] == d(optimizer_alone)[0]


def test_pooled_groups_are_one_group():
    one, optimizer_one = pair((40, 40), (30,))
    run(optimizer_one, one, 40)
    two = Fed((40, 40), (30,))
    optimizer_two = ProdigyPlusScheduleFree([{"params": [p]} for p in two.parameters], split_groups=False)
    run(optimizer_two, two, 40)
    assert d(optimizer_two) == d(optimizer_one) * 2
    first, second = optimizer_two.state_dict()["param_groups"]
    for name in ("d", "d_hat", "d_numerator", "max_d_numerator", "d_denom"):
        assert first[name] == second[name] != 0, name
    for ours, theirs in zip(one.parameters, two.parameters, strict=True):
        assert_same(ours.detach(), theirs.detach())


MIXED = [
    *table.elementwise(table.alone() + table.packed(table.together())),
    {"split_groups": False, "lr": 3.0},
]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_numbers_of_groups_move_together_as_each_for_itself(tensor_lr, monkeypatch):
    """Computing all groups' numbers at once gives the same bits as group by group, skipped steps included."""

    def act():
        problem = Fed(*[(5,), (40, 33)] * len(MIXED))
        groups = [
            {"params": problem.parameters[2 * number : 2 * number + 2], **options}
            for number, options in enumerate(MIXED)
        ]
        if tensor_lr:
            for group in groups:
                group["lr"] = torch.as_tensor(group.get("lr", 1.0)).clone()
        optimizer = ProdigyPlusScheduleFree(groups)
        for step in range(12):
            problem.backward()
            if step == 4:
                problem.parameters[0].grad.fill_(torch.nan)
            if step == 6:
                problem.parameters[2].grad = problem.parameters[3].grad = None
            optimizer.step()
        return *snapshot(optimizer), optimizer.metrics()

    together = act()
    monkeypatch.setattr(
        AlikeGroups,
        "split",
        lambda groups, *of_all: [AlikeGroups([group], *of_all) for group in groups],
    )
    assert_same(act(), together)


def test_an_operator_moves_the_numbers_of_all_groups_alike():
    def count(groups):
        problem = Fed(*[(5,)] * groups)
        optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in problem.parameters])
        run(optimizer, problem, 2)
        problem.backward()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            optimizer.step()
        # Only updates of the groups' numbers call these two operators; passes do not.
        return sum(event.count for event in seen.key_averages() if event.key in ("aten::maximum", "aten::gt"))

    assert count(2) == count(9) > 0


@pytest.mark.parametrize("idle", ["frozen", "empty", "unused"])
@pytest.mark.parametrize("options", [{}, {"split_groups_mean": False}, {"split_groups": False}], ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_an_idle_group_is_as_if_it_were_not_there(idle, options, first):
    alone, optimizer_alone = pair((40, 40), **options)
    run(optimizer_alone, alone, 40)

    problem = Fed((40, 40))
    parameter = nn.Parameter(torch.ones(3), requires_grad=idle != "frozen")
    groups = [{"params": problem.parameters}, {"params": [] if idle == "empty" else [parameter]}]
    optimizer = ProdigyPlusScheduleFree(groups[::-1] if first else groups, **options)
    run(optimizer, problem, 40)
    optimizer.eval()
    optimizer.train()

    assert d(optimizer)[first] == d(optimizer_alone)[0]
    assert_same(optimizer.state[problem.parameters[0]]["z"], optimizer_alone.state[alone.parameters[0]]["z"])
    assert_same(parameter.detach(), torch.ones(3))
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, problem, 1)


def test_a_group_without_a_learning_rate_does_not_hold_the_others():
    problem = Fed((40, 40), (30,))
    first, second = problem.parameters
    optimizer = ProdigyPlusScheduleFree([{"params": [first]}, {"params": [second], "lr": 0.0}])
    run(optimizer, problem, 60)
    metrics = optimizer.metrics()[0]
    assert float(metrics["step_size"] / metrics["effective_lr"]) == pytest.approx(float(metrics["d"]))
    assert float(metrics["d"]) > 1e-4


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("held", [0, 20])
@pytest.mark.parametrize(
    "options", [{}, {"use_speed": True}, {"use_speed": "relative"}, {"step_size": "balance"}], ids=str
)
def test_what_does_not_move_shows_nothing_of_a_step_size(options, held, tensor):
    """In a pool of groups, one that lr=0 holds, at once or after some steps, counts as if it were frozen."""
    found = []
    for lr in (0.0, None):
        problem = Fed((10,), (40, 25))
        first, second = problem.parameters
        groups = [{"params": [first]}, {"params": [second]}]
        optimizer = ProdigyPlusScheduleFree(groups, split_groups=False, **options)
        run(optimizer, problem, held)
        if lr is None:
            second.requires_grad_(False)
        else:
            optimizer.param_groups[1]["lr"] = torch.tensor(lr) if tensor else lr
        kept = second.detach().clone()
        for _ in range(60):
            problem.backward()
            if lr is None:
                second.grad = None
            optimizer.step()
        assert torch.equal(second, kept)
        found.append((d(optimizer)[0], first.detach()))
    (of_held, weights), (of_frozen, same) = found
    assert of_held == pytest.approx(of_frozen)
    torch.testing.assert_close(weights, same)


def test_a_held_group_keeps_its_step_size():
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 30)
    before = evidence_of(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, problem, 30)
    assert evidence_of(optimizer) == before


def evidence_of(optimizer):
    """What the step size is made of."""
    group = optimizer.state_dict()["param_groups"][0]
    return [group[name] for name in ("d", "d_hat", "d_numerator", "max_d_numerator", "d_denom", "shared_d")]


def test_two_optimisers_from_the_same_groups():
    problem, other = Fed((40, 40)), Fed((40, 40))
    groups = [{"params": problem.parameters}]
    first = ProdigyPlusScheduleFree(groups)
    run(first, problem, 30)
    before = d(first)
    groups[0]["params"] = other.parameters
    second = ProdigyPlusScheduleFree(groups)
    assert d(first) == before
    run(second, other, 5)
    run(first, problem, 1)
    assert [int(o.metrics()[0]["step"]) for o in (first, second)] == [31, 5]


def test_groups_of_another_optimiser():
    problem = Fed((40, 40))
    groups = [{"params": problem.parameters}]
    first = ProdigyPlusScheduleFree(groups, prodigy_steps=30)
    run(first, problem, 40)
    first.eval()
    groups[0]["params"] = Fed((40, 40)).parameters
    second = ProdigyPlusScheduleFree(groups, prodigy_steps=30)
    problem.parameters = groups[0]["params"]
    run(second, problem, 25)
    assert d(second)[0] > 1e-5
    assert int(second.metrics()[0]["step"]) == 25


def test_a_pooled_group_that_comes_after_the_step_size_is_frozen():
    problem, optimizer = pair((40, 40), split_groups=False, prodigy_steps=40)
    run(optimizer, problem, 50)
    problem.parameters.append(nn.Parameter(torch.ones(30)))
    optimizer.add_param_group({"params": problem.parameters[1:]})
    run(optimizer, problem, 2)
    assert d(optimizer)[1] == d(optimizer)[0] > 1e-5


def test_what_state_there_is_cannot_change():
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 2)
    optimizer.param_groups[0]["use_schedulefree"] = False
    with pytest.raises(RuntimeError, match="use_schedulefree=False"):
        optimizer.step()
    assert int(optimizer.metrics()[0]["step"]) == 2


def test_an_unused_parameter_does_not_disturb_the_count():
    problem, optimizer = pair((40, 40), (30,))
    for step in range(20):
        problem.backward()
        if step % 2:
            problem.parameters[1].grad = None
        optimizer.step()
    assert int(optimizer.metrics()[0]["step"]) == 20


def test_a_step_without_any_gradient_changes_nothing():
    """Only the count of calls changes, which ``prodigy_steps`` goes by."""
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 5)
    before = snapshot(optimizer)
    problem.parameters[0].grad = None
    optimizer.step()
    before[1]["param_groups"][0]["calls"] += 1
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(
    "options", [{}, {"factored": False}, {"eps": None, "use_stableadamw": False}], ids=str
)
def test_gradients_of_zero(options):
    """Gradients of zero move no weight and leave d where it was; later gradients are learnt from."""
    problem, optimizer = pair((40, 40), (3,), **options)
    weights = [p.detach().clone() for p in problem.parameters]
    for p in problem.parameters:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert_same([p.detach() for p in problem.parameters], weights)
    assert d(optimizer) == [1e-6]
    run(optimizer, problem, 40)
    assert d(optimizer)[0] > 1e-5


def test_a_parameter_that_comes_late_starts_from_its_weight_of_then():
    problem, optimizer = pair((40, 40), (30,))
    for _ in range(10):
        problem.backward()
        problem.parameters[1].grad = None
        optimizer.step()
    late = problem.parameters[1]
    assert late not in optimizer.state
    with torch.no_grad():
        late.fill_(2.0)
    run(optimizer, problem, 1)
    assert_same(optimizer.state[late]["p0"], torch.full((3,), 2.0))


def test_group_added_in_mid_run():
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 30)
    added = Fed((12, 40), seed=1)
    optimizer.add_param_group({"params": added.parameters, "d0": 1e-4, "weight_decay": 0.1})
    assert d(optimizer)[1] == pytest.approx(1e-4)
    for _ in range(40):
        added.backward()
        run(optimizer, problem, 1)
    assert int(optimizer.metrics()[0]["step"]) == 70
    assert int(optimizer.metrics()[1]["step"]) == 40
    assert d(optimizer)[1] > 1e-4


@pytest.mark.parametrize("options", [{}, {"split_groups": False}, {"step_size": "balance"}], ids=str)
def test_a_group_added_in_mid_run_warms_up(options):
    """Its second moment begins at zero: moved by the full step size, its weights would leap."""
    problem, optimizer = pair((40, 40), d0=1e-4, **options)
    run(optimizer, problem, 30)
    size = float(optimizer.metrics()[0]["step_size"])
    added, at_once = Fed((12, 40), seed=1), Fed((12, 40), seed=1)
    optimizer.add_param_group({"params": added.parameters})
    optimizer.add_param_group({"params": at_once.parameters, "warmup_steps": 0})
    assert [group["warmup_steps"] for group in optimizer.param_groups] == [0, 100, 0]
    before = added.parameters[0].detach().clone()
    for _ in range(2):
        for late in (added, at_once):
            late.backward()
        run(optimizer, problem, 1)
    moved = [(late.parameters[0] - before).square().mean().sqrt() for late in (added, at_once)]
    assert moved[0] <= size
    assert moved[1] > 5 * size


def test_a_group_that_grows_a_step_size_of_its_own_needs_no_warm_up():
    problem, optimizer = pair((40, 40), split_groups_mean=False)
    run(optimizer, problem, 30)
    optimizer.add_param_group({"params": Fed((12, 40)).parameters})
    assert optimizer.param_groups[1]["warmup_steps"] == 0


def test_group_added_in_eval_mode_is_in_eval_mode():
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 3)
    optimizer.eval()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    optimizer.train()
    run(optimizer, problem, 1)


def test_options_of_a_group_may_change_between_steps():
    problem, optimizer = pair((40, 40))
    run(optimizer, problem, 3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(3):
        run(optimizer, problem, 1)
        schedule.step()
    assert float(optimizer.metrics()[0]["effective_lr"]) < 0.5


def test_named_parameters():
    model = nn.Linear(3, 2)
    optimizer = ProdigyPlusScheduleFree(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_a_parameter_that_is_appended_to_a_named_group():
    model, more = nn.Linear(3, 2), nn.Parameter(torch.ones(3))
    optimizer = ProdigyPlusScheduleFree(model.named_parameters())
    optimizer.param_groups[0]["params"].append(more)
    (model(more) * more[:2]).sum().backward()
    optimizer.step()
    assert optimizer.state[more]


def test_a_negative_view_as_gradient():
    found = []
    for resolved in (False, True):
        problem, optimizer = pair((12, 8), (9,))
        for _ in range(5):
            problem.backward()
            for p in problem.parameters:
                negative = torch.complex(torch.zeros_like(p.grad), -p.grad).conj().imag
                assert negative.is_neg()
                p.grad = negative.resolve_neg() if resolved else negative
            optimizer.step()
        found.append([p.detach() for p in problem.parameters])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_closure():
    model = nn.Linear(3, 2)
    optimizer = ProdigyPlusScheduleFree(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(200):
        last = optimizer.step(closure)
    assert last < 0.5 * first


@pytest.mark.parametrize("options", [{}, {"factored": False}, {"use_schedulefree": False}], ids=str)
def test_memory_format_does_not_matter(options):
    """Channels-last weights and transposed gradients give the results of contiguous ones."""
    plain, optimizer_plain = pair((40, 8, 3, 3), (40, 12), **options)
    other = Fed((40, 8, 3, 3), (40, 12))
    conv, matrix = other.parameters
    conv.data = conv.data.contiguous(memory_format=torch.channels_last)
    optimizer = ProdigyPlusScheduleFree(other.parameters, **options)
    for _ in range(40):
        plain.backward()
        optimizer_plain.step()
        other.backward()
        conv.grad = conv.grad.contiguous(memory_format=torch.channels_last)
        matrix.grad = matrix.grad.t().contiguous().t()
        optimizer.step()
    assert conv.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(plain.parameters, other.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"factored": False}, {"eps": None, "use_stableadamw": False}], ids=str
)
def test_tensors_without_elements(options):
    problem, optimizer = pair((40, 40), (0,), (0, 64), (64, 0), **options)
    alone, optimizer_alone = pair((40, 40), **options)
    run(optimizer, problem, 10)
    run(optimizer_alone, alone, 10)
    assert d(optimizer) == d(optimizer_alone)
    assert not any(value.isnan().any() for state in optimizer.state.values() for value in state.values())
    optimizer.eval()
    optimizer.load_state_dict(optimizer.state_dict())


def test_lr_as_a_tensor():
    numbers, tensors = pair((40, 40)), pair((40, 40), lr=torch.tensor(1.0))
    for problem, optimizer in (numbers, tensors):
        run(optimizer, problem, 20)
    assert_same(numbers[0].parameters[0].detach(), tensors[0].parameters[0].detach())


@pytest.mark.parametrize("split", [True, False])
def test_prodigy_steps_freeze_d_and_free_its_state(split):
    problem, optimizer = pair((40, 40), prodigy_steps=10, split_groups=split)
    free, optimizer_free = pair((40, 40), split_groups=split)
    run(optimizer, problem, 9)
    run(optimizer_free, free, 9)
    assert d(optimizer) == d(optimizer_free)
    assert optimizer.state[problem.parameters[0]].keys() >= {"p0", "s"}
    run(optimizer, problem, 10)
    frozen, adapting = optimizer.metrics()[0], optimizer_free.metrics()[0]
    for name in ("d", "d_hat", "numerator", "denominator"):
        assert frozen[name] == adapting[name]
    assert not optimizer.state[problem.parameters[0]].keys() & {"p0", "s"}

    optimizer.param_groups[0]["prodigy_steps"] = 0  # too late
    with pytest.warns(UserWarning, match="stays frozen"):
        run(optimizer, problem, 3)
    assert d(optimizer) == [frozen["d"]]
    for steps in (0, 100):  # a state dict saved then can be loaded
        optimizer.param_groups[0]["prodigy_steps"] = steps
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, problem, 3)
        assert d(optimizer) == [frozen["d"]]


def test_a_step_with_lr_zero_freezes_nothing():
    """As a scheduler's first value may be. It is not counted, so d can still be left free after it."""
    problem, optimizer = pair((40, 40), prodigy_steps=3)
    run(optimizer, problem, 2)
    (group,) = optimizer.param_groups
    group["lr"] = 0.0
    run(optimizer, problem, 1)
    group |= {"lr": 1.0, "prodigy_steps": 0}
    optimizer.load_state_dict(optimizer.state_dict())
    before = d(optimizer)
    run(optimizer, problem, 5)
    assert d(optimizer) > before


def test_metrics_are_of_the_moment_they_were_asked():
    problem, optimizer = pair((40, 40))
    assert float(optimizer.metrics()[0]["d"]) == 1e-6
    run(optimizer, problem, 20)
    early = optimizer.metrics()[0]
    value = float(early["d"])
    run(optimizer, problem, 20)
    assert float(early["d"]) == value < float(optimizer.metrics()[0]["d"])
    assert set(early) == {
        "d", "d_hat", "effective_lr", "step_size", "numerator", "denominator", "step", "skipped_steps",
    }  # fmt: skip
    late = optimizer.metrics()[0]
    assert float(late["d_hat"]) == pytest.approx(float(late["numerator"] / late["denominator"]))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_of_fake_tensors_leaves_no_trace(fused):
    """Memory is estimated by such steps, in the process that then trains for real."""
    if fused:
        pytest.importorskip("triton")
        import tests.interpreting  # noqa: F401

    def act():
        problem = Fed(*[(40, 33)] * 3, *[(5,)] * 2, dtype=torch.bfloat16)
        first, *others = problem.parameters
        groups = [{"params": [first]}, {"params": others, "use_speed": True}]
        optimizer = ProdigyPlusScheduleFree(groups, fused=fused)
        run(optimizer, problem, 3)
        return optimizer

    with FakeTensorMode():
        act()
    expected = snapshot(act())
    with FakeTensorMode():
        act()
    assert_same(snapshot(act()), expected)


def test_parameters_that_get_their_memory_later():
    """A large model is built on "meta"; where torch swaps tensors, its parameters stay the same objects."""

    def act(device):
        layer = nn.Linear(6, 3, device=device)
        optimizer = ProdigyPlusScheduleFree(layer.parameters(), d0=1e-2)
        layer.to_empty(device="cpu")
        torch.manual_seed(0)
        layer.reset_parameters()
        for _ in range(3):
            layer(torch.ones(2, 6)).sum().backward()
            optimizer.step()
        return snapshot(optimizer)

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        found, expected = act("meta"), act("cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    assert expected[1]["param_groups"][0]["k"] == 3
    assert found[1]["param_groups"] == expected[1]["param_groups"]


def test_a_step_without_memory():
    problem = Fed((4, 3), (3,))
    problem.parameters = [nn.Parameter(p.to("meta")) for p in problem.parameters]
    optimizer = ProdigyPlusScheduleFree(problem.parameters)
    for _ in range(2):
        for p in problem.parameters:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert optimizer.param_groups[0]["d"].device.type == "meta"


def regression():
    """A model of two layers, and its loss on a full batch of data that it can fit."""
    random = torch.Generator().manual_seed(0)
    data = torch.randn(256, 40, generator=random)
    targets = torch.tanh(data @ torch.randn(40, 8, generator=random))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 8))
    return model, lambda: (model(data) - targets).square().mean()


IDLE = {
    "zero": ({}, lambda grad, _: grad.zero_()),
    "tiny": ({}, lambda grad, _: grad.mul_(1e-12)),
    "noise": ({}, lambda grad, random: grad.copy_(torch.randn(grad.shape, generator=random)).mul_(0.01)),
    "frozen": ({"prodigy_steps": 1}, lambda grad, _: grad),
}


@pytest.mark.parametrize("kind", IDLE)
def test_a_group_without_evidence_does_not_hold_the_others(kind):
    """In the harmonic mean, its d0 would hold the others' step size a thousand times or more too low."""
    options, change = IDLE[kind]
    model, loss = regression()
    optimizer = ProdigyPlusScheduleFree(
        [{"params": [*model[0].parameters()], **options}, {"params": [*model[2].parameters()]}]
    )
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        for p in model[0].parameters():
            change(p.grad, random)
        optimizer.step()
    idle, other = optimizer.param_groups
    assert float(other["d"]) > 1e-2
    assert float(other["shared_d"]) > 0.1 * float(other["d"])
    assert float(idle["shared_d"]) == float(other["shared_d"])


def test_a_group_that_has_just_joined_does_not_hold_the_others():
    model, loss = regression()
    model[0].requires_grad_(False)
    optimizer = ProdigyPlusScheduleFree(model[2].parameters(), d0=1e-5)

    def train(count):
        for _ in range(count):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return float(optimizer.metrics()[0]["step_size"])

    before = train(150)
    assert before > 5e-3
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [*model[0].parameters()]})
    assert all(train(count) > 0.5 * before for count in (1, 1, 8, 40))


def test_groups_that_start_together_count_together():
    """Two groups that have evidence both count in the harmonic mean, the one with the smaller d too."""
    model, loss = regression()
    optimizer = ProdigyPlusScheduleFree([{"params": [*layer.parameters()]} for layer in (model[0], model[2])])
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    one, two = (float(group["d"]) for group in optimizer.param_groups)
    assert min(one, two) > 1e-3
    for group in optimizer.param_groups:
        assert group["in_mean"] == 1
        assert float(group["shared_d"]) == pytest.approx(2 / (1 / one + 1 / two), rel=1e-12)


@pytest.mark.parametrize("scale", [0.01, 10.0])
@pytest.mark.parametrize("options", [{}, {"factored": False}, {"bfloat16_z": True}], ids=str)
def test_noise_is_no_progress(options, scale):
    """Random gradients must not raise d. When p0 was rounded, d grew a hundredfold in these 400 steps."""
    random = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(100, 60, generator=random).mul_(scale))
    optimizer = ProdigyPlusScheduleFree([p], **options)
    for _ in range(400):
        p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
    assert float(optimizer.param_groups[0]["d"]) < 5e-6


@pytest.mark.parametrize("d0", [1e-6, 1e-8])
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_progress_is_seen_whatever_the_weights_scale(scale, d0):
    """When p0 was rounded, d took ten times as long with weights of about 10, or never left a small d0."""
    random = torch.Generator().manual_seed(0)
    a, start, way = (torch.randn(shape, generator=random) for shape in ((64, 40), (40, 20), (40, 20)))
    p = nn.Parameter(start * scale)
    targets = a @ (start + 0.3 * way) * scale
    optimizer = ProdigyPlusScheduleFree([p], d0=d0 * scale)
    for _ in range(30):
        optimizer.zero_grad()
        ((a @ p - targets).square().mean() / scale**2).backward()
        optimizer.step()
    assert float(optimizer.param_groups[0]["d"]) > 10 * d0 * scale


def test_a_skipped_step_lets_no_group_join_the_mean():
    problem = Fed((5,), (5,), (5,))
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in problem.parameters])
    run(optimizer, problem, 3)
    # Each group is near enough to the mean of those before it to join; one joins per step.
    for group, d, in_mean in zip(optimizer.param_groups, (1.0, 0.1, 0.05), (1, 0, 0), strict=True):
        for name, value in (("d", d), ("in_mean", in_mean), ("shared_d", 1.0), ("k", 50)):
            group[name].fill_(value)
    problem.backward()
    problem.parameters[0].grad.fill_(torch.nan)
    optimizer.step()
    assert [float(group["shared_d"]) for group in optimizer.param_groups] == [1.0] * 3
    assert [float(group["in_mean"]) for group in optimizer.param_groups] == [1, 0, 0]
    run(optimizer, problem, 1)
    assert float(optimizer.param_groups[1]["in_mean"]) == 1
