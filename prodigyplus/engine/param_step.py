"""What a parameter brings to a step, and what follows from it alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.device import launches
from prodigyplus.engine.group_step import GroupStep
from prodigyplus.formulas import muon
from prodigyplus.terms.dtypes import compute_dtype
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Matrices, Method


class ParamStep(NamedTuple):
    """What a parameter brings to a step: plain local tensors, and their layout."""

    weight: Tensor  # y, changed in place
    grad: Tensor  # of the same shape; zeros if there is none here, but may be on other ranks
    state: dict[str, Tensor]  # see prodigyplus/state_table.py; changed in place
    layout: Layout
    group: GroupStep
    ordinal: int  # see Location
    # Whether this rank has its gradient; None if nobody needs to ask: all shards have one, or none has.
    present: bool | None

    @property
    def stack_key(self) -> tuple[object, ...]:
        """Parameters with equal keys may be stacked; the same on all ranks."""
        dtypes = [tensor.dtype for tensor in self.state.values()]
        weight, grad = self.weight, self.grad
        # Groups and layouts live as long as the step, and equal layouts are one object.
        return id(self.group), id(self.layout), weight.device, weight.dtype, grad.dtype, *self.state, *dtypes

    @property
    def is_matrix(self) -> bool:
        """Whether Muon moves it, whose direction needs whole matrices."""
        return self.group.options.use_muon_pp

    @property
    def cost(self) -> tuple[int, int, int]:
        """See :attr:`prodigyplus.engine.bundle.Bundle.cost`."""
        return cost_of(self.layout, self.group)

    @property
    def nbytes(self) -> int:
        """The bytes of its direction on the rank with the largest piece."""
        return self.layout.max_local_numel * compute_dtype(self.weight).itemsize

    @property
    def sent_bytes(self) -> int:
        """The bytes of its direction in the dtype of orthogonalising, on the rank with the largest piece."""
        dtype = orthogonalized_in(self.group, compute_dtype(self.weight))
        return self.layout.max_local_numel * dtype.itemsize


def cost_of(layout: Layout, group: GroupStep) -> tuple[int, int, int]:
    """See :attr:`prodigyplus.engine.bundle.Bundle.cost`."""
    _, rows, columns = muon.sizes(layout.shape, batched=group.options.muon_batched)
    return muon.cost(rows, columns), rows, columns


def orthogonalized_in(group: GroupStep, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices are orthogonalised; ``dtype`` is that of the arithmetic."""
    # float64 stays, since its finite values may overflow in bfloat16.
    return dtype if group.options.muon_fp32 or dtype == torch.float64 else torch.bfloat16


def matrices(local: Tensor, group: GroupStep, ordinal: int, dtype: torch.dtype) -> Matrices:
    """The request to orthogonalise a parameter's matrices.

    Args:
        local: The local piece of what is orthogonalised: the gradient or the first moment.
        group: The parameter's group.
        ordinal: See :class:`prodigyplus.placement.Location`.
        dtype: The dtype of the arithmetic.
    """
    o, computed_in = group.options, orthogonalized_in(group, dtype)
    product = None if o.fused is False else launches.symmetric_product(computed_in, local.device)
    return Matrices(
        local, o.muon_batched, Method(computed_in, o.muon_quintic, o.use_stableadamw, product), ordinal
    )
