"""Launches of a batch's passes: the arguments and results of :mod:`prodigyplus.device.kernels`."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.device import jit
from prodigyplus.device.plan import ALIGNMENT, AT_ONCE, BLOCK, FACTOR_BLOCK, Plan, TileKind, TileSize
from prodigyplus.device.tables import EVIDENCE_KINDS, Dtypes
from prodigyplus.terms.device_constants import SentTable
from prodigyplus.terms.requests import SymmetricProduct
from prodigyplus.terms.step_numbers import PackedNumbers

_DTYPE = operator.attrgetter("dtype")

# The most bytes that a thread reads or writes at a time.
_VECTOR_BYTES = 16

# How many values ``add_up`` adds at a time.
_RUN = 1024

# The names of the sums that ``sweep`` takes for each kind, in the order of its rows of partial sums.
EVIDENCE_SUMS: dict[str, tuple[str, ...]] = {
    "products": ("product", "norm"),
    "signs": ("product", "norm"),
    "relative": ("product", "l1", "l2_square"),
    "balance": ("product", "gu", "uu"),
}


def tile_size() -> TileSize:
    """The size of tiles: for GPUs, or small enough for the interpreter to be quick."""
    return TileSize(32, 64) if jit.interprets() else TileSize()


class Program(NamedTuple):
    """How a program works through its tile: the rows in registers at a time, and the number of warps."""

    strip: int
    warps: int


class Programs(NamedTuple):
    """The programs of the passes over whole tensors."""

    squares: Program = Program(2, 2)
    measure: Program = Program(4, 2)
    move: Program = Program(1, 1)


def programs() -> Programs:
    """The programs for GPUs, or those for which the interpreter takes few steps."""
    return Programs(*[Program(16, 1)] * 3) if jit.interprets() else Programs()


class Setup(NamedTuple):
    """What the kernels of a batch are compiled for."""

    dtypes: Dtypes
    has_momentum: bool
    is_offset: bool
    is_atan2: bool
    is_stable: bool
    decays: bool
    evidence: str  # a key of ``EVIDENCE_KINDS``
    slice_p: int
    rounds: bool
    direction: torch.dtype | None = None  # the dtype of directions that are read; None if they are computed


class Directions(NamedTuple):
    """Directions that are read: one for each tensor, contiguous, of its local shape; and their factors."""

    tensors: list[Tensor]
    scales: Tensor  # float32, (tensors,)


@functools.cache
def _kernels() -> ModuleType:
    from prodigyplus.device import kernels

    return kernels


@functools.cache
def _square_kernels() -> ModuleType:
    from prodigyplus.device import square_kernels

    return square_kernels


@functools.cache
def symmetric_product(dtype: torch.dtype, device: torch.device) -> SymmetricProduct | None:
    """The kernel that multiplies matrices by their own transposes; None if the device has none for it."""
    if device.type != "cuda" or not jit.has_triton():
        return None
    from prodigyplus.device import symmetric

    # GPUs before Ampere cannot multiply bfloat16.
    can = torch.cuda.get_device_capability(device) >= (8, 0) and dtype in symmetric.DTYPES
    return symmetric.symmetric_product if can else None


class Launches:
    """The launches of one batch.

    Args:
        plan: The batch's tables.

    Attributes:
        dtypes: The dtypes of the tensors that it was last pointed to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.dtypes: Dtypes
        # The addresses of weights and entries of states, in the order in which these come; and the dtypes of
        # the same tensors and of the gradients. By them it is seen whether any tensor has been replaced.
        self._data_ptrs: list[int] = []
        self._found_dtypes: list[torch.dtype] = []
        self._addresses: list[int] = []  # the same addresses as rows of ``pointers``, without the gradients'
        self._sent = SentTable(plan.device)
        self._pointers: Tensor
        self._is_aligned = False
        self._sent_directions = SentTable(plan.device)
        self._directions: Tensor
        self._directions_are_aligned = False
        self._programs = programs()

    def point_(self, weights: list[Tensor], states: list[dict[str, Tensor]], grads: list[Tensor]) -> None:
        """Point the kernels to these tensors, local ones. Entries that are not contiguous are made so."""
        # This runs for every parameter at every step, so by map(), without a line of Python for each.
        entries = list(itertools.chain.from_iterable(map(dict.values, states)))
        tensors = [*weights, *entries]
        data_ptrs = list(map(Tensor.data_ptr, tensors))
        found_dtypes = list(map(_DTYPE, [*tensors, grads[0]]))
        if data_ptrs != self._data_ptrs or found_dtypes != self._found_dtypes:
            for value in entries:
                if not value.is_contiguous():  # as a loaded state may be
                    value.set_(value.contiguous())  # type: ignore[call-overload]
            self._set_addresses(weights, states, grads[0].dtype)
            self._data_ptrs, self._found_dtypes = data_ptrs, found_dtypes
        self.point_to_gradients(grads)

    def _set_addresses(
        self, weights: list[Tensor], states: list[dict[str, Tensor]], grad: torch.dtype
    ) -> None:
        """Set addresses and dtypes: tensors have been replaced, perhaps by those of other dtypes."""
        rows = [
            (weight, *map(state.get, keys))
            for weight, state, keys in zip(weights, states, self.plan.keys, strict=True)
        ]
        of_column = [
            {tensor.dtype for tensor in column if tensor is not None} for column in zip(*rows, strict=True)
        ]
        assert all(len(dtypes) <= 1 for dtypes in of_column), "a state of several dtypes"
        devices = {tensor.device for row in rows for tensor in row if tensor is not None}
        if devices != {self.plan.device}:
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(
                f"weights and the optimiser's state are on different devices ({found}): move the state to "
                "the weights before step(). A model that moves to a GPU does so before load_state_dict()."
            )
        self.dtypes = Dtypes._make([*(next(iter(dtypes), None) for dtypes in of_column), grad])
        self._addresses = [0 if tensor is None else tensor.data_ptr() for row in rows for tensor in row]

    def is_current(self, weights: list[Tensor], entries: list[Tensor], grads: list[Tensor]) -> bool:
        """Whether the kernels already point to these weights and entries, and gradients have the same dtype.

        Args:
            weights, grads: As for :meth:`point_`.
            entries: All entries of the states. None that :meth:`point_` was given may have been freed.
        """
        if {*map(_DTYPE, grads)} != {self.dtypes.grad} or {*map(_DTYPE, weights)} != {self.dtypes.weight}:
            return False
        return self._data_ptrs == [*map(Tensor.data_ptr, weights), *map(Tensor.data_ptr, entries)]

    def point_to_gradients(self, grads: list[Tensor]) -> None:
        """Update the table of addresses; it is sent to the device only if an address has changed."""
        gradients = list(map(Tensor.data_ptr, grads))

        def table() -> Tensor:
            rows = torch.tensor(self._addresses, dtype=torch.int64, device="cpu").view(len(gradients), -1)
            last = torch.tensor(gradients, dtype=torch.int64, device="cpu").unsqueeze(1)
            rows = torch.cat((rows, last), 1)
            self._is_aligned = not (rows % ALIGNMENT).any()
            return rows

        self._pointers = self._sent.of((self._data_ptrs, gradients), table)

    def _point_to_directions(self, directions: Directions) -> None:
        addresses = [tensor.data_ptr() for tensor in directions.tensors]
        self._directions_are_aligned = not any(address % ALIGNMENT for address in addresses)
        self._directions = self._sent_directions.of(
            addresses, lambda: torch.tensor(addresses, dtype=torch.int64, device="cpu")
        )

    def squares(self) -> tuple[Tensor, Tensor]:
        """Sums of g².

        Returns:
            The local sums that factors need, in the order of ``plan.sum_pieces``; and the local totals,
            (tensors,). Both float32.
        """
        plan, kernels, dtype = self.plan, _square_kernels(), self.dtypes.grad
        lengths = [plan.sum_count, len(plan.layouts), plan.outer_parts, plan.inner_parts]
        every = self._empty(sum(lengths))
        sums, totals, outer, inner = torch.split(every, lengths)
        with jit.on_device(self.plan.device):
            for tiles in plan.tiles:
                jit.launch(
                    kernels.squares, (len(tiles.table),),
                    self._pointers, plan.sizes, plan.matrices, tiles.table, outer, inner,
                    DTYPE=dtype, FACTORED=tiles.kind.factored, FAST=self._is_fast(tiles.kind),
                    **_constants_of_tile(plan.tile, self._programs.squares, dtype),
                )  # fmt: skip
            if len(plan.parts):
                jit.launch(
                    kernels.add_parts, (len(plan.parts),),
                    outer, inner, sums, plan.parts, BLOCK=BLOCK, AT_ONCE=AT_ONCE,
                )  # fmt: skip
            self._add_up(every, every, plan.totals)
        return sums, totals

    def factors_(self, sums: Tensor, setup: Setup, n: PackedNumbers) -> None:
        """Update the factors of the second moment from the completed sums of g²."""
        plan = self.plan
        if not len(plan.factor_blocks):
            return
        with jit.on_device(self.plan.device):
            jit.launch(
                _square_kernels().factors, (len(plan.factor_blocks),),
                self._pointers, plan.factor_blocks, sums, *_numbers(n),
                FACTOR_DTYPE=setup.dtypes.outer, MEAN_DTYPE=setup.dtypes.mean,
                BLOCK=FACTOR_BLOCK,
            )  # fmt: skip

    def measure_(
        self, setup: Setup, n: PackedNumbers, *, takes_evidence: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The directions' sums of squares, (tensors,), or None if nothing needs them; and the evidence.

        The evidence is what :meth:`move_` returns.
        """
        evidence = self._evidence_parts(setup, takes_evidence)
        norms = self._empty(self.plan.tile_count) if setup.is_stable else None
        with jit.on_device(self.plan.device):
            if setup.is_stable or takes_evidence or (setup.direction and setup.has_momentum):
                self._sweep(setup, n, evidence, norm_parts=norms)
            whole = None if norms is None else self._of_tensors(norms[None])[0]
            return whole, self._evidence(setup, evidence)

    def move_(
        self,
        setup: Setup,
        n: PackedNumbers,
        norms: Tensor | None,
        ordinals: Tensor,
        *,
        takes_evidence: bool,
        directions: Directions | None = None,
    ) -> dict[str, Tensor]:
        """Move y, z and the moments of all tensors.

        Args:
            setup, n: The batch's setup, and the numbers of the step.
            norms: The directions' sums of squares over whole tensors, (tensors,), if StableAdamW needs them.
            ordinals: The places of the parameters in the optimiser, from 1; (tensors,), int64.
            takes_evidence: Whether to take evidence in this pass.
            directions: The directions, if they are read.

        Returns:
            The sums of the evidence by name, (tensors,) each, float64; empty if none is taken.
        """
        evidence = self._evidence_parts(setup, takes_evidence)
        with jit.on_device(self.plan.device):
            if directions is not None:
                self._point_to_directions(directions)
            self._sweep(setup, n, evidence, moves=True, norms=norms, ordinals=ordinals, directions=directions)
            return self._evidence(setup, evidence)

    def _sweep(
        self,
        setup: Setup,
        n: PackedNumbers,
        evidence_parts: Tensor,
        *,
        moves: bool = False,
        norm_parts: Tensor | None = None,
        norms: Tensor | None = None,
        ordinals: Tensor | None = None,
        directions: Directions | None = None,
    ) -> None:
        plan = self.plan
        # A kernel needs tensors even for arguments that it does not read: pass any.
        norm_parts, norms = (plan.numels if given is None else given for given in (norm_parts, norms))
        ordinals = plan.sizes if ordinals is None else ordinals
        read = (plan.sizes, plan.numels) if directions is None else (self._directions, directions.scales)
        is_aligned = directions is None or self._directions_are_aligned
        program = self._programs.move if moves else self._programs.measure
        for tiles in plan.tiles:
            jit.launch(
                _kernels().sweep, (len(tiles.table),),
                self._pointers, plan.sizes, plan.runs, plan.matrices, tiles.table, *_numbers(n),
                norm_parts[tiles.first :], evidence_parts[:, tiles.first :], plan.tile_count,
                norms, plan.numels, ordinals, n.step, *read,
                MOVES=moves, TAKES_EVIDENCE=len(evidence_parts) > 0,
                **_constants_of_sweep(
                    setup, tiles.kind, plan.tile, program, is_fast=is_aligned and self._is_fast(tiles.kind),
                ),
            )  # fmt: skip

    def _is_fast(self, kind: TileKind) -> bool:
        return kind.fast and self._is_aligned

    def _evidence_parts(self, setup: Setup, takes_evidence: bool) -> Tensor:
        """The buffer for the partial sums of evidence, (sums, tiles); it has no rows if none is taken."""
        rows = len(EVIDENCE_SUMS[setup.evidence]) if takes_evidence else 0
        return torch.empty(rows, self.plan.tile_count, dtype=torch.float64, device=self.plan.device)

    def _evidence(self, setup: Setup, parts: Tensor) -> dict[str, Tensor]:
        """The sums of the evidence by name, (tensors,) each; empty if ``parts`` has no rows."""
        return dict(zip(EVIDENCE_SUMS[setup.evidence], self._of_tensors(parts), strict=False))

    def _of_tensors(self, parts: Tensor) -> Tensor:
        """The sums of ``parts``, (rows, tiles), over the tiles of each tensor; (rows, tensors)."""
        sums = torch.empty(len(parts), len(self.plan.layouts), dtype=parts.dtype, device=parts.device)
        if parts.shape[0]:
            self._add_up(parts, sums, self.plan.of_tensors)
        return sums

    def _add_up(self, values: Tensor, out: Tensor, sums: Tensor) -> None:
        rows = len(values) if values.ndim == 2 else 1
        if not len(sums):
            return
        jit.launch(
            _square_kernels().add_up, (len(sums), rows),
            values, values.stride(0) if values.ndim == 2 else 0, out, out.stride(0) if out.ndim == 2 else 0,
            sums, DTYPE=values.dtype, BLOCK=_RUN,
        )  # fmt: skip

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self.plan.device)


# Cached, since every step asks for the same ones.
@functools.cache
def _constants_of_sweep(
    setup: Setup, kind: TileKind, tile: TileSize, program: Program, *, is_fast: bool
) -> Mapping[str, object]:
    return {
        "GRAD_DTYPE": setup.dtypes.grad,
        "WEIGHT_DTYPE": setup.dtypes.weight,
        "BASE_DTYPE": setup.dtypes.base,
        "EXP_AVG_DTYPE": setup.dtypes.exp_avg,
        "EXP_AVG_SQ_DTYPE": setup.dtypes.exp_avg_sq,
        "FACTOR_DTYPE": setup.dtypes.outer,
        "MEAN_DTYPE": setup.dtypes.mean,
        "P0_DTYPE": setup.dtypes.p0,
        "S_DTYPE": setup.dtypes.s,
        "DIRECTION_DTYPE": setup.direction,
        "READS": setup.direction is not None,
        "FACTORED": kind.factored,
        "SINGLE": kind.single,
        "FAST": is_fast,
        "MOMENTUM": setup.has_momentum,
        "IS_OFFSET": setup.is_offset,
        "ATAN2": setup.is_atan2,
        "STABLE": setup.is_stable,
        "DECAYS": setup.decays,
        "STOCHASTIC": setup.rounds,
        "KIND": EVIDENCE_KINDS[setup.evidence],
        "SLICE_P": setup.slice_p,
        "SAMPLES": 1 << (-(-tile.columns // setup.slice_p) - 1).bit_length(),
        **_constants_of_tile(tile, program, *setup.dtypes.of_elements, setup.direction),
    }


@functools.cache
def _constants_of_tile(tile: TileSize, program: Program, *dtypes: torch.dtype | None) -> Mapping[str, int]:
    """How a kernel works through its tiles, and how many elements it reads at a time."""
    rows, columns = tile
    widest = max(dtype.itemsize for dtype in dtypes if dtype is not None)
    strip, warps = program
    vector = _VECTOR_BYTES // widest
    return {"ROWS": rows, "COLUMNS": columns, "STRIP": strip, "VECTOR": vector, "num_warps": warps}


def _numbers(n: PackedNumbers) -> tuple[Tensor, int, int, Tensor, int]:
    """The numbers of a step with their strides over numbers and tensors, and the gate with its stride."""
    values, gate = n.values, n.gate
    per_tensor = values.ndim == 2
    tensor_stride, gate_stride = (values.stride(1), gate.stride(0)) if per_tensor else (0, 0)
    return values, values.stride(0), tensor_stride, gate, gate_stride
