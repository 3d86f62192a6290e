"""Muon: its matrices against their singular vectors, edge cases, and independence of other matrices."""

import math
import warnings
from itertools import pairwise, product, starmap

import numpy as np
import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree, exchange
from prodigyplus.formulas import muon, variants
from prodigyplus.formulas.muon import newton_schulz
from prodigyplus.terms.requests import Matrices, Method
from tests.single.problems import Fed, assert_same, pair, run, snapshot
from tests.watching import Watch

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


# ------------------------------------------------------------------------------------ the polynomials


def coefficients(quintic):
    return muon.QUINTIC if quintic else muon.POLAR_EXPRESS


def what_becomes_of(values, quintic):
    """The singular values of a matrix of norm 1 after the iterations, in exact arithmetic."""
    values = values / 1.02
    for a, b, c in coefficients(quintic):
        values = a * values + b * values**3 + c * values**5
    return values


def best_quintic(low, high):
    """The odd quintic nearest to 1 on [low, high], by Remez' exchange: its error is equal at four points."""
    inner, before = np.array([(3 * low + high) / 4, (low + 3 * high) / 4]), math.inf
    while True:
        at = np.array([low, *inner, high])
        *found, error = np.linalg.solve(np.stack([at, at**3, at**5, [1, -1, 1, -1]], 1), np.ones(4))
        if abs(error - before) < 1e-15:
            return np.array(found)
        a, b, c = found
        before, root = error, math.sqrt(9 * b**2 - 20 * a * c)
        inner = np.sqrt((np.array([-root, root]) - 3 * b) / (10 * c))


def test_the_coefficients_are_polar_expresss():
    """arXiv 2505.16932: each polynomial is the best one for the interval that those before it leave.

    As in the variant that is widely used, the first interval starts at 1e-3. A polynomial is made for an
    interval whose ends differ by a factor of at most 50, then centred again. All but the last are made for
    values 2 % larger.
    """
    low, high = 1e-3, 1.0
    for number, (a, b, c) in enumerate(muon.POLAR_EXPRESS):
        its = best_quintic(max(low, high / 50), high)
        if low < high / 50:
            its *= 2 / sum(its[0] * end + its[1] * end**3 + its[2] * end**5 for end in (low, high))
        if number < 4:
            its /= 1.02 ** np.array([1, 3, 5])
        np.testing.assert_allclose((a, b, c), its, rtol=1e-13)
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    assert low == pytest.approx(0.8588727, abs=1e-7)


@pytest.mark.parametrize(
    ("quintic", "first", "low", "high"),
    [
        (False, 1.02e-3, 0.858873, 1.141127),  # what Polar Express is made for
        (False, 1e-3, 0.846647, 1.141127),
        (True, 2e-3, 0.681831, 1.202369),
    ],
)
def test_what_singular_values_become(quintic, first, low, high):
    found = what_becomes_of(np.geomspace(first, 1, 1_000_001), quintic)
    assert (found.min(), found.max()) == pytest.approx((low, high), abs=1e-6)
    # Smaller values grow in proportion, by the slope at zero.
    small = np.geomspace(1e-12, 1e-4, 100)
    slope = math.prod(a for a, *_ in coefficients(quintic)) / 1.02
    np.testing.assert_allclose(what_becomes_of(small, quintic), slope * small, rtol=0.01)
    assert (what_becomes_of(np.linspace(0, 1, 100_001), quintic) <= high + 1e-6).all()


# ----------------------------------------------------------------- matrices against the polar factor

SHORT = 16

