"""Small problems that the single-process tests share."""

import copy
import math

import torch
from torch import Tensor, nn

from prodigyplus import ProdigyPlusScheduleFree


class Fed:
    """Parameters of any shapes, whose gradients are drawn, not computed: only the optimiser is tested.

    The gradients have a mean of one sign, so that Prodigy finds progress to make. After ``turns_after``
    steps the mean is larger, and its sign alternates: each step undoes the last, which stops balance's d
    from growing.
    """

    def __init__(self, *shapes, dtype=torch.float32, seed=0, turns_after=None):
        self.lean, self.steps, self.turns_after = 0.5, 0, turns_after
        self.random = torch.Generator().manual_seed(seed)
        # Exact in bfloat16, so that the problem starts from the same weights in every dtype.
        self.parameters = [nn.Parameter(self._draw(shape).bfloat16().to(dtype)) for shape in shapes]

    def _draw(self, shape):
        return torch.randn(shape, generator=self.random)

    def backward(self):
        self.steps += 1
        if self.turns_after is not None and self.steps > self.turns_after:
            self.lean = -math.copysign(1.0, self.lean)
        for p in self.parameters:
            p.grad = (self._draw(p.shape) + self.lean).mul_(0.1).to(p.dtype)


def run(optimizer, problem, steps):
    for _ in range(steps):
        problem.backward()
        optimizer.step()


def snapshot(optimizer):
    """Copies of all that a step may change: the weights and the state dict."""
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return weights, copy.deepcopy(optimizer.state_dict())


def assert_same(found, expected, path=""):
    """Assert that two values are equal to the bit, and in dtype; looks into dicts and lists."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, path
        torch.testing.assert_close(
            found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{path}: {m}"
        )
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert_same(f, e, f"{path}[{index}]")
    else:
        assert found == expected, path


def shapes_for(options, shapes):
    """The shapes; with Muon, padded with dimensions of 1 to at least two, since it needs matrices."""
    if not options.get("use_muon_pp"):
        return shapes
    return [(*shape, *(1,) * (2 - len(shape))) for shape in shapes]


def pair(*shapes, dtype=torch.float32, **options):
    problem = Fed(*shapes_for(options, shapes), dtype=dtype)
    return problem, ProdigyPlusScheduleFree(problem.parameters, **options)
