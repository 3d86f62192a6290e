import json
import re
import sys
from functools import cache
from itertools import pairwise

import corpus
import gpt_fsdp2
import pytest
import torch
from gpt import GPT, rotary_angles, rotate
from gpt_fsdp2 import Share
from meshes import MeshShape, parse_mesh
from ranks import Ranks

from tests.launch import running
from tests.launch.running import assert_same, assert_same_contents, lines, newest, weights

# An evaluation takes 512 windows, so small batches would make many.
TINY = ["--layers", 2, "--width", 32, "--heads", 4, "--context", 32, "--batch-size", 32, "--log-every", 1]
STEPS, SAVED = 20, 10
ALONE = Ranks(0, 1, 0, 1)


def launch(processes, *options):
    return running.launch("gpt_fsdp2.py", processes, *options)


def trained(processes, out, *options):
    spells = ["--steps", STEPS, "--eval-every", SAVED]
    done = launch(processes, *TINY, *running.TEXT, *spells, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr
    return done


def losses(folder, kind):
    return torch.tensor([line["loss"] for line in lines(folder, kind)])


# ------------------------------------------------------------------------------------------- the mesh


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (None, MeshShape(fsdp=8)),
        ("fsdp=8", MeshShape(fsdp=8)),
        ("tp=8", MeshShape(tp=8)),
        ("tp=2, fsdp=4", MeshShape(fsdp=4, tp=2)),
        ("replicate=2,fsdp=2,tp=2", MeshShape(2, 2, 2)),
        ("replicate=4,tp=2", MeshShape(replicate=4, tp=2)),
    ],
)
def test_mesh_by_name(text, shape):
    assert parse_mesh(text, 8) == shape
    assert parse_mesh(str(shape), 8) == shape


@pytest.mark.parametrize(
    "text", ["", "fsdp", "fsdp=", "fsdp=0", "fsdp=-8", "pp=8", "2x4", "fsdp=2,fsdp=4", "8"]
)
def test_bad_mesh_is_named_with_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"^--mesh .*is not one of replicate=N, fsdp=N, tp=N") as caught:
        parse_mesh(text, 8)
    assert text in str(caught.value)


def test_mesh_of_another_number_of_processes():
    with pytest.raises(ValueError, match=r"^--mesh fsdp=2,tp=2 is a mesh of 4 processes, but there are 8"):
        parse_mesh("fsdp=2,tp=2", 8)


# ------------------------------------------------------------------------------------------- the text


