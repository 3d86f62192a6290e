"""The tables that the kernels read, written once: what a row is, and the names of its columns, in order.

Rows are made by these names, and the kernels take the indices of columns from them. Entries of a parameter's
state have the names that they have in :data:`prodigyplus.state_table.TABLE`.

Each module of kernels has the indices that it needs as constants of its own. Triton's cache on disk tells
such constants apart, but not attributes of other modules: a kernel made for an older table could be loaded.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# The kernels' numbers for the kinds of evidence: see ``Options.evidence``.
EVIDENCE_KINDS: dict[str, int] = {"products": 0, "signs": 1, "relative": 2, "balance": 3}

# The kernels' numbers for the pools: groups of one pool have one d.
POOLS: dict[str | None, int] = {None: 0, "prodigy": 1, "balance": 2}


class Dtypes(NamedTuple):
    """The dtypes of the tensors of a batch; None for those that no parameter has."""

    weight: torch.dtype
    z: torch.dtype | None
    z_minus_y: torch.dtype | None
    exp_avg: torch.dtype | None
    exp_avg_sq: torch.dtype | None
    outer: torch.dtype | None  # the factors of the second moment, see ``plan.py``
    inner: torch.dtype | None
    mean: torch.dtype | None
    p0: torch.dtype | None
    s: torch.dtype | None
    grad: torch.dtype

    @property
    def of_elements(self) -> tuple[torch.dtype | None, ...]:
        """The dtypes of the tensors that have a value for every element."""
        return self.grad, self.weight, self.base, self.exp_avg, self.exp_avg_sq

    @property
    def base(self) -> torch.dtype | None:
        """The dtype of z, or of z − y."""
        return self.z or self.z_minus_y


POINTERS = Dtypes._fields
"""The columns of ``pointers``, which has a row of addresses for each tensor; 0 for what is absent."""

FACTORS = ("outer", "inner", "mean")
"""The columns of ``POINTERS`` for the factors of the second moment."""


def entries(outer: str, inner: str) -> tuple[str, ...]:
    """The state entries of the columns of ``pointers`` between the weight and the gradient.

    Args:
        outer, inner: Which factor is the outer one and which the inner one: "row" and "col", or the reverse.
    """
    factors = dict(zip(FACTORS, (f"exp_avg_sq_{name}" for name in (outer, inner, "mean")), strict=True))
    return tuple(factors.get(column, column) for column in POINTERS[1:-1])


class SizeRow(NamedTuple):
    """A row of ``sizes``: a tensor, and where its local elements lie in the whole one."""

    local: int  # the number of local elements
    first_index: int  # the global index of the first of them, modulo 2³²
    first_phase: int  # the same modulo the distance between samples
    is_row_outer: int  # whether the row factor is the outer one
    run_length: int
    first_run: int  # the index in ``runs`` of its first run, if it has several


Column: TypeAlias = "int | Tensor"
"""A column of several rows: int64, on the host; or the number that is in all of them."""


class RunRow(NamedTuple):
    """Rows of ``runs``: the runs of those tensors that consist of several."""

    first_index: Column  # the global index of the run's first element, modulo 2³²
    first_phase: Column  # the same modulo the distance between samples
    samples: Column  # the number of samples in the tensor's runs before it


class MatrixRow(NamedTuple):
    """Rows of ``matrices``: the matrices of tensors."""

    tensor: Column
    offset: Column  # of its first element in the tensor
    height: Column
    width: Column
    row_stride: Column
    column_stride: Column
    outer_offset: Column  # of its first factor in the outer factors of the tensor
    outer_stride: Column
    inner_offset: Column
    inner_stride: Column
    outer_parts: Column  # the index of its first partial sum of a row
    inner_parts: Column  # the same of a column; not factored: of a tile
    mean_offset: Column  # of its mean among the tensor's


class TileRow(NamedTuple):
    """Rows of ``tiles``: one for each program."""

    matrix: Column
    down: Column  # its position in the matrix, in tiles
    across: Column


class PartsRow(NamedTuple):
    """Rows of the table of ``add_parts``: up to ``plan.BLOCK`` sums of a matrix's rows, or of its columns."""

    is_inner: Column  # 1 for sums of columns, 0 for sums of rows
    first: Column  # the index of the first part
    out: Column  # the index of the first sum
    stride: Column  # of sums
    length: Column  # of a part: all sums of the rows, or of the columns
    parts: Column  # the number of parts
    block: Column  # which of the sums: the index of the block


class SumRow(NamedTuple):
    """Rows of a table of ``add_up``: a sum, and the values that it is of."""

    first: Column  # the index of the first value
    stride: Column  # of values
    values: Column  # the number of values
    out: Column  # the index of the sum


class FactorRow(NamedTuple):
    """A row of the table of ``factors``: up to ``plan.FACTOR_BLOCK`` factors of a tensor."""

    tensor: int
    pointer: int  # their column in ``pointers``
    first: int  # the index of the first sum
    length: int  # the number of sums
    elements: int  # the number of elements in each sum
    block: int  # which of the factors: the index of the block


class GroupOptions(NamedTuple):
    """A group's options as the kernels take them; switches are 0 or 1, ``lr`` is 0 if it is a tensor.

    The table has a row for each option, and a column for each group.
    """

    lr: float
    beta1: float
    beta2: float
    beta3: float
    beta4: float  # 0: d never shrinks
    d0: float
    d_coef: float
    limit: float
    speed_coef: float
    warmup_steps: float
    schedulefree_c: float
    weight_decay: float
    eps: float
    use_schedulefree: float
    use_bias_correction: float
    use_adopt: float
    evidence: float  # a value of ``EVIDENCE_KINDS``
    weight_decay_by_lr: float
    d_limiter: float
    adapts: float
    pool: float  # a value of ``POOLS``
    shares: float
