"""The package in float64 against an independent transcription of docs/algorithm.md, and its edges."""

import numpy as np
import pytest
import torch

from tests.single.problems import pair
from tests.single.reference import Reference

SHAPES = ((), (7,), (40, 12), (12, 40), (33, 33), (3, 35, 33), (2, 34, 3, 3), (5, 5))
MATRICES = ((1, 1), (40, 12), (1, 40), (12, 40), (9, 9), (3, 7, 5), (2, 4, 3, 3), (2, 3, 6, 5))


_FOCUS = {"use_focus": True, "factored": False}

VARIANTS = [
    {"use_speed": True},
    {"use_speed": True, "beta4": 0.9, "d_coef": 2.0},
    {"use_speed": True, "use_adopt": True, "split_groups": False},
    {"use_speed": "relative"},
    {"use_speed": "relative", "beta4": 0.5},
    {"use_bias_correction": True, "betas": (0.9, 0.95)},
    {"use_bias_correction": True, "betas": (0.9, 0.9), "use_adopt": True, "weight_decay": 0.1},
    {"use_cautious": True, "weight_decay": 0.1},
    {"use_cautious": True, "weight_decay": 1e-4, "weight_decay_by_lr": False},
    {"use_cautious": True, "eps": None, "use_stableadamw": False},
    {"use_grams": True},
    {"use_grams": True, "weight_decay": 1e-4, "weight_decay_by_lr": False},
    {"use_adopt": True},
    {"use_adopt": True, "factored": False, "use_cautious": True},
    {"use_orthograd": True, "weight_decay": 0.1},
    {"use_orthograd": True, "use_grams": True},
    _FOCUS,
    {**_FOCUS, "use_adopt": True, "use_cautious": True},
    {**_FOCUS, "use_orthograd": True, "use_speed": True},
]

_MUON = {"use_muon_pp": True, "muon_fp32": True}

MUON = [
    _MUON,
    {**_MUON, "muon_quintic": True},
    {**_MUON, "muon_batched": True, "weight_decay": 0.1},
    {**_MUON, "muon_batched": True, "muon_quintic": True, "use_cautious": True},
    {**_MUON, "use_stableadamw": False, "weight_decay": 1e-4, "weight_decay_by_lr": False},
    {**_MUON, "eps": None, "use_stableadamw": False, "betas": (0.8, 0.95)},
    {**_MUON, "use_cautious": True, "weight_decay": 1e-4, "weight_decay_by_lr": False},
    {**_MUON, "use_grams": True, "muon_batched": True},
    {**_MUON, "use_speed": True},
    {**_MUON, "use_speed": "relative", "muon_quintic": True},
    {**_MUON, "use_bias_correction": True},
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factored": False},
        {"weight_decay": 0.1},
        {"weight_decay": 1e-3, "weight_decay_by_lr": False},
        {"eps": None, "use_stableadamw": False},
        {"beta4": 0.99},
        {"beta4": None, "d_limiter": False},
        {"d_limiter": False, "d_coef": 0.5},
        {"d_coef": 0.5},
        {"d_coef": 3.0},
        {"schedulefree_c": 30.0, "betas": (0.95, 0.999)},
        {"warmup_steps": 40, "weight_decay": 0.1},
        {"slice_p": 1, "lr": 0.3},
        {"slice_p": 4, "d0": 1e-4},
        *VARIANTS,
        *MUON,
        *({**options, "use_schedulefree": False} for options in (*VARIANTS, *MUON)),
    ],
    ids=str,
)
def test_formulas(options):
    shapes = MATRICES if options.get("use_muon_pp") else SHAPES
    problem, optimizer = pair(*shapes, dtype=torch.float64, **options)
    reference = Reference([p.detach().numpy() for p in problem.parameters], **options)
    for step in range(120):
        problem.backward()
        if 50 <= step < 65:  # back, for a while: no progress to be found
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
    """With beta4 d follows its estimate down; without, it stays."""
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
