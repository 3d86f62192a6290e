"""Prodigy's sampled state as rows, the form in which it is saved: it can be sharded as its parameter is.

In memory ``p0`` and ``s`` are 1-D: the sampled elements one after another. In a parameter with C columns,
the samples of row r of the flattened tensor are in the columns ``phase + every·j``, where the row's phase is
``(−r·C) mod every``. So they are saved with shape ``(…, ceil(C/every))``, with zeros where a row has no j-th
sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prodigyplus.terms.layout import Layout


def rows_shape(shape: tuple[int, ...], slice_p: int) -> tuple[int, ...]:
    """The saved shape of a tensor's samples; ``shape`` may be local in all dimensions but the last."""
    *leading, columns = shape or (1,)
    return (*leading, -(-columns // slice_p))


def spread(samples: Tensor, layout: Layout, slice_p: int) -> Tensor:
    """The samples of a local tensor as rows.

    Samples that other shards hold are zero: summing over the shards of the last dimension completes them.

    Args:
        samples: From :meth:`Layout.sample`; shape (samples,).
        layout: The layout of the local tensor.
        slice_p: The distance between samples in the flattened global tensor.
    """
    shape = _local_rows_shape(layout, slice_p)
    rows = samples.new_zeros(math.prod(shape))
    return rows.index_copy_(0, _row_indices(layout, slice_p).to(samples.device), samples).view(shape)


def collect(rows: Tensor, layout: Layout, slice_p: int) -> Tensor:
    """The samples of a local tensor from its rows, complete in the last dimension: undoes :func:`spread`."""
    return rows.reshape(-1).index_select(0, _row_indices(layout, slice_p).to(rows.device))


def _local_rows_shape(layout: Layout, slice_p: int) -> tuple[int, ...]:
    return (*layout.local_shape[:-1], rows_shape(layout.shape, slice_p)[-1])


def _row_indices(layout: Layout, slice_p: int) -> Tensor:
    """The index of each sample in the flattened rows; int64, on the host."""
    elements = torch.arange(math.prod(layout.local_shape), device="cpu").view(layout.local_shape)
    chosen = layout.sample(elements, slice_p)
    columns, local_columns = (layout.shape or (1,))[-1], (layout.local_shape or (1,))[-1]
    positions = layout.sample(layout.positions(), slice_p)
    row, column = positions // max(1, columns), positions % max(1, columns)
    phase = (-row * columns) % slice_p
    return (
        chosen // max(1, local_columns) * rows_shape(layout.shape, slice_p)[-1] + (column - phase) // slice_p
    )
