"""What the step size does, for whoever logs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prodigyplus.engine.columns import NUMBERS, as_tensor, to_python_numbers_
from prodigyplus.terms.isolation import isolated


@isolated
def metrics(groups: Sequence[Mapping[str, Any]], *, as_numbers: bool) -> list[dict[str, Any]]:
    """See :meth:`prodigyplus.ProdigyPlusScheduleFree.metrics`; ``groups`` are its ``param_groups``."""
    result = [_of(group) for group in groups]
    if as_numbers:
        to_python_numbers_(result, result[0] if result else ())
    return result


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