# Singular values, by their share of the largest.
SPECTRA = {
    "even": np.geomspace(1, 0.1, SHORT),
    "steep": np.geomspace(1, 1e-6, SHORT),
    "deficient": np.geomspace(1, 0.1, SHORT) * (np.arange(SHORT) < SHORT // 2),
}

# In exact arithmetic: how far a singular value other than 0 is from 1 at most, and the distance from the
# polar factor, relative to its norm. Then what rounding in each dtype may add, by ``rounding_of``.
#                          off     distance        float64  float32  bfloat16
EXPECTED = {
    ("even", False):      (0.1395, 0.0870, {F64: 2e-14, F32: 1e-5, BF16: 0.1}),
    ("even", True):       (0.3181, 0.2016, {F64: 1e-14, F32: 4e-6, BF16: 0.05}),
    ("steep", False):     (0.9991, 0.6436, {F64: 1e-13, F32: 4e-5, BF16: 0.8}),
    ("steep", True):      (0.9996, 0.6906, {F64: 5e-14, F32: 2e-5, BF16: 0.5}),
    ("deficient", False): (0.1306, 0.0935, {F64: 2e-13, F32: 8e-5, BF16: 1.2}),
    ("deficient", True):  (0.3174, 0.1941, {F64: 7e-14, F32: 4e-5, BF16: 0.7}),
}  # fmt: skip

SHAPES = ((SHORT, 40), (40, SHORT), (SHORT, SHORT))


class Factored:
    """A matrix whose singular vectors and values are known."""

    def __init__(self, shape, values, seed=0):
        random = np.random.default_rng(seed)
        self.left, self.right = (
            np.linalg.qr(random.standard_normal((size, len(values))))[0] for size in shape
        )
        self.values = values / np.linalg.norm(values)
        self.matrix = self.of(self.values)
        self.polar = self.of(self.values > 0)

    def of(self, values):
        """The matrix with these singular vectors and other values."""
        return self.left * values @ self.right.T


def rounding_of(matrix, quintic, dtype, random):
    """The iterations with random errors, of at most half a last bit of the dtype in every result.

    The errors of a sum add up as a random walk of its length; sums for bfloat16 are taken in float32.
    """
    unit = torch.finfo(dtype).eps / 2
    accumulated = min(unit, torch.finfo(F32).eps / 2)

    def rounded(values, unit=unit):
        return values * (1 + unit * random.uniform(-1, 1, np.shape(values)))

    def times(a, b):
        walk = accumulated * math.sqrt(a.shape[1])
        return a @ b + walk * (np.abs(a) @ np.abs(b)) * random.uniform(-1, 1, (a.shape[0], b.shape[1]))

    x = rounded(rounded(matrix) / rounded(1.02 * np.linalg.norm(matrix)))
    x = x.T if x.shape[0] > x.shape[1] else x
    for a, b, c in coefficients(quintic):
        gram = rounded(times(x, x.T))
        x = rounded(a * x + times(rounded(b * gram + c * times(gram, gram)), x))
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize(("spectrum", "quintic"), EXPECTED, ids=str)
def test_the_table_is_what_the_polynomials_and_the_dtypes_make(spectrum, quintic):
    off, distance, rounding = EXPECTED[spectrum, quintic]
    for shape in SHAPES:
        its = Factored(shape, SPECTRA[spectrum])
        exact = what_becomes_of(its.values, quintic)
        norm = np.linalg.norm(its.polar)
        assert np.abs(exact - 1)[its.values > 0].max() == pytest.approx(off, abs=1e-4)
        assert np.linalg.norm(its.of(exact) - its.polar) / norm == pytest.approx(distance, abs=1e-4)
        for dtype, bound in rounding.items():
            random = np.random.default_rng(0)
            rounded = [rounding_of(its.matrix, quintic, dtype, random) for _ in range(4)]
            errors = [np.linalg.norm(one - its.of(exact)) / norm for one in rounded]
            assert bound / 5 < np.mean(errors) < bound / 1.2, (shape, dtype, errors)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("spectrum", "quintic"), EXPECTED, ids=str)
def test_newton_schulz_is_near_the_polar_factor(spectrum, quintic, shape, dtype):
    off, distance, rounding = EXPECTED[spectrum, quintic]
    for seed in range(3):
        its = Factored(shape, SPECTRA[spectrum], seed)
        given = torch.from_numpy(its.matrix * 7.0)[None].to(dtype)
        before = given.clone()
        found = newton_schulz(given, quintic=quintic)
        assert torch.equal(given, before)
        assert (found.shape, found.dtype) == (given.shape, dtype)
        found = found[0].double().numpy()
        norm = np.linalg.norm(its.polar)
        bound = rounding[dtype] * norm
        exact = its.of(what_becomes_of(its.values, quintic))
        assert np.linalg.norm(found - exact) <= bound
        assert np.linalg.norm(found - its.polar) <= distance * norm * (1 + 1e-3) + bound
        some = int((its.values > 0).sum())
        values = np.linalg.svd(found, compute_uv=False)
        assert (np.abs(values[:some] - 1) <= off + 1e-4 + bound).all()
        assert (values[some:] <= bound).all()


