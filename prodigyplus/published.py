"""Convert state dicts of the published package, prodigy-plus-schedule-free 1.9 and 2.0, to ours.

Both versions keep what we keep, but some of it under another name, in another form or in another unit:

===============================================  =======  ==================================================
theirs                                           version  ours
===============================================  =======  ==================================================
``k``, the number of the next step               both     ``k`` and ``calls``, steps made
``exp_avg_sq`` of FOCUS                          both     ``exp_avg_weight``
``p0``, ``s``: samples; a 0-dim zero for all     both     rows (see :mod:`prodigyplus.terms.samples`)
``use_speed=True``                               2.0      ``use_speed="relative"``
``exp_avg_x0_dot``, ``max_x0_minus_l1_norm``,    2.0      ``exp_avg_product``, ``max_l1``, ``max_l2``
``max_x0_minus_l2_norm``: Python numbers
``exp_avg_sq``, a list if factored: of g         1.9      of d·g: times d²; factors by name
``s``, ``d_numerator``, ``d_denom``: weighted    1.9      weighted with d²/sqrt(d0), except for SPEED
with sqrt(d)
===============================================  =======  ==================================================

``exp_avg_sq_mean`` and ``shared_d`` follow from the rest.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prodigyplus import checkpoint, options, state_table
from prodigyplus.checkpoint import Group
from prodigyplus.formulas import moments, prodigy
from prodigyplus.optimizer import ProdigyPlusScheduleFree
from prodigyplus.options import Options
from prodigyplus.placement import name_of
from prodigyplus.reporting import warn_caller
from prodigyplus.state_table import StateOptions
from prodigyplus.terms import samples
from prodigyplus.terms.dtypes import compute_dtype, wide_dtype
from prodigyplus.terms.group_numbers import first_numbers
from prodigyplus.terms.layout import Layout

Unit = Literal["group", "parameter"]


class Outcome(Enum):
    """How an entry of the published package's state dict is imported."""

    EXACT = "carried over exactly"
    CONVERTED = "carried over, converted"
    CHANGES = "goes on by another rule"
    ANEW = "starts anew"
    OWN = "not taken from it, stays as it is here"
    DROPPED = "not needed here, dropped"


@dataclass(frozen=True, slots=True)
class ReportLine:
    """A line of a report: entries with the same outcome.

    Args:
        outcome: How they were imported.
        names: The package's names of the entries; our names for entries that its state dict does not have.
        unit, count: How many groups or parameters have them.
        note: How, or why; may be empty.
    """

    outcome: Outcome
    names: tuple[str, ...]
    unit: Unit
    count: int
    note: str

    def __str__(self) -> str:
        plural = "s" if self.count > 1 else ""
        note = f": {self.note}" if self.note else ""
        return f"{', '.join(self.names)} ({self.count} {self.unit}{plural}){note}"


@dataclass(frozen=True, slots=True)
class ImportReport:
    """How :func:`import_published` imported a state dict; to be printed.

    Args:
        version: The version of the package that saved it, "1.9" or "2.0".
        train_mode: Whether it was saved in train mode, and so which weights the model has to hold.
        items: A line for all entries with the same outcome, not for each tensor.
    """

    version: str
    train_mode: bool
    items: tuple[ReportLine, ...]

    def of(self, *outcomes: Outcome) -> list[ReportLine]:
        """The items with these outcomes."""
        return [item for item in self.items if item.outcome in outcomes]

    def __str__(self) -> str:
        mode = "train" if self.train_mode else "eval"
        lines = [f"prodigy-plus-schedule-free {self.version}, saved in {mode} mode"]
        for outcome in Outcome:
            if items := self.of(outcome):
                lines.append(f"{outcome.value}:")
                for item in items:
                    lines += textwrap.wrap(str(item), 100, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)


