"""Triton kernels that update the numbers of parameter groups: one launch before the move, one at the end.

The arithmetic is that of :mod:`prodigyplus.engine.groups` and of the formulas that it calls, in float64, with
one lane for each group. Operator by operator it takes a hundred launches, each on a few numbers.
"""

# No ``from __future__ import annotations``: Triton reads the annotations of arguments at run time.

import triton
import triton.language as tl

from prodigyplus.device.jit import kernel
from prodigyplus.device.tables import EVIDENCE_KINDS, POOLS, GroupOptions
from prodigyplus.terms.group_numbers import COUNTS, FLOATS
from prodigyplus.terms.step_numbers import VALUES

# The rows of ``floats`` and of ``counts``, the numbers that groups keep.
F_D = tl.constexpr(FLOATS.index("d"))
F_SHARED_D = tl.constexpr(FLOATS.index("shared_d"))
F_D_HAT = tl.constexpr(FLOATS.index("d_hat"))
F_IN_MEAN = tl.constexpr(FLOATS.index("in_mean"))
F_D_NUMERATOR = tl.constexpr(FLOATS.index("d_numerator"))
F_MAX_D_NUMERATOR = tl.constexpr(FLOATS.index("max_d_numerator"))
F_D_DENOM = tl.constexpr(FLOATS.index("d_denom"))
F_WEIGHT_SUM = tl.constexpr(FLOATS.index("weight_sum"))
F_EFFECTIVE_LR = tl.constexpr(FLOATS.index("effective_lr"))
C_K = tl.constexpr(COUNTS.index("k"))
C_SKIPPED = tl.constexpr(COUNTS.index("skipped"))

# The rows of the table of options. The argument is called ``settings``, since Triton's launcher has an
# argument ``options`` of its own.
O_LR = tl.constexpr(GroupOptions._fields.index("lr"))
O_BETA1 = tl.constexpr(GroupOptions._fields.index("beta1"))
O_BETA2 = tl.constexpr(GroupOptions._fields.index("beta2"))
O_BETA3 = tl.constexpr(GroupOptions._fields.index("beta3"))
O_BETA4 = tl.constexpr(GroupOptions._fields.index("beta4"))
O_D0 = tl.constexpr(GroupOptions._fields.index("d0"))
O_D_COEF = tl.constexpr(GroupOptions._fields.index("d_coef"))
O_LIMIT = tl.constexpr(GroupOptions._fields.index("limit"))
O_SPEED_COEF = tl.constexpr(GroupOptions._fields.index("speed_coef"))
O_WARMUP_STEPS = tl.constexpr(GroupOptions._fields.index("warmup_steps"))
O_SCHEDULEFREE_C = tl.constexpr(GroupOptions._fields.index("schedulefree_c"))
O_WEIGHT_DECAY = tl.constexpr(GroupOptions._fields.index("weight_decay"))
O_EPS = tl.constexpr(GroupOptions._fields.index("eps"))
O_USE_SCHEDULEFREE = tl.constexpr(GroupOptions._fields.index("use_schedulefree"))
O_USE_BIAS_CORRECTION = tl.constexpr(GroupOptions._fields.index("use_bias_correction"))
O_USE_ADOPT = tl.constexpr(GroupOptions._fields.index("use_adopt"))
O_EVIDENCE = tl.constexpr(GroupOptions._fields.index("evidence"))
O_WEIGHT_DECAY_BY_LR = tl.constexpr(GroupOptions._fields.index("weight_decay_by_lr"))
O_D_LIMITER = tl.constexpr(GroupOptions._fields.index("d_limiter"))
O_ADAPTS = tl.constexpr(GroupOptions._fields.index("adapts"))
O_POOL = tl.constexpr(GroupOptions._fields.index("pool"))
O_SHARES = tl.constexpr(GroupOptions._fields.index("shares"))

