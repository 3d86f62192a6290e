"""The passes of a step in Triton: each one launch for all parameters of a batch, whatever their shapes.

Each program works on one tile. It reads from ``tiles`` which matrix the tile is in and where, from
``matrices`` how the matrix lies in its tensor, and from ``pointers`` the tensor's address (see
:mod:`prodigyplus.device.plan`). Programs write partial sums, which another kernel adds up in a fixed order:
there are no atomics, so the same step gives the same bits. The arithmetic is that of
:mod:`prodigyplus.engine.passes`, in float32.

A tile is ``ROWS`` × ``COLUMNS`` elements, of which ``STRIP`` rows, a strip, are in registers at a time. A
tensor that is not factored is also a matrix, whose rows are consecutive in memory.
"""

# No ``from __future__ import annotations``: Triton reads the annotations of arguments at run time.

import triton
import triton.language as tl

from prodigyplus.device.jit import kernel

# The columns of the tables ``pointers``, ``sizes``, ``runs`` and ``matrices``, and how many each has.
WEIGHT, BASE, OFFSET_FROM_Y, FIRST, SECOND, OUTER, INNER, MEAN, START, STATISTIC, GRAD = map(
    tl.constexpr, range(11)
)
POINTERS = tl.constexpr(11)
LOCAL, FIRST_INDEX, FIRST_PHASE, IS_ROW_OUTER, RUN_LENGTH, FIRST_RUN = map(tl.constexpr, range(6))
SIZES = tl.constexpr(6)
RUN_INDEX, RUN_PHASE, RUN_SAMPLES = map(tl.constexpr, range(3))
RUNS = tl.constexpr(3)
TENSOR, OFFSET, HEIGHT, WIDTH, ROW_STRIDE, COLUMN_STRIDE, OUTER_OFFSET, OUTER_STRIDE, INNER_OFFSET = map(
    tl.constexpr, range(9)
)
INNER_STRIDE, OUTER_PARTS, INNER_PARTS, MEAN_OFFSET = map(tl.constexpr, range(9, 13))
MATRICES = tl.constexpr(13)

# The indices of the numbers of a step, see ``prodigyplus.terms.scalars.VALUES``.
BETA1, BETA2, BETA3, GRAD_WEIGHT, SQ_WEIGHT, EVIDENCE_WEIGHT, UNIT, DLR, DECAY, C, Y_FRACTION, D, EPS = map(
    tl.constexpr, range(13)
)

_TINY = tl.constexpr(1e-30)
_QUARTER_TURN = tl.constexpr(1.5707963267948966)
_ATAN2_SCALE = tl.constexpr(1.2732395447351628)  # 4/π

# The kinds of evidence, as numbered in ``prodigyplus.device.launches.EVIDENCE``.
PLAIN, SIGNS, RELATIVE, BALANCE = map(tl.constexpr, range(4))


@triton.jit
def _tile(pointers, sizes, matrices, tiles, MULTIPLE: tl.constexpr):
    """The program's tile: its tensor and matrix with their table rows, its place there, and the strides."""
    tile = tiles + tl.program_id(0) * 3
    matrix = matrices + tl.load(tile).to(tl.int64) * MATRICES
    tensor = tl.load(matrix + TENSOR)
    size, address = sizes + tensor * SIZES, pointers + tensor * POINTERS
    local = tl.multiple_of(tl.load(size + LOCAL).to(tl.int32), MULTIPLE)
    offset = tl.multiple_of(tl.load(matrix + OFFSET).to(tl.int32), MULTIPLE)
    height = tl.load(matrix + HEIGHT).to(tl.int32)
    width = tl.multiple_of(tl.load(matrix + WIDTH).to(tl.int32), MULTIPLE)
    row_stride = tl.multiple_of(tl.load(matrix + ROW_STRIDE).to(tl.int32), MULTIPLE)
    column_stride = tl.load(matrix + COLUMN_STRIDE).to(tl.int32)
    down, across = tl.load(tile + 1), tl.load(tile + 2)
    return (
        tensor,
        size,
        address,
        matrix,
        down,
        across,
        local,
        offset,
        height,
        width,
        row_stride,
        column_stride,
    )


