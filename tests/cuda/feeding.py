"""Problems on a GPU or the CPU that get the same gradients, and how far their results may differ."""

import math

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from tests import option_table
from tests.single import test_kernels
from tests.single.problems import Fed, run, shapes_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")

# Those of tests/single/test_kernels.py, and two that kernels read 16 bytes at a time.
SHAPES = (*test_kernels.SHAPES, (64, 48), (96,))
D0 = 1e-3
STEPS = 8  # by then every option set has moved weights and found evidence


def packed(sets):
    """Option sets, merged where they go together.

    SPEED counts signs. Muon's polynomial in bfloat16 may flip one by a last bit, which moves d by a tenth. So
    with both, Muon computes in float32.
    """
    for options in option_table.packed(sets, most=10):
        counts_signs = options.get("use_muon_pp") and options.get("use_speed")
        yield {**options, "muon_fp32": True} if counts_signs else options


# Option sets that the kernels move, and those whose passes run operator by operator.
ADMITTED = [{}, *packed(test_kernels.ADMITTED)]
OTHERS = [
    *packed(
        options
        for options in option_table.alone() + option_table.together()
        if not test_kernels.is_admitted(options)
    )
]

# Allowed differences between GPU and CPU: of weights, relative to a tensor's largest; of d; of its estimate.
# For comparison, gradients that differ in last bits made 4e-7, 0 and 2e-6 in float32 on the CPU.
WEIGHTS = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
D = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
D_HAT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# For Muon in bfloat16, whose polynomial amplifies the rounding of products. On the CPU, gradients that differ
# in last bits of bfloat16 made 1.6e-2, 1e-2 and 0.6; the last is of an estimate that is almost zero there.
MUON_WEIGHTS, MUON_D, MUON_D_HAT = 3e-2, 3e-2, 1.0


class Feed(Fed):
    """A problem of :mod:`tests.single.problems` on a device; its numbers do not depend on a generator.

    Args:
        device: Where its parameters are.
        moves: Whether each step's gradients are at other addresses than those before.
    """

    def __init__(self, *shapes, dtype=torch.float32, device=GPU, moves=True):
        self._next, self._device, self._moves = 1, device, moves
        super().__init__(*shapes, dtype=dtype)
        self.parameters = [torch.nn.Parameter(p.detach().to(device)) for p in self.parameters]

    def _draw(self, shape):
        index = torch.arange(self._next, self._next + math.prod(shape), dtype=torch.float64)
        self._next += math.prod(shape)
        # The fractional parts of a quadratic polynomial: evenly spread, scaled to mean 0 and variance 1.
        return (index.square() * math.sqrt(2) % 1 - 0.5).mul_(math.sqrt(12)).float().view(shape)

    def backward(self):
        before = [p.grad for p in self.parameters]  # kept alive, so that their memory is not reused
        for p, old in zip(self.parameters, before, strict=True):
            grad = (self._draw(p.shape) + 0.5).mul_(0.1).to(p.dtype)
            p.grad = grad.to(self._device) if self._moves or old is None else old.copy_(grad)


def begun(options, *, shapes=SHAPES, **how):
    """A problem and an optimiser of its parameters."""
    problem = Feed(*shapes_for(options, shapes), **how)
    return problem, ProdigyPlusScheduleFree(problem.parameters, **{"d0": D0, **options})


def trained(options, steps=STEPS, **how):
    """A problem and its optimiser after a few steps."""
    problem, optimizer = begun(options, **how)
    run(optimizer, problem, steps)
    return problem, optimizer


def assert_near(found, expected):
    """Assert that weights and step sizes of two runs agree, on whatever devices they are."""
    options = expected[1].param_groups[0]
    is_muon = options["use_muon_pp"] and not options["muon_fp32"]
    for p, q in zip(found[0].parameters, expected[0].parameters, strict=True):
        bound = max(WEIGHTS[p.dtype], MUON_WEIGHTS * is_muon)
        difference = (p.detach().cpu().double() - q.detach().cpu().double()).abs().max()
        assert difference <= bound * q.abs().max(), (tuple(p.shape), difference.item(), q.abs().max().item())
    bounds = {"d": max(D[p.dtype], MUON_D * is_muon), "d_hat": max(D_HAT[p.dtype], MUON_D_HAT * is_muon)}
    for ours, theirs in zip(found[1].metrics(), expected[1].metrics(), strict=True):
        assert ours["step"].item() == theirs["step"].item()
        for name, bound in bounds.items():
            pair = ours[name].item(), theirs[name].item()
            assert pair[0] == pytest.approx(pair[1], rel=bound), (name, *pair)


def assert_same(found, expected):
    """Assert the same to the bit."""
    for p, q in zip(found[0].parameters, expected[0].parameters, strict=True):
        assert torch.equal(p.cpu(), q.cpu()), tuple(p.shape)
    for ours, theirs in zip(found[1].metrics(), expected[1].metrics(), strict=True):
        assert {name: value.item() for name, value in ours.items()} == {
            name: value.item() for name, value in theirs.items()
        }