# The columns of ``values``, the numbers of a step.
VALUE_COUNT = tl.constexpr(len(VALUES))
N_BETA1 = tl.constexpr(VALUES.index("beta1"))
N_BETA2 = tl.constexpr(VALUES.index("beta2"))
N_BETA3 = tl.constexpr(VALUES.index("beta3"))
N_GRAD_WEIGHT = tl.constexpr(VALUES.index("grad_weight"))
N_SQ_WEIGHT = tl.constexpr(VALUES.index("sq_weight"))
N_EVIDENCE_WEIGHT = tl.constexpr(VALUES.index("evidence_weight"))
N_UNIT = tl.constexpr(VALUES.index("unit"))
N_DLR = tl.constexpr(VALUES.index("dlr"))
N_DECAY = tl.constexpr(VALUES.index("decay"))
N_C = tl.constexpr(VALUES.index("c"))
N_Y_FRACTION = tl.constexpr(VALUES.index("y_fraction"))
N_D = tl.constexpr(VALUES.index("d"))
N_EPS = tl.constexpr(VALUES.index("eps"))
N_EMA_WEIGHT = tl.constexpr(VALUES.index("ema_weight"))
N_ADOPT_CLIP = tl.constexpr(VALUES.index("adopt_clip"))

# Options are float64, numbers of kinds too.
SIGNS = tl.constexpr(float(EVIDENCE_KINDS["signs"]))
RELATIVE = tl.constexpr(float(EVIDENCE_KINDS["relative"]))
BALANCE = tl.constexpr(float(EVIDENCE_KINDS["balance"]))
LAST_POOL = tl.constexpr(max(POOLS.values()))


@triton.jit
def _groups(count, BLOCK: tl.constexpr):
    """The group of each lane, and whether it is the lane's own: lanes beyond the last group read that one."""
    lane = tl.arange(0, BLOCK)
    return tl.minimum(lane, count - 1), lane < count


@triton.jit
def _row(table, row: tl.constexpr, count, group):
    """A row of a table, for all groups."""
    return tl.load(table + row * count + group)


@triton.jit
def _store_number(values, values32, number: tl.constexpr, group, exists, value):
    """Write one number of a step, for all groups, in float64 and float32."""
    index = group * VALUE_COUNT + number
    tl.store(values + index, value, mask=exists)
    tl.store(values32 + index, value.to(tl.float32), mask=exists)


@triton.jit
def _rectified(step, beta2):
    """:func:`prodigyplus.formulas.radam.rectified`."""
    decayed = tl.exp(step * tl.log(beta2))
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * step * decayed / (1.0 - decayed)
    variance = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
    return tl.sqrt(tl.where(length > 4.0, variance, 0.0)), 1.0 - (1.0 - beta2) / (1.0 - decayed)


@triton.jit
def _step_sizes(settings, count, group, lr, step, shared_d, beta2):
    """``dlr``, and the same without d, with RAdam and warm-up; and β2, which RAdam corrects."""
    rectifies = _row(settings, O_USE_BIAS_CORRECTION, count, group) > 0
    rectification, corrected = _rectified(step, beta2)
    beta2 = tl.where(rectifies, corrected, beta2)
    factor = tl.where(rectifies, rectification, 1.0)
    dlr, effective_lr = shared_d * lr * factor, lr * factor
    warmup = _row(settings, O_WARMUP_STEPS, count, group)
    factor = tl.minimum(step / tl.maximum(warmup, 1.0), 1.0)
    return dlr * factor, effective_lr * factor, beta2


@triton.jit
def _averaging(settings, count, group, weight, weight_sum, beta1):
    """Schedule-Free's c, and the fraction of z's step that y makes."""
    c = weight / tl.where(weight_sum > 0, weight_sum, 1.0)  # the sum includes the weight
    strength = _row(settings, O_SCHEDULEFREE_C, count, group)
    c = tl.where(strength > 0, tl.minimum(c * ((1.0 - beta1) * strength), 1.0), c)
    return c, 1.0 - beta1 * (1.0 - c)