@pytest.fixture
def folder(tmp_path):
    for number in range(23):
        path = tmp_path / f"{number % 3}" / f"{number:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * (50 + number))
    (tmp_path / "0" / "empty.txt").touch()
    (tmp_path / "0" / "other.md").write_text("x" * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("x" * 100)
    return tmp_path


def test_every_tenth_file_is_held_out(folder):
    text = corpus.read(corpus.files_in(folder, "*.txt"), 16)
    assert corpus.read(reversed(list(corpus.files_in(folder, "*.txt"))), 16).summary == text.summary
    in_order = sorted(range(23), key=lambda number: (number % 3, number))
    assert text.held_out.unique().tolist() == sorted(in_order[::10])
    assert text.training.unique().tolist() == sorted(set(range(23)) - set(in_order[::10]))
    assert len(text.training) + len(text.held_out) == sum(range(50, 73))
    (folder / "1" / "01.txt").write_bytes(bytes([9]) * 51)
    assert corpus.read(corpus.files_in(folder, "*.txt"), 16).summary != text.summary


def test_too_little_text_is_told(folder):
    with pytest.raises(ValueError, match=r"^--data: of 1 files 0 bytes would train on"):
        corpus.read(corpus.files_in(folder, "*.md"), 16)
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        corpus.files_in(folder / "nowhere", "*")


@pytest.mark.parametrize("pattern", ["/etc/*", "../*", "**x"])
def test_pattern_that_no_file_can_match_is_told(folder, pattern):
    with pytest.raises(
        ValueError, match=rf"^--pattern {re.escape(repr(pattern))}: .* name files below --data"
    ):
        corpus.files_in(folder, pattern)


def test_standard_library_has_no_tests():
    paths = list(corpus.standard_library())
    assert len(paths) > 300
    assert not any({"test", "site-packages"} & set(path.parts[-3:]) for path in paths)


def test_windows_follow_from_seed_and_step():
    text = torch.arange(200, dtype=torch.uint8)
    draws = {
        tuple(corpus.random_windows(text, 8, 4, seed, step)[0][:, 0].tolist())
        for seed in (0, 1)
        for step in (0, 1, 0)
    }
    assert len(draws) == 4
    inputs, targets = corpus.random_windows(text, 8, 1000, 0, 0)
    assert_same(inputs + 1, targets)
    assert_same(inputs[:, :1] + torch.arange(8), inputs)
    assert (inputs.min(), targets.max()) == (0, 199)  # every byte can be seen
    inputs, targets = corpus.even_windows(text, 8, 5)
    assert (inputs.shape, inputs.min(), targets.max()) == ((5, 8), 0, 199)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_make_up_the_batch(count):
    batch = corpus.random_windows(torch.arange(200, dtype=torch.uint8), 8, 12, 0, 3)
    shares = [Share(number, count).of(batch) for number in range(count)]
    for whole, *parts in zip(batch, *shares, strict=True):
        assert {len(part) for part in parts} == {12 // count}
        assert_same(torch.cat(parts), whole)


# ------------------------------------------------------------------------------------------ the model


def test_rotation_tells_distances_alone():
    angles = rotary_angles(64, 16)
    q, k = torch.randn(2, 16).expand(64, 2, 16).unbind(1)
    q, k = (rotate(x, angles.cos(), angles.sin()) for x in (q, k))
    scores = q @ k.T
    for distance in (0, 1, 7):
        same = scores.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-4)
    assert all(
        not torch.allclose(scores[50, 50 - one], scores[50, 50 - two]) for one, two in pairwise((0, 1, 7))
    )
    torch.testing.assert_close(q.norm(dim=-1), q[0].norm().expand(64))


def test_model_sees_the_past_and_no_future():
    model = GPT(2, 32, 4, 16)
    text = torch.randint(256, (1, 16))
    changed = text.clone()
    changed[0, 9] += 1
    different = (model.logits(text) != model.logits(changed % 256)).any(dim=-1).squeeze()
    assert different.tolist() == [False] * 9 + [True] * 7


def test_untrained_model_knows_next_to_nothing():
    text = torch.randint(256, (16, 65))
    loss = GPT(4, 64, 4, 64)(text[:, :-1], text[:, 1:])
    assert 5 < loss < 7  # a uniform guess: ln 256 = 5.55


def test_width_must_suit_the_heads():
    with pytest.raises(ValueError, match=r"^--width 36 with --heads 4: .* choose a multiple of 8\.$"):
        GPT(1, 36, 4, 16)


# ------------------------------------------------------------------------------------ the whole script


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """For each optimiser, a run of two processes that is not stopped, and saves a checkpoint on its way."""

    @cache
    def whole_run(optimizer):
        out = tmp_path_factory.mktemp(optimizer)
        trained(2, out, "--optimizer", optimizer, "--save-every", SAVED)
        return out

    return whole_run


@pytest.fixture(params=["prodigyplus", "adamw"])
def whole(request, whole_run):
    return whole_run(request.param), request.param


@pytest.mark.slow
@pytest.mark.xdist_group("gpt")
def test_resumed_run_equals_an_uninterrupted_one(whole, tmp_path):
    out, optimizer = whole
    saved = out / "checkpoints" / f"{SAVED:08}"
    # More frequent evaluations leave no trace in the weights either.
    trained(2, tmp_path, "--optimizer", optimizer, "--eval-every", 3, "--resume", saved)
    assert_same(weights(out), weights(tmp_path))
    assert lines(out, "train") == lines(tmp_path, "train")
    tested = lines(tmp_path, "held out")
    assert [line["step"] for line in tested] == [10, 12, 15, 18, 20]
    assert lines(out, "held out") == [tested[0], tested[-1]]
    assert_same_contents(newest(out), newest(tmp_path), tmp_path, kinds=("train",))


def assert_close(one, other):
    for kind in ("train", "held out"):
        torch.testing.assert_close(losses(one, kind), losses(other, kind), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.xdist_group("gpt")
@pytest.mark.parametrize(("processes", "mesh"), [(0, "fsdp=1"), (4, "fsdp=2,tp=2")])
@pytest.mark.parametrize("whole", ["prodigyplus"], indirect=True)
def test_every_mesh_learns_the_same(whole, tmp_path, processes, mesh):
    trained(processes, tmp_path, "--mesh", mesh)
    assert_close(tmp_path, whole[0])


@pytest.mark.slow
@pytest.mark.xdist_group("gpt")
@pytest.mark.parametrize(
    ("whole", "processes", "mesh"),
    [
        ("prodigyplus", 0, "fsdp=1"),
        ("prodigyplus", 1, "fsdp=1"),
        ("prodigyplus", 2, "tp=2"),
        ("prodigyplus", 2, "replicate=2"),
        ("prodigyplus", 4, "fsdp=2,tp=2"),
        ("prodigyplus", 4, "replicate=2,fsdp=2"),
        ("adamw", 0, "fsdp=1"),
        ("adamw", 4, "fsdp=2,tp=2"),  # has weights on several meshes
    ],
    indirect=["whole"],
)
def test_run_goes_on_on_any_mesh(whole, tmp_path, processes, mesh):
    out, optimizer = whole
    saved = out / "checkpoints" / f"{SAVED:08}"
    trained(processes, tmp_path, "--mesh", mesh, "--optimizer", optimizer, "--resume", saved)
    assert_close(tmp_path, out)


@pytest.mark.slow
@pytest.mark.xdist_group("gpt")
@pytest.mark.parametrize("whole", ["prodigyplus"], indirect=True)
@pytest.mark.parametrize(
    "options", [["--option", "use_cautious=True", "--option", "betas=(0.9, 0.95)"], ["--muon"]], ids=str
)
def test_options_of_the_optimizer(whole, tmp_path, options):
    """A plain run, and one that is fused, stopped and resumed, have the same curve, and not the default's."""
    trained(2, tmp_path / "plain", *options)
    fused = [*options, "--option", "fused_back_pass=True"]
    trained(2, tmp_path / "fused", *fused, "--steps", SAVED)
    trained(2, tmp_path / "fused", *fused, "--resume")
    assert_same(losses(tmp_path / "fused", "train"), losses(tmp_path / "plain", "train"))
    assert not torch.equal(losses(whole[0], "train"), losses(tmp_path / "plain", "train"))


@pytest.mark.slow
@pytest.mark.xdist_group("gpt")
def test_run_tells_what_it_does_and_ends_in_time(folder, tmp_path):
    out = tmp_path / "new" / "folder"
    options = ["--data", folder, "--pattern", "*.txt", "--minutes", 0.001, "--out", out]
    done = running.run(running.command("gpt_fsdp2.py", 2, *TINY, *options))
    assert done.returncode == 0, done.stderr
    start, held_out, end = done.stdout.splitlines()
    assert start.endswith("processes, fsdp=2; " + corpus.read(corpus.files_in(folder, "*.txt"), 32).summary)
    (run,), train, (test,) = (lines(out, kind) for kind in ("run", "train", "held out"))
    assert held_out == f"step {test['step']}: held-out {test['bits_per_byte']:.4f} bits/byte"
    assert run["processes"] == 2
    assert {"step", "loss", "bits_per_byte", "lr", "d", "d_hat", "effective_lr"} < train[-1].keys()
    assert (out / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        *(".lock", "checkpoints", "log.jsonl", "model.json", "model.safetensors", "progress.png"),
    ]
    assert end == f"The trained model is in {out / 'model.safetensors'}"

    # It is the average: its loss is the one that was reported.
    model = GPT(**json.loads((out / "model.json").read_text()))
    model.load_state_dict(weights(out))
    text = corpus.read(corpus.files_in(folder, "*.txt"), 32).held_out
    args = gpt_fsdp2.argparse.Namespace(batch_size=32, context=32)
    loss = gpt_fsdp2.evaluate(model, text, args, Share(0, 1), ALONE)
    assert loss == pytest.approx(test["loss"], rel=1e-5)

    again = launch(2, *TINY, *options)
    assert again.returncode != 0
    assert "is of an earlier run" in again.stderr


def test_a_full_disk_ends_the_run_with_a_line(folder, tmp_path, monkeypatch, capsys):
    class Full(gpt_fsdp2.Report):
        def __init__(self, out, *args, **options):
            super().__init__(out, *args, **options)
            (out / "log.jsonl").unlink()
            (out / "log.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(gpt_fsdp2, "Report", Full)
    arguments = ["", *TINY, "--data", folder, "--pattern", "*.txt", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as end:
        gpt_fsdp2.run(gpt_fsdp2.parse(), ALONE)
    assert end.value.code == 1
    told = f"error: {tmp_path / 'out' / 'log.jsonl'} cannot be written: No space left on device\n"
    assert told in capsys.readouterr().err.split("\r")  # on a line of its own, not after the progress bar


def assert_told_once(done, message, out):
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.xdist_group("gpt")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "fsdp=4"], "--mesh fsdp=4 is a mesh of 4 processes, but there are 2"),
        (["--mesh", "tp=2", "--heads", "1"], "--heads 1 cannot be split evenly over tp=2"),
        (["--batch-size", "3"], "--batch-size 3 cannot be split evenly over the 2 processes"),
        (["--data", "nowhere"], "--data: nowhere is not a folder"),
        (["--option", "use_cautius=True"], "argument --option: 'use_cautius' is none of beta3, beta4, betas"),
        (["--option", "d0=1e-5", "--optimizer", "adamw"], "only --optimizer prodigyplus has options"),
        (["--muon", "--optimizer", "adamw"], "--muon: only --optimizer prodigyplus has it"),
        (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_error_is_told_once_and_ends_all_processes(tmp_path, options, message):
    out = tmp_path / "out"
    assert_told_once(launch(2, "--out", out, *running.TEXT, *options), message, out)


@pytest.mark.slow
@pytest.mark.xdist_group("gpt")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1"),
        (["--option", "d0=0"], "d0=0: must be a finite number greater than 0"),
    ],
)
def test_torchrun_says_nothing_that_hides_an_error(tmp_path, options, message):
    out = tmp_path / "out"
    done = running.run(running.command("gpt_fsdp2.py", 2, "--out", out, *options))
    assert_told_once(done, message, out)
