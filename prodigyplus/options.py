"""What a user may set, per parameter group: one dataclass, checked once.

The defaults live in one place only, the signature of
:class:`prodigyplus.ProdigyPlusScheduleFree`. Everything that reads an option reads it from an
:class:`Options`, which is taken from the group anew at every step: a scheduler may change ``lr``
and a user any other option between two steps.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

EvidenceKind = Literal["products", "signs", "relative", "balance"]
"""The kinds of evidence for the step size."""

# Prodigy's, by ``use_speed``.
_KIND_OF_SPEED: dict[object, EvidenceKind] = {False: "products", True: "signs", "relative": "relative"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of one parameter group; the docstring of the optimiser's class explains them."""

    lr: float | Tensor
    betas: tuple[float, float]
    beta3: float  # None in the group stands for sqrt(β2)
    weight_decay: float
    weight_decay_by_lr: bool
    use_bias_correction: bool
    d0: float
    d_coef: float
    prodigy_steps: int | None
    use_speed: bool | Literal["relative"]
    eps: float | None
    split_groups: bool
    split_groups_mean: bool
    factored: bool
    factored_fp32: bool
    fused_back_pass: bool
    use_stableadamw: bool
    use_muon_pp: bool
    muon_fp32: bool
    muon_quintic: bool
    muon_batched: bool
    use_cautious: bool
    use_grams: bool
    use_adopt: bool
    use_orthograd: bool
    use_focus: bool
    stochastic_rounding: bool
    bfloat16_z: bool
    beta4: float  # None in the group stands for β2
    d_limiter: bool
    schedulefree_c: float
    use_schedulefree: bool
    warmup_steps: int
    slice_p: int
    compile: bool
    fused: bool | None
    step_size: Literal["prodigy", "balance"]

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Options:
        """The current options of a group of ``param_groups``: checked, and with excluded ones switched off.

        Cheap where nothing has changed: the same values give the same object.

        Raises:
            ValueError: see :func:`plain`.
        """
        values = _values_of(group)
        lr = values[0]
        if isinstance(lr, Tensor):  # its value may have changed in place
            _plain("lr", lr)
        try:
            return _resolved(*values)
        except TypeError:  # not hashable, as a list of betas
            return _resolved.__wrapped__(*values)

    @property
    def evidence(self) -> EvidenceKind:
        """What the step size goes by; of Prodigy's kinds, see :mod:`prodigyplus.formulas.prodigy`."""
        return "balance" if self.step_size == "balance" else _KIND_OF_SPEED[self.use_speed]

    @property
    def pool(self) -> str | None:
        """Which pool of groups it shares one step size with, found from the sums of all; None: with none."""
        # No group would be in balance at a mean of step sizes.
        is_pooled = not self.split_groups or (self.step_size == "balance" and self.split_groups_mean)
        return self.step_size if is_pooled else None

    @property
    def shares_mean(self) -> bool:
        """Whether it moves by the harmonic mean of its own step size and those of other such groups."""
        return self.pool is None and self.split_groups_mean

    @property
    def late_warmup_steps(self) -> int:
        """How many steps a group warms up over that joins groups with a grown step size, which it shares.

        Its second moment averages over 1/(1 − β2) steps and begins at zero, so that its first directions are
        1/√(1 − β2) times too long. In a new run, d is tiny as long as that is so.
        """
        has_its_own = self.pool is None and not self.shares_mean
        return 0 if has_its_own or self.use_bias_correction else round(1 / (1 - self.betas[1]))

    def wants_kernels(self, device: torch.device) -> bool:
        """Whether what is on ``device`` is to move by kernels, if they can move it."""
        return device.type == "cuda" if self.fused is None else self.fused

    @property
    def lr_is_zero(self) -> bool:
        """Whether ``lr`` is known to be zero without waiting for a device."""
        if isinstance(self.lr, Tensor):
            return _is_on_host(self.lr) and not self.lr.any()
        return self.lr == 0

    def is_frozen(self, group: Mapping[str, Any]) -> bool:
        """Whether the next step of a group with these options finds its step size frozen, or freezes it."""
        # A step with lr=0 is not counted, so it freezes nothing.
        return bool(group["frozen"] or (self.freezes(group["calls"]) and not self.lr_is_zero))

    def freezes(self, calls: int) -> bool:
        """Whether ``d`` is to be frozen in the step that follows ``calls`` earlier ones."""
        return bool(self.prodigy_steps) and calls + 1 >= cast("int", self.prodigy_steps)


NAMES = tuple(field.name for field in fields(Options))
_values_of = operator.itemgetter(*NAMES)

# Up to this β2, RAdam's rectification never leaves zero: its average is never long enough.
_SHORTEST_RECTIFIED = 0.6


# Tests of one value. Each returns it as a plain Python number, switch or pair, or None if it cannot be.
_Test = Callable[[Any], Any]


