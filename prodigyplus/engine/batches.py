"""Parameters of any shapes that move as one batch, by the kernels of :mod:`prodigyplus.device`.

On a GPU, a launch costs more than the arithmetic of most tensors, so one launch serves all of them. A batch
is like a stack (see :mod:`prodigyplus.engine.stack`) but of many layouts, and has the same passes.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Generator, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from prodigyplus import state_table
from prodigyplus.device import jit
from prodigyplus.device.launches import Directions, Launches, Setup, tile_size
from prodigyplus.device.plan import MAX_NUMEL, Plan
from prodigyplus.engine import passes
from prodigyplus.engine.bundle import Backend, Bundle
from prodigyplus.engine.group_step import GroupStep
from prodigyplus.engine.kind import ADMITTED_BY_ALL, Kind
from prodigyplus.engine.param_step import ParamStep, matrices, orthogonalized_in
from prodigyplus.formulas import moments, muon, prodigy, schedule_free
from prodigyplus.options import Options
from prodigyplus.state_table import Subject
from prodigyplus.terms import stacks
from prodigyplus.terms.requests import Answers, Matrices, Requests, Sum
from prodigyplus.terms.step_numbers import StepNumbers

# The values of the fields of a kind that the kernels can move.
_ADMITTED: dict[str, tuple[object, ...]] = {
    **ADMITTED_BY_ALL,
    "direction": ("adam", "atan2", "muon"),
    "z": (schedule_free.BASE, schedule_free.OFFSET, None),
}
_DTYPES = (torch.float32, torch.bfloat16)


def obstacle(o: Options, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels cannot move a parameter, in words; None if they can.

    Args:
        o: The options of its group.
        dtype: The dtype of its weights.
        device: The device that it is on.
    """
    # Of a tensor of several elements, without any state: then there is neither z nor evidence, which kernels
    # do without.
    if refused := Kind.of(o, {}, numel=2).refused_by(_ADMITTED):
        return f"the kernels have no {refused}"
    if dtype not in _DTYPES:
        return f"the kernels move {' and '.join(map(str, _DTYPES))}, not {dtype}"
    if not jit.has_triton():
        return "Triton is not installed"
    return None if jit.runs_on(device) else f"the kernels run on GPUs, not on {device}"


def batch_key(param: ParamStep) -> Hashable | None:
    """Parameters with equal keys move as one batch, the same on all ranks; None if kernels do not move it."""
    weight, grad, state, group, layout = param.weight, param.grad, param.state, param.group, param.layout
    if not group.options.wants_kernels(weight.device):
        return None
    if type(weight) not in _MEMORY or type(grad) is not Tensor or not weight.is_contiguous():
        return None
    # This runs for every parameter at every step, so the key is cached by what it depends on. Groups and
    # layouts live as long as the step, so their ids stay valid.
    kept = *state, *map(_DTYPE, state.values())
    depends_on = id(layout), weight.dtype, weight.get_device(), grad.dtype, kept, param.present is None
    keys = group.batch_keys
    if depends_on not in keys:
        keys[depends_on] = _batch_key(param)
    return keys[depends_on]


def _batch_key(param: ParamStep) -> Hashable | None:
    weight, grad, group, layout = param.weight, param.grad, param.group, param.layout
    if grad.dtype not in _DTYPES or layout.max_local_numel > MAX_NUMEL:
        return None
    if not set(state_table.DTYPES).issuperset(map(_DTYPE, param.state.values())):
        return None
    if obstacle(group.options, weight.dtype, weight.device):
        return None
    axes = tuple([axis for axis, _ in layout.shard_axes]), layout.replica_axes
    has_evidence, may_lack = "p0" in param.state, param.present is not None
    dtypes = weight.dtype, grad.dtype, _unusual_dtypes(param)
    return group.index, axes, weight.device, *dtypes, has_evidence, may_lack


def _unusual_dtypes(param: ParamStep) -> Hashable | None:
    """All dtypes of a state, if any differs from a new state's, as after ``model.bfloat16()``; else None.

    The kernels of a batch read each entry in one dtype, but its parameters need not all have the same
    entries.
    """
    options = param.group.state_options
    subject = Subject(param.weight.dtype, param.grad.dtype, param.weight.device, param.layout.shape, options)
    found = {key: value.dtype for key, value in param.state.items()}
    new = {key: state_table.TABLE[key].dtype(subject) for key in found}
    return None if found == new else tuple(sorted(found.items(), key=operator.itemgetter(0)))


_TORCH_LAYOUT, _DTYPE, _SHAPE = map(operator.attrgetter, ("layout", "dtype", "shape"))

# The types of tensors whose elements are at ``data_ptr()``. Those of other types are elsewhere (quantised
# tensors), or nowhere (fake tensors).
_MEMORY = (nn.Parameter, Tensor)


