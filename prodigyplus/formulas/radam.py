"""RAdam (arXiv 1908.03265, algorithm 2): the second moment without its bias to zero, and a warm-up."""

from __future__ import annotations

import torch
from torch import Tensor


def rectified(step: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a step to make, and the decay that corrects the second moment's bias.

    Args:
        step: Its number, from 1; any shape.
        beta2: Decay of the second moment, above 0.6; the same shape.

    Returns:
        The rectification, 0 as long as the average is too short to be trusted; and the decay with which
        ``V ← β2' V + (1−β2') g²`` is the average without its bias to zero.
    """
    decayed = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * decayed / (1 - decayed)
    variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return torch.where(length > 4, variance.sqrt(), 0.0), 1 - (1 - beta2) / (1 - decayed)