class _Tally(Counter[tuple[Outcome, tuple[str, ...], Unit, str]]):
    """Counts the groups or parameters by outcome, names and note."""

    def add(self, outcome: Outcome, *names: str, unit: Unit = "parameter", note: str = "") -> None:
        if names:
            self[outcome, names, unit, note] += 1

    def add_scaled(self, scale: float, *names: str, unit: Unit = "parameter", note: str) -> None:
        """Add entries that were multiplied by ``scale``; ``note`` says why."""
        if scale == 1:
            self.add(Outcome.EXACT, *names, unit=unit)
        else:
            self.add(Outcome.CONVERTED, *names, unit=unit, note=note)

    def lines(self) -> tuple[ReportLine, ...]:
        """A line of the report for each."""
        return tuple(
            ReportLine(outcome, names, unit, count, note)
            for (outcome, names, unit, note), count in self.items()
        )


class _Scales(NamedTuple):
    """The factors that convert the package's units to ours."""

    moment: float = 1.0  # of second moments
    statistic: float = 1.0  # of Prodigy's statistics


class _Change(NamedTuple):
    """What behaves differently here than in a version of the package."""

    applies: Callable[[Group], bool]  # to a group
    name: str
    how: str


@dataclass(frozen=True, slots=True)
class _Package:
    """How a version of the package differs from ours.

    Args:
        version: Its major and minor version.
        options: The options in a group of its state dict.
        implied: Options of ours that it does not have, with the values that describe what it does.
        speed: Our value for its ``use_speed=True``.
        numbers: The other entries of a group that we need.
        scales: Returns the scales of a group, given all groups and its index.
        changes: What behaves differently here.
    """

    version: str
    options: tuple[str, ...]
    implied: Mapping[str, Any]
    speed: bool | str
    numbers: tuple[str, ...]
    scales: Callable[[Sequence[Group], int], _Scales]
    changes: tuple[_Change, ...]


# The options in a group of both versions, and of the later one alone.
_OPTIONS = ("lr", "betas", "beta3", "eps", "weight_decay", "weight_decay_by_lr", "d0", "d_coef",
            "prodigy_steps", "use_bias_correction", "use_speed", "use_stableadamw", "use_cautious",
            "use_grams", "use_adopt", "use_orthograd", "use_focus", "factored", "factored_fp32",
            "stochastic_rounding")  # fmt: skip
_SINCE_2_0 = ("split_groups", "split_groups_mean", "use_schedulefree", "schedulefree_c", "d_limiter")

# Entries of a group of either version that follow from the rest, or are only needed within a step.
_BOOKKEEPING = ("optimiser_version", "d_prev", "shared_d", "prev_d_numerator", "running_d_numerator",
                "running_d_denom", "running_weight_sum")  # fmt: skip

_SLICE_P = 11

_WEIGHTED = "weighted with d²/sqrt(d0), not sqrt(d)"

_MOMENTS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")

# Entries of a parameter that follow from the rest, or have no part in our algorithm.
_DROPPED = ("exp_avg_sq_metadata", "muon", "rms_sq")

# The package's names of SPEED's numbers, in the order of ``prodigy.AVERAGES``.
_SPEED = ("exp_avg_x0_dot", "max_x0_minus_l1_norm", "max_x0_minus_l2_norm")


def _scales_of_1_9(groups: Sequence[Group], index: int) -> _Scales:
    group = groups[index]
    # d_prev is the d of the last step; but groups that share the first one's d never update theirs, and no
    # group does once d is frozen.
    leader = groups[0] if _is_pooled(groups) else group
    frozen = 0 < group["prodigy_steps"] < group["k"]
    last_d = leader["d"] if frozen else leader["d_prev"]
    return _Scales(last_d**2, 1.0 if group["use_speed"] else group["d"] ** 1.5 / math.sqrt(group["d0"]))


def _is_pooled(groups: Sequence[Group]) -> bool:
    """Whether the groups of a state dict of 1.9 share one d: then the first alone has running sums."""
    return any("running_d_numerator" not in group for group in groups)


