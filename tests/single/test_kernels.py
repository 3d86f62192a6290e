"""The kernels of ``prodigyplus/device`` against the same passes operator by operator on the CPU.

The kernels run on a GPU where there is one, otherwise in Triton's interpreter. Sums taken in another order
may differ in their last bits; nothing else may differ.
"""

import contextlib

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree, state_table
from prodigyplus.device import jit
from prodigyplus.device.jit import interprets
from prodigyplus.device.launches import Launches, tile_size
from prodigyplus.device.plan import AT_ONCE
from prodigyplus.device.tables import entries
from prodigyplus.engine.batches import Batch, obstacle
from prodigyplus.exchange import OneProcess
from prodigyplus.options import Options
from tests import option_table
from tests.compiling import compile_alone
from tests.single.problems import Fed

pytest.importorskip("triton")
import triton
from triton import language as tl

from prodigyplus.device import kernels

if interprets():
    import tests.interpreting  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# A scalar, a vector, a matrix of several tiles in both directions, and several matrices in one tensor.
SHAPES = ((), (70,), (33, 70), (3, 33, 10))

# Allowed differences, relative to a tensor's largest value; 2.2e-7 is the most seen over all options.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}

# Evidence sums distances of about 1e-3 between weights of about 1, whose rounding, 2⁻²⁴, is 6e-5 of that.
EVIDENCE = 1e-4

# d comes from some hundred samples with such errors each; relative to their sum, a tenth of it remains.
NUMBERS = EVIDENCE / 10


def is_admitted(options):
    with contextlib.suppress(ValueError):
        values = {**option_table.defaults(), **options}
        return obstacle(Options.of(values), torch.float32, DEVICE) is None
    return False


ADMITTED = [options for options in option_table.alone() + option_table.together() if is_admitted(options)]

# For Muon: a matrix of several tiles, twice, a convolution, and rows that are read 16 bytes at a time.
MATRICES = ((33, 70), (40, 3, 5), (48, 32), (33, 70))
# In float32, since differing last bits may be rounded apart in bfloat16, and the iterations amplify that.
MUON = {"use_muon_pp": True, "muon_fp32": True}


def untouched(step, index, p):
    """Leaves the gradient as it is."""


def play(fused, options, *, shapes=SHAPES, dtype=torch.float32, steps=3, device="cpu", spoil=untouched):
    """The optimiser and its parameters after a few steps with drawn gradients."""
    problem = Fed(*shapes, dtype=dtype)
    parameters = [torch.nn.Parameter(p.detach().to(device)) for p in problem.parameters]
    optimizer = ProdigyPlusScheduleFree(parameters, **{"d0": 1e-3, **options, "fused": fused})
    for step in range(steps):
        problem.backward()
        for index, (p, fed) in enumerate(zip(parameters, problem.parameters, strict=True)):
            p.grad = fed.grad.to(device)
            spoil(step, index, p)
        optimizer.step()
    return optimizer, parameters


def assert_close(found, expected, rel=NUMBERS):
    """Assert that weights, state and (to ``rel``) numbers agree between the kernels and the reference."""
    for p, q in zip(found[1], expected[1], strict=True):
        ours, theirs = found[0].state[p], expected[0].state[q]
        assert ours.keys() == theirs.keys()
        for key, value, reference in [("y", p, q), *((key, ours[key], theirs[key]) for key in ours)]:
            assert value.dtype == reference.dtype, key
            assert torch.equal(value.isnan().cpu(), reference.isnan()), key
            difference = (value.detach().cpu().double() - reference.double()).abs().nan_to_num()
            if value.numel():
                bound = TOLERANCE.get(value.dtype, EVIDENCE) * reference.double().abs().nan_to_num().max()
                assert difference.max() <= bound, (key, tuple(p.shape))
    for group, ours, theirs in zip(
        found[0].param_groups, found[0].metrics(), expected[0].metrics(), strict=True
    ):
        # A sum of terms of both signs may almost cancel: it is compared relative to the terms' size.
        small = {}
        if group["step_size"] == "balance":
            small = {"d_hat": rel, "numerator": rel * theirs["denominator"].item()}
        for name, value in theirs.items():
            assert ours[name].item() == pytest.approx(value.item(), rel=rel, abs=small.get(name, 0)), name


