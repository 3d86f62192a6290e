"""The launches of a batch's passes: what :mod:`prodigyplus.device.kernels` gets, and what comes back.

Triton is imported with the first launch. Without a GPU, ``TRITON_INTERPRET=1`` in the environment of the
process has the kernels run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus.device.plan import AT_ONCE, BLOCK, FACTOR_BLOCK, Plan, TileSize
from prodigyplus.terms.scalars import Packed

# How many values are added up at a time.
_RUN = 1024

# The kinds of ``use_speed``, as the kernels number them.
_SPEED = {False: 0, True: 1, "relative": 2}


def interprets() -> bool:
    """Whether Triton runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tile_size() -> TileSize:
    """The size of tiles: for GPUs, or so small that the interpreter ends before long."""
    return TileSize(32, 64, 16) if interprets() else TileSize()


class Setup(NamedTuple):
    """Of a batch what its kernels are compiled for."""

    grad: torch.dtype
    weight: torch.dtype
    base: torch.dtype | None  # of z or its offset; None: there is a first moment in its place
    first: torch.dtype | None
    second: torch.dtype | None
    factor: torch.dtype | None
    mean: torch.dtype | None
    statistic: torch.dtype | None
    is_offset: bool
    is_atan2: bool
    is_stable: bool
    decays: bool
    use_speed: object
    every: int
    rounds: bool


class Evidence(NamedTuple):
    """Where evidence is taken, and its sums: by row those of the products, of the norms, …"""

    sums: Tensor  # float64, (3, tensors)


@functools.cache
def _kernels() -> ModuleType:
    from prodigyplus.device import kernels

    return kernels


@functools.cache
def _triton_dtype(dtype: torch.dtype | None) -> Any:
    import triton.language as tl

    # What is not there is never read; the kernel needs a type for its address all the same.
    return {torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}.get(dtype, tl.float32)  # type: ignore[arg-type]


