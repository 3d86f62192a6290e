"""The passes of a step in Triton: each one launch for all parameters of a batch, whatever their shapes.

Each program works on one tile. It reads from ``tiles`` which matrix the tile is in and where, from
``matrices`` how the matrix lies in its tensor, and from ``pointers`` the tensor's address (see
:mod:`prodigyplus.device.tables`). Programs write partial sums, which another kernel adds up in a fixed order:
there are no atomics, so the same step gives the same bits. The arithmetic is that of
:mod:`prodigyplus.engine.passes`, in float32.

A tile is ``ROWS`` × ``COLUMNS`` elements, of which ``STRIP`` rows, a strip, are in registers at a time. A
tensor that is not factored is also a matrix, whose rows are consecutive in memory.

The first pass is in :mod:`prodigyplus.device.square_kernels`, the second and the third are here.
"""

# No ``from __future__ import annotations``: Triton reads the annotations of arguments at run time.

import triton
import triton.language as tl

from prodigyplus.device import tables
from prodigyplus.device.jit import kernel
from prodigyplus.device.tables import POINTERS, MatrixRow, RunRow, SizeRow
from prodigyplus.device.tiles import elements_of, pointer, tile_of
from prodigyplus.formulas import directions, moments
from prodigyplus.terms.step_numbers import VALUES

# Indices of columns, and how many columns a table has; see ``prodigyplus.device.tables``.
P_WEIGHT = tl.constexpr(POINTERS.index("weight"))
P_Z = tl.constexpr(POINTERS.index("z"))
P_Z_MINUS_Y = tl.constexpr(POINTERS.index("z_minus_y"))
P_EXP_AVG = tl.constexpr(POINTERS.index("exp_avg"))
P_EXP_AVG_SQ = tl.constexpr(POINTERS.index("exp_avg_sq"))
P_OUTER = tl.constexpr(POINTERS.index("outer"))
P_INNER = tl.constexpr(POINTERS.index("inner"))
P_MEAN = tl.constexpr(POINTERS.index("mean"))
P_P0 = tl.constexpr(POINTERS.index("p0"))
P_S = tl.constexpr(POINTERS.index("s"))
P_GRAD = tl.constexpr(POINTERS.index("grad"))
S_FIRST_INDEX = tl.constexpr(SizeRow._fields.index("first_index"))
S_FIRST_PHASE = tl.constexpr(SizeRow._fields.index("first_phase"))
S_IS_ROW_OUTER = tl.constexpr(SizeRow._fields.index("is_row_outer"))
S_RUN_LENGTH = tl.constexpr(SizeRow._fields.index("run_length"))
S_FIRST_RUN = tl.constexpr(SizeRow._fields.index("first_run"))
R_FIRST_INDEX = tl.constexpr(RunRow._fields.index("first_index"))
R_FIRST_PHASE = tl.constexpr(RunRow._fields.index("first_phase"))
R_SAMPLES = tl.constexpr(RunRow._fields.index("samples"))
RUN_COLUMNS = tl.constexpr(len(RunRow._fields))
M_OUTER_OFFSET = tl.constexpr(MatrixRow._fields.index("outer_offset"))
M_OUTER_STRIDE = tl.constexpr(MatrixRow._fields.index("outer_stride"))
M_INNER_OFFSET = tl.constexpr(MatrixRow._fields.index("inner_offset"))
M_INNER_STRIDE = tl.constexpr(MatrixRow._fields.index("inner_stride"))
M_MEAN_OFFSET = tl.constexpr(MatrixRow._fields.index("mean_offset"))
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

# The kinds of evidence.
SIGNS = tl.constexpr(tables.EVIDENCE_KINDS["signs"])
RELATIVE = tl.constexpr(tables.EVIDENCE_KINDS["relative"])
BALANCE = tl.constexpr(tables.EVIDENCE_KINDS["balance"])

_TINY = tl.constexpr(moments.TINY)
_QUARTER_TURN = tl.constexpr(1.5707963267948966)
_ATAN2_SCALE = tl.constexpr(directions.ATAN2_SCALE)


@triton.jit
def _atan2(y, x):
    """The angle of (x, y) for x ≥ 0; 0 for (0, 0). The error is at most 2 ulp of float32."""
    size = tl.abs(y)
    larger, smaller = tl.maximum(size, x), tl.minimum(size, x)
    t = smaller / tl.where(larger > 0, larger, 1.0)
    t = tl.where((smaller == larger) & (larger > 0), 1.0, t)  # also for two infinities
    # A series of atan(t) on [0, tan(π/8)]; above, atan(t) = π/4 + atan((t − 1)/(t + 1)) (Cephes).
    far = t > 0.4142135623730950
    reduced = tl.where(far, (t - 1.0) / (t + 1.0), t)
    square = reduced * reduced
    series = 8.05374449538e-2 * square - 1.38776856032e-1
    series = series * square + 1.99777106478e-1
    series = series * square - 3.33329491539e-1
    angle = series * square * reduced + reduced + tl.where(far, 0.7853981633974483, 0.0)
    angle = tl.where(size > x, _QUARTER_TURN - angle, angle)
    return tl.where(y < 0, -angle, angle)


