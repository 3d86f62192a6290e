"""Stochastic rounding, of bfloat16 weights and of z in bfloat16."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.formulas import schedule_free, stochastic_rounding
from tests.single.problems import Fed, assert_same, pair, run, snapshot


def noise_of(count, step=1, parameter=1):
    positions = torch.arange(count, dtype=torch.int32)
    return stochastic_rounding.noise(
        [positions], stochastic_rounding.seeds(torch.tensor(step), torch.tensor([parameter]))
    )[0]


def test_noise_is_uniform():
    bits = noise_of(1 << 18)
    for half in (stochastic_rounding.low_half(bits), stochastic_rounding.high_half(bits)):
        assert half.min() >= 0
        assert half.max() < 1 << 16
        counts = torch.bincount((half >> 8).long(), minlength=256).double()
        expected = half.numel() / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert 160 < chi_square < 370  # 255 degrees of freedom: this is p = 1e-6 on both sides


def test_noise_is_uncorrelated():
    """Between neighbours, consecutive steps, consecutive parameters, and the two halves."""
    count = 1 << 18

    def centred(values):
        return (values.double() - 32767.5) / 65536 * 12**0.5

    base = centred(stochastic_rounding.low_half(noise_of(count)))
    others = [
        base.roll(1),
        base.roll(64),
        centred(stochastic_rounding.low_half(noise_of(count, step=2))),
        centred(stochastic_rounding.low_half(noise_of(count, parameter=2))),
        centred(stochastic_rounding.high_half(noise_of(count))),
    ]
    for other in others:
        assert abs((base * other).mean()) < 5 / count**0.5


def test_rounding_is_to_a_neighbour_and_unbiased():
    values = torch.linspace(1.0, 1.0 + 2**-7, 33)[1:-1].repeat_interleave(4096)
    target = torch.empty_like(values, dtype=torch.bfloat16)
    stochastic_rounding.write_(target, values, stochastic_rounding.low_half(noise_of(values.numel())))
    assert set(target.tolist()) == {1.0, 1.0 + 2**-7}
    mean = target.double().view(-1, 4096).mean(1)
    assert (mean - values.double().view(-1, 4096).mean(1)).abs().max() < 5 * 2**-7 * 0.5 / 64


def test_what_needs_no_rounding_is_not_changed():
    values = torch.tensor(
        [0.0, -0.0, 1.0, -3.5, float("inf"), -float("inf"), 2.0**-126], dtype=torch.bfloat16
    )
    target = torch.empty_like(values)
    for step in range(50):
        stochastic_rounding.write_(
            target, values.float(), stochastic_rounding.high_half(noise_of(values.numel(), step))
        )
        assert_same(target, values)


def test_same_run_same_bits_and_another_place_other_bits():
    runs = [pair((40, 12), (40, 12), dtype=torch.bfloat16) for _ in range(2)]
    for seed, (problem, optimizer) in enumerate(runs):
        torch.manual_seed(seed)  # the process's random state must not matter
        run(optimizer, problem, 60)
    assert_same(snapshot(runs[0][1]), snapshot(runs[1][1]))
    assert not torch.equal(noise_of(100, parameter=1), noise_of(100, parameter=2))


def test_small_steps_are_lost_to_the_nearest_and_kept_on_average():
    def moved(stochastic_rounding):
        parameter = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = ProdigyPlusScheduleFree(
            [parameter], d0=1e-4, prodigy_steps=1, stochastic_rounding=stochastic_rounding
        )
        for _ in range(20):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return 1 - optimizer.state[parameter]["z"].float().mean().item()

    reference = torch.nn.Parameter(torch.ones(11))
    exact = ProdigyPlusScheduleFree([reference], d0=1e-4, prodigy_steps=1)
    for _ in range(20):
        reference.grad = torch.ones_like(reference)
        exact.step()
    expected = 1 - exact.state[reference]["z"].mean().item()
    assert moved(False) == 0
    assert moved(True) == pytest.approx(expected, rel=0.05)


def test_bfloat16_learns():
    dtype = torch.bfloat16
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.GELU(), torch.nn.Linear(64, 5)).to(dtype)
    inputs = torch.randn(256, 20, dtype=dtype)
    labels = (inputs.float() @ torch.randn(20, 5)).argmax(1)
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    for _ in range(250):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs).float(), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_z_in_bfloat16_is_less_than_half_the_state():
    problem, optimizer = pair((512, 256), (64, 40, 3, 3), bfloat16_z=True)
    run(optimizer, problem, 2)
    held = [value for state in optimizer.state.values() for value in state.values()]
    assert sum(value.nbytes for value in held) <= 2.6 * sum(p.numel() for p in problem.parameters)
    assert all(state["z_minus_y"].dtype == torch.bfloat16 for state in optimizer.state.values())
    assert all(p.dtype == torch.float32 for p in problem.parameters)
    wide, others = pair((40, 12), dtype=torch.float64, bfloat16_z=True)
    run(others, wide, 2)
    assert others.state[wide.parameters[0]]["z"].dtype == torch.float64


def test_z_in_bfloat16_is_on_average_what_it_is_in_float32():
    """The steps are a hundred times smaller than bfloat16's last bit; y, z and the average still follow."""

    def moved(**options):
        parameter = torch.nn.Parameter(torch.ones(1 << 14))
        optimizer = ProdigyPlusScheduleFree([parameter], d0=1e-4, prodigy_steps=1, **options)
        for _ in range(40):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        y = parameter.detach().clone()
        z = schedule_free.base_iterate(y, optimizer.state[parameter])
        optimizer.eval()
        return [1 - values.mean().item() for values in (y, z, parameter.detach())]

    assert moved(bfloat16_z=True) == pytest.approx(moved(), rel=0.05)
    assert moved(bfloat16_z=True, stochastic_rounding=False) == pytest.approx(moved(), rel=0.05)