def test_the_docstring_of_newton_schulz():
    """Its bounds hold in float32, for singular values down to the share of the norm that it names."""
    for quintic, smallest, low, high in ((False, 1.02e-3, 0.85, 1.15), (True, 2e-3, 0.68, 1.21)):
        values = np.geomspace(smallest, 0.1, 59)
        values = np.append(values, math.sqrt(1 - (values**2).sum()))
        its = Factored((60, 90), values)
        found = newton_schulz(torch.from_numpy(its.matrix)[None].float(), quintic=quintic)[0]
        found_values = torch.linalg.svdvals(found.double())
        assert low <= found_values.min()
        assert found_values.max() <= high


# --------------------------------------------------------------------------------------------- edge cases

METHODS = list(starmap(Method, product((F32, BF16, F64), (False, True), (True, False))))


def drawn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def orthogonalized(batches, limit=1 << 20):
    copies = [(matrices.clone(), method) for matrices, method in batches]
    muon.orthogonalize_(copies, limit)
    return [matrices for matrices, _ in copies]


def alone(matrices, method):
    (result,) = orthogonalized([(matrices, method)])
    return result


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_zeros_stay_zeros(method):
    for shape in ((1, 4, 6), (2, 6, 4), (1, 1, 1)):
        assert torch.equal(
            alone(torch.zeros(shape, dtype=method.dtype), method), torch.zeros(shape, dtype=method.dtype)
        )
    one_of_two = drawn(2, 4, 6, dtype=method.dtype)
    one_of_two[0] = 0
    result = alone(one_of_two, method)
    assert not result[0].any()
    assert torch.equal(result[1:], alone(one_of_two[1:], method))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0)])
def test_nothing_stays_nothing(shape):
    for method in METHODS:
        empty, other = orthogonalized(
            [(torch.empty(shape, dtype=method.dtype), method), (drawn(1, 3, 4, dtype=method.dtype), method)],
            1,
        )
        assert (empty.shape, empty.dtype) == (shape, method.dtype)
        assert other.any()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (1, 9, 1)])
def test_vectors_keep_their_direction(shape, dtype):
    """A vector has one singular value, its norm."""
    matrix = drawn(*shape, dtype=dtype)
    for quintic in (False, True):
        expected = what_becomes_of(np.ones(()), quintic) * matrix.double() / matrix.double().norm()
        found = newton_schulz(matrix, quintic=quintic).double()
        # The norm is rounded a few times, and the polynomials' slopes near 1 amplify that.
        assert (found - expected).norm() <= 64 * torch.finfo(dtype).eps
    assert newton_schulz(-matrix).equal(-newton_schulz(matrix))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_matrix_is_what_it_is_whatever_the_company(method):
    """On the CPU, to the bit: alone, in a batch, beside others of its shape, first or last, at any limit."""
    matrices = [drawn(count, *shape, seed=number, dtype=method.dtype) for number, (count, shape) in enumerate(
        ((1, (5, 9)), (3, (5, 9)), (1, (9, 5)), (2, (33, 70)), (1, (5, 9)), (4, (33, 70)), (1, (1, 7)))
    )]  # fmt: skip
    expected = [
        torch.cat([alone(matrix[i : i + 1], method) for i in range(len(matrix))]) for matrix in matrices
    ]
    other_method = Method(F32 if method.dtype == BF16 else BF16, not method.quintic, not method.stable)
    for limit in (1, 1000, 1 << 30):
        for order in (range(7), range(6, -1, -1)):
            batches = [(matrices[i], method) for i in order]
            batches.insert(3, (drawn(2, 5, 9, seed=9, dtype=other_method.dtype), other_method))
            results = orthogonalized(batches, limit)
            del results[3]
            for i, result in zip(order, results, strict=True):
                assert torch.equal(result, expected[i])


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_the_size_of_a_gradient_does_not_matter(dtype):
    """Powers of 2 change no bit, since the norm is all that is divided by; other factors only round."""
    for shape in ((1, 20, 30), (1, 30, 20)):
        matrix = drawn(*shape, dtype=dtype)
        expected = newton_schulz(matrix)
        for power in (-50, -13, 13, 50):
            assert torch.equal(newton_schulz(matrix * 2.0**power), expected)
        for scale in (1e-15, 1e15):
            found = newton_schulz((drawn(*shape) * scale).to(dtype))
            off = (found - expected).double().norm() / expected.double().norm()
            assert off <= EXPECTED["even", False][2][dtype]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_too_small_to_be_squared(dtype):
    """When gradients end, a first moment decays through all of these magnitudes; nothing may overflow."""
    for matrix in (drawn(1, 20, 30), drawn(1, 60, 400)):
        for power in range(-149, -40, 2):
            found = newton_schulz((matrix * 2.0**power).to(dtype)).double()
            assert found.isfinite().all(), power
            assert found.norm() <= 1.2 * math.sqrt(matrix.shape[1]), power
        assert newton_schulz((matrix * 2.0**-40).to(dtype)).any()


