"""The numbers of the step size, for logging."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from prodigyplus.engine.columns import as_tensor, to_python_numbers_
from prodigyplus.terms.group_numbers import NUMBERS
from prodigyplus.terms.isolation import isolated


@isolated
def metrics(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """See :meth:`prodigyplus.ProdigyPlusScheduleFree.metrics`; ``groups`` are its ``param_groups``."""
    return [_of(group) for group in groups]


@isolated
def scalars(
    groups: Sequence[Mapping[str, Any]], prefix: str, names: Collection[str] | None
) -> dict[str, float]:
    """See :meth:`prodigyplus.ProdigyPlusScheduleFree.scalars`; ``groups`` are its ``param_groups``."""
    if not isinstance(prefix, str):
        raise TypeError(f"scalars: prefix={prefix!r} is no string. To choose numbers, pass names=[…].")
    numbers = [_of(group) for group in groups]
    known = numbers[0] if numbers else {}
    if names is not None:
        if unknown := set(names) - known.keys():
            raise ValueError(f"names={sorted(names)}: {sorted(unknown)} is none of {', '.join(known)}.")
        numbers = [{name: of_group[name] for name in known if name in names} for of_group in numbers]
    to_python_numbers_(numbers, numbers[0] if numbers else ())
    return {
        f"{prefix}{name}" if len(numbers) == 1 else f"{prefix}{name}/{index}": float(value)
        for index, of_group in enumerate(numbers)
        for name, value in of_group.items()
    }


def _of(group: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        name: value.clone() if isinstance(value := group[name], Tensor) else as_tensor(name, value)
        for name in NUMBERS
    }
    return {
        "d": numbers["d"],
        "d_hat": numbers["d_hat"],
        "effective_lr": numbers["effective_lr"],
        "step_size": numbers["shared_d"] * numbers["effective_lr"],
        "numerator": numbers["d_numerator"],
        "denominator": numbers["d_denom"],
        "step": numbers["k"],
        "skipped_steps": numbers["skipped"],
    }
