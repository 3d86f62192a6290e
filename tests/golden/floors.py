"""How close two runs must be that differ only in rounding: bounds that follow from measurements.

A processor's instructions, its libraries and the order of a package's operations decide the last bits of a
step. What that does to a run is measured when the golden runs are made: the package itself runs again,
several times, with some last bits changed in the terms that gradients sum. (So a gradient that is almost zero
may change its sign.) The largest distance of these runs from the unperturbed one, at each step, is the noise
floor. Our runs must stay within a few times that floor.

Options that go by signs, and rounding to bfloat16, turn a last bit into a jump, and with the large step sizes
at the end one jump causes others. Perturbed runs then diverge, and no longer tell what a run should be. So a
run is compared only as long as all perturbed runs are within ``AGREE`` of the unperturbed one.

make.py imports this with the published packages, the tests with ours; this imports neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# By how many last bits a perturbed run's gradients are changed. A step rounds a dozen times, in another order
# in each package and on each processor: with one last bit, perturbed runs diverged up to 16 times less than
# our runs from the package's. With more, jumps come more often, too, so that the floor includes rare ones.
LAST_BITS = 8

# The same for FOCUS, which uses only a gradient's sign. Its weights move by equal amounts, so their roundings
# add up instead of averaging out: after 92 steps, a gradient was off by 22 last bits of its terms.
LAST_BITS_OF_FOCUS = 64

# How many perturbed runs a floor is the largest distance of.
PERTURBATIONS = 8

# How far perturbed runs may be from the unperturbed one and still tell what a run should be.
AGREE = 1e-3

# How many times the floor a bound is. In two thirds of the cases, each perturbed run is within the bound that
# the others give; in the rest, one run has a jump that the others lack. The package itself with torch's
# plainest kernels is never further than 0.43 of the bounds from its own runs with AVX2.
SAFETY = 3

# The least bounds, in last bits of the dtype, over a run and in a single step: the packages' own roundings
# may come to that where perturbed runs are closer.
ROUNDINGS = 64
ROUNDINGS_OF_A_STEP = 8

# With other last bits, a jump may come this many steps earlier or later.
WINDOW = 10


def last_bits(options: Mapping[str, Any]) -> int:
    """By how many last bits a perturbed run's gradients are changed, with these options."""
    return LAST_BITS_OF_FOCUS if options.get("use_focus") else LAST_BITS


def furthest(distances: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The noise floor: the largest distances of perturbed runs from the unperturbed one.

    Args:
        distances: Those of each perturbed run, from :func:`tests.golden.cases.distances`.

    Returns:
        By the same names: for a curve, shape (steps,); for tensors, the largest of any, shape (kept steps,).
    """

    def of_any_tensor(values: np.ndarray) -> np.ndarray:
        return values if values.ndim == 1 else values.max(axis=1)

    return {
        name: np.max([of_any_tensor(each[name]) for each in distances], axis=0).astype(np.float32)
        for name in distances[0]
    }


def held(floor: np.ndarray) -> int:
    """For how many of the floor's steps a run is compared."""
    apart = np.flatnonzero(~(floor <= AGREE))
    return int(apart[0]) if apart.size else len(floor)


def bounds(
    floor: np.ndarray, dtype: torch.dtype = torch.float32, window: int = 0, roundings: int = ROUNDINGS
) -> np.ndarray:
    """How far a run may be from the golden one; shape (held steps,).

    Args:
        floor: The noise floor; shape (steps,) or (kept steps,).
        dtype: The dtype that the runs were made in.
        window: How many steps before and after count, too; ``WINDOW`` for a curve.
        roundings: The least bound, in last bits.
    """
    count = held(floor)
    near = [floor[max(0, step - window) : min(step + window + 1, count)].max() for step in range(count)]
    return np.maximum(roundings * torch.finfo(dtype).eps, SAFETY * np.array(near))