@pytest.mark.parametrize("options", [{}, {"muon_fp32": True}, {"muon_batched": True}], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_parameter_whose_gradients_end(dtype, options):
    """Its first moment decays to zero, and the weights stay finite."""
    problem, optimizer = pair(
        (8, 12),
        (3, 6, 5),
        dtype=dtype,
        use_muon_pp=True,
        use_schedulefree=False,
        betas=(0.5, 0.99),
        **options,
    )
    run(optimizer, problem, 5)
    for _ in range(160):
        for p in problem.parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(p.isfinite().all() for p in problem.parameters)
    assert int(optimizer.metrics()[0]["skipped_steps"]) == 0


def test_what_is_finite_in_float64_moves_weights_of_float64():
    problem, optimizer = pair((8, 12), dtype=F64, use_muon_pp=True)
    for _ in range(3):
        problem.backward()
        problem.parameters[0].grad.mul_(1e50)
        optimizer.step()
    assert problem.parameters[0].isfinite().all()
    assert int(optimizer.metrics()[0]["step"]) == 3


def test_adam_atan2_is_none_of_muons_business():
    """Muon has no denominator for eps to be in, so ``eps=None`` neither warns nor turns StableAdamW off."""
    _, optimizer = pair((8, 12), use_muon_pp=True, eps=None)
    assert optimizer.param_groups[0]["use_stableadamw"]


def test_muon_switched_on_for_what_is_no_matrix():
    problem, optimizer = pair((8, 12), (5,))
    optimizer.param_groups[0]["use_muon_pp"] = True
    problem.backward()
    with pytest.raises(ValueError, match=r"parameter 1 of param_groups\[0\] is of shape \(5,\)"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_matrices_of_one_batch_have_nothing_to_do_with_each_other(dtype):
    """Matrices of very different sizes may be computed in one batch, as on a GPU."""
    for shape in ((20, 30), (30, 20)):
        matrices = drawn(4, *shape, dtype=dtype) * torch.tensor([1.0, 2.0**-20, 0.0, 2.0**20]).view(
            4, 1, 1
        ).to(dtype)
        found = newton_schulz(matrices)
        for one, matrix in zip(found, matrices, strict=True):
            off = (one - newton_schulz(matrix[None])[0]).double().norm()
            assert off <= EXPECTED["even", False][2][dtype] * math.sqrt(20)


def test_products_are_of_the_short_side(monkeypatch):
    sizes = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append((a.shape[1], b.shape[2])) or bmm(a, b))
    for shape in ((1, 3, 8), (1, 8, 3)):
        newton_schulz(drawn(*shape))
    assert sizes == [(3, 3)] * 10


@pytest.mark.parametrize(("limit", "at_once"), [(1, 1), (2 * 48, 2), (3 * 48 - 1, 2), (1000, 5)])
def test_how_many_are_computed_at_once(monkeypatch, limit, at_once):
    """On a GPU: as many as fit the limit, from all batches of one method and one shape."""
    sizes = []
    real = muon.orthogonalized
    monkeypatch.setattr(muon, "orthogonalized", lambda x, method: sizes.append(len(x)) or real(x, method))
    method = Method(BF16, quintic=False, stable=True)
    batches = [(torch.empty(count, 4, 6, dtype=BF16, device="meta"), method) for count in (2, 0, 3)]
    batches.insert(1, (torch.empty(1, 6, 4, dtype=BF16, device="meta"), method))
    muon.orthogonalize_(batches, limit)
    assert sizes[-1] == 1
    assert sizes[:-1] == [min(at_once, 5 - first) for first in range(0, 5, at_once)]


def test_equal_shapes_are_computed_where_they_are_gathered():
    """On a GPU, many matrices take the same operators as few, and none of these concatenates them."""

    def operators(count):
        method = Method(BF16, quintic=False, stable=True)
        tensors = [torch.empty(shape, device="meta") for shape in ((4, 6), (6, 4), (2, 3, 2)) * count]
        asked = [(tuple(t.shape), Matrices(t, t.ndim == 3, method)) for t in tensors]
        with Watch() as watch:
            ((numbers, results),) = exchange.in_one_process(asked, 1 << 20)
        assert numbers == list(range(3 * count))
        assert [result.shape for result in results] == [t.shape for t in tensors]
        views = ("view", "slice", "split", "split_with_sizes", "transpose")
        return [call.name for call in watch.calls if call.name not in views]

    few = operators(1)
    assert operators(5) == few
    assert "cat" not in few


# -------------------------------------------------------------------------------------- how large a step is


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("shape", [(SHORT, 40), (40, SHORT), (SHORT, SHORT), (1, 9), (1, 1)])
def test_the_rms_of_a_direction(shape, dtype):
    """It is about 1. StableAdamW takes an rms above 1 to its square root, and leaves a smaller one."""
    for spectrum, values in SPECTRA.items():
        for quintic in (False, True):
            its = Factored(shape, values[: min(shape)])
            given = torch.from_numpy(its.matrix)[None].to(dtype)
            rms, stable_rms = (
                (alone(given, method).double() * muon.unit_rms(*shape)).square().mean().sqrt().item()
                for method in (Method(dtype, quintic, False), Method(dtype, quintic, True))
            )
            exact = np.linalg.norm(what_becomes_of(its.values, quintic)) / math.sqrt(min(shape))
            rounding = (
                64 * torch.finfo(dtype).eps if spectrum == "even" else EXPECTED[spectrum, quintic][2][dtype]
            )
            assert rms == pytest.approx(exact, abs=rounding)
            # StableAdamW divides by the square root of the rms.
            assert stable_rms == pytest.approx(min(rms, math.sqrt(rms)), rel=torch.finfo(dtype).eps)


def test_stableadamw_scales_matrices():
    """A matrix whose rms ends above 1, as all its singular values are where the polynomials overshoot."""
    its = Factored((22, 40), np.ones(22))
    given = torch.from_numpy(its.matrix)[None].bfloat16()
    plain, found = (alone(given, Method(BF16, quintic=False, stable=stable)) for stable in (False, True))
    rms = (plain.double() * muon.unit_rms(22, 40)).square().mean().sqrt()
    assert rms > 1.05
    assert_same(found, plain * rms.rsqrt().bfloat16())


# ------------------------------------------------------------------------------------- requests and waves


def test_sizes():
    assert muon.sizes((5, 7), batched=False) == muon.sizes((5, 7), batched=True) == (1, 5, 7)
    assert muon.sizes((2, 5, 7, 3), batched=False) == (1, 2, 105)
    assert muon.sizes((2, 5, 7, 3), batched=True) == (10, 7, 3)
    assert muon.sizes((0, 5, 7), batched=True) == (0, 5, 7)


def test_cost_is_that_of_the_products():
    """Five iterations, each of two products of short²·long multiply-adds and one of short³."""
    assert muon.cost(3, 8) == muon.cost(8, 3) == 5 * (3 * 3 * 8 + 3 * 3 * 3 + 3 * 3 * 8)


@pytest.mark.parametrize("limit", [0, 1, 10, 24, 25, 100, 10**9])
def test_waves(limit):
    """A wave is within the limit (or its largest matrix), or has one member; the next would not fit in."""
    random = np.random.default_rng(0)
    for _ in range(200):
        matrices = [int(random.integers(0, 30)) for _ in range(random.integers(0, 9))]
        sizes = [(matrix * int(random.integers(0, 4)), matrix) for matrix in matrices]
        waves = list(exchange.split_by_bytes(sizes, limit))
        assert [number for wave in waves for number in wave] == list(range(len(sizes)))
        assert all(waves)
        for wave in waves:
            room = max(limit, *(sizes[number][1] for number in wave))
            assert len(wave) == 1 or sum(sizes[number][0] for number in wave) <= room
        for wave, after in pairwise(waves):
            room = max(limit, *(sizes[number][1] for number in (*wave, after[0])))
            assert sum(sizes[number][0] for number in wave) + sizes[after[0]][0] > room


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_in_one_process(dtype):
    """It keeps to its limit, and changes no tensor that it is given, whatever its memory format."""
    method = Method(dtype, quintic=False, stable=True)
    tensors = [drawn(*shape, seed=number, dtype=F32) for number, shape in enumerate(
        ((4, 6), (2, 4, 6), (8, 6), (2, 2, 3, 2), (4, 6), (0, 4), (3, 3))
    )]  # fmt: skip
    tensors[4] = tensors[4].mT.contiguous().mT
    before = [t.clone() for t in tensors]
    asked = [(tuple(t.shape), Matrices(t, number != 3, method)) for number, t in enumerate(tensors)]
    for limit in (1, 100, 200, 10**6):
        seen = []
        for numbers, results in exchange.in_one_process(asked, limit):
            assert len(numbers) == 1 or sum(r.nbytes for r in results) <= max(limit, 8 * 6 * dtype.itemsize)
            for number, result in zip(numbers, results, strict=True):
                shape, its = asked[number]
                whole = tensors[number].contiguous().view(muon.sizes(shape, batched=its.batched))
                assert_same(result, alone(whole.to(dtype), method).view(shape))
            seen += numbers
        assert_same(tensors, before)
        assert seen == list(range(len(asked)))


def test_bytes_of():
    its = Matrices(torch.empty(0), batched=True, method=Method(BF16, quintic=False, stable=False))
    assert muon.bytes_of((3, 4, 5), its) == (120, 40)
    assert muon.bytes_of((3, 4, 5), its._replace(batched=False)) == (120, 120)
    assert muon.bytes_of((3, 4, 5), its._replace(method=its.method._replace(dtype=F64))) == (480, 160)


# --------------------------------------------------------------------------------------- in the optimiser

MUON = {"use_muon_pp": True}


@pytest.mark.parametrize("options", [{}, {"use_schedulefree": False}], ids=str)
def test_the_first_step_is_along_the_polar_factor(options):
    """z or the weights move by d0 along it; a first moment then has the gradient's direction, too."""
    problem, optimizer = pair((SHORT, 40), (40, SHORT), dtype=F64, **MUON, muon_fp32=True, d0=1e-2, **options)
    before = [p.detach().clone() for p in problem.parameters]
    run(optimizer, problem, 1)
    for p, old in zip(problem.parameters, before, strict=True):
        new = optimizer.state[p].get("z", p.detach())
        u = (old - new) / 1e-2
        left, values, right = torch.linalg.svd(p.grad, full_matrices=False)
        values = torch.from_numpy(what_becomes_of((values / values.norm()).numpy(), quintic=False))
        expected = left * values @ right * math.sqrt(40)
        expected /= math.sqrt(max(1, expected.square().mean().sqrt()))
        torch.testing.assert_close(u, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{}, {"use_schedulefree": False}, {"muon_fp32": True, "use_grams": True}], ids=str
)
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_a_batch_is_its_matrices(dtype, options):
    """A batched parameter moves as its matrices would by themselves; StableAdamW, too, scales each."""
    options = {**MUON, "slice_p": 1, "stochastic_rounding": False, "d0": 1e-2, **options}
    problem, optimizer = pair((2, 3, 8, 5), dtype=dtype, muon_batched=True, **options)
    batch = problem.parameters[0]
    before = batch.detach().clone()
    separate = [nn.Parameter(one.clone()) for one in before.flatten(0, 1)]
    optimizer_separate = ProdigyPlusScheduleFree(separate, **options)
    for _ in range(20):
        problem.backward()
        for p, grad in zip(separate, batch.grad.flatten(0, 1), strict=True):
            p.grad = grad.clone()
        optimizer.step()
        optimizer_separate.step()
        # Prodigy's sums are taken in another order.
        d = optimizer.metrics()[0]["d"].item()
        assert optimizer_separate.metrics()[0]["d"].item() == pytest.approx(d, rel=1e-5)
        optimizer_separate.param_groups[0].update(
            {
                name: optimizer.param_groups[0][name].clone()
                for name in ("d", "shared_d", "d_numerator", "d_denom")
            }
        )
    assert not torch.equal(batch, before)
    assert_same(torch.stack(separate), batch.flatten(0, 1))


