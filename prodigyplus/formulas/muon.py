"""Muon: the orthogonalised gradient of a whole matrix, instead of Adam's direction.

Newton–Schulz iterations drive all singular values of a matrix to 1 by odd polynomials::

    X ← G / (1.02·‖G‖)
    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X        five times, each with its own a, b, c
    u = sqrt(max(rows, columns)) · X

A matrix of ``rows × columns`` with orthonormal rows or columns has an rms of 1/sqrt(max(rows, columns)). So u
has an rms of about 1, like Adam's direction, and a step size means the same to both.

Pure functions on tensors; matrices come as batches of equal shapes, (count, rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prodigyplus.formulas import directions
from prodigyplus.terms.dtypes import compute_dtype, wide_dtype
from prodigyplus.terms.isolation import isolated
from prodigyplus.terms.requests import Matrices, Method, SymmetricProduct
from prodigyplus.torch_private import foreach_copy_

# arXiv 2505.16932, algorithm 1: five polynomials, each optimal after the previous ones, for singular values
# from 1e-3 of the norm up. In bfloat16 values may overshoot, so they are made for 1.02 times the norm.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# The first Muon's (https://kellerjordan.github.io/posts/muon): one polynomial, steep at zero.
QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5

_HEADROOM = 1.02

# A matrix with a smaller norm counts as zero: in this dtype, the norm or its inverse may be inaccurate.
_LEAST = {torch.float64: 1e-30, torch.float32: 1e-16}


def sizes(shape: Sequence[int], *, batched: bool) -> tuple[int, int, int]:
    """The count, rows and columns of a tensor of two or more dimensions, as a batch of matrices."""
    if batched:
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    return 1, shape[0], math.prod(shape[1:])


def cost(rows: int, columns: int) -> int:
    """The cost of orthogonalising a matrix: the number of multiplications in five iterations."""
    short, long = sorted((rows, columns))
    return 5 * short**2 * (2 * long + short)


def unit_rms(rows: int, columns: int) -> float:
    """The factor that gives a matrix with orthonormal rows or columns an rms of 1."""
    return math.sqrt(max(rows, columns))


@isolated
def newton_schulz(
    matrices: Tensor, *, quintic: bool = False, symmetric_product: SymmetricProduct | None = None
) -> Tensor:
    """Matrices with the same singular vectors as the given ones, and singular values near 1.

    Near 1 means in [0.84, 1.15] for singular values from 1e-3 of the matrix's Frobenius norm up (``quintic``:
    in [0.68, 1.21], from 2e-3 up). Smaller ones come out proportionally smaller, but never below what
    rounding makes of them: in bfloat16 even singular values of 0 may come out near 1.

    Args:
        matrices: (count, rows, columns), of any floating-point dtype; computed in that dtype, not changed.
        quintic: Use the first Muon's polynomial instead of Polar Express's.
        symmetric_product: Computes ``X Xᵀ`` and polynomials of it; None for torch's operators.

    Returns:
        A new tensor of the same shape and dtype.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    # If squares underflowed, the norm would be too small, and the iterations would diverge.
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=wide_dtype(matrices.device))
    scale = torch.where(norm > _LEAST[norm.dtype], 1 / (_HEADROOM * norm), 0)
    x: Tensor = matrices * scale.to(matrices.dtype)
    for a, b, c in QUINTIC if quintic else POLAR_EXPRESS:
        # The Gram matrix of the shorter side; multiplying from the left or the right gives the same.
        if symmetric_product is None:
            gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
        else:
            gram = symmetric_product(x.mT if tall else x, None)
            # With a·I in the polynomial, baddbmm's copy of X is saved; the rounding error is as small.
            polynomial = symmetric_product(gram, (a, b, c))
            x = torch.bmm(x, polynomial) if tall else torch.bmm(polynomial, x)
    return x


def orthogonalized(matrices: Tensor, method: Method) -> Tensor:
    """Orthogonalised matrices, with StableAdamW's factor but without ``unit_rms``; see ``newton_schulz``."""
    x = newton_schulz(matrices, quintic=method.quintic, symmetric_product=method.symmetric_product)
    if method.stable:
        rows, columns = x.shape[-2:]
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=compute_dtype(x))
        x.mul_(directions.stable_scale(norm.square() * max(rows, columns), rows * columns).to(x.dtype))
    return x


def orthogonalize_(batches: Sequence[tuple[Tensor, Method]], limit: int) -> None:
    """Orthogonalise batches in place, those of equal shape and method together.

    Args:
        batches: Pairs of a batch (count, rows, columns), in the dtype of its method, and the method.
        limit: How many bytes of matrices may be worked on at once; a single matrix may have more.
    """
    alike: dict[tuple[torch.Size, Method, torch.device], list[Tensor]] = {}
    for batch, method in batches:
        if batch.numel():
            alike.setdefault((batch.shape[1:], method, batch.device), []).append(batch)
    for (shape, method, device), of_shape in alike.items():
        # On the host there is no gain in more at once, and in bfloat16 the last bit of a product depends on
        # how many there are, and so on how matrices are shared among ranks.
        on_host = device.type == "cpu"
        at_once = 1 if on_host else max(1, limit // (shape.numel() * method.dtype.itemsize))
        for chosen in _runs(of_shape, at_once):
            together = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
            foreach_copy_(chosen, torch.split(orthogonalized(together, method), list(map(len, chosen))))


def _runs(batches: Sequence[Tensor], count: int) -> Iterator[list[Tensor]]:
    """The matrices of all batches, ``count`` at a time, as slices of the batches."""
    run: list[Tensor] = []
    room = count
    for batch in batches:
        left = batch
        while len(left):
            run.append(left[:room])
            room -= len(run[-1])
            left = left[len(run[-1]) :]
            if not room:
                yield run
                run, room = [], count
    if run:
        yield run


def bytes_of(shape: Sequence[int], matrices: Matrices) -> tuple[int, int]:
    """The bytes of a whole tensor and of one of its matrices, in the dtype in which they are sent."""
    count, rows, columns = sizes(shape, batched=matrices.batched)
    matrix = rows * columns * matrices.method.dtype.itemsize
    return count * matrix, matrix