_1_9 = _Package(
    version="1.9",
    options=(*_OPTIONS, "use_muon_pp"),
    # d_limiter=False is not implied: its d grows by another rule, and ours may need the limiter.
    implied={
        "slice_p": _SLICE_P,
        "beta4": 0.0,
        "warmup_steps": 0,
        "use_schedulefree": True,
        "schedulefree_c": 0.0,
        "step_size": "prodigy",
    },
    speed=True,
    numbers=("d", "d_prev", "d_numerator", "d_denom", "weight_sum", "k", "train_mode"),
    scales=_scales_of_1_9,
    changes=(
        _Change(
            lambda o: True, "d", "goes by progress at z, not y, and by the ratio N/‖s‖₁, not its arctangent"
        ),
        _Change(
            lambda o: not o["split_groups"] or 0 < (o["prodigy_steps"] or 0) <= o["calls"],
            "d_prev",
            "does not shorten the memory of the second moment, where it was left behind",
        ),
        _Change(
            lambda o: o["use_stableadamw"], "use_stableadamw", "divides by the root of the rms, not the rms"
        ),
        _Change(lambda o: o["eps"] is None, "eps=None", "steps are 4/π as long, as Adam-atan2 has it"),
        _Change(lambda o: o["use_focus"], "use_focus", "averages z weighted with d², not y"),
        _Change(lambda o: o["use_orthograd"], "use_orthograd", "projects the direction, not the gradient"),
        _Change(lambda o: o["use_muon_pp"], "use_muon_pp", "has other polynomials, and no memory of the rms"),
    ),
)

_2_0 = _Package(
    version="2.0",
    options=(*_OPTIONS, *_SINCE_2_0),
    implied={
        "slice_p": _SLICE_P,
        "beta4": 0.0,
        "use_muon_pp": False,
        "warmup_steps": 0,
        "step_size": "prodigy",
    },
    speed="relative",
    numbers=("d", "d_numerator", "max_d_numerator", "d_denom", "effective_lr", "k", "train_mode"),
    scales=lambda groups, index: _Scales(),
    changes=(
        _Change(
            lambda o: o["use_cautious"] and not o["use_schedulefree"],
            "use_cautious",
            "applies its mask, and does not only compute it",
        ),
        _Change(
            lambda o: o["use_adopt"] and not o["use_schedulefree"],
            "use_adopt",
            "normalises d·g, not g, by the deviation of d·g",
        ),
        _Change(
            lambda o: o["d_limiter"] and o["d_coef"] < 1 and not o["use_speed"],
            "d_limiter",
            "limits d_coef·d_hat, not d_hat",
        ),
    ),
)


def import_published(optimizer: ProdigyPlusScheduleFree, state_dict: Mapping[str, Any]) -> ImportReport:
    """Resume from a state dict of the published package, prodigy-plus-schedule-free 1.9 or 2.0.

    >>> saved = torch.load("checkpoint.pt", weights_only=True)
    >>> model.load_state_dict(saved["model"])
    >>> print(import_published(optimizer, saved["optimizer"]))

    The state dict does not have the model's weights: load those that were saved with it. It says whether they
    are the training weights or their average, and the optimiser is put into that mode. Its options are loaded
    too, as by ``load_state_dict``; options that the package does not have are set to what it does.

    Args:
        optimizer: The optimiser to resume with, with the same parameters in the same groups and order. A
            sharded one loads this rank's pieces.
        state_dict: The result of ``state_dict()`` of the package's optimiser; neither changed nor shared.

    Returns:
        How each entry was imported. If the run will continue differently than with the package, there is
        a warning too.

    Raises:
        ValueError: The state dict is not the package's, or its groups, parameters or options do not fit. The
            optimiser is then unchanged.
    """
    package = _package_of(state_dict)
    saved, saved_states = state_dict["param_groups"], state_dict["state"]
    tally = _Tally()
    converted = [_group(package, saved, index, saved_states, tally) for index in range(len(saved))]
    groups = checkpoint.checked_groups({"state": {}, "param_groups": converted}, optimizer.param_groups)
    states = _states(package, state_dict, groups, optimizer.param_groups, tally)
    _set_shared_d_(groups, saved, tally)
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    report = ImportReport(package.version, all(group["train_mode"] for group in groups), tally.lines())
    if notable := report.of(Outcome.CHANGES, Outcome.ANEW):
        warn_caller(
            f"the run will continue differently than with prodigy-plus-schedule-free {package.version}:\n  "
            + "\n  ".join(map(str, notable))
        )
    return report