def test_a_convolution_is_its_flattened_matrix():
    runs = []
    for shape in ((8, 3, 2, 2), (8, 12)):
        problem = Fed((8, 12))
        problem.parameters = [nn.Parameter(p.detach().view(shape)) for p in problem.parameters]
        optimizer = ProdigyPlusScheduleFree(problem.parameters, **MUON)
        for _ in range(20):
            gradient = torch.randn((8, 12), generator=problem.random) + 0.5
            problem.parameters[0].grad = gradient.view(shape)
            optimizer.step()
        runs.append([problem.parameters[0].detach().view(8, 12), optimizer.state[problem.parameters[0]]["s"]])
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", [{}, {"use_schedulefree": False}, {"use_cautious": True}], ids=str)
def test_channels_last_weights(options, dtype):
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        problem = Fed((8, 3, 4, 2), (6, 5), dtype=dtype)
        problem.parameters[0] = nn.Parameter(problem.parameters[0].detach().to(memory_format=memory_format))
        optimizer = ProdigyPlusScheduleFree(problem.parameters, **MUON, **options)
        for _ in range(15):
            problem.backward()
            problem.parameters[0].grad = problem.parameters[0].grad.to(memory_format=memory_format)
            optimizer.step()
        assert problem.parameters[0].is_contiguous(memory_format=memory_format)
        runs.append(snapshot(optimizer))
    assert_same(runs[1], runs[0])


