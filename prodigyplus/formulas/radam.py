"""RAdam (arXiv 1908.03265, algorithm 2): bias correction of the second moment, and a warm-up."""

from __future__ import annotations

import torch
from torch import Tensor


def rectified(step: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
    """RAdam's rectification, and the decay that corrects the second moment's bias towards zero.

    Args:
        step: The number of the step, from 1; any shape.
        beta2: Decay of the second moment, above 0.6; the same shape.

    Returns:
        The factor of the step size, 0 while the average is too short to be trusted; and the decay β2' with
        which ``V ← β2' V + (1−β2') g²`` is the bias-corrected average.
    """
    decayed = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * decayed / (1 - decayed)
    variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return torch.where(length > 4, variance.sqrt(), 0.0), 1 - (1 - beta2) / (1 - decayed)
