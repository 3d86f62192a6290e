"""What each variant of the step promises, in the situations where it might go wrong."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.formulas import variants
from tests import option_table as table
from tests.single.problems import Fed, assert_same, pair, run, shapes_for


def almost_parallel(sine, dtype, size=4096):
    """A direction whose angle to the weights has this sine, and the weights; then both in float64."""
    random = torch.Generator().manual_seed(0)
    w, across = torch.randn(2, size, generator=random, dtype=torch.float64)
    w /= w.norm()
    across -= (across @ w) * w
    u = w + sine * across / across.norm()
    w, u = (3 * w).to(dtype), (7 * u).to(dtype)
    return u, w, u.double(), w.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sine", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_orthograd_where_the_direction_is_almost_parallel_to_the_weights(sine, dtype):
    """The error stays within rounding.

    What is left of the direction is off by the rounding of its elements, which grows as 1/sine. The closed
    form of its norm is off by the rounding of the sums, in float64, which grows as 1/sine².
    """
    u, w, u_exact, w_exact = almost_parallel(sine, dtype)
    left = u_exact - (u_exact @ w_exact) / (w_exact @ w_exact) * w_exact
    expected = left * u_exact.norm() / left.norm()

    along, scale, square = variants.projection(variants.dots(u[None], w[None]), dtype)
    found = (u - along * w) * scale
    rounding = 2 * torch.finfo(dtype).eps / sine + 100 * torch.finfo(torch.float64).eps / sine**2
    assert (found - expected).norm() <= rounding * expected.norm()
    assert abs(found.double() @ w_exact) <= rounding * found.double().norm() * w_exact.norm()
    assert square.double() == pytest.approx((u_exact @ u_exact).item(), rel=rounding)


@pytest.mark.parametrize(
    ("sine", "dtype"),
    [
        *((sine, dtype) for sine in (0.0, 1e-12, 1e-9) for dtype in (torch.float32, torch.float64)),
        (1e-7, torch.float32),
    ],
)
def test_orthograd_makes_no_step_of_rounding(sine, dtype):
    u, w, *_ = almost_parallel(sine, dtype)
    along, scale, _ = variants.projection(variants.dots(u[None], w[None]), dtype)
    assert ((u - along * w) * scale).norm() <= 0.05 * u.norm()


def test_orthograd_of_pieces_is_that_of_the_whole():
    """The sums may be taken in pieces, cut anywhere, as for shards."""
    u, w, *_ = almost_parallel(1e-4, torch.float32, size=(1 << 18) + 4097)
    whole = variants.projection(variants.dots(u[None], w[None]), torch.float32)
    for cut in (1, 1000, 1 << 17):
        first, second = (
            variants.dots(u[None, at], w[None, at]) for at in (slice(None, cut), slice(cut, None))
        )
        summed = variants.Dots(*(a + b for a, b in zip(first, second, strict=True)))
        for found, expected in zip(variants.projection(summed, torch.float32), whole, strict=True):
            assert found == pytest.approx(expected.item(), rel=1e-5)


def test_orthograd_of_zeros():
    zeros, ones = torch.zeros(4), torch.ones(4)
    along, scale, _ = variants.projection(variants.dots(ones[None], zeros[None]), torch.float32)
    assert (along, scale) == (0, 1)  # no weights to be orthogonal to
    along, scale, square = variants.projection(variants.dots(zeros[None], ones[None]), torch.float32)
    assert all(value.isfinite() for value in (along, scale, square))


def test_orthograd_leaves_one_element_alone():
    runs = []
    for use_orthograd in (False, True):
        problem, optimizer = pair((), (1,), (1, 1), use_orthograd=use_orthograd)
        run(optimizer, problem, 40)
        runs.append([p.detach() for p in problem.parameters])
    assert_same(runs[1], runs[0])


def test_orthograd_of_weights_that_start_at_zero():
    """After one step z is parallel to that step's direction, so the same gradient again moves it little."""
    moves = {}
    gradient = torch.randn(64)
    for use_orthograd in (False, True):
        p = nn.Parameter(torch.zeros(64))
        optimizer = ProdigyPlusScheduleFree([p], use_orthograd=use_orthograd, d0=1e-2)
        weights = []
        for _ in range(2):
            p.grad = gradient.clone()
            optimizer.step()
            weights.append(p.detach().clone())
        moves[use_orthograd] = [weights[0].norm(), (weights[1] - weights[0]).norm()]
    assert moves[True][0] == moves[False][0]
    assert moves[True][1] < 0.2 * moves[False][1]


@pytest.mark.parametrize("by_lr", [True, False])
def test_adopt_starts_with_a_step_that_moves_nothing(by_lr):
    problem, optimizer = pair((40, 12), (9,), use_adopt=True, weight_decay=1e-6, weight_decay_by_lr=by_lr)
    before = [p.detach().clone() for p in problem.parameters]
    run(optimizer, problem, 1)
    assert_same([p.detach() for p in problem.parameters], before)
    state = optimizer.state[problem.parameters[1]]
    torch.testing.assert_close(state["exp_avg_sq"], 1e-12 * problem.parameters[1].grad.square())
    assert not state["s"].any()
    run(optimizer, problem, 30)
    assert optimizer.metrics()[0]["d"] > 1e-5


