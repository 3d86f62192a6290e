"""Parameters of whatever shapes that move as one batch, by the kernels of :mod:`prodigyplus.device`.

Where a tensor's own launch costs more than its arithmetic, one launch serves all of them. A batch is what a
stack is (see :mod:`prodigyplus.engine.rule`), of many layouts; its passes are the same ones.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Generator, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from prodigyplus.device.launches import Launches, Setup, interprets, tile_size
from prodigyplus.device.plan import MAX_NUMEL, Plan
from prodigyplus.engine.passes import Kind
from prodigyplus.engine.rule import Answers, ParamStep
from prodigyplus.formulas import moments, prodigy, schedule_free, stochastic_rounding
from prodigyplus.options import Options
from prodigyplus.terms import stacks
from prodigyplus.terms.requests import Requests, Sum
from prodigyplus.terms.scalars import Constants, Scalars

# The values that the fields of a kind may have for the kernels to move it; see also ``engine/compiled.py``.
_SWITCH = (False, True)
_ADMITTED: dict[str, tuple[object, ...]] = {
    "direction": ("adam", "atan2"),
    "z": (schedule_free.BASE, schedule_free.OFFSET, None),
    "is_stable": _SWITCH,
    "decays": _SWITCH,
    "decays_by_lr": _SWITCH,
    "use_speed": (*_SWITCH, "relative"),
}
_DTYPES = (torch.float32, torch.bfloat16)


def obstacle(o: Options, dtype: torch.dtype, device: torch.device) -> str | None:
    """What stands in the way of moving a parameter by kernels, if anything does.

    Args:
        o: The options of its group.
        dtype: That of its weights.
        device: Where it is.
    """
    kind = Kind.of(o, {}, 2)
    fields = zip(Kind._fields, kind, Kind(), strict=True)
    for name, value, default in fields:
        if value not in _ADMITTED.get(name, (default,)):
            return f"the kernels have no {name}={value!r}"
    if dtype not in _DTYPES:
        return f"the kernels move {' and '.join(map(str, _DTYPES))}, not {dtype}"
    if device.type != "cuda" and not interprets():
        return f"the kernels run on GPUs, not on {device}"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def batch_key(param: ParamStep) -> Hashable | None:
    """Parameters of equal keys move as one batch, the same on all ranks; None: not by kernels."""
    o, weight, grad, layout = param.group.options, param.weight, param.grad, param.layout
    if o.fused is False or (o.fused is None and weight.device.type != "cuda"):
        return None
    if _has_obstacle(o, weight.dtype, weight.device) or grad.dtype not in _DTYPES:
        return None
    is_dense = weight.is_contiguous() and all(value.is_contiguous() for value in param.state.values())
    if not (layout.is_run and is_dense and layout.max_local_numel <= MAX_NUMEL):
        return None
    axes = tuple(axis for axis, _ in layout.shard_axes), layout.replica_axes
    dtypes = (
        weight.device,
        weight.dtype,
        grad.dtype,
        *(param.state[key].dtype for key in _KEPT if key in param.state),
    )
    return id(param.group), axes, dtypes, "p0" in param.state, param.present is None


# For every parameter at every step: what is asked of a group's options is asked once.
_has_obstacle = functools.lru_cache(maxsize=256)(obstacle)

# The entries of a state whose dtypes are those of all parameters of a batch, if they have them.
_KEPT = (schedule_free.BASE, schedule_free.OFFSET, "exp_avg", "p0")


class Batch:
    """Parameters of one batch key; see :class:`prodigyplus.engine.rule.Stack`."""

    is_matrix = False
    nbytes = 0  # no direction is kept

    def __init__(self, params: Sequence[ParamStep]) -> None:
        first = params[0]
        self.weights = [param.weight for param in params]
        self.grads = [param.grad.contiguous() for param in params]
        self.states = [param.state for param in params]
        self.layouts = [param.layout for param in params]
        self.group = first.group
        self.numbers = [param.number for param in params]
        self.present = None if first.present is None else [bool(param.present) for param in params]

    def squares(self, constants: Constants) -> Requests:
        """See :class:`prodigyplus.engine.rule.Moving`; a request for each run of the sums."""
        plan, launches = self._planned(constants)
        sums, totals = launches.squares(self.setup)
        pieces = {
            f"squares {index}": Sum(sums[piece.start : piece.end], piece.axes)
            for index, piece in enumerate(plan.sum_pieces)
        }
        return {"total": Sum(totals, self.axes), **pieces}

    def work(self, squares: Answers, n: Scalars, constants: Constants) -> _KernelWork:
        """See :class:`prodigyplus.engine.rule.Moving`."""
        return _KernelWork(self, squares, n, constants)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.float32

    @property
    def axes(self) -> tuple[Hashable, ...]:
        """See :attr:`prodigyplus.engine.rule.Stack.axes`; the same for all of its parameters."""
        layout = self.layouts[0]
        return layout.axes(layout.dims, count_replicas=True)

    @property
    def is_sharded(self) -> bool:
        """Whether its sums are completed by other ranks before it moves."""
        return bool(self.layouts[0].shard_axes)

    @property
    def adapts(self) -> bool:
        """Whether the gradients are evidence for the step size."""
        return self.group.adapts and "p0" in self.states[0]

    @property
    def kind(self) -> Kind:
        """Which operators its passes consist of."""
        return Kind.of(self.group.options, self.states[0], 2)

    def _planned(self, constants: Constants) -> tuple[Plan, Launches]:
        """Its tables, and its launches, which know where its tensors are."""
        factored = tuple(map(moments.is_factored, self.states))
        every, device = self.group.options.slice_p, self.weights[0].device
        key = "plan", tuple(self.numbers), tuple(map(id, self.layouts)), factored, every, device

        def make() -> tuple[Plan, Launches]:
            plan = Plan(self.layouts, factored, every, device, tile_size())
            return plan, Launches(plan)

        plan, launches = constants.made(key, make)
        launches.point(self._addresses(plan))
        return plan, launches

    def _addresses(self, plan: Plan) -> list[int]:
        addresses: list[int] = []
        for weight, grad, state, is_row_outer in zip(
            self.weights, self.grads, self.states, plan.is_row_outer, strict=True
        ):
            outer, inner = ("row", "col") if is_row_outer else ("col", "row")
            z = state.get(schedule_free.BASE, state.get(schedule_free.OFFSET))
            entries = (
                z,
                *(state.get(key) for key in ("exp_avg", "exp_avg_sq", f"exp_avg_sq_{outer}")),
                *(state.get(key) for key in (f"exp_avg_sq_{inner}", "exp_avg_sq_mean", "p0", "s")),
            )
            addresses += grad.data_ptr(), weight.data_ptr()
            addresses += [0 if entry is None else entry.data_ptr() for entry in entries]
        return addresses

    @property
    def setup(self) -> Setup:
        """What its kernels are compiled for."""
        kind, o = self.kind, self.group.options
        dtypes = {key: value.dtype for state in self.states for key, value in state.items()}
        weight = self.weights[0].dtype
        base = None if kind.z is None else dtypes[kind.z]
        return Setup(
            grad=self.grads[0].dtype,
            weight=weight,
            base=base,
            first=dtypes.get("exp_avg"),
            second=dtypes.get("exp_avg_sq"),
            factor=dtypes.get("exp_avg_sq_row"),
            mean=dtypes.get("exp_avg_sq_mean"),
            statistic=dtypes.get("s"),
            is_offset=kind.is_offset,
            is_atan2=kind.direction == "atan2",
            is_stable=kind.is_stable,
            decays=kind.decays,
            use_speed=kind.use_speed,
            every=o.slice_p,
            rounds=o.stochastic_rounding and torch.bfloat16 in (weight, base),
        )


class _KernelWork:
    """The passes of a batch by kernels: a direction is made anew for the move, rather than kept.

    Where nothing has to be asked between the two, the move is made with the measuring, and takes the
    evidence: it has all of g, y and z at hand.

    Args:
        batch: The batch.
        squares: The whole sums of its gradients' squares.
        n: The numbers of the step.
        constants: The optimiser's.
    """

    def __init__(self, batch: Batch, squares: Mapping[str, Tensor], n: Scalars, constants: Constants) -> None:
        self.batch, self.kind, self.n = batch, batch.kind, n
        keys = prodigy.AVERAGES if self.kind.use_speed == "relative" and batch.adapts else ()
        self.state = {key: stacks.stack_view([state[key] for state in batch.states]) for key in keys}
        self._plan, self._launches = batch._planned(constants)
        self._setup, self._sums = batch.setup, squares
        numbers = constants.on(n.step.device, batch.numbers)
        self._seeds = stochastic_rounding.seeds(n.step, numbers) if self._setup.rounds else numbers

    def momentum_(self) -> None:
        """Moved with the rest: it needs nothing of other ranks."""

    def scale_up_(self, agreeing: Tensor | None) -> Generator[Requests, Answers, None]:
        """Nothing is masked."""
        yield from ()

    def measure_(self) -> Requests:
        batch, setup, n = self.batch, self._setup, self.n.packed
        sums = [self._sums[f"squares {index}"] for index in range(len(self._plan.sum_pieces))]
        whole = (
            sums[0]
            if len(sums) == 1
            else torch.cat([*sums, batch.weights[0].new_empty(0, dtype=batch.dtype)])
        )
        self._launches.factors_(whole, setup, n)
        takes = batch.adapts
        norms, evidence = self._launches.measure_(setup, n, takes_evidence=takes and batch.is_sharded)
        if not batch.is_sharded:
            evidence = self._launches.move_(setup, norms, self._seeds, n, takes_evidence=takes)
        requests = self._evidence(evidence) if takes else {}
        if batch.is_sharded and setup.is_stable:
            requests["uu"] = norms[0]
        layout = batch.layouts[0]
        return {name: Sum(value, layout.axes(layout.dims)) for name, value in requests.items()}

    def _evidence(self, sums: Tensor) -> dict[str, Tensor]:
        names = ("product", "l1", "l2_square") if self.kind.use_speed == "relative" else ("product", "norm")
        return dict(zip(names, sums, strict=True))

    def move_(self, answers: Answers) -> None:
        if self.batch.is_sharded:
            norms = answers.get("uu", self._seeds)
            self._launches.move_(self._setup, norms, self._seeds, self.n.packed, takes_evidence=False)

    def finish_(self) -> None:
        for key, values in self.state.items():
            stacks.write_back_([state[key] for state in self.batch.states], values)
