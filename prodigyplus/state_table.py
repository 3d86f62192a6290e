"""The state of a parameter, as a table: each entry's name, dtype, shape, initial value and saved form.

New, freed, expected, saved and loaded states all follow from it. To add an entry, add a line to ``TABLE``;
and, if an option outside :class:`StateOptions` decides about it, a field there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.formulas import moments, prodigy, schedule_free
from prodigyplus.options import Options
from prodigyplus.terms import samples
from prodigyplus.terms.dtypes import wide_dtype
from prodigyplus.terms.layout import Layout

# Of parameters, gradients and state. float16 lacks the range for the squares of d·g.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# bfloat16 has 8 bits: a product with a larger factor is rounded back to where it was.
_LARGEST_DECAY_IN_BFLOAT16 = 1 - 2**-8


class StateOptions(NamedTuple):
    """The options that decide which entries a parameter's state has, and their dtypes.

    Only ``decays_slowly`` may change once there is state.
    """

    use_schedulefree: bool
    bfloat16_z: bool
    use_focus: bool
    use_muon_pp: bool
    use_speed: bool  # whether it is "relative"
    factored: bool
    factored_fp32: bool
    slice_p: int
    step_size: str
    decays_slowly: bool  # whether β3 is so close to 1 that s, in bfloat16, would not decay

    @classmethod
    def of(cls, o: Options) -> StateOptions:
        """The state options of a group."""
        names = [name for name in cls._fields if name not in ("use_speed", "decays_slowly")]
        return cls(
            **{name: getattr(o, name) for name in names},
            use_speed=o.use_speed == "relative",
            decays_slowly=o.beta3 > _LARGEST_DECAY_IN_BFLOAT16,
        )


class Subject(NamedTuple):
    """What decides about a parameter's state: its dtypes, device, global shape and options."""

    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    options: StateOptions

    @property
    def has_moment(self) -> bool:
        """Whether there is a second moment."""
        return not (self.options.use_muon_pp or self.options.use_focus)

    @property
    def is_factored(self) -> bool:
        """Whether the second moment is factored."""
        return self.has_moment and self.options.factored and moments.factored_dims(self.shape) is not None

    @property
    def keeps_offset(self) -> bool:
        """Whether z is kept as its offset from y."""
        o = self.options
        return o.use_schedulefree and o.bfloat16_z and self.weight_dtype == torch.float32

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        if self.grad_dtype == torch.float64:
            return torch.float64
        return torch.float32 if self.options.factored_fp32 else self.grad_dtype


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table.

    Args:
        exists: Whether a parameter has the entry.
        dtype: Its dtype.
        averaged: Returns, for a global shape, the dimensions that it is averaged over, where it has size 1.
        is_sampled: Whether it holds samples: kept in shape (ceil(elements / ``slice_p``),), and saved as rows
            (see ``terms/samples.py``).
        is_number: Whether it is one number for the parameter, a 0-dim tensor.
        starts_at_weight: Whether it starts as the weight, or the weight's samples. Otherwise as zeros.
        restarts: Whether it is initialised again at the first real step, see :func:`restart_`.
        is_evidence: Whether Prodigy alone needs it: freed, and saved as zeros, once the step size is frozen.
    """

    exists: Callable[[Subject], bool]
    dtype: Callable[[Subject], torch.dtype]
    averaged: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: ()
    is_sampled: bool = False
    is_number: bool = False
    starts_at_weight: bool = False
    restarts: bool = False
    is_evidence: bool = False

    def saved_shape(self, shape: tuple[int, ...], slice_p: int) -> tuple[int, ...]:
        """The global shape that it is saved in, for a parameter of this global shape."""
        if self.is_number:
            return ()
        if self.is_sampled:
            return samples.rows_shape(shape, slice_p)
        return tuple(1 if dim in self.averaged(shape) else size for dim, size in enumerate(shape))

    def whole_dims(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The dimensions of the parameter along which every shard has the saved entry whole."""
        if self.is_number:
            return tuple(range(len(shape)))
        if self.is_sampled:
            return (max(0, len(shape) - 1),)
        return self.averaged(shape)


def _row(shape: tuple[int, ...]) -> int:
    return _factored(shape)[0]


def _column(shape: tuple[int, ...]) -> int:
    return _factored(shape)[1]


def _factored(shape: tuple[int, ...]) -> tuple[int, int]:
    dims = moments.factored_dims(shape)
    assert dims is not None, shape
    return dims


def _statistics_dtype(s: Subject) -> torch.dtype:
    if s.weight_dtype == torch.float64:
        return torch.float64
    return torch.float32 if s.options.decays_slowly else torch.bfloat16


def _number_dtype(s: Subject) -> torch.dtype:
    return wide_dtype(s.device)


def _uses_prodigy(s: Subject) -> bool:
    return s.options.step_size == "prodigy"


def _is_relative(s: Subject) -> bool:
    return _uses_prodigy(s) and s.options.use_speed


