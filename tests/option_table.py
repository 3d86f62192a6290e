"""Every option of the optimiser, one row each, and the lists of options that tests draw from the rows.

A row is all that a new option needs to be covered by the tests of exactness on every mesh, resuming,
random options, compiling, bad input and modes of the caller, and by ``benchmarks/same_bits.py``. When
imported, this module imports none of our packages, so it also serves a checkout that lacks some options.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """An option.

    Args:
        values: What to test besides the default. Each names this option first, then the options that it
            needs to have an effect, or to give no warning.
        edges: Values to test only together with other options: alone, they equal the default, or
            nothing moves.
        bad: Values that are refused, both as an argument and when set later.
        acts_on: "passes": which operators a step runs, or the form of the state. "numbers": only the
            numbers that these operators take. "execution": how a step is run, which changes no number.
        is_compiled: Whether ``compile=True`` compiles the passes that it leads to.
    """

    values: tuple[Options, ...]
    edges: tuple[Options, ...] = ()
    bad: tuple[Any, ...] = (None, 1, "yes")  # those of a switch
    acts_on: Literal["passes", "numbers", "execution"] = "passes"
    is_compiled: bool = False


def _switch(name: str, value: bool = True, /, *, needs: Options | None = None, **flags: Any) -> Row:
    """The row of a switch whose default is the other value."""
    return Row(values=({name: value, **(needs or {})},), **flags)


_NOT_NUMBERS = (math.nan, math.inf, "1", None, True)
_MUON = {"use_muon_pp": True}

TABLE: dict[str, Row] = {
    "lr": Row(
        values=({"lr": 0.3}, {"lr": torch.tensor(0.7)}),
        edges=({"lr": 0.0}, {"lr": torch.tensor([0.7], dtype=torch.float64)}),
        bad=(-1.0, *_NOT_NUMBERS, torch.ones(2), torch.tensor(math.nan), torch.tensor(-1.0)),
        acts_on="numbers",
        is_compiled=True,
    ),
    "betas": Row(
        values=({"betas": (0.8, 0.95)}, {"betas": (0.95, 0.999)}),
        edges=({"betas": (0.5, 0.8)}, {"betas": (0.0, 0.9), "use_schedulefree": False}),
        bad=((0.9,), (0.9, 1.0), (1.5, 0.99), (-0.1, 0.9), 0.9, (0.9, None), (0.0, 0.9), None),
        acts_on="numbers",
        is_compiled=True,
    ),
    "beta3": Row(
        values=({"beta3": 0.9},),
        edges=({"beta3": 0.0},),
        bad=(1.0, 1.5, -0.1, math.nan, "x", True),
        acts_on="numbers",
        is_compiled=True,
    ),
    "weight_decay": Row(values=({"weight_decay": 0.1},), bad=(-0.1, -1.0, *_NOT_NUMBERS), is_compiled=True),
    "weight_decay_by_lr": _switch(
        "weight_decay_by_lr", False, needs={"weight_decay": 1e-3}, is_compiled=True
    ),
    "use_bias_correction": Row(  # the larger β2, the longer RAdam's warm-up
        values=({"use_bias_correction": True, "betas": (0.9, 0.95)},),
        edges=({"use_bias_correction": True, "betas": (0.9, 0.9)}, {"use_bias_correction": True}),
        is_compiled=True,
    ),
    "d0": Row(
        values=({"d0": 1e-4}, {"d0": 1e-2}),
        edges=({"d0": 1e-3},),
        bad=(0.0, -1e-6, *_NOT_NUMBERS),
        acts_on="numbers",
        is_compiled=True,
    ),
    "d_coef": Row(
        values=({"d_coef": 0.5}, {"d_coef": 2.0}),
        bad=(0.0, *_NOT_NUMBERS),
        acts_on="numbers",
        is_compiled=True,
    ),
    "prodigy_steps": Row(
        values=({"prodigy_steps": 5},),
        edges=({"prodigy_steps": None}, {"prodigy_steps": 1}),
        bad=(-1, 2.5, True),
        is_compiled=True,
    ),
    "use_speed": Row(
        values=({"use_speed": True}, {"use_speed": "relative"}),
        bad=("fast", None, 2),
        is_compiled=True,
    ),
    "eps": Row(
        values=({"eps": None, "use_stableadamw": False}, {"eps": 1e-4}),
        bad=(0.0, -1e-8, math.nan, True),
        is_compiled=True,
    ),
    "split_groups": _switch("split_groups", False, acts_on="numbers", is_compiled=True),
    "split_groups_mean": _switch("split_groups_mean", False, acts_on="numbers", is_compiled=True),
    "factored": _switch("factored", False, is_compiled=True),
    "factored_fp32": _switch("factored_fp32", False, is_compiled=True),
    "fused_back_pass": _switch("fused_back_pass", acts_on="execution"),
    "use_stableadamw": _switch("use_stableadamw", False, is_compiled=True),
    "use_muon_pp": _switch("use_muon_pp"),
    "muon_fp32": _switch("muon_fp32", needs=_MUON),
    "muon_quintic": _switch("muon_quintic", needs=_MUON),
    "muon_batched": _switch("muon_batched", needs=_MUON),
    "use_cautious": _switch("use_cautious"),
    "use_grams": _switch("use_grams"),
    "use_adopt": _switch("use_adopt"),
    "use_orthograd": _switch("use_orthograd"),
    "use_focus": _switch("use_focus", needs={"factored": False}),
    "stochastic_rounding": _switch("stochastic_rounding", False, is_compiled=True),
    "bfloat16_z": _switch("bfloat16_z", is_compiled=True),
    "beta4": Row(
        values=({"beta4": 0.5}, {"beta4": None}),
        bad=(1.0, -0.1, math.nan),
        acts_on="numbers",
        is_compiled=True,
    ),
    "d_limiter": _switch("d_limiter", False, acts_on="numbers", is_compiled=True),
    "schedulefree_c": Row(
        values=({"schedulefree_c": 20.0},),
        edges=({"schedulefree_c": 1.0}, {"schedulefree_c": 6.0}, {"schedulefree_c": 50.0}),
        bad=(-1.0, *_NOT_NUMBERS),
        acts_on="numbers",
        is_compiled=True,
    ),
    "use_schedulefree": _switch("use_schedulefree", False),
    "warmup_steps": Row(
        values=({"warmup_steps": 5},), bad=(-1, 0.5, *_NOT_NUMBERS), acts_on="numbers", is_compiled=True
    ),
    "slice_p": Row(
        values=({"slice_p": 1}, {"slice_p": 3}),
        edges=({"slice_p": 2}, {"slice_p": 1000}),
        bad=(0, -11, 2.0, True, None),
        is_compiled=True,
    ),
    "compile": _switch("compile", acts_on="execution", is_compiled=True),
    "fused": Row(values=({"fused": False},), bad=(1, "yes"), acts_on="execution", is_compiled=True),
    "step_size": Row(values=({"step_size": "balance"},), bad=("fast", None, True), is_compiled=True),
}

_ADAM = {"use_schedulefree": False}
_BY_ITSELF = dict(TABLE["weight_decay_by_lr"].values[0])
_ATAN2 = dict(TABLE["eps"].values[0])
_RADAM = dict(TABLE["use_bias_correction"].values[0])
_FOCUS = dict(TABLE["use_focus"].values[0])
_BALANCE = dict(TABLE["step_size"].values[0])

# Options that meet in a formula, or in what a pass writes, and so might go wrong only together.
TOGETHER: tuple[Options, ...] = (
    {"use_speed": True, "beta4": 0.5, "d_coef": 2.0},
    {"use_speed": True, "use_adopt": True, "split_groups": False},
    {"use_speed": "relative", "beta4": 0.5},
    {"use_speed": "relative", "factored": False},
    {"use_speed": "relative", **_RADAM},
    {"use_speed": "relative", "prodigy_steps": 5},
    {"use_speed": "relative", "prodigy_steps": 5, **_ADAM},
    {**_RADAM, "use_adopt": True, "weight_decay": 0.1},
    {**_RADAM, "beta4": 0.5},
    {"beta4": None, "weight_decay": 0.1},
    {"beta4": None, "d_limiter": False},
    {"beta4": 0.5, "schedulefree_c": 20.0},
    {"d_limiter": False, "d_coef": 0.5},
    {"schedulefree_c": 20.0, "betas": (0.95, 0.999)},
    {"warmup_steps": 5, "weight_decay": 0.1},
    {"betas": (0.8, 0.95), "weight_decay": 0.1},
    {"d0": 1e-4, "d_coef": 0.5, "beta3": 0.9},
    {"eps": 1e-4, "schedulefree_c": 20.0},
    {**_RADAM, "lr": 0.3},
    {"slice_p": 1, "lr": 0.3},
    {"slice_p": 3, "d0": 1e-4},
    {"factored": False, "weight_decay": 0.1},
    {"factored": False, "use_cautious": True, "use_adopt": True},
    {"use_cautious": True, "weight_decay": 0.1},
    {"use_cautious": True, **_BY_ITSELF},
    {"use_cautious": True, **_ATAN2},
    {"use_cautious": True, "bfloat16_z": True},
    {"use_cautious": True, **_ADAM},
    {"use_cautious": True, "use_adopt": True, **_ADAM},
    {"use_grams": True, **_BY_ITSELF},
    {"use_grams": True, **_ADAM},
    {"use_grams": True, "use_orthograd": True},
    {"use_grams": True, "use_orthograd": True, **_ADAM},
    {"use_adopt": True, "factored": False, **_ADAM},
    {"use_orthograd": True, "weight_decay": 0.1},
    {"use_orthograd": True, "use_stableadamw": False},
    {"use_orthograd": True, **_ADAM},
    {**_FOCUS, "use_adopt": True, "use_cautious": True},
    {**_FOCUS, "use_orthograd": True, "use_speed": True},
    {"bfloat16_z": True, "weight_decay": 0.1},
    {**_ADAM, "weight_decay": 0.1},
    {**_ADAM, "factored": False},
    {**_MUON, **_ADAM},
    {**_MUON, "muon_fp32": True, **_ADAM},
    {**_MUON, "muon_fp32": True, "muon_quintic": True, "weight_decay": 0.1},
    {**_MUON, "muon_fp32": True, "muon_quintic": True, **_ADAM},
    {**_MUON, "muon_fp32": True, "use_cautious": True, **_ADAM},
    {**_MUON, "muon_batched": True, "use_cautious": True, "weight_decay": 0.1},
    {**_MUON, "muon_batched": True, "muon_quintic": True, "use_cautious": True},
    {**_MUON, "muon_batched": True, "muon_quintic": True, "use_speed": "relative"},
    {**_MUON, "muon_batched": True, "prodigy_steps": 5},
    {**_MUON, "muon_batched": True, "use_grams": True},
    {**_MUON, "use_stableadamw": False, **_BY_ITSELF},
    {**_MUON, **_ATAN2, "betas": (0.8, 0.95)},
    {**_MUON, "use_cautious": True, **_BY_ITSELF},
    {**_MUON, "use_cautious": True, "use_speed": True, **_ADAM},
    {**_MUON, **_RADAM},
    {**_MUON, "use_speed": True, **_RADAM},
    {**_BALANCE, "bfloat16_z": True, "weight_decay": 0.1},
    {**_BALANCE, "betas": (0.8, 0.95), "lr": 0.3},
    {**_BALANCE, "d0": 1e-2, "factored": False},
    {**_BALANCE, "use_orthograd": True, "bfloat16_z": True},
    {**_BALANCE, "use_orthograd": True, "use_stableadamw": False},
    {**_BALANCE, "use_cautious": True, **_BY_ITSELF},
    {**_BALANCE, "use_grams": True, "use_adopt": True},
    {**_BALANCE, **_FOCUS},
    {**_BALANCE, **_ATAN2, "split_groups": False},
    {**_BALANCE, **_RADAM, "schedulefree_c": 20.0},
    {**_BALANCE, "warmup_steps": 5, "split_groups_mean": False},
    {**_BALANCE, "prodigy_steps": 5},
    {**_BALANCE, **_MUON},
    {**_BALANCE, **_MUON, "muon_batched": True, "use_cautious": True},
    {**_BALANCE, **_MUON, "muon_fp32": True, "split_groups_mean": False},
    {**_BALANCE, **_MUON, "prodigy_steps": 5},
)


def named(*acts_on: str, but: Iterable[str] = ()) -> list[str]:
    """The names of the options that act on any of these, except those in ``but``."""
    left = set(but)
    assert left <= TABLE.keys(), left - TABLE.keys()
    return [name for name, row in TABLE.items() if row.acts_on in acts_on and name not in left]


def defaults() -> dict[str, Any]:
    """The default of every option, from the optimiser that is installed."""
    from prodigyplus import ProdigyPlusScheduleFree

    parameters = inspect.signature(ProdigyPlusScheduleFree).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "params"}


# The options that change numbers: those that a test of the numbers draws from.
CHANGING = tuple(named("passes", "numbers"))


MUON = tuple(name for name in TABLE if "muon" in name)


def alone(names: Iterable[str] = CHANGING, *, edges: bool = False) -> list[dict[str, Any]]:
    """Every value of the options, alone but for what it needs; with ``edges``, those too."""
    return [
        dict(options)
        for name in names
        for options in TABLE[name].values + (TABLE[name].edges if edges else ())
    ]


def together(names: Iterable[str] = CHANGING) -> list[dict[str, Any]]:
    """The combinations in TOGETHER that consist of these options only."""
    known = set(names)
    return [dict(options) for options in TOGETHER if options.keys() <= known]


def pairs(names: Iterable[str] = CHANGING) -> Iterator[dict[str, Any]]:
    """Every pair of values of two different options that ``agree``."""
    for one, other in itertools.combinations(alone(names), 2):
        if agree(one, other) and next(iter(one)) != next(iter(other)):
            yield {**one, **other}


def elementwise(many: Iterable[Options]) -> list[dict[str, Any]]:
    """The options of a list that do not use Muon."""
    return [dict(options) for options in many if not options.get("use_muon_pp")]


def of_matrices(many: Iterable[Options]) -> list[dict[str, Any]]:
    """The options of a list that use Muon."""
    return [dict(options) for options in many if options.get("use_muon_pp")]


def packed(many: Iterable[Options], most: int = 6) -> list[dict[str, Any]]:
    """A shorter list that covers a longer one: each of its entries merges several that ``agree``.

    Each entry of the longer list is thus part of a merged one, in which it keeps its effect.

    Args:
        many: The longer list; with ``most``, it determines the result.
        most: The most names that merging may give an entry.
    """
    found: list[dict[str, Any]] = []
    for options in sorted(many, key=len, reverse=True):  # the largest are placed first
        for other in found:
            if agree(options, other) and len(options.keys() | other.keys()) <= max(most, len(other)):
                other.update(options)
                break
        else:
            found.append(dict(options))
    return found


def agree(one: Options, other: Options) -> bool:
    """Whether two entries can be merged so that each keeps the effect that it has alone."""
    both = {**one, **other}
    return (
        all(same(one[name], other[name]) for name in one.keys() & other.keys())
        and all(one.get(name, default) == other.get(name, default) for name, default in _WAYS.items())
        and not any(all(same(both.get(name), value) for name, value in rule.items()) for rule in _HIDDEN)
    )


# Options that change most formulas of a step: an entry without one of them is not covered by an entry
# with it. Also those with which d stops adapting, or is small beside a decay that it does not multiply:
# these hide the effect of others on d.
_WAYS: Options = {
    "use_schedulefree": True,
    "use_muon_pp": False,
    "use_focus": False,
    "prodigy_steps": 0,
    "weight_decay_by_lr": True,
    "step_size": "prodigy",
}

# Options that cannot be merged: one excludes the other, or hides all of its effect.
_HIDDEN: tuple[Options, ...] = (
    {"use_cautious": True, "use_grams": True},
    {"use_focus": True, "eps": None},
    {"use_focus": True, "eps": 1e-4},
    {"use_focus": True, "factored_fp32": False},
    {"factored": False, "factored_fp32": False},
    {"use_speed": True, "d_limiter": False},
    {"split_groups": False, "split_groups_mean": False},
)


def same(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same, in type too."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return type(one) is type(other) and bool(one == other)


def without_schedulefree(many: Iterable[Options]) -> list[dict[str, Any]]:
    """The same options without Schedule-Free, leaving out those that need it."""
    of_average = ("use_schedulefree", "schedulefree_c", "bfloat16_z", "step_size")
    return [{**options, **_ADAM} for options in many if not options.keys() & set(of_average)]


def text_of(options: Options) -> str:
    """Options as text, to name a test."""

    def short(value: Any) -> str:
        return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else str(value).replace(" ", "")

    return " ".join(f"{name}={short(value)}" for name, value in options.items()) or "default"