def _states(
    package: _Package,
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    own: Sequence[Group],
    tally: _Tally,
) -> dict[Any, dict[str, Tensor]]:
    """The states of all parameters as ours, by the package's keys of them.

    Args:
        package: The version that saved them.
        state_dict: The package's.
        groups: Its groups, converted.
        own: Our optimiser's groups.
        tally: What has become of each entry is added to it.

    Raises:
        ValueError: A parameter has another shape, or is no matrix, but in a group that Muon moves.
    """
    saved, saved_states = state_dict["param_groups"], state_dict["state"]
    states = {}
    for index, (group, ours) in enumerate(zip(groups, own, strict=True)):
        for change in package.changes:
            if change.applies(group):
                tally.add(Outcome.CHANGES, change.name, unit="group", note=change.how)
        o, scales = Options.of(group), package.scales(saved, index)
        for in_group, (key, p) in enumerate(zip(group["params"], ours["params"], strict=True)):
            name = name_of(ours, index, in_group)
            if o.use_muon_pp and p.ndim < 2:
                raise ValueError(
                    f"{name} has shape {tuple(p.shape)}, but use_muon_pp=True, which here is for matrices. "
                    f'To go on without: state_dict["param_groups"][{index}]["use_muon_pp"] = False.'
                )
            if saved_states.get(key):
                states[key] = _state(saved_states[key], p, o, scales, name, tally)
            else:
                tally.add(Outcome.EXACT, "no state", note="no gradient yet")
    return states


def _package_of(state_dict: Mapping[str, Any]) -> _Package:
    """The version of the package that saved a state dict; ValueError if none did."""
    checkpoint.check_is_state_dict(state_dict)
    groups = state_dict["param_groups"]
    # 2.0.0 and 2.0.1 both say (2, 0, 0); earlier versions lack the key.
    versions = {tuple(group.get("optimiser_version", (1, 9)))[:2] for group in groups}
    if versions not in ({(1, 9)}, {(2, 0)}):
        raise ValueError(
            f"the state dict has optimiser_version {sorted(versions)}: states of prodigy-plus-schedule-free "
            "1.9 and 2.0 can be imported."
        )
    package = _1_9 if versions == {(1, 9)} else _2_0
    for index, group in enumerate(groups):
        # 2.0.0 has no schedulefree_c.
        if missing := {*package.options, *package.numbers} - {"schedulefree_c"} - group.keys():
            raise ValueError(
                f"param_groups[{index}] of the state dict has no {', '.join(sorted(missing))}: it is not of "
                "prodigy-plus-schedule-free 1.9 or 2.0. State of ours is for load_state_dict()."
            )
    return package


def _group(
    package: _Package, saved: Sequence[Group], index: int, saved_states: Mapping[Any, Any], tally: _Tally
) -> dict[str, Any]:
    """Convert a group, except for our options that the package's group does not determine."""
    theirs = saved[index]
    given = {**{name: theirs.get(name, 0.0) for name in package.options}, **package.implied}
    tally.add(Outcome.EXACT, "options", unit="group")
    implied = (f"{name}={value}" for name, value in package.implied.items())
    tally.add(Outcome.CONVERTED, *implied, unit="group", note="no options there, but what it does")
    if theirs["use_speed"]:
        given["use_speed"] = package.speed
        if package.speed is not True:
            tally.add(Outcome.CONVERTED, "use_speed", unit="group", note=f"{package.speed!r} here")
    if "split_groups" not in given and len(saved) > 1:
        given["split_groups"] = not _is_pooled(saved)
        tally.add(Outcome.CONVERTED, "split_groups", unit="group", note="told by which sums there are")
    tally.add(Outcome.OWN, *(name for name in options.NAMES if name not in given), unit="group")

    numbers = _numbers(theirs, index, package.scales(saved, index).statistic, tally)
    steps, has_state = numbers["k"], any(map(saved_states.get, theirs["params"]))
    if not has_state:
        numbers["k"] = 0  # the package counts steps of all groups, we count those with gradients
    if has_state and not given["use_schedulefree"]:
        numbers["weight_sum"] = numbers["d"] ** 2  # the package has none; only whether it is > 0 matters
    kept = theirs.keys() - {*options.NAMES, *_BOOKKEEPING, *numbers, "params", "train_mode"}
    tally.add(Outcome.EXACT, *sorted(kept), unit="group", note="not the package's, but the group's own")
    bookkeeping = [name for name in _BOOKKEEPING if any(name in group for group in saved)]
    tally.add(Outcome.DROPPED, *bookkeeping, unit="group")
    return {
        **{name: theirs[name] for name in ("params", "train_mode", *kept)},
        **given,
        **numbers,
        "calls": steps,
    }