def used_kernels(monkeypatch):
    """A list that receives the number of parameters of each batch."""
    batches = []
    real = Batch.squares

    def squares(self):
        batches.append(len(self.weights))
        return real(self)

    monkeypatch.setattr(Batch, "squares", squares)
    return batches


@pytest.mark.parametrize("options", option_table.packed(option_table.elementwise(ADMITTED)), ids=str)
def test_steps_as_the_plain_passes(options, monkeypatch):
    batches = used_kernels(monkeypatch)
    found = play(True, options, device=DEVICE)
    assert set(batches) == {len(SHAPES)}
    assert_close(found, play(False, options))


@pytest.mark.parametrize("options", option_table.packed(option_table.of_matrices(ADMITTED)), ids=str)
def test_muon_as_the_plain_passes(options, monkeypatch):
    options = {**options, **MUON}
    batches = used_kernels(monkeypatch)
    found = play(True, options, shapes=MATRICES, device=DEVICE)
    assert set(batches) == {len(MATRICES)}
    assert_close(found, play(False, options, shapes=MATRICES), EVIDENCE)


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"use_schedulefree": False}], ids=str)
def test_muon_in_bfloat16(options):
    """With bfloat16 weights; on the CPU, the matrices are orthogonalised in bfloat16, too."""
    options = {**options, "use_muon_pp": True, "muon_fp32": DEVICE.type != "cpu"}
    found = play(True, options, shapes=MATRICES, dtype=torch.bfloat16, device=DEVICE, steps=2)
    assert_close(found, play(False, options, shapes=MATRICES, dtype=torch.bfloat16, steps=2), EVIDENCE)


def test_matrices_move_as_they_are_orthogonalised(monkeypatch):
    """Matrices that are orthogonalised at once, within ``bucket_bytes``, move as one batch."""
    monkeypatch.setattr(OneProcess, "bucket_bytes", 4 * (48 * 32 + 40 * 15))
    batches = used_kernels(monkeypatch)
    found = play(True, MUON, shapes=MATRICES, device=DEVICE)
    assert batches == [1, 2, 1] * 3
    assert_close(found, play(False, MUON, shapes=MATRICES), EVIDENCE)


def test_directions_that_begin_anywhere(monkeypatch):
    """Directions received from other ranks may start at an address that is no multiple of 16 bytes."""
    orthogonalize, launch, fast = OneProcess.orthogonalize, jit.launch, set()

    def shifted(self, asked):
        for numbers, pieces in orthogonalize(self, asked):
            memories = [torch.empty(piece.numel() + 1, device=piece.device) for piece in pieces]
            yield (
                numbers,
                [m[1:].view(piece.shape).copy_(piece) for m, piece in zip(memories, pieces, strict=True)],
            )

    def note(kernel, *arguments, **constants):
        if "MOVES" in constants:
            fast.add((constants["MOVES"], constants["FAST"]))
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(jit, "launch", note)
    expected = play(True, MUON, shapes=((48, 32),), device=DEVICE)
    monkeypatch.setattr(OneProcess, "orthogonalize", shifted)
    found = play(True, MUON, shapes=((48, 32),), device=DEVICE)
    assert fast == {(False, True), (True, True), (True, False)}
    assert torch.equal(found[1][0], expected[1][0])


@pytest.mark.parametrize("gradient", [0.0, torch.inf, -torch.inf])
def test_the_angle_of_nothing_and_of_no_end(gradient):
    """Where a gradient has always been 0, atan2(0, 0) must be 0. A step with an inf changes nothing."""

    def spoil(step, index, p):
        if p.ndim and (gradient == 0 or step == 1):
            p.grad[..., 3] = gradient

    options = {"eps": None, "use_stableadamw": False, "factored": False}
    played = {"shapes": ((70,), (4, 20)), "spoil": spoil}
    assert_close(play(True, options, device=DEVICE, **played), play(False, options, **played))


