"""The kernel for products of matrices with their own transposes, and Muon's iterations with it.

It runs on a GPU where there is one, otherwise in Triton's interpreter.
"""

import numpy as np
import pytest
import torch

from prodigyplus.device import launches
from prodigyplus.device.jit import interprets
from prodigyplus.formulas import muon
from prodigyplus.terms.requests import Method
from tests.compiling import compile_alone
from tests.single.problems import pair, run
from tests.single.test_muon import EXPECTED, SHORT, SPECTRA, Factored, what_becomes_of

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

if interprets():
    import tests.interpreting  # noqa: F401

from prodigyplus.device import symmetric  # noqa: E402
from prodigyplus.device.symmetric import symmetric_product  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Rounding of sums and of the results, relative to their size: about one last bit.
TOLERANCE = {torch.float32: 4e-7, torch.bfloat16: 2**-8}

# A part of a block, one whole block, several blocks, also off the diagonal; and several matrices.
SHAPES = ((1, 1, 1), (3, 5, 3), (1, 16, 16), (2, 40, 20), (1, 50, 33))


def drawn(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def assert_near(found, expected, dtype):
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@triton.jit
def places(pairs, down, across, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    row, column = symmetric._block_of(tl.load(pairs + index))
    tl.store(down + index, row)
    tl.store(across + index, column)


def test_each_pair_of_blocks_is_found():
    """Also near the diagonal, where a root in float32 is one off; matrices of up to 4096 blocks a side."""
    column = torch.arange(1, 4097)
    first = column * (column + 1) // 2
    pairs = torch.cat((first - 1, first, first + 1, first + column // 2)).to(torch.int32)
    expected = torch.cat((column - 1, column, column, column))
    given = pairs.to(DEVICE)
    down, across = torch.empty_like(given), torch.empty_like(given)
    places[(1,)](given, down, across, COUNT=len(pairs))
    assert torch.equal(across.cpu().long(), expected)
    assert torch.equal(down.cpu().long(), pairs.long() - expected * (expected + 1) // 2)


@pytest.mark.parametrize("dtype", symmetric.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_polynomials(shape, dtype):
    """For contiguous matrices, transposed ones, and ones with gaps between their elements."""
    drawn_twice = drawn(*shape[:2], 2 * shape[2], dtype=dtype)
    for x in (drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype).mT, drawn_twice[:, :, ::2]):
        gram = symmetric_product(x)
        wide = x.double()
        assert_near(gram, wide @ wide.mT, dtype)
        wide = gram.double()
        eye = torch.eye(len(gram[0]), device=DEVICE, dtype=torch.float64)
        expected = 1.5 * eye - 2 * wide + 0.5 * wide @ wide
        assert_near(symmetric_product(gram, (1.5, -2.0, 0.5)), expected, dtype)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0)])
def test_products_of_nothing(shape):
    x = torch.empty(shape, device=DEVICE)
    assert torch.equal(symmetric_product(x), x @ x.mT)


def test_float32_stays_float32():
    """The matrix has more bits than TensorFloat-32 keeps; the kernel must not use it."""
    x = torch.full((1, 16, 16), 1 + 2.0**-12, device=DEVICE)
    torch.testing.assert_close(symmetric_product(x), x @ x.mT, rtol=1e-6, atol=0)


def test_half_of_the_blocks_are_computed(monkeypatch):
    grids = []

    class Noted:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(symmetric, "product", Noted())
    monkeypatch.setitem(symmetric._BLOCKS, torch.float32, symmetric._INTERPRETED)
    symmetric_product(torch.empty(3, 64, 20, device=DEVICE))  # of four by four
    symmetric_product(torch.empty(1, 65, 20, device=DEVICE))
    assert grids == [(3 * 10,), (15,)]


@triton.jit
def _places(first, out, COUNT: tl.constexpr):
    pair = tl.load(first) + tl.arange(0, COUNT)
    down, across = symmetric._block_of(pair)
    tl.store(out + tl.arange(0, COUNT), down)
    tl.store(out + COUNT + tl.arange(0, COUNT), across)


@pytest.mark.parametrize("column", [1, 2, 3, 100, 2897, 2898, 4097, 16001])
def test_which_block_a_program_computes(column):
    """Also around the first block of a column, where a root in float32 may be one off."""
    first = column * (column + 1) // 2 - 1
    found = torch.empty(2, 4, dtype=torch.int32, device=DEVICE)
    _places[(1,)](torch.tensor([first], dtype=torch.int32, device=DEVICE), found, COUNT=4)
    places = [(column - 1, column - 1), *((down, column) for down in range(min(3, column + 1)))]
    if column == 1:
        places.append((0, 2))
    assert list(zip(*found.tolist(), strict=True)) == places


# ------------------------------------------------------------------------------------ Muon's iterations


@pytest.mark.parametrize("dtype", symmetric.DTYPES)
@pytest.mark.parametrize("shape", [(SHORT, 40), (40, SHORT)], ids=str)
@pytest.mark.parametrize(("spectrum", "quintic"), EXPECTED, ids=str)
def test_newton_schulz_is_near_the_polar_factor(spectrum, quintic, shape, dtype):
    """As near as with torch's operators."""
    _, _, rounding = EXPECTED[spectrum, quintic]
    several = [Factored(shape, SPECTRA[spectrum], seed) for seed in range(2)]
    given = torch.from_numpy(np.stack([its.matrix * 7.0 for its in several])).to(DEVICE, dtype)
    found = muon.newton_schulz(given, quintic=quintic, symmetric_product=symmetric_product)
    assert (found.shape, found.dtype) == (given.shape, dtype)
    for its, matrix in zip(several, found.double().cpu().numpy(), strict=True):
        exact = its.of(what_becomes_of(its.values, quintic))
        assert np.linalg.norm(matrix - exact) <= rounding[dtype] * np.linalg.norm(its.polar)


def used(monkeypatch, **options):
    """The dtypes of the products that a step computes by the kernel, if that is offered on all devices."""
    products = []

    def note(x, coefficients):
        products.append(x.dtype)
        return symmetric_product(x.to(DEVICE), coefficients).to(x.device)

    monkeypatch.setattr(launches, "symmetric_product", lambda dtype, device: note)
    problem, optimizer = pair((8, 12), (24, 8), use_muon_pp=True, **options)
    run(optimizer, problem, 1)
    return products


@pytest.mark.parametrize("options", [{}, {"muon_fp32": True}], ids=str)
def test_a_step_takes_it(monkeypatch, options):
    """Two products in each of five iterations, for each of two matrices."""
    dtype = torch.float32 if options else torch.bfloat16
    assert used(monkeypatch, **options) == [dtype] * 20


def test_fused_false_is_without_it(monkeypatch):
    assert not used(monkeypatch, fused=False)


def test_where_it_is():
    """The kernel is offered only on a GPU, and only for dtypes that it can multiply."""
    assert launches.symmetric_product(torch.bfloat16, torch.device("cpu")) is None
    if DEVICE.type == "cuda":
        assert launches.symmetric_product(torch.bfloat16, DEVICE) is symmetric_product
        assert launches.symmetric_product(torch.float64, DEVICE) is None


def test_by_which_products_is_part_of_the_method():
    """Matrices with and without the kernel have different methods, so they are never batched together."""
    one = Method(torch.float32, quintic=False, stable=True)
    assert one != one._replace(symmetric_product=symmetric_product)


COMPILE = """
import itertools, sys
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prodigyplus.device import symmetric

kernel, types = symmetric.product, {torch.bfloat16: "*bf16", torch.float32: "*fp32"}

def build(capability, dtype, is_product, is_tall):
    block = symmetric._BLOCKS[dtype]
    # As in a launch: Triton makes a constant of a stride that is 1.
    one, other = ("row_stride", "column_stride")[:: 1 if is_tall else -1]
    constants = {"IS_PRODUCT": is_product, "SIDE": block.side, "DEPTH": block.depth, one: 1}
    signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    signature |= dict.fromkeys(("x", "out"), types[dtype])
    signature |= dict.fromkeys(("constant", "linear", "square"), "fp32")
    multiples = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in ("x", "out", "size", "terms", "matrix_stride", other)
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=multiples)
    options = {"num_warps": block.warps, "num_stages": block.stages}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)

capability = int(sys.argv[1])
for dtype, is_product in itertools.product(types, (True, False)):
    made = build(capability, dtype, is_product, is_tall=is_product)
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= 99 << 10, made.metadata.shared
    assert "tf32" not in ptx
    assert "cp.async" in ptx and "st.global.v4" in ptx, "memory is not read and written 16 bytes at a time"
    if dtype == torch.bfloat16:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_it_compiles_for_gpus(tmp_path, capability):
    """It compiles to machine code for the tensor cores of Ampere and Hopper; no GPU is needed for that."""
    compile_alone(COMPILE, tmp_path, capability)