def test_what_is_kept():
    """No second moment: z or the first moment, 4 bytes per weight; p0 and s, 4 + 2 for every 11th."""
    keys = {"p0", "s"}
    for options, more in (({}, {"z"}), ({"use_schedulefree": False}, {"exp_avg"})):
        problem, optimizer = pair((44, 30), (4, 11, 10), **MUON, **options)
        run(optimizer, problem, 2)
        for p in problem.parameters:
            state = optimizer.state[p]
            assert state.keys() == keys | more
            assert sum(value.nbytes for value in state.values()) == 4 * p.numel() + (4 + 2) * p.numel() // 11
    problem, optimizer = pair((44, 30), **MUON, prodigy_steps=2)
    run(optimizer, problem, 3)
    assert optimizer.state[problem.parameters[0]].keys() == {"z"}


def test_the_first_moment_is_that_of_d_times_the_gradients():
    problem, optimizer = pair((8, 12), dtype=F64, **MUON, use_schedulefree=False, betas=(0.8, 0.99))
    (p,) = problem.parameters
    expected = torch.zeros_like(p)
    for _ in range(30):
        d = float(optimizer.metrics()[0]["d"])
        run(optimizer, problem, 1)
        expected = 0.8 * expected + 0.2 * d * p.grad
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [True, False])
def test_it_holds_from_the_first_step_on(value):
    problem, optimizer = pair((8, 12), use_muon_pp=not value)
    optimizer.param_groups[0]["use_muon_pp"] = value  # it may still change before the first step
    optimizer.param_groups[0]["use_muon_pp"] = not value
    run(optimizer, problem, 1)
    before = problem.parameters[0].detach().clone()
    optimizer.param_groups[0]["use_muon_pp"] = value
    with pytest.raises(RuntimeError, match=f"use_muon_pp={value}.*build another optimiser"):
        run(optimizer, problem, 1)
    assert_same(problem.parameters[0].detach(), before)