@pytest.mark.parametrize("options", [{}, {"use_schedulefree": False}], ids=str)
def test_muon_skips_a_step_with_a_nan(options):
    def spoil(step, index, p):
        if step == 1 and index == 1:
            p.grad[3] = torch.nan

    found = play(True, {**MUON, **options}, shapes=MATRICES, device=DEVICE, spoil=spoil)
    expected = play(False, {**MUON, **options}, shapes=MATRICES, spoil=spoil)
    assert_close(found, expected, EVIDENCE)
    assert found[0].metrics()[0]["skipped_steps"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factored": False},
        {"factored_fp32": False, "weight_decay": 0.1},
        {"use_schedulefree": False},
        {"stochastic_rounding": False, "use_speed": True},
    ],
    ids=str,
)
def test_bfloat16(options):
    found = play(True, options, dtype=torch.bfloat16, device=DEVICE, steps=2)
    assert_close(found, play(False, options, dtype=torch.bfloat16, steps=2))


def test_reads_of_sixteen_bytes():
    """Shapes whose rows start at multiples of 16 elements take another branch of the kernels."""
    shapes = ((64, 48), (96,), (2, 32, 16))
    assert_close(play(True, {}, shapes=shapes, device=DEVICE), play(False, {}, shapes=shapes))


def test_gradients_that_begin_anywhere():
    def shift(step, index, p):
        memory = torch.empty(p.numel() + 1, device=p.device)
        p.grad = memory[1:].view(p.shape).copy_(p.grad)
        assert p.grad.data_ptr() % 16

    shapes = ((64, 48), (96,))
    assert_close(play(True, {}, shapes=shapes, device=DEVICE, spoil=shift), play(False, {}, shapes=shapes))


def test_gradients_that_are_not_contiguous():
    def turn(step, index, p):
        p.grad = p.grad.t().contiguous().t()

    shapes = ((33, 70),)
    assert_close(play(True, {}, shapes=shapes, device=DEVICE, spoil=turn), play(False, {}, shapes=shapes))


def test_more_tiles_in_a_row_than_are_added_up_at_once():
    tile, count = tile_size(), AT_ONCE + 1
    shapes = ((3, count * tile.columns), (count * tile.rows, 3))
    found = play(True, {}, shapes=shapes, steps=1, device=DEVICE)
    assert_close(found, play(False, {}, shapes=shapes, steps=1))


def test_empty_tensors():
    shapes = ((0,), (0, 70), (40, 0), (33, 40))
    assert_close(play(True, {}, shapes=shapes, device=DEVICE), play(False, {}, shapes=shapes))


@pytest.mark.parametrize("options", [{}, {"bfloat16_z": True}, {"use_speed": "relative"}], ids=str)
@pytest.mark.parametrize("spoilt", [(70,), (33, 70)])  # the second moment of the second is factored
def test_a_step_with_a_nan_changes_nothing(options, spoilt):
    def spoil(step, index, p):
        if step == 1 and SHAPES[index] == spoilt:
            p.grad.view(-1)[3] = torch.nan

    found = play(True, options, device=DEVICE, spoil=spoil)
    assert_close(found, play(False, options, spoil=spoil))
    assert found[0].metrics()[0]["skipped_steps"] == 1


def test_a_nan_in_any_tile_is_seen():
    tile = tile_size()
    size = tile.rows * tile.columns

    def spoil(step, index, p):
        p.grad[step * size] = torch.nan

    optimizer, _ = play(True, {}, shapes=((3 * size,),), device=DEVICE, spoil=spoil)
    assert optimizer.metrics()[0]["skipped_steps"] == 3


def test_a_missing_gradient():
    def leave_out(step, index, p):
        if step == index:
            p.grad = None

    assert_close(play(True, {}, device=DEVICE, spoil=leave_out), play(False, {}, spoil=leave_out))


def test_inside_backward():
    """In a fused backward pass, a parameter whose gradient is not finite is skipped individually."""

    def run(fused, device):
        model = torch.nn.ParameterList(p.detach().to(device) for p in Fed((70,), (33, 70)).parameters)
        optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-3, fused_back_pass=True, fused=fused)
        optimizer.fuse_backward(model)
        for step in range(3):
            scale = torch.nan if step == 1 else 0.1
            (model[0].square().sum() * scale + model[1].square().sum()).backward()
            optimizer.step()
        return optimizer, list(model)

    assert_close(run(True, DEVICE), run(False, "cpu"))