@triton.jit
def _factor_roots(factor, index, exists, mean, scale, is_row):
    """The roots of a strip's row or column factors, see :func:`prodigyplus.formulas.moments.roots`."""
    value = tl.load(factor + index, mask=exists, other=0.0).to(tl.float32)
    return tl.where(is_row, tl.sqrt(value / mean), tl.sqrt(value) / scale)


@triton.jit
def _momentum(
    g, exp_avg, index, exists, weight, keep,
    EXP_AVG_DTYPE: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """The next first moment of a strip; with ``STORES``, it is also written to memory."""
    old = tl.load(exp_avg + index, mask=exists, other=0.0).to(tl.float32)
    momentum = g * weight + old * keep
    if STORES:
        tl.store(exp_avg + index, momentum.to(EXP_AVG_DTYPE), mask=exists)
    return momentum


@triton.jit
def _moments(
    g, numerator, exp_avg_sq, index, exists, row_root, column_root, weight, keep, d, eps,
    ATAN2: tl.constexpr, FACTORED: tl.constexpr, EXP_AVG_SQ_DTYPE: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """The direction of a strip, of unit scale; with ``STORES``, the second moment is also written."""
    if FACTORED:
        deviation = row_root[:, None] * column_root[None, :] + eps
    else:
        old = tl.load(exp_avg_sq + index, mask=exists, other=0.0).to(tl.float32)
        # Rounded as it is stored, so that the direction is the same in both passes.
        average = (g * g * weight + old * keep).to(EXP_AVG_SQ_DTYPE)
        if STORES:
            tl.store(exp_avg_sq + index, average, mask=exists)
        deviation = tl.sqrt(average.to(tl.float32)) / d + eps
    u = _ATAN2_SCALE * _atan2(numerator, deviation) if ATAN2 else numerator / deviation
    return tl.where(exists, u, 0.0)


@triton.jit
def _moved(
    y, z, u, step, unit, decay, c, fraction,
    MOMENTUM: tl.constexpr, IS_OFFSET: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """The next y and z of a strip: ``step_`` and ``descend_`` of ``prodigyplus.formulas.schedule_free``."""
    if MOMENTUM:
        if DECAYS:
            y = y * (1.0 - decay)
        y = y - u * step
    else:
        if DECAYS:
            u = u * step + y * decay
            step = unit
        if IS_OFFSET:
            y = y + (z * c - u * (step * fraction))
            z = z - z * c - u * (step * (1.0 - fraction))
        else:
            y = y + (c * (z - y) - u * (step * fraction))
            z = z - u * step
    return y, z


@triton.jit
def _run_of(index, size, runs):
    """For a shard of several runs: the row in ``runs`` of each element's run, and its position in the run."""
    length = tl.load(size + S_RUN_LENGTH).to(tl.int32)
    run = index // length
    return runs + (tl.load(size + S_FIRST_RUN) + run) * RUN_COLUMNS, index - run * length


@triton.jit
def _whole_indices(index, exists, size, runs, SINGLE: tl.constexpr):
    """The indices of a strip's elements in the whole tensor, modulo 2³²."""
    if SINGLE:
        return index.to(tl.uint32) + tl.load(size + S_FIRST_INDEX).to(tl.uint32)
    else:
        run, in_run = _run_of(index, size, runs)
        first = tl.load(run + R_FIRST_INDEX, mask=exists, other=0).to(tl.uint32, bitcast=True)
        return in_run.to(tl.uint32) + first


@triton.jit
def _samples(
    tile, index, exists, row, runs,
    FACTORED: tl.constexpr, SINGLE: tl.constexpr, FAST: tl.constexpr, SLICE_P: tl.constexpr,
    COLUMNS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """The samples of a strip: at most ``SAMPLES`` candidates in each row, if its elements are consecutive.

    Otherwise all elements of the strip are candidates.

    Returns:
        The indices of the candidates in their tensor, a mask of those that are samples, and the position of
        each among the tensor's samples.
    """
    if SINGLE and FAST:
        phase = tl.load(tile.size + S_FIRST_PHASE).to(tl.int32)
        start = tile.offset + row * tile.row_stride + tile.across * COLUMNS
        end = tile.offset + row * tile.row_stride + tl.minimum(tile.width, (tile.across + 1) * COLUMNS)
        if not FACTORED:
            end = tl.minimum(end, tile.local)
        number = ((start + phase + (SLICE_P - 1)) // SLICE_P)[:, None] + tl.arange(0, SAMPLES)[None, :]
        index = number * SLICE_P - phase
        return (
            index,
            (row[:, None] < tile.height) & (index < end[:, None]),
            number - tl.where(phase > 0, 1, 0),
        )
    elif SINGLE:
        phase = tl.load(tile.size + S_FIRST_PHASE).to(tl.int32)
        position = index + phase
        return index, exists & (position % SLICE_P == 0), position // SLICE_P - tl.where(phase > 0, 1, 0)
    else:
        run, in_run = _run_of(index, tile.size, runs)
        phase = tl.load(run + R_FIRST_PHASE, mask=exists, other=0)
        before = tl.load(run + R_SAMPLES, mask=exists, other=0) - tl.where(phase > 0, 1, 0)
        position = in_run + phase
        return index, exists & (position % SLICE_P == 0), before + position // SLICE_P


@triton.jit
def _evidence(
    grad, weight, base, p0, s, at, slot, sampled, opens, beta3, evidence_weight,
    MOMENTUM: tl.constexpr, IS_OFFSET: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Prodigy's evidence of a strip: update s at its samples, and return the terms of up to three sums.

    Samples are read once more, from the cache: they are few, about every eleventh element.

    Args:
        grad, weight, base, p0, s: The addresses of the tensor's gradient, weight, z or its offset, p0 and s.
        at, slot, sampled: The positions of the samples in the tensor, and among its samples; and a mask of
            those that exist.
        opens: False in a no-op.
        beta3, evidence_weight: Numbers of the step.
    """
    g = tl.where(opens, tl.load(grad + at, mask=sampled, other=0.0).to(tl.float32), 0.0)
    # z, or without Schedule-Free y.
    iterate = tl.load((weight if MOMENTUM else base) + at, mask=sampled, other=0.0).to(tl.float32)
    if IS_OFFSET:
        iterate += tl.load(weight + at, mask=sampled, other=0.0).to(tl.float32)
    distance = tl.load(p0 + slot, mask=sampled, other=0.0).to(tl.float32) - iterate
    product = distance * g
    if KIND == RELATIVE:
        return product, tl.abs(distance), distance * distance
    else:
        dtype: tl.constexpr = s.dtype.element_ty
        kept = (tl.load(s + slot, mask=sampled, other=0.0).to(tl.float32) * beta3).to(dtype)
        seen = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)) if KIND == SIGNS else g
        kept = (kept.to(tl.float32) + seen * evidence_weight).to(dtype)
        tl.store(s + slot, kept, mask=sampled)
        return product, tl.abs(kept.to(tl.float32)), product


@triton.jit
def _hash(bits):
    """32 bits of noise: see :mod:`prodigyplus.formulas.stochastic_rounding`."""
    bits = (bits ^ (bits >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    bits = (bits ^ (bits >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def _seed(step, ordinal):
    """:func:`prodigyplus.formulas.stochastic_rounding.seeds`, of one parameter; both are int64."""
    golden = tl.full((), 0x9E3779B9, tl.int64)
    of_parameter = (ordinal * golden).to(tl.uint32) & tl.full((), 0x7FFFFFFF, tl.uint32)
    return _hash(_hash((step * golden).to(tl.uint32)) + of_parameter)


@triton.jit
def _rounded(value, half, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``value`` rounded to ``DTYPE``: to nearest, or for bfloat16 with ``half``, 16 bits of noise."""
    if STOCHASTIC and tl.bfloat16 == DTYPE:
        bits = (half + value.to(tl.uint32, bitcast=True)) & tl.full((), 0xFFFF0000, tl.uint32)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@kernel
def sweep(
    pointers, sizes, runs, matrices, tiles, numbers, number_stride, tensor_stride, gate, gate_stride,
    norm_parts, evidence_parts, parts_stride, norms, numels, ordinals, steps, directions, scales,
    GRAD_DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, BASE_DTYPE: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr, EXP_AVG_SQ_DTYPE: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr, MEAN_DTYPE: tl.constexpr,
    P0_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, DIRECTION_DTYPE: tl.constexpr,
    MOVES: tl.constexpr, TAKES_EVIDENCE: tl.constexpr, READS: tl.constexpr,
    FACTORED: tl.constexpr, SINGLE: tl.constexpr, FAST: tl.constexpr, MOMENTUM: tl.constexpr,
    IS_OFFSET: tl.constexpr, ATAN2: tl.constexpr, STABLE: tl.constexpr, DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr, KIND: tl.constexpr, SLICE_P: tl.constexpr, SAMPLES: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Measure: sum the squares of the direction over each tile. Or, with ``MOVES``, move y, z and moments.

    With ``TAKES_EVIDENCE``, also update s, and sum the evidence over each tile. Measuring writes nothing
    else: the moments of elements are computed in both passes, and written by the one that moves.

    With ``READS``, the move reads directions at the addresses in ``directions``, and scales them: they are
    orthogonalised between the two passes. So measuring updates the first moment, and takes all evidence
    except what balance needs of the directions, which the move takes.
    """
    MULTIPLE: tl.constexpr = 16 if FAST else 1
    BALANCES: tl.constexpr = TAKES_EVIDENCE and KIND == BALANCE
    SAMPLED: tl.constexpr = TAKES_EVIDENCE and KIND != BALANCE
    program = tl.program_id(0)
    tile = tile_of(pointers, sizes, matrices, tiles, MULTIPLE)
    tensor, matrix = tile.tensor, tile.matrix
    is_row_outer = tl.load(tile.size + S_IS_ROW_OUTER) != 0
    grad = pointer(tile.pointers, P_GRAD, GRAD_DTYPE, MULTIPLE)
    weight = pointer(tile.pointers, P_WEIGHT, WEIGHT_DTYPE, MULTIPLE)
    base = pointer(tile.pointers, P_Z_MINUS_Y if IS_OFFSET else P_Z, BASE_DTYPE, MULTIPLE)
    exp_avg = pointer(tile.pointers, P_EXP_AVG, EXP_AVG_DTYPE, MULTIPLE)
    exp_avg_sq = pointer(tile.pointers, P_EXP_AVG_SQ, EXP_AVG_SQ_DTYPE, MULTIPLE)
    p0 = pointer(tile.pointers, P_P0, P0_DTYPE, 1)
    s = pointer(tile.pointers, P_S, S_DTYPE, 1)
    opens = tl.load(gate + tensor * gate_stride) != 0
    # All loaded before the loop: for all the compiler knows, stores in the loop may change them.
    numbers += tensor * tensor_stride
    beta1, beta2 = tl.load(numbers + N_BETA1 * number_stride), tl.load(numbers + N_BETA2 * number_stride)
    beta3, eps = tl.load(numbers + N_BETA3 * number_stride), tl.load(numbers + N_EPS * number_stride)
    grad_weight = tl.load(numbers + N_GRAD_WEIGHT * number_stride)
    sq_weight = tl.load(numbers + N_SQ_WEIGHT * number_stride)
    evidence_weight = tl.load(numbers + N_EVIDENCE_WEIGHT * number_stride)
    decay, c = tl.load(numbers + N_DECAY * number_stride), tl.load(numbers + N_C * number_stride)
    fraction = tl.load(numbers + N_Y_FRACTION * number_stride)
    unit, d = tl.load(numbers + N_UNIT * number_stride), tl.load(numbers + N_D * number_stride)
    step = tl.load(numbers + N_DLR * number_stride) * unit
    direction = grad
    if READS and MOVES:
        step = tl.load(numbers + N_DLR * number_stride) * (unit * tl.load(scales + tensor))
        direction = tl.load(directions + tensor).to(tl.pointer_type(DIRECTION_DTYPE))
        direction = tl.multiple_of(direction, MULTIPLE)
    if MOVES and STABLE:
        rms = tl.sqrt(tl.load(norms + tensor) / tl.load(numels + tensor))
        step = step / tl.sqrt(tl.maximum(rms, 1.0))
    seed = tl.full((), 0, tl.uint32)
    if MOVES and STOCHASTIC:
        seed = _seed(tl.load(steps), tl.load(ordinals + tensor))
    column = tile.across * COLUMNS + tl.arange(0, COLUMNS)
    column_root = tl.zeros((COLUMNS,), tl.float32)
    if FACTORED:
        means = pointer(tile.pointers, P_MEAN, MEAN_DTYPE, 1)
        mean = tl.load(means + tl.load(matrix + M_MEAN_OFFSET)).to(tl.float32) + _TINY
        outer = pointer(tile.pointers, P_OUTER, FACTOR_DTYPE, 1) + tl.load(matrix + M_OUTER_OFFSET)
        inner = pointer(tile.pointers, P_INNER, FACTOR_DTYPE, 1) + tl.load(matrix + M_INNER_OFFSET)
        outer_stride, inner_stride = tl.load(matrix + M_OUTER_STRIDE), tl.load(matrix + M_INNER_STRIDE)
        column_root = _factor_roots(
            inner, column * inner_stride, column < tile.width, mean, d, is_row_outer == 0
        )
    # Accumulated elementwise: a sum over threads in each strip would make all of them wait.
    norm = tl.zeros((STRIP, COLUMNS), tl.float32)
    TERMS: tl.constexpr = SAMPLES if SAMPLED and SINGLE and FAST else COLUMNS
    product_sum = tl.zeros((STRIP, TERMS), tl.float64)
    second_sum = tl.zeros((STRIP, TERMS), tl.float64)
    third_sum = tl.zeros((STRIP, TERMS), tl.float64)
    for top in range(0, ROWS, STRIP):
        row = tile.down * ROWS + top + tl.arange(0, STRIP)
        index, exists = elements_of(tile, row, column, FACTORED, FAST, VECTOR)
        # With READS, the move reads the direction here instead of the gradient, which it does not need.
        g = tl.where(opens, tl.load(direction + index, mask=exists, other=0.0).to(tl.float32), 0.0)
        y, z = tl.zeros((STRIP, COLUMNS), tl.float32), tl.zeros((STRIP, COLUMNS), tl.float32)
        if MOVES or (BALANCES and (MOMENTUM or not IS_OFFSET)):
            y = tl.load(weight + index, mask=exists, other=0.0).to(tl.float32)
        if (MOVES or BALANCES) and not MOMENTUM:
            z = tl.load(base + index, mask=exists, other=0.0).to(tl.float32)
        if SAMPLED:
            at, sampled, slot = _samples(
                tile, index, exists, row, runs, FACTORED, SINGLE, FAST, SLICE_P, COLUMNS, SAMPLES
            )
            product, second_term, third_term = _evidence(
                direction, weight, base, p0, s, at, slot, sampled, opens, beta3, evidence_weight,
                MOMENTUM, IS_OFFSET, KIND,
            )  # fmt: skip
            product_sum += product.to(tl.float64)
            second_sum += second_term.to(tl.float64)
            if KIND == RELATIVE:
                third_sum += third_term.to(tl.float64)
            if MOVES:
                tl.debug_barrier()  # so that no thread overwrites what another has yet to read
        u = g
        if READS:
            if MOMENTUM and not MOVES:
                _momentum(g, exp_avg, index, exists, grad_weight, beta1, EXP_AVG_DTYPE, True)
        elif MOVES or STABLE or BALANCES:
            row_root = tl.zeros((STRIP,), tl.float32)
            if FACTORED:
                row_root = _factor_roots(outer, row * outer_stride, row < tile.height, mean, d, is_row_outer)
            numerator = g
            if MOMENTUM:
                momentum = _momentum(g, exp_avg, index, exists, grad_weight, beta1, EXP_AVG_DTYPE, MOVES)
                numerator = momentum / d
            u = _moments(
                g, numerator, exp_avg_sq, index, exists, row_root, column_root, sq_weight, beta2, d, eps,
                ATAN2, FACTORED, EXP_AVG_SQ_DTYPE, MOVES,
            )  # fmt: skip
            if not MOVES:
                norm += u * u
        if BALANCES:
            if READS and MOVES:
                g = tl.where(opens, tl.load(grad + index, mask=exists, other=0.0).to(tl.float32), 0.0)
            else:
                lag = -z if IS_OFFSET else y - z
                product_sum += (lag * g).to(tl.float64)
            second_sum += (u * g).to(tl.float64)
            third_sum += (u * u).to(tl.float64)
        if MOVES:
            y, z = _moved(y, z, u, step, unit, decay, c, fraction, MOMENTUM, IS_OFFSET, DECAYS)
            noise = index
            if STOCHASTIC:
                noise = _hash(_whole_indices(index, exists, tile.size, runs, SINGLE) + seed)
            tl.store(weight + index, _rounded(y, noise & 0xFFFF, WEIGHT_DTYPE, STOCHASTIC), mask=exists)
            if not MOMENTUM:
                tl.store(base + index, _rounded(z, noise >> 16, BASE_DTYPE, STOCHASTIC), mask=exists)
    if STABLE and not MOVES:
        tl.store(norm_parts + program, tl.sum(norm))
    if TAKES_EVIDENCE:
        tl.store(evidence_parts + program, tl.sum(product_sum))
        tl.store(evidence_parts + parts_stride + program, tl.sum(second_sum))
        if KIND == RELATIVE or BALANCES:
            tl.store(evidence_parts + 2 * parts_stride + program, tl.sum(third_sum))
