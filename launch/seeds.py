"""Random numbers that follow from the seed of a run and a place in it: no checkpoint need hold them."""

from __future__ import annotations

import numpy as np
import torch


def everything(*numbers: int) -> None:
    """Begin torch's random numbers anew, on all devices, at a place that these numbers say."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))