def _numbers(theirs: Group, index: int, statistic: float, tally: _Tally) -> dict[str, float | int]:
    """Our numbers of a group, see ``terms/group_numbers.py``, from the package's."""

    def read(name: str, default: float = 0.0) -> float:
        value = float(theirs.get(name, default))
        if not math.isfinite(value):
            raise ValueError(
                f"param_groups[{index}] of the state dict has {name}={value}: its run had diverged. Import "
                "a state from before."
            )
        return value

    d, numerator, norm = read("d"), read("d_numerator") * statistic, read("d_denom") * statistic
    exact = [name for name in ("d", "max_d_numerator", "weight_sum", "effective_lr") if name in theirs]
    tally.add(Outcome.EXACT, *exact, unit="group")
    tally.add_scaled(statistic, "d_numerator", "d_denom", unit="group", note=_WEIGHTED)
    tally.add(Outcome.CONVERTED, "k", unit="group", note="the number of steps made, not of the next")
    return first_numbers(d) | {
        "d_hat": numerator / norm if norm > 0 and not theirs["use_speed"] else d,
        "d_numerator": numerator,
        "max_d_numerator": read("max_d_numerator", max(0.0, numerator)),
        "d_denom": norm,
        "weight_sum": read("weight_sum"),
        "effective_lr": read("effective_lr"),
        "k": int(theirs["k"]) - 1,
    }


def _set_shared_d_(groups: Sequence[dict[str, Any]], saved: Sequence[Group], tally: _Tally) -> None:
    """Set the shared d of our groups, see :func:`prodigyplus.formulas.prodigy.shared_d`."""
    sharing = [group for group in groups if Options.of(group).shares_mean]
    if len(sharing) > 1:
        d, d0, weight_sum, k = (
            torch.tensor([group[name] for group in sharing], dtype=torch.float64, device="cpu")
            for name in ("d", "d0", "weight_sum", "k")
        )
        mean, in_mean = prodigy.shared_d(d, d0, weight_sum, k, (d > d0).double())
        for group, *numbers in zip(sharing, mean.tolist(), in_mean.tolist(), strict=True):
            group["shared_d"], group["in_mean"] = numbers
    for group, theirs in zip(groups, saved, strict=True):
        # 1.9 does not save it, and in 2.0 it may be None.
        if theirs.get("shared_d") and not math.isclose(theirs["shared_d"], group["shared_d"], rel_tol=1e-6):
            note = "the mean of the groups with evidence, not of all"
            tally.add(Outcome.CHANGES, "shared_d", unit="group", note=note)


def _state(
    saved: Mapping[str, Any], p: Tensor, o: Options, scales: _Scales, name: str, tally: _Tally
) -> dict[str, Tensor]:
    """Convert a parameter's state to the form in which we save it; it may share tensors with ``saved``."""
    converted = {*_MOMENTS, *_DROPPED, *state_table.SAMPLED_KEYS, *_SPEED}
    state = {key: value for key, value in saved.items() if key not in converted}
    base = state.get("z", state.get("exp_avg"))
    if base is None or base.shape != p.shape:
        found = "no z nor exp_avg" if base is None else f"state of shape {tuple(base.shape)}"
        raise ValueError(
            f"{name} has shape {tuple(p.shape)}, but the state dict has {found} for it: build the optimiser "
            "with the parameters that it was saved with, in their order."
        )
    tally.add(Outcome.EXACT, *state)
    tally.add(Outcome.DROPPED, *(key for key in _DROPPED if key in saved))
    state |= _second_moment(saved, base, o, scales.moment, tally)
    if "p0" in saved:
        state |= _evidence(saved, p, o, scales.statistic, name, tally)
    return state