class Batch(Bundle):
    """Parameters of one batch key, of any shapes; it may be reused in later steps."""

    nbytes = 0  # no direction is kept between passes

    def __init__(self, params: Sequence[ParamStep]) -> None:
        super().__init__(params)
        self.grads = [grad.contiguous() for grad in self.grads]
        self.matrix_names = [f"matrices {param.ordinal}" for param in params]
        self._keys = [tuple(param.state) for param in params]
        self._entries = list(itertools.chain.from_iterable(map(dict.values, [p.state for p in params])))
        # Kept apart, since ``p.data = …`` changes the shape of p itself.
        self._shapes = list(map(_SHAPE, self.weights))
        self._launches: Launches | None = None
        self._watched: list[weakref.ref[Tensor]] = []  # the entries that the launches point to
        self._freed: list[weakref.ref[Tensor]] = []  # those of them that are gone

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """The states of its parameters, made from their entries."""
        entries = iter(self._entries)
        return [dict(zip(keys, entries, strict=False)) for keys in self._keys]

    def reuse_(
        self, group: GroupStep, weights: list[Tensor], entries: list[Tensor], grads: list[Tensor]
    ) -> bool:
        """Take the tensors of another step, if nothing but gradients has been replaced.

        Args:
            group: Its parameters' group in that step.
            weights, entries, grads: Local tensors: its parameters, all entries of their states, and their
                gradients, none of which is missing on this rank.

        Returns:
            Whether it can be reused. If not, a new batch must be made.
        """
        launches = self.launches
        # This runs for every parameter at every step, so by map(), without a line of Python for each.
        if {*map(type, grads)} != {Tensor} or {*map(_TORCH_LAYOUT, grads)} != {torch.strided}:
            return False
        if not all(map(Tensor.is_contiguous, grads + weights)):
            return False
        if any(map(Tensor.is_neg, grads)):
            return False
        # Other weights may lie at the same address: a part of the old ones, or a buffer of the user's.
        if self._shapes != [*map(_SHAPE, weights)]:
            return False
        # So may another entry, of another dtype or with other strides, once the old one has been freed.
        if self._freed or not launches.is_current(weights, entries, grads):
            return False
        self.group, self.weights, self._entries, self.grads = group, weights, entries, grads
        self.present = None if self.present is None else [True] * len(grads)
        launches.point_to_gradients(grads)
        return True

    def drop_tensors_(self) -> None:
        """Drop all references to tensors, so that what is replaced before the next step can be freed."""
        self.weights, self._entries, self.grads = [], [], []

    def squares(self) -> Requests:
        """See :class:`Bundle`; one request for each piece of the buffer of sums."""
        launches = self._launches = self._launches or self._launches_made_()
        sums, totals = launches.squares()
        pieces = {
            f"squares {index}": Sum(sums[piece.start : piece.end], piece.axes)
            for index, piece in enumerate(launches.plan.sum_pieces)
        }
        return {"total": Sum(totals, self.axes), **pieces}

    def backend(self, squares: Answers, n: StepNumbers) -> Backend:
        return _KernelBackend(self, squares, n)

    def _launches_made_(self) -> Launches:
        """Its launches, pointed to its tensors, of which they hold the addresses."""
        states, slice_p, device = self.states, self.group.options.slice_p, self.weights[0].device
        factored = tuple(map(moments.is_factored, states))
        key = "launches", tuple(self.ordinals), tuple(map(id, self.layouts)), factored, slice_p
        launches = self.group.constants.get_recent(
            device, key, lambda: Launches(Plan(self.layouts, factored, slice_p, device, tile_size()))
        )
        launches.point_(self.weights, states, self.grads)
        self._watched = [weakref.ref(entry, self._freed.append) for entry in self._entries]
        return launches

    @property
    def launches(self) -> Launches:
        """Its launches, once :meth:`squares` has made them."""
        assert self._launches is not None
        return self._launches

    @property
    def setup(self) -> Setup:
        """The constants that its kernels are compiled for."""
        kind, o, dtypes = self.kind, self.group.options, self.launches.dtypes
        return Setup(
            dtypes,
            has_momentum=kind.has_momentum,
            is_offset=kind.is_offset,
            is_atan2=kind.direction == "atan2",
            is_stable=kind.is_stable and not self.is_matrix,  # matrices have been scaled already
            decays=kind.decays,
            evidence=o.evidence,
            slice_p=o.slice_p,
            rounds=o.stochastic_rounding and torch.bfloat16 in (dtypes.weight, dtypes.base),
            direction=orthogonalized_in(self.group, self.dtype) if self.is_matrix else None,
        )

    def matrices(self) -> dict[str, Matrices]:
        """The requests to orthogonalise its matrices, by ``matrix_names``."""
        moved_by = [state["exp_avg"] for state in self.states] if self.kind.has_momentum else self.grads
        return {
            name: matrices(local, self.group, ordinal, self.dtype)
            for name, local, ordinal in zip(self.matrix_names, moved_by, self.ordinals, strict=True)
        }

    @property
    def scales(self) -> Tensor:
        """The factor of each tensor's orthogonalised matrices, see ``muon.unit_rms``; float32, (tensors,)."""
        batched, device = self.group.options.muon_batched, self.weights[0].device
        shapes = tuple(muon.sizes(layout.shape, batched=batched)[1:] for layout in self.layouts)
        return self.group.constants.get(
            device,
            ("unit_rms", shapes),
            lambda: torch.tensor(
                [muon.unit_rms(*shape) for shape in shapes], dtype=torch.float32, device="cpu"
            ).to(device),
        )