def test_z_in_bfloat16_leaves_weights_as_they_are():
    """A fine-tuned model keeps its bits while gradients are zero, then moves as with z in float32."""
    problem, optimizer = pair((400, 80), bfloat16_z=True)
    (p,) = problem.parameters
    with torch.no_grad():
        p.mul_(1 + 2**-20 * torch.arange(80))  # bits that bfloat16 would lose
    before = p.detach().clone()
    reference = torch.nn.Parameter(before.clone())
    other = ProdigyPlusScheduleFree([reference])
    for _ in range(20):
        p.grad, reference.grad = torch.zeros_like(p), torch.zeros_like(p)
        optimizer.step()
        other.step()
    assert_same(p.detach(), before)

    problem.backward()
    reference.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert not torch.equal(p, before)
    # z is off by the rounding of z − y, which is far smaller than z.
    torch.testing.assert_close(p, reference, rtol=2**-23, atol=1e-8)
    optimizer.eval()
    other.eval()
    torch.testing.assert_close(p, reference, rtol=2**-22, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"use_cautious": True}, {"weight_decay": 0.1}], ids=str)
def test_z_in_bfloat16_changes_nothing_in_a_step_that_is_skipped(options):
    problem, optimizer = pair((40, 33), bfloat16_z=True, d0=1e-3, **options)
    run(optimizer, problem, 20)
    before = snapshot(optimizer)
    problem.backward()
    problem.parameters[0].grad[3, 3] = torch.nan
    optimizer.step()
    weights, state = snapshot(optimizer)
    assert_same(weights, before[0])
    assert_same(state["state"], before[1]["state"])


def test_a_state_that_keeps_z_itself_goes_on():
    """As earlier versions saved it: z itself, in bfloat16."""
    problem, optimizer = pair((40, 33))
    run(optimizer, problem, 20)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["bfloat16_z"] = True
    saved["state"][0]["z"] = saved["state"][0]["z"].bfloat16()
    _, other = pair((40, 33), bfloat16_z=True)
    with pytest.warns(UserWarning, match="bfloat16_z=False"):
        other.load_state_dict(saved)
    assert not other.param_groups[0]["bfloat16_z"]
    other_problem = Fed((40, 33))
    other.param_groups[0]["params"][0].data.copy_(problem.parameters[0])
    other_problem.parameters = other.param_groups[0]["params"]
    run(other, other_problem, 2)
    assert other.state[other_problem.parameters[0]]["z"].dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"use_cautious": True}, {"use_orthograd": True}], ids=str)
def test_z_in_bfloat16_learns(options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.GELU(), torch.nn.Linear(64, 5))
    inputs = torch.randn(256, 20)
    labels = (inputs @ torch.randn(20, 5)).argmax(1)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), bfloat16_z=True, **options)
    for _ in range(250):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    optimizer.eval()
    assert torch.nn.functional.cross_entropy(model(inputs), labels) < 0.2
    optimizer.train()
    assert torch.nn.functional.cross_entropy(model(inputs), labels) < 0.2