TABLE = {
    # FOCUS's average of the weights, instead of a second moment.
    "exp_avg_weight": Entry(lambda s: s.options.use_focus, lambda s: s.grad_dtype),
    # The second moment of d·g; factored, its averages over columns, over rows and over both.
    "exp_avg_sq": Entry(lambda s: s.has_moment and not s.is_factored, lambda s: s.grad_dtype),
    "exp_avg_sq_row": Entry(
        lambda s: s.is_factored, lambda s: s.factor_dtype, lambda shape: (_column(shape),)
    ),
    "exp_avg_sq_col": Entry(lambda s: s.is_factored, lambda s: s.factor_dtype, lambda shape: (_row(shape),)),
    "exp_avg_sq_mean": Entry(
        lambda s: s.is_factored,
        # Divides every row factor: its rounding would not average out, so it is never below float32.
        lambda s: torch.promote_types(s.factor_dtype, torch.float32),
        lambda shape: (_row(shape), _column(shape)),
    ),
    # Schedule-Free's base iterate, or its offset from the weights; without Schedule-Free, the first moment.
    schedule_free.OFFSET: Entry(lambda s: s.keeps_offset, lambda s: torch.bfloat16, restarts=True),
    schedule_free.BASE: Entry(
        lambda s: s.options.use_schedulefree and not s.keeps_offset,
        lambda s: s.weight_dtype,
        starts_at_weight=True,
        restarts=True,
    ),
    "exp_avg": Entry(lambda s: not s.options.use_schedulefree, lambda s: s.grad_dtype),
    # Prodigy's evidence. p0 is in the weight's dtype: if it were rounded, its distance from the weights would
    # pass for progress.
    "p0": Entry(
        _uses_prodigy,
        lambda s: s.weight_dtype,
        is_sampled=True,
        starts_at_weight=True,
        restarts=True,
        is_evidence=True,
    ),
    "s": Entry(
        lambda s: _uses_prodigy(s) and not s.options.use_speed,
        _statistics_dtype,
        is_sampled=True,
        is_evidence=True,
    ),
    **{key: Entry(_is_relative, _number_dtype, is_number=True, is_evidence=True) for key in prodigy.AVERAGES},
}

SAMPLED_KEYS = tuple(key for key, entry in TABLE.items() if entry.is_sampled)
EVIDENCE_KEYS = tuple(key for key, entry in TABLE.items() if entry.is_evidence)


def new_state(weight: Tensor, grad: Tensor, layout: Layout, options: StateOptions) -> dict[str, Tensor]:
    """The state of a parameter before its first step.

    Args:
        weight, grad: Local tensors.
        layout: Their layout.
        options: The options that decide about the state.
    """
    subject = Subject(weight.dtype, grad.dtype, weight.device, layout.shape, options)
    return {key: _start(entry, subject, weight, layout) for key, entry in entries_of(subject).items()}


def entries_of(subject: Subject) -> dict[str, Entry]:
    """The lines of the table that hold for a parameter."""
    return {key: entry for key, entry in TABLE.items() if entry.exists(subject)}


def _start(entry: Entry, subject: Subject, weight: Tensor, layout: Layout) -> Tensor:
    dtype = entry.dtype(subject)
    if entry.is_number:
        return weight.new_zeros((), dtype=dtype)
    value = weight.detach()
    if entry.is_sampled:
        value = layout.sample(value, subject.options.slice_p)
        kept = torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)
    elif averaged := entry.averaged(layout.shape):
        local = [1 if dim in averaged else size for dim, size in enumerate(weight.shape)]
        kept = weight.new_empty(local, dtype=dtype)
    else:
        kept = torch.empty_like(value, dtype=dtype)
    return kept.copy_(value) if entry.starts_at_weight else kept.zero_()


def freed_state(weight: Tensor, layout: Layout, options: StateOptions) -> dict[str, Tensor]:
    """Zeros, to be saved instead of evidence that was freed.

    torch's checkpoint helpers load into the state of a new optimiser, and fail if the file lacks an entry.
    """
    state = new_state(weight, weight, layout, options)
    return {key: torch.zeros_like(value) for key, value in state.items() if key in EVIDENCE_KEYS}


def expected_shapes(
    weight: Tensor, grad: Tensor, layout: Layout, options: StateOptions
) -> dict[str, tuple[int, ...]]:
    """The local shapes of a parameter's state; the arguments as for :func:`new_state`."""
    like, grad_like = (torch.empty_like(tensor, device="meta") for tensor in (weight, grad))
    return {key: tuple(value.shape) for key, value in new_state(like, grad_like, layout, options).items()}


def restart_(state: Mapping[str, Tensor], weight: Tensor, layout: Layout, slice_p: int) -> None:
    """Initialise a state again, in place, from the weights as they are now.

    torch's checkpoint helpers create state by a step with ``lr=0``, after which weights may be loaded.
    """
    for key, value in state.items():
        entry = TABLE.get(key)
        if entry is not None and entry.restarts:
            start = layout.sample(weight, slice_p) if entry.is_sampled else weight
            value.copy_(start) if entry.starts_at_weight else value.zero_()