class _KernelBackend:
    """The passes of a batch by kernels: the direction is computed again for the move instead of kept.

    If no other rank is needed between the two passes, ``measure_`` also moves, and the move takes the
    evidence, since it has g, y and z at hand. The directions of matrices are not computed but read:
    ``measure_`` asks for them to be orthogonalised.

    Args:
        batch: The batch.
        squares: The sums of its gradients' squares, completed.
        n: The numbers of the step.
    """

    def __init__(self, batch: Batch, squares: Mapping[str, Tensor], n: StepNumbers) -> None:
        self.batch, self.kind, self.n = batch, batch.kind, n
        keys = prodigy.AVERAGES if self.kind.evidence == "relative" else ()
        self._averages = {key: stacks.stack_view([state[key] for state in batch.states]) for key in keys}
        self._launches, self._squares = batch.launches, squares
        self._moves_at_once = not (batch.is_sharded or batch.is_matrix)
        self._setup = batch.setup
        self._ordinals = batch.group.constants.int64(n.step.device, batch.ordinals)
        self._late: dict[str, Tensor] = {}  # see late_sums()

    def momentum_(self) -> None:
        """Nothing to do: the first moment is updated in the other passes, since it needs no other rank."""

    def scale_up_(self, agreeing: Tensor | None) -> Generator[Requests, Answers, None]:
        """Nothing to do: kernels move no kind that is masked."""
        yield from ()

    def measure_(self) -> Requests:
        batch, setup, n = self.batch, self._setup, self.n.packed
        squares = [self._squares[f"squares {index}"] for index in range(len(self._launches.plan.sum_pieces))]
        if squares:
            self._launches.factors_(squares[0] if len(squares) == 1 else torch.cat(squares), setup, n)
        takes = self.kind.evidence is not None
        norms, sums = self._launches.measure_(setup, n, takes_evidence=takes and not self._moves_at_once)
        if self._moves_at_once:
            sums = self._move_(norms, takes_evidence=takes)
        if self.kind.is_late:
            del sums["gu"], sums["uu"]  # of g: Muon's directions come later, and late_sums() asks for theirs
        if norms is not None and not self._moves_at_once:
            sums["uu"] = norms  # in float32, as the move reads it
        asked = batch.whole_sums(sums)
        return {**asked, **batch.matrices()} if batch.is_matrix else asked

    def late_sums(self) -> Requests:
        return self.batch.whole_sums(self._late)

    def evidence_(self, answers: Answers) -> tuple[Tensor, Tensor]:
        kind, numels = self.kind, self._launches.plan.numels
        if not kind.is_balanced:
            assert kind.evidence is not None
            return prodigy.evidence_(answers, self._averages, kind.evidence, self.n)
        if self.batch.is_matrix:
            scales = passes.Scales(None, self.n.unit * self.batch.scales)
        else:
            scales = passes.scales(answers, numels, self.batch.dtype, kind)
        return passes.balance_evidence(answers, scales, numels, self.n)

    def move_(self, answers: Answers) -> None:
        if self._moves_at_once:
            return
        directions = None
        if self.batch.is_matrix:
            pieces = [answers.pop(name).contiguous() for name in self.batch.matrix_names]
            directions = Directions(pieces, self.batch.scales)
        norms = answers["uu"] if self._setup.is_stable else None
        late = self._move_(norms, takes_evidence=self.kind.is_late, directions=directions)
        if self.kind.is_late:
            self._late = {name: late[name] for name in ("gu", "uu")}

    def _move_(
        self, norms: Tensor | None, *, takes_evidence: bool, directions: Directions | None = None
    ) -> dict[str, Tensor]:
        sums = self._launches.move_(
            self._setup,
            self.n.packed,
            norms,
            self._ordinals,
            takes_evidence=takes_evidence,
            directions=directions,
        )
        # Autograd does not see what kernels write; a backward pass through the old weights must still fail.
        increment_version(self.batch.weights)
        return sums

    def finish_(self) -> None:
        for key, values in self._averages.items():
            stacks.write_back_([state[key] for state in self.batch.states], values)