def _second_moment(
    saved: Mapping[str, Any], base: Tensor, o: Options, scale: float, tally: _Tally
) -> dict[str, Tensor]:
    """Convert the second moment, or FOCUS's average; ``base`` is a saved tensor of the parameter's shape."""
    layout = Layout(tuple(base.shape))
    if saved.get("muon") and not o.use_muon_pp:
        tally.add(Outcome.ANEW, "second moment", note="Muon had none")
        fresh = state_table.new_state(base, base, layout, StateOptions.of(o))
        return {key: value for key, value in fresh.items() if key.startswith("exp_avg_sq")}
    found = {key: saved[key] for key in _MOMENTS if key in saved}
    if isinstance(found.get("exp_avg_sq"), (list, tuple)):  # row and column factors, and their dimensions
        found["exp_avg_sq_row"], found["exp_avg_sq_col"], *_ = found.pop("exp_avg_sq")
    tally.add_scaled(scale, *found, note="times d², as that of d·g")
    found = {key: _scaled(value, scale) for key, value in found.items()}
    if o.use_focus and "exp_avg_sq" in found:
        return {"exp_avg_weight": found["exp_avg_sq"]}
    dims = moments.factored_dims(layout.shape)
    if "exp_avg_sq_row" in found and dims is not None:
        row, column = dims
        tally.add(Outcome.CONVERTED, "exp_avg_sq_mean", note="the mean of exp_avg_sq_row")
        factor = found["exp_avg_sq_row"]
        total = factor.to(compute_dtype(factor)).sum(row, keepdim=True)
        found["exp_avg_sq_mean"] = total / layout.size(row)
        if row > column:
            tally.add(Outcome.CHANGES, "exp_avg_sq_row", note="of a tall tensor, is divided by its true mean")
    return found


def _evidence(
    saved: Mapping[str, Any], p: Tensor, o: Options, scale: float, name: str, tally: _Tally
) -> dict[str, Tensor]:
    """Convert what a parameter keeps for Prodigy while the step size adapts."""
    layout, count = Layout(tuple(p.shape)), -(-math.prod(p.shape) // _SLICE_P)

    def rows(key: str) -> Tensor:
        value = saved.get(key)
        if isinstance(value, Tensor) and value.ndim == 0:  # the saved form for weights that are all zero
            value = value.expand(count)
        if value is None or value.shape != (count,):
            found = f"no {key!r}" if value is None else f"{key!r} of shape {tuple(value.shape)}"
            raise ValueError(
                f"{name} has shape {layout.shape}, but the state dict has {found} for it: the package keeps "
                f"every {_SLICE_P}th element, here of shape {(count,)}."
            )
        return samples.spread(value, layout, _SLICE_P)

    if saved["p0"].ndim == 0:
        tally.add(Outcome.CONVERTED, "p0", note="one zero stood for all")
    else:
        tally.add(Outcome.EXACT, "p0")
    if o.use_speed == "relative":
        tally.add(Outcome.EXACT, *(key for key in _SPEED if key in saved))
        dtype = wide_dtype(p.device)
        numbers = {
            ours: torch.tensor(saved.get(theirs, 0.0), dtype=dtype, device="cpu")
            for ours, theirs in zip(prodigy.AVERAGES, _SPEED, strict=True)
        }
        return {"p0": rows("p0"), **numbers}
    tally.add_scaled(scale, "s", note=_WEIGHTED)
    return {"p0": rows("p0"), "s": _scaled(rows("s"), scale)}


def _scaled(value: Tensor, scale: float) -> Tensor:
    return value if scale == 1 else (value.to(compute_dtype(value)) * scale).to(value.dtype)
