"""The numbers that a parameter group keeps from step to step: their names, and what they start as."""

from __future__ import annotations


def first_numbers(d0: float) -> dict[str, float | int]:
    """The numbers of a new group, as Python numbers; the keys are those in ``param_groups``.

    ===================  =============================================================================
    ``d``                step size of the group
    ``shared_d``         step size that multiplies ``lr``: ``d``, or the mean of several groups
    ``d_hat``            last estimate ``d_numerator / d_denom``, before limiter and ``d_coef``; balance: ρ
    ``in_mean``          1 once ``d`` counts in the mean of several groups, else 0
    ``d_numerator``      N, the decayed weighted sum of ⟨g, p0 − z⟩; balance: average of w·⟨g, x − z⟩/⟨g, u⟩
    ``max_d_numerator``  the largest N so far
    ``d_denom``          ‖s‖₁ of the last step; balance: the average of its weights times dlr
    ``weight_sum``       Σ dlr², the sum of Schedule-Free's weights so far
    ``effective_lr``     lr·(1 − β1(1 − c)) of the last step, times RAdam's rectification
    ``k``                steps so far in which the group moved
    ``skipped``          steps skipped for an inf or NaN in a gradient
    ===================  =============================================================================
    """
    numbers = dict.fromkeys(("d", "shared_d", "d_hat"), float(d0))
    zeros = dict.fromkeys(("d_numerator", "max_d_numerator", "d_denom", "weight_sum", "effective_lr"), 0.0)
    return {**numbers, "in_mean": 0.0, **zeros, "k": 0, "skipped": 0}


NUMBERS = tuple(first_numbers(1.0))

# Integers, and floating-point numbers, in the order in which kernels find them.
COUNTS = ("k", "skipped")
FLOATS = tuple(name for name in NUMBERS if name not in COUNTS)
