"""Random numbers that depend on the seed and the step alone, so that no checkpoint need hold their state."""

from __future__ import annotations

import numpy as np
import torch


def everything(*numbers: int) -> None:
    """Seed torch's generators, on all devices, with a hash of these numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))