def _number(low: float, *, above: bool = False, below: float = math.inf) -> _Test:
    """Finite real numbers, also numpy's, from ``low`` (or ``above`` it) to below ``below``."""

    def test(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return None
        number = float(value)
        return number if (low < number if above else low <= number) and number < below else None

    return test


def whole_number(low: int) -> _Test:
    """A test of whole numbers, ``low`` or greater: gives the value as an int, or None if it is none."""

    def test(value: Any) -> int | None:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            return None
        return int(value) if int(value) >= low else None

    return test


def _switch(value: Any) -> bool | None:
    is_switch = isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # numpy's
    return bool(value) if is_switch else None


def _speed(value: Any) -> bool | str | None:
    return value if isinstance(value, str) and value == "relative" else _switch(value)


def _step_size(value: Any) -> str | None:
    return value if isinstance(value, str) and value in ("prodigy", "balance") else None


def _betas(value: Any) -> tuple[float, float] | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        return None
    first, second = map(_number(0, below=1), value)
    return None if first is None or second is None else (first, second)


def _learning_rate(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return _LR(value)
    if value.numel() != 1 or value.dtype.is_complex:
        return None
    # The value of a tensor may live on a device that nobody should wait for. A step then looks at it there.
    return value.reshape(()) if not _is_on_host(value) or _LR(value.item()) is not None else None


def _is_on_host(value: Tensor) -> bool:
    return type(value) is Tensor and value.device.type == "cpu"


_LR = _number(0)
_POSITIVE, _POSITIVE_TEXT = _number(0, above=True), "a finite number greater than 0"
_NOT_NEGATIVE = (_number(0), False, "a finite number, 0 or greater")
_DECAY = (_number(0, below=1), True, "None or a number in [0, 1)")
_SWITCH = (_switch, False, "True or False")

# Of each option: the test of a value, whether None is one too, and what is allowed. The others are switches.
_ALLOWED: dict[str, tuple[_Test, bool, str]] = {
    "lr": (_learning_rate, False, "a finite number, 0 or greater, or a tensor of one such element"),
    "betas": (_betas, False, "two numbers in [0, 1)"),
    "beta3": _DECAY,
    "beta4": _DECAY,
    "weight_decay": _NOT_NEGATIVE,
    "d0": (_POSITIVE, False, _POSITIVE_TEXT),
    "d_coef": (_POSITIVE, False, _POSITIVE_TEXT),
    "prodigy_steps": (whole_number(0), True, "None or a whole number, 0 or greater"),
    "eps": (_POSITIVE, True, f"None (Adam-atan2) or {_POSITIVE_TEXT}"),
    "schedulefree_c": _NOT_NEGATIVE,
    "warmup_steps": (whole_number(0), False, "a whole number, 0 or greater"),
    "slice_p": (whole_number(1), False, "a whole number, 1 or greater"),
    "fused": (_switch, True, "None, True or False"),
    "use_speed": (_speed, False, "True, False or 'relative'"),
    "step_size": (_step_size, False, "'prodigy' or 'balance'"),
}


def _plain(name: str, value: Any) -> Any:
    """The value of an option as a plain Python number, switch or pair; of ``lr``, a tensor stays one.

    Raises:
        ValueError: It cannot be the option's.
    """
    test, admits_none, allowed = _ALLOWED.get(name, _SWITCH)
    if value is None and admits_none:
        return None
    plain = test(value)
    if plain is None:
        raise ValueError(f"{name}={value!r}: must be {allowed}.")
    return plain


def plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one parameter group, checked, as plain Python values.

    Raises:
        ValueError: An option has a value it cannot have. The message names the option, the value and what is
            allowed.
    """
    values = {name: _plain(name, group[name]) for name in NAMES}
    betas = values["betas"]
    if values["use_schedulefree"] and betas[0] == 0:
        raise ValueError(
            f"betas={betas!r}: Schedule-Free averages with betas[0], which must be greater than 0; or set "
            "use_schedulefree=False."
        )
    if values["step_size"] == "balance" and not values["use_schedulefree"]:
        raise ValueError(
            "step_size='balance': it observes how Schedule-Free's iterates move, but use_schedulefree=False "
            "has none. Leave use_schedulefree on, or pass step_size='prodigy'."
        )
    if values["use_bias_correction"] and betas[1] <= _SHORTEST_RECTIFIED:
        raise ValueError(
            f"betas={betas!r}: with use_bias_correction=True, betas[1] must be greater than "
            f"{_SHORTEST_RECTIFIED}, or the correction holds every step at zero."
        )
    if isinstance(group["lr"], Tensor):
        values["lr"] = group["lr"]  # itself, which a scheduler may write to
    return values


# Kept by value and type: of numbers that a scheduler moves, there are as many as steps.
@functools.lru_cache(maxsize=1024, typed=True)
def _resolved(*values: Any) -> Options:
    checked = plain(dict(zip(NAMES, values, strict=True)))
    if isinstance(checked["lr"], Tensor) and checked["lr"].ndim:
        checked["lr"] = checked["lr"].reshape(())  # an alias, which does not follow ``lr.data = …``
    resolve_exclusions_(checked)
    _, beta2 = checked["betas"]
    for name, of_none in (("beta3", math.sqrt(beta2)), ("beta4", beta2)):
        if checked[name] is None:
            checked[name] = of_none
    return Options(**checked)


# Keys that frameworks and schedulers put into a group on purpose, and read themselves.
_OF_FRAMEWORKS = frozenset(
    {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "lr_scale"}
    | {"max_momentum", "base_momentum", "lr_mult", "decay_mult", "layer_id", "param_group_id"}
)

# What other optimisers call an option of ours.
_ELSEWHERE = {
    "learning_rate": "lr",
    "momentum": "betas",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "wd": "weight_decay",
    "epsilon": "eps",
    "use_muon": "use_muon_pp",
    "foreach_muon": "use_muon_pp",
    "safeguard_warmup": "use_bias_correction",
    "cautious": "use_cautious",
    "adopt": "use_adopt",
}


def check_group_keys(group: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse keys of a new parameter group that nobody reads.

    Keys of the owner's own pass if they begin with an underscore, or if their values are texts; so do those
    that frameworks add on purpose, and switches of other optimisers that are off (None or False).

    Args:
        group: What was passed for the group.
        known: The keys that are no options, but ours.

    Raises:
        ValueError: A key looks like an option, and is none.
    """
    for key, value in group.items():
        if key in NAMES or key in known or key in _OF_FRAMEWORKS or str(key).startswith("_"):
            continue
        close = [_ELSEWHERE[key]] if key in _ELSEWHERE else difflib.get_close_matches(key, NAMES, 1, 0.85)
        if close:
            raise ValueError(f"unknown option {key!r} in a parameter group: did you mean {close[0]!r}?")
        if not (value is None or value is False or isinstance(value, str)):
            raise ValueError(
                f"unknown option {key!r}={value!r} in a parameter group: this optimiser has no option of "
                "that name, and would ignore it. Leave it out; begin a key of your own with an underscore."
            )


class _Exclusion(NamedTuple):
    """Options that exclude others."""

    applies: Callable[[Mapping[str, Any]], bool]  # to a group
    switches_off: dict[str, Any]  # what it has set, then
    note: str


def _of_prodigy_alone(name: str, off: Any) -> _Exclusion:
    return _Exclusion(
        lambda o: o["step_size"] == "balance" and o[name] not in (off, None),
        {name: off},
        f"step_size='balance' excludes {name}, an option of Prodigy's step size: {name}={off!r}",
    )


# In this order.
_EXCLUSIONS: tuple[_Exclusion, ...] = (
    _of_prodigy_alone("use_speed", off=False),
    _of_prodigy_alone("d_coef", off=1.0),
    _of_prodigy_alone("beta4", off=0.0),
    _Exclusion(
        lambda o: o["eps"] is None and o["use_stableadamw"] and not o["use_muon_pp"],  # which has no eps
        {"use_stableadamw": False},
        "eps=None (Adam-atan2) excludes use_stableadamw=True: StableAdamW is off",
    ),
    _Exclusion(
        lambda o: o["use_cautious"] and o["use_grams"],
        {"use_grams": False},
        "use_cautious=True excludes use_grams=True: Grams is off",
    ),
    _Exclusion(
        lambda o: o["use_focus"] and o["factored"],
        {"factored": False},
        "use_focus=True excludes factored=True: factored is off, and the state larger",
    ),
    _Exclusion(
        lambda o: o["use_focus"] and o["eps"] is None,
        {"eps": 1e-8},
        "use_focus=True excludes eps=None (Adam-atan2): Adam-atan2 is off",
    ),
    _Exclusion(
        lambda o: o["use_focus"] and o["use_muon_pp"],
        {"use_muon_pp": False},
        "use_focus=True excludes use_muon_pp=True: Muon is off",
    ),
    _Exclusion(
        lambda o: o["use_muon_pp"] and o["use_adopt"],
        {"use_adopt": False},
        "use_muon_pp=True excludes use_adopt=True: ADOPT is off, there is no second moment",
    ),
    _Exclusion(
        lambda o: o["use_muon_pp"] and o["use_orthograd"],
        {"use_orthograd": False},
        "use_muon_pp=True excludes use_orthograd=True: OrthoGrad is off",
    ),
)


def resolve_exclusions_(group: dict[str, Any]) -> list[str]:
    """Switch off the options of ``group`` that another one excludes; returns a note on each."""
    notes = []
    for exclusion in _EXCLUSIONS:
        if exclusion.applies(group):
            group.update(exclusion.switches_off)
            values = ", ".join(f"{name}={value!r}" for name, value in exclusion.switches_off.items())
            notes.append(f"{exclusion.note}. Pass {values} to silence this.")
    return notes


# What torch's own optimisers are given, and no multiple of a step size that is found.
_SMALL_LR = 0.01


def likely_mistakes(group: Mapping[str, Any]) -> list[str]:
    """Warnings about values of ``group`` that are allowed, but probably not meant."""
    lr = group["lr"]
    if isinstance(lr, Tensor) or not 0 < lr < _SMALL_LR:
        return []
    return [
        f"lr={lr!r} looks like another optimiser's learning rate. Here lr only scales the step size that is "
        "found: leave it at 1.0 (a Hugging Face Trainer: learning_rate=1.0)."
    ]
