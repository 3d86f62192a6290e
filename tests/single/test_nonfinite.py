"""A step that meets an inf or NaN changes nothing, and is counted."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from tests import option_table as table
from tests.single.problems import Fed, assert_same, pair, run, snapshot

OPTIONS = [{}, *table.packed(table.alone() + table.together(), most=10)]


def without_skips(state):
    weights, saved = state
    for group in saved["param_groups"]:
        group["skipped"] = group["calls"] = None
    return weights, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_one_bad_element_skips_the_step(options, dtype):
    problem, optimizer = pair((40, 12), (12, 40), (9,), (), dtype=dtype, **options)
    run(optimizer, problem, 30)
    before = without_skips(snapshot(optimizer))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for number, place in ((0, (3, 5)), (1, (11, 0)), (2, (4,)), (3, ())):
            problem.backward()
            problem.parameters[number].grad[place] = bad
            optimizer.step()
        assert_same(without_skips(snapshot(optimizer)), before)
    assert int(optimizer.metrics()[0]["skipped_steps"]) == 12
    run(optimizer, problem, 1)
    assert int(optimizer.metrics()[0]["step"]) == 31


# Without prodigy_steps, which counts the skipped step, too.
@pytest.mark.parametrize("options", [its for its in OPTIONS if "prodigy_steps" not in its], ids=table.text_of)
def test_a_bad_first_step(options):
    problem, optimizer = pair((40, 12), (9,), **options)
    weights = [p.detach().clone() for p in problem.parameters]
    problem.backward()
    problem.parameters[1].grad[0] = float("nan")
    optimizer.step()
    assert_same([p.detach() for p in problem.parameters], weights)
    clean, optimizer_clean = pair((40, 12), (9,), **options)
    clean.backward()  # the same draws
    run(optimizer, problem, 20)
    run(optimizer_clean, clean, 20)
    assert_same(without_skips(snapshot(optimizer)), without_skips(snapshot(optimizer_clean)))


@pytest.mark.parametrize("split", [True, False])
def test_a_bad_gradient_in_one_group_stops_all(split):
    problem = Fed((40, 12), (9,))
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in problem.parameters], split_groups=split)
    run(optimizer, problem, 10)
    before = snapshot(optimizer)
    problem.backward()
    problem.parameters[1].grad[2] = float("inf")
    optimizer.step()
    assert_same(without_skips(snapshot(optimizer)), without_skips(before))
    assert [int(group["skipped_steps"]) for group in optimizer.metrics()] == [1, 1]


def test_a_gradient_too_large_to_square_is_not_finite():
    """Its square would leave an inf in the second moment for good."""
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, 10)
    problem.backward()
    problem.parameters[0].grad[0, 0] = 1e30
    before = snapshot(optimizer)
    optimizer.step()
    assert_same(without_skips(snapshot(optimizer)), without_skips(before))
    assert int(optimizer.metrics()[0]["skipped_steps"]) == 1


def test_training_goes_on_with_a_fifth_of_the_steps_poisoned():
    def train(poison):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.GELU(), torch.nn.Linear(64, 5))
        inputs = torch.randn(256, 20)
        labels = (inputs @ torch.randn(20, 5)).argmax(1)
        optimizer = ProdigyPlusScheduleFree(model.parameters())
        for step in range(250):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            if poison and step % 5 == 2:
                model[0].weight.grad[step % 64, 3] = float("nan")
            optimizer.step()
        return loss.item(), int(optimizer.metrics()[0]["skipped_steps"])

    (clean, none), (poisoned, skipped) = train(False), train(True)
    assert (none, skipped) == (0, 50)
    assert poisoned < 0.05
    assert clean < 0.05
