"""How near two runs must be that are the same but for their roundings: bounds, from what was measured.

A processor's instructions, its libraries and the order of a package's operations decide the last bits of a
step. What they do to a run is measured where the golden runs are made: the package itself is played again,
several times, with gradients off by some last bits of the terms that are summed in them, so that one that is
nearly zero may change its sign. How far those runs are from the unperturbed one is kept, for each step, as
the noise floor. A run of ours is held to a few times that floor.

Options that decide by signs, and roundings to bfloat16, turn a last bit into a jump, and at the step sizes of
the end the jumps feed one another: perturbed runs part, and no longer say what a run should be. So a run is
compared only up to the last step at which all perturbed runs are still within ``AGREE`` of it.

Imported by make.py beside the oracle and by the tests beside our own package; imports neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# By how many last bits the gradients of a perturbed run are off. A step rounds a dozen times, and each
# package and processor in another order: off by one last bit, perturbed runs parted up to 16 times less than
# ours and the package's do. Jumps, too, come more often, so that the floor has seen those that are rare.
LAST_BITS = 8

# The same with FOCUS, which takes nothing of a gradient but its sign. Its weights move by equal amounts, and
# their roundings add up, not average out: after 92 steps, a gradient was off by 22 last bits of its terms.
LAST_BITS_OF_FOCUS = 64

# How many perturbed runs a floor is the furthest of.
PERTURBATIONS = 8

# How far from one another perturbed runs may be that still say where a run should be.
AGREE = 1e-3

# Of how many floors a bound is. In two thirds of the cases, each perturbed run is within that many of the
# floor that its others give; in the rest, a jump of one is not. The package itself, made to take torch's
# plainest kernels, is nowhere further from its runs with AVX2 than 0.43 of the bounds.
SAFETY = 3

# What the roundings of the packages themselves may come to where the perturbed runs are nearer than that: so
# many last bits of the dtype, over a run and in a single step.
ROUNDINGS = 64
ROUNDINGS_OF_A_STEP = 8

# A jump comes some steps earlier or later where the last bits are others.
WINDOW = 10


def last_bits(options: Mapping[str, Any]) -> int:
    """By how many last bits the gradients of a perturbed run with these options are off."""
    return LAST_BITS_OF_FOCUS if options.get("use_focus") else LAST_BITS


def furthest(distances: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The noise floor: how far perturbed runs are from the unperturbed at most.

    Args:
        distances: Of each perturbed run, as :func:`tests.golden.cases.distances` gives them.

    Returns:
        Under the same names: of a curve, of shape (steps,); of tensors, the most of any, (kept steps,).
    """

    def of_any_tensor(values: np.ndarray) -> np.ndarray:
        return values if values.ndim == 1 else values.max(axis=1)

    return {
        name: np.max([of_any_tensor(each[name]) for each in distances], axis=0).astype(np.float32)
        for name in distances[0]
    }


def held(floor: np.ndarray) -> int:
    """Over how many steps, of all that a floor is of, a run is compared."""
    apart = np.flatnonzero(~(floor <= AGREE))
    return int(apart[0]) if apart.size else len(floor)


def bounds(
    floor: np.ndarray, dtype: torch.dtype = torch.float32, window: int = 0, roundings: int = ROUNDINGS
) -> np.ndarray:
    """How far a run may be from the golden one; of shape (held steps,).

    Args:
        floor: The noise floor; of shape (steps,) or (kept steps,).
        dtype: In which the runs were made.
        window: That many steps before and after count too; ``WINDOW`` for a curve.
        roundings: The least bound, in last bits.
    """
    count = held(floor)
    near = [floor[max(0, step - window) : min(step + window + 1, count)].max() for step in range(count)]
    return np.maximum(roundings * torch.finfo(dtype).eps, SAFETY * np.array(near))
