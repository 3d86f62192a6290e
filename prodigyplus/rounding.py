"""Stochastic rounding to bfloat16, with noise that depends on an element's place, not on who holds it.

An element is rounded up with the probability of its distance to the value below: a step that is
smaller than the last bit of the weight is then lost on no average. The noise is a hash of the step,
of the parameter and of the element's index in the global tensor. The same run gives the same bits,
replicas agree, and a shard draws what the whole tensor would have drawn there.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd multipliers of a 32-bit mixing hash with low bias (C. Wellons, "Prospecting for hash functions").
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9  # spreads the seeds of consecutive parameters and steps

_HIGH_HALF = -65536  # 0xFFFF0000 as a signed int32
_LOW_HALF = 0xFFFF


def noise(positions: Tensor, step: Tensor, parameter: int) -> Tensor:
    """Uniform 32-bit noise, int32, in the shape of ``positions`` (int32, overwritten).

    Args:
        positions: Index of each element in the global tensor, modulo 2³².
        step: Number of the step, an integer tensor without dimensions on the same device.
        parameter: Number of the parameter in the optimiser.
    """
    seed = _hash((step * _GOLDEN).to(torch.int32))
    seed = _hash(seed.add_(parameter * _GOLDEN % (1 << 31)))
    return _hash(positions.add_(seed))


def _hash(bits: Tensor) -> Tensor:
    bits.bitwise_xor_(_shift_right(bits, 16)).mul_(_MIX_1)
    bits.bitwise_xor_(_shift_right(bits, 15)).mul_(_MIX_2)
    return bits.bitwise_xor_(_shift_right(bits, 16))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """A logical shift; torch's own on int32 carries the sign in."""
    return (bits >> count).bitwise_and_((1 << (32 - count)) - 1)


def low_half(bits: Tensor) -> Tensor:
    """The lower 16 of 32 random bits, as an int32 from 0 to 65535: the noise of one rounding."""
    return bits & _LOW_HALF


def high_half(bits: Tensor) -> Tensor:
    """The upper 16 of 32 random bits, as an int32 from 0 to 65535: the noise of another."""
    return _shift_right(bits, 16)


def write(target: Tensor, source: Tensor, noise16: Tensor | None) -> None:
    """Write ``source`` to ``target``, rounding to the nearest, or with ``noise16`` stochastically.

    Args:
        target: Tensor of any floating dtype; bfloat16 where ``noise16`` is given.
        source: Tensor of the dtype of the computation; float32 where ``noise16`` is given.
        noise16: int32 from 0 to 65535, overwritten; or None.
    """
    if target is source:
        return
    if noise16 is None:
        target.copy_(source)
        return
    # bfloat16 is the upper half of float32: add noise below it, cut there.
    bits = noise16.add_(source.view(torch.int32)).bitwise_and_(_HIGH_HALF)
    target.copy_(bits.view(torch.float32))