@pytest.mark.parametrize("use_schedulefree", [True, False])
@pytest.mark.parametrize("factored", [True, False])
def test_adopt_with_what_comes_late(factored, use_schedulefree):
    """Rows of an embedding, and a parameter, get their first gradient when the others have a history.

    ADOPT must not divide by a second moment of zero: their first step moves nothing.
    """
    table, late = nn.Parameter(torch.ones(40, 8)), nn.Parameter(torch.ones(6))
    optimizer = ProdigyPlusScheduleFree(
        [table, late], use_adopt=True, factored=factored, use_schedulefree=use_schedulefree, d0=1e-3
    )
    random = torch.Generator().manual_seed(0)
    for step in range(30):
        table.grad = torch.randn(40, 8, generator=random)
        table.grad[20:] *= step >= 20
        if step == 20:
            before = table.detach().clone(), late.detach().clone()
        late.grad = torch.randn(6, generator=random) if step >= 20 else None
        optimizer.step()
        if step == 20:
            assert torch.equal(table[20:], before[0][20:])
            assert torch.equal(late, before[1])
            assert not torch.equal(table[:20], before[0][:20])
    assert (table - 1).abs().max() < 1
    assert not torch.equal(late, before[1])


def test_cautious_moves_nothing_against_the_gradient():
    """Also without Schedule-Free, where the published package computes the mask but does not use it."""
    for use_schedulefree in (True, False):
        problem, optimizer = pair((300,), use_cautious=True, use_schedulefree=use_schedulefree, d0=1e-3)
        run(optimizer, problem, 10)
        (p,) = problem.parameters
        kept = 0
        for _ in range(20):
            before = p.detach().clone()
            run(optimizer, problem, 1)
            moved = p.detach() - before
            assert (moved * p.grad <= 0).all()
            kept += int((moved == 0).sum())
        assert kept > 100


def test_grams_moves_everything_along_the_gradient():
    for use_schedulefree in (True, False):
        problem, optimizer = pair((300,), use_grams=True, use_schedulefree=use_schedulefree, d0=1e-3)
        (p,) = problem.parameters
        for _ in range(20):
            before = p.detach().clone()
            run(optimizer, problem, 1)
            assert ((p.detach() - before) * p.grad <= 0).all()


def test_bias_correction_warms_up():
    """Weights stay still until the second moment has averaged long enough; then steps start small."""
    problem, optimizer = pair((40, 12), use_bias_correction=True)
    before = problem.parameters[0].detach().clone()
    sizes = []
    for _ in range(200):
        run(optimizer, problem, 1)
        sizes.append(float(optimizer.metrics()[0]["effective_lr"]))
    assert sizes[:4] == [0] * 4
    assert 0 < sizes[6] < 0.3 * sizes[-1] / (1 - 0.9 * (1 - 1 / 200)) * 1.01
    assert not torch.equal(problem.parameters[0], before)


def test_speed_grows_by_the_power_it_is_held_to():
    problem, optimizer = pair((40, 12), (50,), use_speed=True)
    d = [1e-6]
    for _ in range(120):
        run(optimizer, problem, 1)
        d.append(float(optimizer.metrics()[0]["d"]))
    assert d == sorted(d)
    assert all(after <= before**0.975 * (1 + 1e-12) for before, after in pairwise(d))
    assert max(after / before for before, after in pairwise(d)) > 2**0.25  # no limiter


@pytest.mark.parametrize("use_speed", [True, "relative"])
def test_speed_does_not_look_at_the_size_of_gradients(use_speed):
    sizes = []
    for scale in (1.0, 2.0**-20):
        problem, optimizer = pair((40, 12), (50,), use_speed=use_speed, eps=None, use_stableadamw=False)
        for _ in range(80):
            problem.backward()
            for p in problem.parameters:
                p.grad *= scale
            optimizer.step()
        sizes.append(float(optimizer.metrics()[0]["d"]))
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_options_of_each_group():
    """Groups with different options move as each would in an optimiser of its own."""
    # Without bfloat16_z: rounding noise depends on a parameter's number among all.
    names = table.named("passes", "numbers", but=("split_groups", "split_groups_mean", "bfloat16_z"))
    every = [{}, *table.packed(table.alone(names) + table.together(names))]
    together = Fed(*(shape for options in every for shape in shapes_for(options, ((40, 12), (9,)))))
    parameters = together.parameters
    groups = [{"params": parameters[2 * i : 2 * i + 2], **options} for i, options in enumerate(every)]
    optimizer = ProdigyPlusScheduleFree(groups, split_groups_mean=False)
    weights = [p.detach().clone() for p in parameters]
    gradients = []
    for _ in range(40):
        together.backward()
        gradients.append([p.grad.clone() for p in parameters])
        optimizer.step()
    for i, options in enumerate(every):
        alone = [nn.Parameter(w.clone()) for w in weights[2 * i : 2 * i + 2]]
        optimizer_alone = ProdigyPlusScheduleFree(alone, **options)
        for step in gradients:
            for p, grad in zip(alone, step[2 * i : 2 * i + 2], strict=True):
                p.grad = grad.clone()
            optimizer_alone.step()
        assert_same(alone, parameters[2 * i : 2 * i + 2], str(options))
        assert optimizer_alone.metrics()[0]["d"] == optimizer.metrics()[i]["d"]
