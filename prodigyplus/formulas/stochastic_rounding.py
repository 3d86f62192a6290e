"""Stochastic rounding to bfloat16, with noise that depends on an element's global index, not on its rank.

An element is rounded up with a probability proportional to its distance from the value below, so a step
smaller than the last bit of the weight is not lost on average. The noise is a hash of the step, of the
parameter and of the element's index in the global tensor. So the same run gives the same bits, replicas
agree, and a shard draws what the whole tensor would have drawn there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Odd multipliers of a 32-bit mixing hash with low bias (C. Wellons, "Prospecting for hash functions").
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9  # spreads the seeds of consecutive parameters and steps

_HIGH_HALF = -65536  # 0xFFFF0000 as a signed int32
_LOW_HALF = 0xFFFF


def seeds(step: Tensor, ordinals: Tensor) -> Tensor:
    """A seed for each parameter, different in each step; int32, shape (count,).

    Args:
        step: The number of the step, a 0-dim integer tensor.
        ordinals: The places of the parameters in the optimiser, from 1; int64, (count,).
    """
    of_step = _hash_((step * _GOLDEN).to(torch.int32))
    return _hash_(of_step + (ordinals * _GOLDEN % (1 << 31)).to(torch.int32))


def noise(index_terms: Sequence[Tensor], seeds: Tensor) -> Tensor:
    """Uniform 32-bit noise for a stack of parameters; int32, shape (count, *shape).

    Args:
        index_terms: The elements' indices, see :meth:`prodigyplus.terms.layout.Layout.index_terms`.
        seeds: See :func:`seeds`.
    """
    return _hash_(functools.reduce(torch.add, index_terms, seeds.view(-1, *(1,) * len(index_terms))))


def _hash_(bits: Tensor) -> Tensor:
    bits.bitwise_xor_(_shift_right(bits, 16)).mul_(_MIX_1)
    bits.bitwise_xor_(_shift_right(bits, 15)).mul_(_MIX_2)
    return bits.bitwise_xor_(_shift_right(bits, 16))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """A logical right shift; torch's own shift of int32 is arithmetic."""
    return (bits >> count).bitwise_and_((1 << (32 - count)) - 1)


def low_half(bits: Tensor) -> Tensor:
    """The lower 16 of 32 random bits, as an int32 from 0 to 65535: noise for one rounding."""
    return bits & _LOW_HALF


def high_half(bits: Tensor) -> Tensor:
    """The upper 16 of 32 random bits, as an int32 from 0 to 65535: noise for another."""
    return _shift_right(bits, 16)


def write_(
    target: Tensor, source: Tensor, bits: Tensor | None, half: Callable[[Tensor], Tensor] = low_half
) -> None:
    """Write ``source`` to ``target``, rounded to nearest, or stochastically if there is noise.

    Args:
        target: Of any floating-point dtype; with noise, bfloat16 or the dtype of ``source``.
        source: In the dtype of the computation, with noise float32. If the dtypes are equal, it must be
            ``target`` itself, and nothing is written.
        bits: The noise (see :func:`noise`), or None.
        half: Which half of it to take: :func:`low_half` or :func:`high_half`.
    """
    if target.dtype == source.dtype:
        return
    if bits is not None:
        # bfloat16 is the upper half of float32: add noise to the lower half, then truncate.
        source = half(bits).add_(source.view(torch.int32)).bitwise_and_(_HIGH_HALF).view(torch.float32)
    target.copy_(source)
