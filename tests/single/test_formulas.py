"""The package in float64 against an independent implementation of docs/algorithm.md."""

import numpy as np
import pytest
import torch

from tests import option_table as table
from tests.single.problems import pair
from tests.single.reference import Reference

SHAPES = ((), (7,), (40, 12), (12, 40), (33, 33), (3, 35, 33), (2, 34, 3, 3), (5, 5))
MATRICES = ((1, 1), (40, 12), (1, 40), (12, 40), (9, 9), (3, 7, 5), (2, 4, 3, 3), (2, 3, 6, 5))


# All but what the reference lacks: it does not freeze d, and it has no rounding and no other dtypes.
NAMES = table.named(
    "passes", "numbers", but=("prodigy_steps", "factored_fp32", "stochastic_rounding", "bfloat16_z")
)
TOGETHER = table.together(NAMES)
# A tensor lr acts as a number does: see test_bad_input.py.
ALONE = [options for options in table.alone(NAMES) if not isinstance(options.get("lr"), torch.Tensor)]
ADAM = table.without_schedulefree(ALONE + TOGETHER)
OPTIONS = [
    {},
    *table.elementwise(ALONE),
    *table.packed(table.elementwise(TOGETHER)),
    *table.packed(table.elementwise(ADAM)),
    *({**options, "muon_fp32": True} for options in table.packed(table.of_matrices(ALONE + TOGETHER + ADAM))),
]


@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_formulas(options):
    shapes = MATRICES if options.get("use_muon_pp") else SHAPES
    problem, optimizer = pair(*shapes, dtype=torch.float64, **options)
    reference = Reference([p.detach().numpy() for p in problem.parameters], **options)
    for step in range(45):
        problem.backward()
        if 25 <= step < 35:  # backwards for a while: Prodigy finds no progress
            for p in problem.parameters:
                p.grad.neg_()
        reference.step([p.grad.numpy() for p in problem.parameters])
        optimizer.step()
        assert float(optimizer.metrics()[0]["d"]) == pytest.approx(reference.d, rel=1e-9)

    for i, p in enumerate(problem.parameters):
        np.testing.assert_allclose(p.detach().numpy(), reference.y(i), rtol=1e-8, atol=1e-10)
        if optimizer.param_groups[0]["use_schedulefree"]:
            np.testing.assert_allclose(optimizer.state[p]["z"].numpy(), reference.z[i], rtol=1e-8, atol=1e-10)
    optimizer.eval()
    for i, p in enumerate(problem.parameters):
        np.testing.assert_allclose(p.detach().numpy(), reference.x[i], rtol=1e-8, atol=1e-10)


def test_moving_step_size_shrinks():
    """With beta4, d follows its estimate down; without, it stays at its largest."""
    sizes = {}
    for beta4 in (0.0, 0.9):
        problem, optimizer = pair((50,), (12, 40), beta4=beta4)
        largest = 0.0
        for step in range(150):
            problem.backward()
            if step > 60:
                for p in problem.parameters:
                    p.grad.neg_()
            optimizer.step()
            largest = max(largest, float(optimizer.metrics()[0]["d"]))
        sizes[beta4] = float(optimizer.metrics()[0]["d"]), largest
    assert sizes[0.0][0] == sizes[0.0][1]
    assert sizes[0.9][0] < 0.5 * sizes[0.9][1]
    assert sizes[0.9][0] >= 1e-6