def test_what_is_not_for_kernels_is_refused_by_name():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match=r"parameter 0 of param_groups\[0\].*fused=True.*torch.float64"):
        ProdigyPlusScheduleFree([p], fused=True)
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match=r"fused=True.*use_adopt=True"):
        ProdigyPlusScheduleFree([p], fused=True, use_adopt=True)


@pytest.mark.skipif(not interprets(), reason="there is a GPU")
def test_without_a_gpu_they_are_refused_and_left_alone(monkeypatch):
    p = torch.nn.Parameter(torch.ones(3))
    monkeypatch.setattr(jit, "interprets", lambda: False)
    with pytest.raises(ValueError, match="the kernels run on GPUs, not on cpu"):
        ProdigyPlusScheduleFree([p], fused=True)
    batches = used_kernels(monkeypatch)
    play(None, {}, shapes=((3,),))
    assert not batches


def test_a_launch_serves_all_parameters(monkeypatch):
    """Many tensors take as many launches as few; no table is sent again while tensors stay in place."""

    def count(shapes, options):
        names, tables = [], []
        launch, point = jit.launch, Launches.point_to_gradients

        def count_launch(kernel, *arguments, **constants):
            names.append(kernel.__name__)
            launch(kernel, *arguments, **constants)

        def note_table(self, grads):
            point(self, grads)
            tables.append(id(self._pointers))

        monkeypatch.setattr(jit, "launch", count_launch)
        monkeypatch.setattr(Launches, "point_to_gradients", note_table)
        gradients = {}

        def keep(step, index, p):
            p.grad = gradients.setdefault(index, p.grad).copy_(p.grad)

        play(True, options, shapes=shapes, device=DEVICE, steps=2, spoil=keep)
        monkeypatch.undo()
        assert len(set(tables)) == 1
        return len(names) // 2, set(names)

    few = count(((64, 48), (33, 70), (70,), (32,)), {})
    many = count(((64, 48), (33, 70), (70,), (32,)) * 3, {})
    assert few == many
    assert few[0] == 19  # with tiles of all four kinds; it would be 10 with one kind
    few, many = (count(((64, 48), (33, 70)) * times, MUON) for times in (1, 3))
    assert few == many
    assert (
        few[0] == 10
    )  # with tiles of both kinds: three launches for each, two that add up, two for the groups' numbers


COMPILE = """
import itertools, struct, warnings
warnings.simplefilter("ignore")
import torch
from benchmarks.harness.no_gpu import pretend_gpu
from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.device import jit
from prodigyplus.formulas import balance

pretend_gpu()
launch, sweeps = jit.launch, []

def note(kernel, *arguments, **constants):
    if "SINGLE" in constants:
        sweeps.append((kernel, arguments, constants))
    launch(kernel, *arguments, **constants)

jit.launch = note

def compiled(options, dtype, shapes):
    jit._COMPILED.clear()
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = ProdigyPlusScheduleFree(parameters, fused=True, **options)
    counts = []
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        counts.append(len(jit._COMPILED))
    assert len(set(counts)) == 1  # later steps compile nothing more
    made = {}
    for kernel, _ in jit._COMPILED.values():
        made.setdefault(kernel.name, []).append(kernel.asm["ptx"])
    return made

fast, slow = ((64, 48), (96,)), ((3, 33, 10),)
sets = [
    ({}, torch.float32),
    ({"bfloat16_z": True, "use_speed": True}, torch.float32),
    ({"use_schedulefree": False, "use_speed": "relative", "weight_decay": 0.1}, torch.float32),
    ({"eps": None, "use_stableadamw": False, "factored": False}, torch.bfloat16),
    ({"step_size": "balance", "factored_fp32": False}, torch.bfloat16),
    ({"step_size": "balance", "bfloat16_z": True}, torch.float32),
    ({"use_muon_pp": True, "muon_fp32": True, "step_size": "balance"}, torch.float32),
]
for (options, dtype), shapes in zip(sets, itertools.cycle((fast, slow))):
    shapes = shapes[:1] if "use_muon_pp" in options else shapes
    made = compiled(options, dtype, shapes)
    reads = "ld.global.v4.b32" if dtype == torch.float32 else "ld.global.v2.b32", "ld.global.v4.b32"
    if shapes[0] == fast[0]:
        for ptx in made["squares"] + made["sweep"]:
            assert any(read in ptx for read in reads), options
    # Constants that float32 cannot represent are there in float64.
    constants = (2**0.25, 0.975, balance.LOG_LIMIT)
    assert all(struct.pack(">d", value).hex().upper() in made["end"][0] for value in constants)
    # Also as for shards that consist of several runs, which one process never has.
    if not options or dtype == torch.bfloat16:
        for kernel, arguments, constants in sweeps[-4:]:
            launch(kernel, *arguments, **(constants | {"SINGLE": False}))
"""