class Launches:
    """The launches of one batch.

    Args:
        plan: The batch's tables.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._addresses: tuple[int, ...] = ()
        self._pointers: Tensor
        self._is_aligned = False
        rows, columns, strip = plan.tile
        self._tile = {"ROWS": rows, "COLUMNS": columns, "STRIP": strip}

    def point(self, addresses: Sequence[int]) -> None:
        """Say where the tensors are: of each the addresses in the order of ``kernels.py``, 0 for none."""
        addresses = tuple(addresses)
        if addresses == self._addresses:
            return
        on_gpu = self._plan.device.type == "cuda"
        table = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._pointers = table.to(self._plan.device, non_blocking=True)
        self._addresses = addresses
        self._is_aligned = not any(address % 16 for address in addresses)

    def squares(self, setup: Setup) -> tuple[Tensor, Tensor]:
        """Sums of g².

        Returns:
            Those that factors need, local, in the order of the plan; and those of whole tensors, (tensors,).
        """
        plan, kernels = self._plan, _kernels()
        outer, inner = self._empty(plan.outer_parts), self._empty(plan.inner_parts)
        sums, totals = self._empty(plan.sum_count), self._empty(len(plan.layouts))
        with self._on_device():
            for tiles in plan.tiles:
                self._launch(
                    kernels.squares, (len(tiles.table),),
                    self._pointers, plan.sizes, plan.matrices, tiles.table, outer, inner,
                    DTYPE=_triton_dtype(setup.grad), FACTORED=tiles.factored, FAST=self._is_fast(tiles.fast),
                    **self._tile,
                )  # fmt: skip
            if len(plan.segments):
                self._launch(
                    kernels.add_parts, (len(plan.segments),),
                    outer, inner, sums, plan.segments, BLOCK=BLOCK, AT_ONCE=AT_ONCE,
                )  # fmt: skip
            self._add_up(sums, sums, plan.means)
            self._add_up(sums, totals, plan.factored_totals)
            self._add_up(inner, totals, plan.full_totals)
        return sums, totals

    def factors_(self, sums: Tensor, setup: Setup, n: Packed) -> None:
        """Move the factors of the second moment by the whole sums of g²."""
        plan = self._plan
        if not len(plan.factor_blocks):
            return
        with self._on_device():
            self._launch(
                _kernels().factors, (len(plan.factor_blocks),),
                self._pointers, plan.factor_blocks, sums, *_numbers(n),
                FACTOR=_triton_dtype(setup.factor), MEAN_DTYPE=_triton_dtype(setup.mean), BLOCK=FACTOR_BLOCK,
            )  # fmt: skip

    def measure_(self, setup: Setup, n: Packed, *, takes_evidence: bool) -> tuple[Tensor, Tensor]:
        """The sums of the directions' squares, (1 or 0, tensors); of the evidence, if it is taken here."""
        norms, evidence = self._parts(setup, takes_evidence)
        with self._on_device():
            if setup.is_stable or takes_evidence:
                for tiles in self._plan.tiles:
                    self._launch(
                        _kernels().measure, (len(tiles.table),),
                        self._pointers, self._plan.sizes, self._plan.matrices, tiles.table, *_numbers(n),
                        norms[:, tiles.first :], evidence[:, tiles.first :], self._plan.tile_count,
                        **self._constants(setup, tiles.factored, tiles.fast), EVIDENCE=takes_evidence,
                    )  # fmt: skip
            return self._of_tensors(norms), self._of_tensors(evidence)

    def move_(self, setup: Setup, norms: Tensor, seeds: Tensor, n: Packed, *, takes_evidence: bool) -> Tensor:
        """Move everything; returns the sums of the evidence, if it is taken here, (3, tensors)."""
        _, evidence = self._parts(setup, takes_evidence)
        with self._on_device():
            for tiles in self._plan.tiles:
                self._launch(
                    _kernels().move, (len(tiles.table),),
                    self._pointers, self._plan.sizes, self._plan.matrices, tiles.table, *_numbers(n),
                    norms, self._plan.numels, seeds, evidence[:, tiles.first :], self._plan.tile_count,
                    **self._constants(setup, tiles.factored, tiles.fast), EVIDENCE=takes_evidence,
                    DECAYS=setup.decays, STOCHASTIC=setup.rounds,
                )  # fmt: skip
            return self._of_tensors(evidence)

    def _constants(self, setup: Setup, factored: bool, fast: bool) -> dict[str, Any]:
        return {
            "GRAD_DTYPE": _triton_dtype(setup.grad),
            "WEIGHT_DTYPE": _triton_dtype(setup.weight),
            "BASE_DTYPE": _triton_dtype(setup.base),
            "FIRST_DTYPE": _triton_dtype(setup.first),
            "SECOND_DTYPE": _triton_dtype(setup.second),
            "FACTOR": _triton_dtype(setup.factor),
            "MEAN_DTYPE": _triton_dtype(setup.mean),
            "STATISTIC_DTYPE": _triton_dtype(setup.statistic),
            "FACTORED": factored,
            "FAST": self._is_fast(fast),
            "MOMENTUM": setup.base is None,
            "IS_OFFSET": setup.is_offset,
            "ATAN2": setup.is_atan2,
            "STABLE": setup.is_stable,
            "SPEED": _SPEED[setup.use_speed],
            "EVERY": setup.every,
            **self._tile,
        }

    def _is_fast(self, fast: bool) -> bool:
        return fast and self._is_aligned

    def _parts(self, setup: Setup, takes_evidence: bool) -> tuple[Tensor, Tensor]:
        """What the programs of a pass write their sums to."""
        count, device = self._plan.tile_count, self._plan.device
        norms = torch.empty(int(setup.is_stable), count, dtype=torch.float32, device=device)
        rows = (3 if setup.use_speed == "relative" else 2) if takes_evidence else 0
        return norms, torch.empty(rows, count, dtype=torch.float64, device=device)

    def _of_tensors(self, parts: Tensor) -> Tensor:
        """The sums over the tiles of each tensor; (rows, tensors)."""
        sums = torch.empty(len(parts), len(self._plan.layouts), dtype=parts.dtype, device=parts.device)
        if parts.shape[0]:
            self._add_up(parts, sums, self._plan.of_tensors)
        return sums

    def _add_up(self, values: Tensor, out: Tensor, segments: Tensor) -> None:
        rows = len(values) if values.ndim == 2 else 1
        if not len(segments):
            return
        self._launch(
            _kernels().add_up, (len(segments), rows),
            values, values.stride(0) if values.ndim == 2 else 0, out, out.stride(0) if out.ndim == 2 else 0,
            segments, DTYPE=_triton_dtype(values.dtype), BLOCK=_RUN,
        )  # fmt: skip

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self._plan.device)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        device = self._plan.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    @staticmethod
    def _launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        # Not fused into multiply-adds, so that the CPU and the GPU round alike.
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


def _numbers(n: Packed) -> tuple[Tensor, int, int, Tensor, int]:
    """The numbers of a step and its gate, with the strides from one number, and one tensor, to the next."""
    values, gate = n.values, n.gate
    per_tensor = values.ndim == 2
    tensor_stride, gate_stride = (values.stride(1), gate.stride(0)) if per_tensor else (0, 0)
    return values, values.stride(0), tensor_stride, gate, gate_stride
