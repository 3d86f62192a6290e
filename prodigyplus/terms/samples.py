"""Prodigy's sampled state as rows, the form in which it is saved: it can be sharded as its parameter is.

In memory ``p0`` and ``s`` are 1-D: the sampled elements one after another. In a parameter with C columns,
each row of the flattened tensor has a sample in every slice_p-th column, from one that depends on the row. So
samples are saved with shape ``(…, ceil(C/slice_p))``, each in column ``c // slice_p`` if c was its column,
with zeros where a row has no sample.
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
    return rows.index_copy_(0, _row_indices(layout, slice_p, samples.device), samples).view(shape)


def collect(rows: Tensor, layout: Layout, slice_p: int) -> Tensor:
    """The samples of a local tensor from its rows, complete in the last dimension: undoes :func:`spread`."""
    return rows.reshape(-1).index_select(0, _row_indices(layout, slice_p, rows.device))


def _local_rows_shape(layout: Layout, slice_p: int) -> tuple[int, ...]:
    return (*layout.local_shape[:-1], rows_shape(layout.shape, slice_p)[-1])


def _row_indices(layout: Layout, slice_p: int, device: torch.device) -> Tensor:
    """The index of each sample in the flattened rows; int64, (samples,)."""
    chosen = layout.sample_indices(slice_p, device).long()
    columns = layout.indices[-1] if layout.shape else range(1)  # of the whole tensor that are here
    row, column = chosen // max(1, len(columns)), chosen % max(1, len(columns))
    if isinstance(columns, range):
        column = column + columns.start
    else:
        column = torch.tensor(columns, device="cpu").to(device)[column]
    return row * rows_shape(layout.shape, slice_p)[-1] + column // slice_p