def test_they_compile_for_gpus(tmp_path):
    """Kernels that the interpreter accepts might not compile or launch; this is checked without a GPU."""
    compile_alone(COMPILE, tmp_path)


def test_what_is_on_a_gpu_moves_by_them_unless_it_is_said(monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    for fused, expected in ((None, (True, False)), (True, (True, True)), (False, (False, False))):
        o = Options.of({**option_table.defaults(), "fused": fused})
        assert (o.wants_kernels(gpu), o.wants_kernels(cpu)) == expected
    assert jit.runs_on(gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert isinstance(jit.on_device(gpu), torch.cuda.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_state_of_other_strides(dtype):
    """A state tensor that is not contiguous is made so, and its tensor is kept."""

    def turned(fused, device):
        p = torch.nn.Parameter(torch.ones(6, 5, dtype=dtype, device=device))
        optimizer = ProdigyPlusScheduleFree([p], fused=fused)
        for step in range(3):
            p.grad = torch.arange(-9.0, 21.0).view(6, 5).to(p) / (step + 8)
            if step == 1:
                state = optimizer.state[p]
                state["z"] = state["z"].t().contiguous().t()
            optimizer.step()
        return optimizer, [p]

    assert_close(turned(True, DEVICE), turned(False, "cpu"))


def test_every_entry_of_the_state_is_known_to_them():
    """Fails for a new entry of the state until it is listed, so that kernels cannot silently ignore it."""
    pointed_to = {"z", "z_minus_y", "exp_avg", "exp_avg_sq", "p0", "s"}
    pointed_to |= {f"exp_avg_sq_{name}" for name in ("row", "col", "mean")}
    assert set(entries("row", "col")) == set(entries("col", "row")) == pointed_to
    known = pointed_to | {"exp_avg_product", "max_l1", "max_l2"}
    assert known | {"exp_avg_weight"} == set(state_table.TABLE)


@triton.jit
def angles(y, x, out, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(out + index, kernels._atan2(tl.load(y + index), tl.load(x + index)))


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # of infinities
def test_angles():
    """Within 2 ulp, on either side of each case of the series, at zeros and infinities.

    GPUs divide less precisely, by up to 2 ulp, and two divisions are in it.
    """
    special = [0.0, 1e-38, 1.0, 3.4e38, float("inf")]
    ratios = [*(step / 1000 for step in range(1, 1001)), 0.41421354, 0.41421357]
    points = [(y, x) for y in special for x in special] + [p for r in ratios for p in ((r, 1.0), (1.0, r))]
    points += [(-y, x) for y, x in points]
    count = 1 << 12
    y, x = torch.tensor(points + [(0.0, 0.0)] * (count - len(points)), device=DEVICE).t().contiguous()
    out = torch.full_like(y, torch.nan)
    angles[(1,)](y, x, out, COUNT=count)
    expected = torch.atan2(y.double(), x.double())
    limits, ulps = torch.finfo(torch.float32), 2 if interprets() else 6
    assert ((out - expected).abs() <= ulps * limits.eps * expected.abs() + limits.tiny).all()