@kernel
def begin(
    floats, counts, settings, square, present,
    values, values32, gates, gates32, observes, steps, learns, count,
    INITIALIZES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the numbers of a step, and count it; see :meth:`prodigyplus.engine.groups.Groups.begin`.

    ``values`` and ``values32`` are of shape (groups, ``VALUE_COUNT``), in the order of ``VALUES``.
    """
    group, exists = _groups(count, BLOCK)
    total = tl.load(square + group * 0)
    lr = _row(settings, O_LR, count, group)
    infinity = float("inf")
    is_finite = total < infinity  # False for NaN too; a sum of squares is never negative
    has_gradients = tl.load(present + group) > 0
    lr_is_valid = (lr >= 0) & (lr < infinity)
    lr = tl.where(lr_is_valid, lr, 0.0)
    happens = is_finite & (total > 0) if INITIALIZES else is_finite
    moves = has_gradients & happens & lr_is_valid
    skips = has_gradients & (is_finite == 0)
    skips = skips | (has_gradients & happens & (lr_is_valid == 0))

    d = _row(floats, F_D, count, group)
    shared_d = _row(floats, F_SHARED_D, count, group)
    weight_sum = _row(floats, F_WEIGHT_SUM, count, group)
    old_effective_lr = _row(floats, F_EFFECTIVE_LR, count, group)
    k = _row(counts, C_K, count, group)
    skipped = _row(counts, C_SKIPPED, count, group)
    beta1 = _row(settings, O_BETA1, count, group)
    beta2 = _row(settings, O_BETA2, count, group)
    beta3 = _row(settings, O_BETA3, count, group)
    d0 = _row(settings, O_D0, count, group)
    evidence = _row(settings, O_EVIDENCE, count, group)

    step = (k + 1).to(tl.float64)
    evidence_weight = tl.where(evidence == SIGNS, tl.sqrt(d) * d0, d * d / tl.sqrt(d0))
    evidence_weight = tl.where(evidence == BALANCE, 1.0 / beta1, evidence_weight)
    dlr, effective_lr, beta2 = _step_sizes(settings, count, group, lr, step, shared_d, beta2)
    # ADOPT's first gradient only starts the second moment.
    counts_evidence = (_row(settings, O_USE_ADOPT, count, group) == 0) | (step > 1)
    unit = tl.where(counts_evidence, 1.0, 0.0)
    dlr, effective_lr = dlr * unit, effective_lr * unit
    beta2 = tl.where(counts_evidence, beta2, 0.0)
    # What does not move shows nothing of a step size.
    counts_evidence = counts_evidence & (lr > 0)
    evidence_weight = tl.where(counts_evidence, evidence_weight, 0.0)
    beta3 = tl.where(counts_evidence, beta3, 1.0)
    new_sum = weight_sum + dlr * dlr
    c, y_fraction = _averaging(settings, count, group, dlr * dlr, new_sum, beta1)
    use_schedulefree = _row(settings, O_USE_SCHEDULEFREE, count, group) > 0
    effective_lr = tl.where(use_schedulefree, effective_lr * y_fraction, effective_lr)
    by_lr = _row(settings, O_WEIGHT_DECAY_BY_LR, count, group) > 0
    decay = tl.where(by_lr, dlr, unit) * _row(settings, O_WEIGHT_DECAY, count, group)
    eps = _row(settings, O_EPS, count, group)
    fourth_root = tl.sqrt(tl.sqrt(step))

    # In a no-op, weights that keep something are 1, and weights that add something are 0.
    added = tl.where(moves, 1.0, 0.0)
    _store_number(values, values32, N_BETA1, group, exists, tl.where(moves, beta1, 1.0))
    _store_number(values, values32, N_BETA2, group, exists, tl.where(moves, beta2, 1.0))
    _store_number(values, values32, N_BETA3, group, exists, tl.where(moves, beta3, 1.0))
    _store_number(values, values32, N_GRAD_WEIGHT, group, exists, (1.0 - beta1) * d * unit * added)
    _store_number(values, values32, N_SQ_WEIGHT, group, exists, (1.0 - beta2) * (d * d) * added)
    _store_number(values, values32, N_EVIDENCE_WEIGHT, group, exists, evidence_weight * added)
    _store_number(values, values32, N_UNIT, group, exists, unit * added)
    _store_number(values, values32, N_DLR, group, exists, dlr * added)
    _store_number(values, values32, N_DECAY, group, exists, decay * added)
    _store_number(values, values32, N_C, group, exists, c * added)
    _store_number(values, values32, N_Y_FRACTION, group, exists, y_fraction)
    _store_number(values, values32, N_D, group, exists, d)
    _store_number(values, values32, N_EPS, group, exists, eps)
    _store_number(values, values32, N_EMA_WEIGHT, group, exists, 1.0 / (fourth_root * tl.sqrt(step)))
    _store_number(values, values32, N_ADOPT_CLIP, group, exists, fourth_root)
    gate = tl.where(moves, -1, 0)
    tl.store(gates + group, gate.to(tl.int64), mask=exists)
    tl.store(gates32 + group, gate, mask=exists)
    tl.store(observes + group, counts_evidence & moves, mask=exists)
    tl.store(steps + group, k + 1, mask=exists)
    tl.store(learns + group, moves & (lr > 0), mask=exists)
    tl.store(floats + F_WEIGHT_SUM * count + group, tl.where(moves, new_sum, weight_sum), mask=exists)
    effective_lr = tl.where(moves, effective_lr, old_effective_lr)
    tl.store(floats + F_EFFECTIVE_LR * count + group, effective_lr, mask=exists)
    tl.store(counts + C_K * count + group, k + moves.to(tl.int64), mask=exists)
    tl.store(counts + C_SKIPPED * count + group, skipped + skips.to(tl.int64), mask=exists)


@triton.jit
def _next_d(
    d, numerator, largest, product, norm, settings, group, count,
    LIMIT_OF_SPEED: tl.constexpr, LARGEST_FACTOR: tl.constexpr,
):  # fmt: skip
    """:func:`prodigyplus.formulas.prodigy.next_d`: the next ``d``, the estimate, and the next numerator."""
    d0 = _row(settings, O_D0, count, group)
    d_coef = _row(settings, O_D_COEF, count, group)
    limit = _row(settings, O_LIMIT, count, group)
    speed_coef = _row(settings, O_SPEED_COEF, count, group)
    evidence = _row(settings, O_EVIDENCE, count, group)
    limits = _row(settings, O_D_LIMITER, count, group) > 0
    beta4 = _row(settings, O_BETA4, count, group)
    before = numerator
    numerator = numerator * _row(settings, O_BETA3, count, group)
    numerator = tl.where((d > d0) | (product > 0), numerator + product, numerator)
    grows = (numerator >= largest) & (numerator > 0) & (before > 0)
    growth = tl.sqrt(tl.where(grows, numerator, 1.0) / tl.where(grows, before, 1.0))
    # As float64: versions of Triton differ in the dtype that they give to a constant.
    largest_factor = tl.full(growth.shape, LARGEST_FACTOR, tl.float64)
    relative = d * tl.minimum(growth, largest_factor)
    observed = norm > 0
    d_hat = numerator / tl.where(observed, norm, 1.0)
    by_speed = tl.minimum(d_hat * d_coef, tl.exp(LIMIT_OF_SPEED * tl.log(d)))
    plain = tl.where(limits, tl.minimum(d_hat, d * limit), d_hat) * d_coef
    estimate = tl.where(evidence == SIGNS, by_speed, plain)
    estimate = tl.where(evidence == RELATIVE, tl.where(grows, relative * speed_coef, d), estimate)
    d_hat = tl.where(evidence == RELATIVE, relative, d_hat)
    moved = tl.maximum(d, estimate)
    moved = tl.where(beta4 > 0, d * beta4 + tl.maximum(estimate, d0) * (1.0 - beta4), moved)
    return tl.where(observed, moved, d), d_hat, numerator


@triton.jit
def _next_balanced(
    d, k, numerator, denominator, product, norm,
    TARGET: tl.constexpr, GROWTH: tl.constexpr, LOG_LIMIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """:func:`prodigyplus.formulas.balance.next_d`: the next ``d``, ρ, and the next averages."""
    count = k.to(tl.float64)
    # As float64: versions of Triton differ in the dtype that they give to a constant.
    target, limit = tl.full(d.shape, TARGET, tl.float64), tl.full(d.shape, LOG_LIMIT, tl.float64)
    keep = tl.maximum(1.0 - WINDOW / tl.maximum(count, 1.0), 0.0)
    numerator = numerator * keep + product * (1.0 - keep)
    denominator = denominator * keep + norm * (1.0 - keep)
    known = denominator > 0
    rho = tl.where(known, numerator / tl.where(known, denominator, 1.0), 0.0)
    above = rho + target
    rise, fall = tl.minimum(above / (2.0 * target), 1.0), tl.maximum(above / (0.5 - target), -1.0)
    power = tl.where(above > 0, rise * GROWTH, fall * 0.5)
    grown = d * tl.exp(tl.minimum(power / tl.maximum(count, 1.0), limit))
    return tl.where(norm > 0, grown, d), rho, numerator, denominator


@triton.jit
def _led(values, leads, pooled):
    """``values``, in a pool those of the group that leads it."""
    return tl.where(pooled, tl.sum(tl.where(leads, values, 0.0), 0), values)


@triton.jit
def _harmonic_mean(d, where):
    """:func:`prodigyplus.formulas.prodigy._harmonic_mean`."""
    total = tl.sum(tl.where(where, 1.0 / d, 0.0), 0)
    return tl.sum(where.to(tl.float64), 0) / tl.where(total > 0, total, 1.0)


@triton.jit
def _share(
    floats, counts, settings, group, count, exists, d, happens,
    LEAST_GROWTH: tl.constexpr, NEAR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Set the step sizes in use; groups may share one, see :func:`prodigyplus.formulas.prodigy.shared_d`."""
    shares = exists & (_row(settings, O_SHARES, count, group) > 0)
    weight_sum = _row(floats, F_WEIGHT_SUM, count, group)
    k = _row(counts, C_K, count, group)
    in_mean = _row(floats, F_IN_MEAN, count, group)
    shared_d = _row(floats, F_SHARED_D, count, group)
    d0 = _row(settings, O_D0, count, group)
    moved = shares & (weight_sum > 0)
    is_early = (k == tl.max(tl.where(shares, k, 0), 0)) & (k <= EARLY)
    is_near = d * NEAR >= _harmonic_mean(d, moved & (in_mean > 0))
    counting = moved & ((in_mean > 0) | ((d > LEAST_GROWTH * d0) & (is_early | is_near)))
    over = counting | (moved & is_early & (d > d0))
    over = tl.where(tl.max(over.to(tl.int32), 0) + group * 0 > 0, over, moved)
    mean = tl.where(moved, _harmonic_mean(d, over), d)
    next_in_mean = tl.where(shares, counting.to(tl.float64), in_mean)
    tl.store(floats + F_SHARED_D * count + group, tl.where(happens, mean, shared_d), mask=exists)
    tl.store(floats + F_IN_MEAN * count + group, tl.where(happens, next_in_mean, in_mean), mask=exists)


@kernel
def end(
    floats, counts, settings, totals, values, learns, count,
    LIMIT_OF_SPEED: tl.constexpr, LARGEST_FACTOR: tl.constexpr,
    LEAST_GROWTH: tl.constexpr, NEAR: tl.constexpr, EARLY: tl.constexpr,
    TARGET: tl.constexpr, GROWTH: tl.constexpr, LOG_LIMIT: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update ``d`` and the step sizes in use; see :meth:`prodigyplus.engine.groups.Groups.end`.

    ``totals`` are not weighted yet: the weights of products, and of norms with balance, are in ``values``,
    which :func:`begin` has set.
    """
    group, exists = _groups(count, BLOCK)
    weight = tl.load(values + group * VALUE_COUNT + N_EVIDENCE_WEIGHT)
    product = tl.load(totals + group * 2) * weight
    norm = tl.load(totals + group * 2 + 1)
    is_balanced = _row(settings, O_EVIDENCE, count, group) == BALANCE
    dlr = tl.load(values + group * VALUE_COUNT + N_DLR)
    norm = tl.where(is_balanced, norm * dlr, norm)
    learning = tl.load(learns + group).to(tl.int1)
    happens = tl.max(learning.to(tl.int32), 0) + group * 0 > 0
    adapts = _row(settings, O_ADAPTS, count, group) > 0
    # Groups of one pool have one d: the first of them updates it from the sums of all. It may have made fewer
    # steps than others.
    k = _row(counts, C_K, count, group)
    pool = _row(settings, O_POOL, count, group)
    follows = exists & (pool > 0)
    for number in tl.static_range(1, LAST_POOL + 1):
        pooled = exists & (pool == number)
        leads = group == tl.min(tl.where(pooled, group, BLOCK), 0)
        product = tl.where(leads, tl.sum(tl.where(pooled, product, 0.0), 0), product)
        norm = tl.where(leads, tl.sum(tl.where(pooled, norm, 0.0), 0), norm)
        k = tl.where(leads, tl.max(tl.where(pooled, k, 0), 0), k)
        pool_learns = tl.max((pooled & learning).to(tl.int32), 0)
        learning = tl.where(leads, pool_learns, learning.to(tl.int32)) > 0
        follows = follows & (leads == 0)

    d = _row(floats, F_D, count, group)
    d_hat = _row(floats, F_D_HAT, count, group)
    numerator = _row(floats, F_D_NUMERATOR, count, group)
    largest = _row(floats, F_MAX_D_NUMERATOR, count, group)
    denominator = _row(floats, F_D_DENOM, count, group)
    next_d, estimate, next_numerator = _next_d(
        d, numerator, largest, product, norm, settings, group, count, LIMIT_OF_SPEED, LARGEST_FACTOR
    )
    balanced_d, rho, average, next_denominator = _next_balanced(
        d, k, numerator, denominator, product, norm, TARGET, GROWTH, LOG_LIMIT, WINDOW
    )
    next_d = tl.where(is_balanced, balanced_d, next_d)
    next_numerator = tl.where(is_balanced, average, next_numerator)
    next_denominator = tl.where(is_balanced, next_denominator, norm)
    next_largest = tl.where(is_balanced, largest, tl.maximum(next_numerator, largest))
    estimate = tl.where(is_balanced, rho, tl.where(norm > 0, estimate, d_hat))
    writes = learning & adapts & (follows == 0)
    d = tl.where(writes, next_d, d)
    d_hat = tl.where(writes, estimate, d_hat)
    numerator = tl.where(writes, next_numerator, numerator)
    largest = tl.where(writes, next_largest, largest)
    denominator = tl.where(writes, next_denominator, denominator)
    for number in tl.static_range(1, LAST_POOL + 1):
        pooled = exists & (pool == number)
        leads = pooled & (follows == 0)
        d, d_hat = _led(d, leads, pooled), _led(d_hat, leads, pooled)
        numerator, denominator = _led(numerator, leads, pooled), _led(denominator, leads, pooled)
        largest = _led(largest, leads, pooled)
    tl.store(floats + F_D * count + group, d, mask=exists)
    tl.store(floats + F_D_HAT * count + group, d_hat, mask=exists)
    tl.store(floats + F_D_NUMERATOR * count + group, numerator, mask=exists)
    tl.store(floats + F_MAX_D_NUMERATOR * count + group, largest, mask=exists)
    tl.store(floats + F_D_DENOM * count + group, denominator, mask=exists)

    _share(floats, counts, settings, group, count, exists, d, happens, LEAST_GROWTH, NEAR, EARLY)