@triton.jit
def _elements(
    offset, row, column, height, width, row_stride, column_stride, local,
    FACTORED: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The indices of a strip's elements in their tensor, and a mask of those that exist."""
    columns = column[None, :] if FAST else column[None, :] * column_stride
    index = offset + row[:, None] * row_stride + columns
    exists = (row[:, None] < height) & (column[None, :] < width)
    if not FACTORED:
        exists = exists & (index < local)
    if FAST:
        # Tell Triton that 16 bytes can be read at a time: it cannot see it, as offsets come from tables.
        index = tl.max_contiguous(tl.multiple_of(index, (1, VECTOR)), (1, VECTOR))
        exists = tl.max_constancy(exists, (1, 16))
    return index, exists


@kernel
def squares(
    pointers, sizes, matrices, tiles, outer_parts, inner_parts,
    DTYPE: tl.constexpr, FACTORED: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Sums of g² in each tile: of each row and of each column; if not factored, of the whole tile."""
    MULTIPLE: tl.constexpr = 16 if FAST else 1
    _tensor, _size, address, matrix, down, across, local, offset, height, width, row_stride, column_stride = (
        _tile(pointers, sizes, matrices, tiles, MULTIPLE)
    )
    grad = tl.multiple_of(tl.load(address + GRAD).to(tl.pointer_type(DTYPE)), MULTIPLE)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    of_columns = tl.zeros((STRIP, COLUMNS), tl.float32)
    rows_out = outer_parts + tl.load(matrix + OUTER_PARTS) + across * height
    columns_out = inner_parts + tl.load(matrix + INNER_PARTS) + down * width
    for start in range(0, ROWS, STRIP):
        row = down * ROWS + start + tl.arange(0, STRIP)
        index, exists = _elements(
            offset, row, column, height, width, row_stride, column_stride, local, FACTORED, FAST, VECTOR
        )
        g = tl.load(grad + index, mask=exists, other=0.0).to(tl.float32)
        square = g * g
        of_columns += square
        if FACTORED:
            tl.store(rows_out + row, tl.sum(square, 1), mask=row < height)
    if FACTORED:
        tl.store(columns_out + column, tl.sum(of_columns, 0), mask=column < width)
    else:
        tl.store(inner_parts + tl.load(matrix + INNER_PARTS) + down, tl.sum(of_columns))


@kernel
def add_parts(outer_parts, inner_parts, sums, segments, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Add up the partial sums of rows and of columns, in the order of the tiles.

    A row of ``segments``: 1 for sums of columns, 0 for rows; the index of the first part; the index of the
    first sum, and the stride of sums; the length of a part; the number of parts; and the index of the block.
    """
    segment = segments + tl.program_id(0) * 7
    is_inner, first, out, stride = (
        tl.load(segment), tl.load(segment + 1), tl.load(segment + 2), tl.load(segment + 3)
    )  # fmt: skip
    length, count, block = tl.load(segment + 4), tl.load(segment + 5), tl.load(segment + 6)
    parts = inner_parts + first if is_inner != 0 else outer_parts + first
    column = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        exists = (part[:, None] < count) & (column[None, :] < length)
        total += tl.sum(tl.load(parts + part[:, None] * length + column[None, :], mask=exists, other=0.0), 0)
    tl.store(sums + out + column * stride, total, mask=column < length)


@kernel
def add_up(values, values_stride, out, out_stride, segments, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum segments of each row of ``values``; the second axis of the grid runs over rows.

    A row of ``segments``: the index of the first value, the stride, the number of values, and the index of
    the sum in ``out``.
    """
    segment = segments + tl.program_id(0) * 4
    first, stride = tl.load(segment), tl.load(segment + 1)
    count, target = tl.load(segment + 2), tl.load(segment + 3)
    row = tl.program_id(1).to(tl.int64)
    values += row * values_stride + first
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index * stride, mask=index < count, other=0.0)
    tl.store(out + row * out_stride + target, tl.sum(total, 0))


@kernel
def factors(
    pointers, pieces, sums, numbers, number_stride, tensor_stride, gate, gate_stride,
    FACTOR: tl.constexpr, MEAN_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the factors of the second moment from the sums of g².

    A row of ``pieces``: the tensor, the column of the factor in ``pointers``, the index of the first sum, the
    number of sums, the number of elements in each, and the index of the block.
    """
    piece = pieces + tl.program_id(0) * 6
    tensor, field, first = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    length, count, block = tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5)
    index = block * BLOCK + tl.arange(0, BLOCK)
    exists = index < length
    numbers += tensor * tensor_stride
    weight = tl.load(numbers + SQ_WEIGHT * number_stride) / count.to(tl.float32)
    keep = tl.load(numbers + BETA2 * number_stride)
    total = tl.load(sums + first + index, mask=exists, other=0.0)
    total = tl.where(tl.load(gate + tensor * gate_stride) != 0, total, 0.0)
    address = tl.load(pointers + tensor * POINTERS + field)
    if field == MEAN:
        average = address.to(tl.pointer_type(MEAN_DTYPE))
        old = tl.load(average + index, mask=exists, other=0.0).to(tl.float32)
        tl.store(average + index, (total * weight + old * keep).to(MEAN_DTYPE), mask=exists)
    else:
        factor = address.to(tl.pointer_type(FACTOR))
        old = tl.load(factor + index, mask=exists, other=0.0).to(tl.float32)
        tl.store(factor + index, (total * weight + old * keep).to(FACTOR), mask=exists)


@triton.jit
def _atan2(y, x):
    """The angle of (x, y) for x ≥ 0; 0 for (0, 0). The error is at most 2 ulp of float32."""
    size = tl.abs(y)
    larger, smaller = tl.maximum(size, x), tl.minimum(size, x)
    t = tl.where(larger > 0, smaller / tl.where(larger > 0, larger, 1.0), 0.0)
    t = tl.where(smaller == larger, tl.where(larger > 0, 1.0, 0.0), t)  # also for two infinities
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
def _factor_roots(factor, index, exists, mean, scale, IS_ROW):
    """The roots of a strip's row or column factors, see :func:`prodigyplus.formulas.moments.roots`."""
    value = tl.load(factor + index, mask=exists, other=0.0).to(tl.float32)
    return tl.where(IS_ROW, tl.sqrt(value / mean), tl.sqrt(value) / scale)


@triton.jit
def _momentum(
    g, first, index, exists, weight, keep,
    FIRST_DTYPE: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """The next first moment of a strip; with ``STORES``, it is also written to memory."""
    old = tl.load(first + index, mask=exists, other=0.0).to(tl.float32)
    momentum = g * weight + old * keep
    if STORES:
        tl.store(first + index, momentum.to(FIRST_DTYPE), mask=exists)
    return momentum


@triton.jit
def _moments(
    g, numerator, second, index, exists, row_root, column_root, weight, keep, d, eps,
    ATAN2: tl.constexpr, FACTORED: tl.constexpr, SECOND_DTYPE: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """The direction of a strip, of unit scale; with ``STORES``, the second moment is also written."""
    if FACTORED:
        deviation = row_root[:, None] * column_root[None, :] + eps
    else:
        old = tl.load(second + index, mask=exists, other=0.0).to(tl.float32)
        # Rounded as it is stored, so that the direction is the same in both passes.
        average = (g * g * weight + old * keep).to(SECOND_DTYPE)
        if STORES:
            tl.store(second + index, average, mask=exists)
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
            y = y + z * c - u * (step * fraction)
            z = z - z * c - u * (step * (1.0 - fraction))
        else:
            # As torch.lerp(), which starts from the nearer end.
            y = tl.where(c < 0.5, y + c * (z - y), z - (z - y) * (1.0 - c)) - u * (step * fraction)
            z = z - u * step
    return y, z


@triton.jit
def _run_of(index, size, runs):
    """For a shard of several runs: the row in ``runs`` of each element's run, and its position in the run."""
    length = tl.load(size + RUN_LENGTH).to(tl.int32)
    run = index // length
    return runs + (tl.load(size + FIRST_RUN) + run) * RUNS, index - run * length


@triton.jit
def _whole_indices(index, exists, size, runs, SINGLE: tl.constexpr):
    """The indices of a strip's elements in the whole tensor, modulo 2³²."""
    if SINGLE:
        return index.to(tl.uint32) + tl.load(size + FIRST_INDEX).to(tl.uint32)
    else:
        run, place = _run_of(index, size, runs)
        first = tl.load(run + RUN_INDEX, mask=exists, other=0).to(tl.uint32, bitcast=True)
        return place.to(tl.uint32) + first


@triton.jit
def _samples(
    index, exists, row, across, offset, height, width, row_stride, local, size, runs,
    FACTORED: tl.constexpr, SINGLE: tl.constexpr, FAST: tl.constexpr, EVERY: tl.constexpr,
    COLUMNS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """The samples of a strip: at most ``SAMPLES`` candidates in each row, if its elements are consecutive.

    Otherwise all elements of the strip are candidates.

    Returns:
        The indices of the candidates in their tensor, a mask of those that are samples, and the position of
        each among the tensor's samples.
    """
    if SINGLE and FAST:
        phase = tl.load(size + FIRST_PHASE).to(tl.int32)
        start = offset + row * row_stride + across * COLUMNS
        end = offset + row * row_stride + tl.minimum(width, (across + 1) * COLUMNS)
        if not FACTORED:
            end = tl.minimum(end, local)
        number = ((start + phase + (EVERY - 1)) // EVERY)[:, None] + tl.arange(0, SAMPLES)[None, :]
        index = number * EVERY - phase
        return index, (row[:, None] < height) & (index < end[:, None]), number - tl.where(phase > 0, 1, 0)
    elif SINGLE:
        phase = tl.load(size + FIRST_PHASE).to(tl.int32)
        position = index + phase
        return index, exists & (position % EVERY == 0), position // EVERY - tl.where(phase > 0, 1, 0)
    else:
        run, place = _run_of(index, size, runs)
        phase = tl.load(run + RUN_PHASE, mask=exists, other=0)
        before = tl.load(run + RUN_SAMPLES, mask=exists, other=0) - tl.where(phase > 0, 1, 0)
        position = place + phase
        return index, exists & (position % EVERY == 0), before + position // EVERY


@triton.jit
def _evidence(g, base, start, statistic, slot, sampled, beta3, weight, KIND: tl.constexpr):
    """Prodigy's evidence of a strip: update s at its samples, and return the terms of up to three sums.

    Args:
        g, base: The gradients and the base iterates before the move; 0 where there is no sample.
        start, statistic: The addresses of the tensor's p0 and s.
        slot, sampled: The positions of the samples among the tensor's, and a mask of those that exist.
    """
    distance = tl.load(start + slot, mask=sampled, other=0.0).to(tl.float32) - base
    product = distance * g
    if KIND == RELATIVE:
        return product, tl.abs(distance), distance * distance
    else:
        dtype: tl.constexpr = statistic.dtype.element_ty
        kept = (tl.load(statistic + slot, mask=sampled, other=0.0).to(tl.float32) * beta3).to(dtype)
        seen = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)) if KIND == SIGNS else g
        kept = (kept.to(tl.float32) + seen * weight).to(dtype)
        tl.store(statistic + slot, kept, mask=sampled)
        return product, tl.abs(kept.to(tl.float32)), product


@triton.jit
def _hash(bits):
    """32 bits of noise: see :mod:`prodigyplus.formulas.stochastic_rounding`."""
    bits = (bits ^ (bits >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    bits = (bits ^ (bits >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def _seed(step, number):
    """:func:`prodigyplus.formulas.stochastic_rounding.seeds`, of one parameter; both are int64."""
    golden = tl.full((), 0x9E3779B9, tl.int64)
    of_parameter = (number * golden).to(tl.uint32) & tl.full((), 0x7FFFFFFF, tl.uint32)
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
    norm_parts, evidence_parts, parts_stride, norms, numels, numbers_of, steps, directions, scales,
    GRAD_DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, BASE_DTYPE: tl.constexpr,
    FIRST_DTYPE: tl.constexpr, SECOND_DTYPE: tl.constexpr, FACTOR: tl.constexpr, MEAN_DTYPE: tl.constexpr,
    START_DTYPE: tl.constexpr, STATISTIC_DTYPE: tl.constexpr, DIRECTION_DTYPE: tl.constexpr,
    MOVES: tl.constexpr, EVIDENCE: tl.constexpr, READS: tl.constexpr,
    FACTORED: tl.constexpr, SINGLE: tl.constexpr, FAST: tl.constexpr, MOMENTUM: tl.constexpr,
    IS_OFFSET: tl.constexpr, ATAN2: tl.constexpr, STABLE: tl.constexpr, DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr, KIND: tl.constexpr, EVERY: tl.constexpr, SAMPLES: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Measure: sum the squares of the direction over each tile. Or, with ``MOVES``, move y, z and moments.

    With ``EVIDENCE``, also update s, and sum the evidence over each tile. Measuring writes nothing else: the
    moments of elements are computed in both passes, and written by the one that moves.

    With ``READS``, the move reads directions at the addresses in ``directions``, and scales them: they are
    orthogonalised between the two passes. So measuring updates the first moment, and takes all evidence
    except what balance needs of the directions, which the move takes.
    """
    MULTIPLE: tl.constexpr = 16 if FAST else 1
    BALANCES: tl.constexpr = EVIDENCE and KIND == BALANCE
    SAMPLED: tl.constexpr = EVIDENCE and KIND != BALANCE
    tensor, size, address, matrix, down, across, local, offset, height, width, row_stride, column_stride = (
        _tile(pointers, sizes, matrices, tiles, MULTIPLE)
    )
    program = tl.program_id(0)
    is_row_outer = tl.load(size + IS_ROW_OUTER) != 0
    grad = tl.multiple_of(tl.load(address + GRAD).to(tl.pointer_type(GRAD_DTYPE)), MULTIPLE)
    weight = tl.multiple_of(tl.load(address + WEIGHT).to(tl.pointer_type(WEIGHT_DTYPE)), MULTIPLE)
    base = tl.multiple_of(
        tl.load(address + (OFFSET_FROM_Y if IS_OFFSET else BASE)).to(tl.pointer_type(BASE_DTYPE)), MULTIPLE
    )
    first = tl.multiple_of(tl.load(address + FIRST).to(tl.pointer_type(FIRST_DTYPE)), MULTIPLE)
    second = tl.multiple_of(tl.load(address + SECOND).to(tl.pointer_type(SECOND_DTYPE)), MULTIPLE)
    start = tl.load(address + START).to(tl.pointer_type(START_DTYPE))
    statistic = tl.load(address + STATISTIC).to(tl.pointer_type(STATISTIC_DTYPE))
    opens = tl.load(gate + tensor * gate_stride) != 0
    # All loaded before the loop: for all the compiler knows, stores in the loop may change them.
    numbers += tensor * tensor_stride
    beta1, beta2 = tl.load(numbers + BETA1 * number_stride), tl.load(numbers + BETA2 * number_stride)
    beta3, eps = tl.load(numbers + BETA3 * number_stride), tl.load(numbers + EPS * number_stride)
    grad_weight = tl.load(numbers + GRAD_WEIGHT * number_stride)
    sq_weight = tl.load(numbers + SQ_WEIGHT * number_stride)
    evidence_weight = tl.load(numbers + EVIDENCE_WEIGHT * number_stride)
    decay, c = tl.load(numbers + DECAY * number_stride), tl.load(numbers + C * number_stride)
    fraction = tl.load(numbers + Y_FRACTION * number_stride)
    unit, d = tl.load(numbers + UNIT * number_stride), tl.load(numbers + D * number_stride)
    step = tl.load(numbers + DLR * number_stride) * unit
    direction = grad
    if READS and MOVES:
        step = tl.load(numbers + DLR * number_stride) * (unit * tl.load(scales + tensor))
        direction = tl.load(directions + tensor).to(tl.pointer_type(DIRECTION_DTYPE))
        direction = tl.multiple_of(direction, MULTIPLE)
    if MOVES and STABLE:
        rms = tl.sqrt(tl.load(norms + tensor) / tl.load(numels + tensor))
        step = step / tl.sqrt(tl.maximum(rms, 1.0))
    seed = tl.full((), 0, tl.uint32)
    if MOVES and STOCHASTIC:
        seed = _seed(tl.load(steps), tl.load(numbers_of + tensor))
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    column_root = tl.zeros((COLUMNS,), tl.float32)
    if FACTORED:
        average = tl.load(address + MEAN).to(tl.pointer_type(MEAN_DTYPE))
        mean = tl.load(average + tl.load(matrix + MEAN_OFFSET)).to(tl.float32) + _TINY
        outer = tl.load(address + OUTER).to(tl.pointer_type(FACTOR)) + tl.load(matrix + OUTER_OFFSET)
        inner = tl.load(address + INNER).to(tl.pointer_type(FACTOR)) + tl.load(matrix + INNER_OFFSET)
        outer_stride, inner_stride = tl.load(matrix + OUTER_STRIDE), tl.load(matrix + INNER_STRIDE)
        column_root = _factor_roots(inner, column * inner_stride, column < width, mean, d, is_row_outer == 0)
    # Accumulated elementwise: a sum over threads in each strip would make all of them wait.
    norm = tl.zeros((STRIP, COLUMNS), tl.float32)
    TERMS: tl.constexpr = SAMPLES if SAMPLED and SINGLE and FAST else COLUMNS
    product_sum = tl.zeros((STRIP, TERMS), tl.float64)
    second_sum = tl.zeros((STRIP, TERMS), tl.float64)
    third_sum = tl.zeros((STRIP, TERMS), tl.float64)
    for top in range(0, ROWS, STRIP):
        row = down * ROWS + top + tl.arange(0, STRIP)
        index, exists = _elements(
            offset, row, column, height, width, row_stride, column_stride, local, FACTORED, FAST, VECTOR
        )
        # With READS, the move reads the direction here instead of the gradient, which it does not need.
        g = tl.where(opens, tl.load(direction + index, mask=exists, other=0.0).to(tl.float32), 0.0)
        y, z = tl.zeros((STRIP, COLUMNS), tl.float32), tl.zeros((STRIP, COLUMNS), tl.float32)
        if MOVES or (BALANCES and (MOMENTUM or not IS_OFFSET)):
            y = tl.load(weight + index, mask=exists, other=0.0).to(tl.float32)
        if (MOVES or BALANCES) and not MOMENTUM:
            z = tl.load(base + index, mask=exists, other=0.0).to(tl.float32)
        if SAMPLED:
            # Read again, from the cache: samples are few, about every eleventh element.
            at, sampled, slot = _samples(
                index, exists, row, across, offset, height, width, row_stride, local, size, runs,
                FACTORED, SINGLE, FAST, EVERY, COLUMNS, SAMPLES,
            )  # fmt: skip
            seen = tl.where(opens, tl.load(direction + at, mask=sampled, other=0.0).to(tl.float32), 0.0)
            iterate = tl.zeros(at.shape, tl.float32)
            if MOMENTUM or IS_OFFSET:
                iterate += tl.load(weight + at, mask=sampled, other=0.0).to(tl.float32)
            if not MOMENTUM:
                iterate += tl.load(base + at, mask=sampled, other=0.0).to(tl.float32)
            product, second_term, third_term = _evidence(
                seen, iterate, start, statistic, slot, sampled, beta3, evidence_weight, KIND
            )
            product_sum += product.to(tl.float64)
            second_sum += second_term.to(tl.float64)
            if KIND == RELATIVE:
                third_sum += third_term.to(tl.float64)
            if MOVES:
                tl.debug_barrier()  # so that no thread overwrites what another has yet to read
        u = g
        if READS:
            if MOMENTUM and not MOVES:
                _momentum(g, first, index, exists, grad_weight, beta1, FIRST_DTYPE, True)
        elif MOVES or STABLE or BALANCES:
            row_root = tl.zeros((STRIP,), tl.float32)
            if FACTORED:
                row_root = _factor_roots(outer, row * outer_stride, row < height, mean, d, is_row_outer)
            numerator = g
            if MOMENTUM:
                numerator = _momentum(g, first, index, exists, grad_weight, beta1, FIRST_DTYPE, MOVES) / d
            u = _moments(
                g, numerator, second, index, exists, row_root, column_root, sq_weight, beta2, d, eps,
                ATAN2, FACTORED, SECOND_DTYPE, MOVES,
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
                noise = _hash(_whole_indices(index, exists, size, runs, SINGLE) + seed)
            tl.store(weight + index, _rounded(y, noise & 0xFFFF, WEIGHT_DTYPE, STOCHASTIC), mask=exists)
            if not MOMENTUM:
                tl.store(base + index, _rounded(z, noise >> 16, BASE_DTYPE, STOCHASTIC), mask=exists)
    if STABLE and not MOVES:
        tl.store(norm_parts + program, tl.sum(norm))
    if EVIDENCE:
        tl.store(evidence_parts + program, tl.sum(product_sum))
        tl.store(evidence_parts + parts_stride + program, tl.sum(second_sum))
        if KIND == RELATIVE or BALANCES:
            tl.store(evidence_parts + 2 * parts_stride + program, tl.sum(third_sum))
