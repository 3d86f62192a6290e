"""The kind of a stack or batch: which operators its passes consist of, and which kinds a backend admits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from prodigyplus.formulas import schedule_free
from prodigyplus.options import EvidenceKind, Options

# The options behind fields of a kind that have another name.
_OPTION_OF: dict[tuple[str, object], str] = {
    ("direction", "muon"): "use_muon_pp=True",
    ("direction", "focus"): "use_focus=True",
    ("mask", "cautious"): "use_cautious=True",
    ("mask", "grams"): "use_grams=True",
}


class Kind(NamedTuple):
    """Which operators the passes of a stack consist of; equal kinds need the same operators."""

    direction: Literal["adam", "atan2", "focus", "muon"] = "adam"
    z: str | None = schedule_free.BASE  # the key in the state of z or of z − y; None without Schedule-Free
    use_adopt: bool = False
    use_orthograd: bool = False
    is_single: bool = False  # with OrthoGrad, whether a tensor has one element: it is left alone
    mask: Literal["cautious", "grams"] | None = None
    is_stable: bool = True  # StableAdamW
    decays: bool = False
    decays_by_lr: bool = True
    evidence: EvidenceKind | None = "products"  # None: none is taken

    @classmethod
    def of(cls, o: Options, state: Mapping[str, Tensor], numel: int, *, adapts: bool = True) -> Kind:
        """The kind of a stack.

        Args:
            o: Its group's options.
            state: The state of one of its parameters.
            numel: The number of elements of a whole tensor.
            adapts: Whether its group's step size adapts.
        """
        direction: Literal["adam", "atan2", "focus", "muon"] = "atan2" if o.eps is None else "adam"
        return cls(
            direction="muon" if o.use_muon_pp else "focus" if o.use_focus else direction,
            z=next((key for key in (schedule_free.BASE, schedule_free.OFFSET) if key in state), None),
            use_adopt=o.use_adopt,
            use_orthograd=o.use_orthograd,
            is_single=o.use_orthograd and numel <= 1,
            mask="cautious" if o.use_cautious else "grams" if o.use_grams else None,
            is_stable=o.use_stableadamw,
            decays=o.weight_decay > 0,
            decays_by_lr=o.weight_decay_by_lr,
            # Without p0, Prodigy has nothing to go by: it is freed with the rest of the evidence.
            evidence=o.evidence if adapts and (o.evidence == "balance" or "p0" in state) else None,
        )

    def refused_by(self, admitted: Mapping[str, tuple[object, ...]]) -> str | None:
        """The first option, with its value, that a backend does not admit; None if it admits the kind.

        Args:
            admitted: For each field, the values that the backend admits. A field that is missing must have
                its default, so a new option is never ignored: it runs operator by operator until admitted.
        """
        for name, value, default in zip(self._fields, self, Kind(), strict=True):
            if value not in admitted.get(name, (default,)):
                return _OPTION_OF.get((name, value), f"{name}={value!r}")
        return None

    @property
    def projects(self) -> bool:
        """Whether OrthoGrad projects the direction."""
        return self.use_orthograd and not self.is_single

    @property
    def is_balanced(self) -> bool:
        """Whether the evidence is balance's."""
        return self.evidence == "balance"

    @property
    def is_late(self) -> bool:
        """Whether the evidence needs directions that exist only after ``measure_``: balance with Muon."""
        return self.is_balanced and self.direction == "muon"

    @property
    def is_offset(self) -> bool:
        """Whether z − y is stored instead of z."""
        return self.z == schedule_free.OFFSET

    @property
    def has_momentum(self) -> bool:
        """Whether there is a first moment, which replaces Schedule-Free."""
        return self.z is None


_SWITCH = (False, True)

# The fields of a kind that every backend admits, whatever their values.
ADMITTED_BY_ALL: dict[str, tuple[object, ...]] = {
    "is_stable": _SWITCH,
    "decays": _SWITCH,
    "decays_by_lr": _SWITCH,
    "evidence": (*get_args(EvidenceKind), None),
}