def test_how_matrices_are_orthogonalised_may_change_between_steps():
    problem, optimizer = pair((3, 8, 12), **MUON)
    for options in (
        {"muon_fp32": True},
        {"muon_quintic": True},
        {"muon_batched": True},
        {"use_cautious": True},
    ):
        optimizer.param_groups[0].update(options)
        run(optimizer, problem, 2)
    assert int(optimizer.metrics()[0]["step"]) == 8


@pytest.mark.parametrize(
    ("options", "named", "left"),
    [
        (
            {"use_adopt": True},
            "use_muon_pp=True excludes use_adopt=True",
            {"use_muon_pp": True, "use_adopt": False},
        ),
        (
            {"use_orthograd": True},
            "use_muon_pp=True excludes use_orthograd=True",
            {"use_muon_pp": True, "use_orthograd": False},
        ),
        (
            {"use_focus": True, "factored": False},
            "use_focus=True excludes use_muon_pp=True",
            {"use_focus": True, "use_muon_pp": False},
        ),
        (
            {"use_focus": True, "factored": False, "use_adopt": True},
            "use_focus=True excludes use_muon_pp=True",
            {"use_muon_pp": False, "use_adopt": True},
        ),
    ],
)  # fmt: skip
def test_exclusions(options, named, left):
    problem = Fed((8, 12))
    with pytest.warns(UserWarning, match=named) as caught:
        optimizer = ProdigyPlusScheduleFree(problem.parameters, **MUON, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert {name: optimizer.param_groups[0][name] for name in left} == left
    run(optimizer, problem, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = Fed((8, 12))
        optimizer_other = ProdigyPlusScheduleFree(other.parameters, **{**MUON, **options, **left})
    run(optimizer_other, other, 5)
    assert_same(other.parameters, problem.parameters)


def test_cautious_and_grams_without_schedulefree():
    """They change the orthogonalised first moment, by the signs of this step's gradient."""
    moves = {}
    for option in (None, "use_cautious", "use_grams"):
        options = {**MUON, "muon_fp32": True, "use_schedulefree": False, "d0": 1e-2}
        if option is not None:
            options[option] = True
        problem, optimizer = pair((8, 12), dtype=F64, **options)
        (p,) = problem.parameters
        for sign in (1, -0.5):
            before = p.detach().clone()
            problem.random.manual_seed(3)
            problem.backward()
            p.grad[:, ::2] *= sign
            optimizer.step()
        moves[option] = before - p.detach()
    move, grad = moves[None], p.grad
    agrees = move * grad > 0
    assert 0.1 < agrees.double().mean() < 0.9
    torch.testing.assert_close(moves["use_cautious"], move * agrees / agrees.double().mean())
    torch.testing.assert_close(moves["use_grams"], move.abs() * grad.sign())


def test_an_empty_matrix_and_one_without_a_gradient():
    problem, optimizer = pair((0, 3), (3, 0), (8, 12), (4, 5), **MUON)
    before = problem.parameters[3].detach().clone()
    for _ in range(20):
        problem.backward()
        problem.parameters[3].grad = None
        optimizer.step()
    assert float(optimizer.metrics()[0]["d"]) > 1e-6
    assert torch.equal(problem.parameters[3], before)


def test_a_scale_of_gradients_changes_no_direction():
    moves = []
    for scale in (1.0, 2.0**-30):
        problem, optimizer = pair((8, 12), **MUON, d0=1e-2)
        (p,) = problem.parameters
        before = p.detach().clone()
        problem.backward()
        p.grad *= scale
        optimizer.step()
        moves.append(p.detach() - before)
    assert moves[0].any()
    assert torch.equal(*moves)


def test_agreement_is_with_the_gradient_itself(monkeypatch):
    """Cautious compares with the gradient, not with the first moment that the direction is made from."""
    seen = []
    real = variants.cautious_
    monkeypatch.setattr(variants, "cautious_", lambda u, g: seen.append(g.clone()) or real(u, g))
    problem, optimizer = pair((8, 12), **MUON, use_schedulefree=False, use_cautious=True)
    for _ in range(3):
        run(optimizer, problem, 1)
        assert torch.equal(seen.pop()[0], problem.parameters[0].grad)


def test_the_most_expensive_matrices_go_first(monkeypatch):
    """They are asked for by falling cost, equal shapes next to each other."""
    shapes = []
    real = exchange.in_one_process
    monkeypatch.setattr(
        exchange, "in_one_process", lambda asked, n: shapes.extend(s for s, _ in asked) or real(asked, n)
    )
    problem, optimizer = pair((4, 6), (8, 6), (2, 3), (6, 8), (4, 6), (8, 6), **MUON)
    run(optimizer, problem, 1)
    assert shapes == [(8, 6), (8, 6), (6, 8), (4, 6), (4, 6), (2, 3)]
