"""A run that is saved on a GPU or the CPU, and resumed on either, equals the run that did not stop."""

import pytest
import torch

from tests import option_table
from tests.cuda.feeding import ADMITTED, CPU, GPU, OTHERS, assert_near, begun, trained
from tests.single.problems import run
from tests.single.test_checkpoint import through_a_file

LEG = 4


def journey(options, start, end, dtype):
    """A problem and its optimiser after one half of a run on one device and the rest on another."""
    problem, optimizer = trained(options, LEG, dtype=dtype, device=start)
    other, other_optimizer = begun(options, dtype=dtype, device=end)
    for _ in range(LEG):
        other.backward()  # draws the gradients of the first half again
    with torch.no_grad():
        for p, q in zip(other.parameters, problem.parameters, strict=True):
            p.copy_(q)
    other_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    run(other_optimizer, other, LEG)
    return other, other_optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "end"), [(CPU, GPU), (GPU, CPU), (GPU, GPU)], ids=str)
@pytest.mark.parametrize("options", [*ADMITTED, *OTHERS[:4]], ids=option_table.text_of)
def test_goes_on(options, start, end, dtype):
    whole = trained(options, 2 * LEG, dtype=dtype, device=CPU)
    assert_near(journey(options, start, end, dtype), whole)


@pytest.mark.parametrize("into", [CPU, GPU], ids=str)
def test_the_average_is_the_same(into):
    problem, optimizer = trained({}, LEG)
    optimizer.eval()
    other, other_optimizer = begun({}, device=into)
    other_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(other.parameters, problem.parameters, strict=True):
            p.copy_(q)
    for its in (optimizer, other_optimizer):
        its.train()
    assert_near((other, other_optimizer), (problem, optimizer))
