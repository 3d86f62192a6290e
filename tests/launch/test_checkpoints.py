"""Checkpoints of the launch scripts, in one process: what is kept, what is refused, what is unpickled."""

import argparse
import errno
import fcntl
import io
import json
import os
import pickle
import shutil
import signal
import threading
from datetime import timedelta

import checkpoints
import corpus
import files
import gpt_fsdp2
import pytest
import storage
import torch
from checkpoints import Checkpoints, Run
from gpt import GPT
from ranks import Ranks
from torch.distributed.checkpoint.metadata import MetadataIndex

from prodigyplus import ProdigyPlusScheduleFree
from tests.launch.running import assert_same
from tests.waiting import HANG

ALONE = Ranks(0, 1, 0, 1)
TEXT = torch.arange(256, dtype=torch.uint8)


def options(out, resume=None, keep=3):
    return argparse.Namespace(out=out, resume=resume, keep=keep, timeout=timedelta(seconds=HANG))


def fresh(width=16):
    torch.manual_seed(0)
    model = GPT(1, width, 2, 8)
    return model, ProdigyPlusScheduleFree(model.parameters())


def learn(model, optimizer, steps):
    for step in steps:
        gpt_fsdp2.take_step(model, optimizer, corpus.random_windows(TEXT, 8, 4, 0, step))


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert_same(one.pop("state"), other.pop("state"))
    assert one == other


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a checkpoint after five steps, and the model and optimiser that were saved."""
    out = tmp_path_factory.mktemp("written")
    model, optimizer = fresh()
    learn(model, optimizer, range(5))
    saved = Checkpoints(options(out), ALONE)
    saved.begin(Run(5, {"seed": 1}, [{"kind": "train", "loss": 0.1}], "job"), model, optimizer)
    saved.finish()
    return out, model, optimizer


@pytest.fixture
def copied(written, tmp_path):
    """A copy of the checkpoint, which a test may damage."""
    shutil.copytree(written[0], tmp_path / "out")
    return tmp_path / "out" / "checkpoints" / "00000005"


def test_checkpoint_of_one_process(written):
    out, model, optimizer = written
    path, run = checkpoints.find(options(out, resume=True), {"seed": 1})
    assert run == Run(5, {"seed": 1}, [{"kind": "train", "loss": 0.1}], "job")
    other, others = fresh()
    checkpoints.load(path, other, others, ALONE)
    assert_same(other.state_dict(), model.state_dict())
    assert_same_state(others, optimizer)
    for one in ((model, optimizer), (other, others)):
        learn(*one, range(5, 9))
    assert_same(other.state_dict(), model.state_dict())
    assert_same_state(others, optimizer)


def test_a_run_goes_on_from_its_checkpoint(copied, capsys):
    out, (model, optimizer), (other, others) = copied.parents[1], fresh(), fresh()
    learn(model, optimizer, range(5))
    _, before = checkpoints.resume(options(out, True), {"seed": 1}, other, others, ALONE)
    assert before == Run(5, {"seed": 1}, [{"kind": "train", "loss": 0.1}], "job")
    assert_same(other.state_dict(), model.state_dict())
    assert_same_state(others, optimizer)
    assert capsys.readouterr().out == f"Going on from {copied}\n"


def test_a_run_without_a_checkpoint_begins_at_the_beginning(tmp_path, capsys):
    _, before = checkpoints.resume(options(tmp_path, True), {}, *fresh(), ALONE)
    assert before == Run()
    assert capsys.readouterr().out == ""


def test_a_run_that_cannot_go_on_makes_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        checkpoints.resume(options(tmp_path / "out", tmp_path / "nowhere"), {}, *fresh(), ALONE)
    assert "there is no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    begin, function = threading.Event(), storage.Writer.write_data

    def delayed(*args):
        assert begin.wait(HANG)
        return function(*args)

    monkeypatch.setattr(storage.Writer, "write_data", delayed)
    model, optimizer = fresh()
    learn(model, optimizer, range(5))
    expected, expected_optimizer = fresh()
    learn(expected, expected_optimizer, range(5))
    saved = Checkpoints(options(tmp_path), ALONE)
    saved.begin(Run(5), model, optimizer)
    learn(model, optimizer, range(5, 9))
    assert checkpoints.newest(tmp_path / "checkpoints") is None
    begin.set()
    saved.finish()
    other, others = fresh()
    checkpoints.load(tmp_path / "checkpoints" / "00000005", other, others, ALONE)
    assert_same(other.state_dict(), expected.state_dict())
    assert_same_state(others, expected_optimizer)


def test_the_last_few_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    for left in (".00000007.3f0c", ".00000006.removed"):  # left by a killed run
        (folder / left).mkdir(parents=True)
        (folder / left / "rest").touch()
    of_the_user = [".DS_Store", "00000001.best", "notes"]
    for name in of_the_user:
        (folder / name).mkdir()
        (folder / name / "run.json").touch()
    model, optimizer = fresh()
    saved = Checkpoints(options(tmp_path, keep=2), ALONE)
    for step in (1, 2, 3, 3, 20):
        saved.begin(Run(step), model, optimizer)
    saved.finish()
    assert sorted(path.name for path in folder.iterdir()) == sorted(["00000003", "00000020", *of_the_user])


def test_a_save_that_fails_is_told_and_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimizer = fresh()
    saved = Checkpoints(options(tmp_path), ALONE)
    saved.begin(Run(1), model, optimizer)
    saved.finish()

    def full(*_args):
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "_write", full)
    saved.begin(Run(2), model, optimizer)
    with pytest.raises(
        OSError, match=r"cannot be written to .*checkpoints: OSError: No space left on device$"
    ):
        saved.begin(Run(3), model, optimizer)
    path = checkpoints.newest(tmp_path / "checkpoints")
    assert path.name == "00000001"
    storage.check(path)


def test_one_too_many_is_no_reason_to_end(tmp_path, monkeypatch):
    model, optimizer = fresh()
    saved = Checkpoints(options(tmp_path, keep=1), ALONE)
    saved.begin(Run(1), model, optimizer)
    saved.begin(Run(2), model, optimizer)

    def busy(path):
        raise OSError("Directory not empty")

    monkeypatch.setattr(storage, "remove", busy)
    with pytest.warns(UserWarning, match=r"00000001 cannot be removed: Directory not empty"):
        saved.finish()
    assert checkpoints.newest(tmp_path / "checkpoints").name == "00000002"


# --------------------------------------------------------------------- which checkpoint a run goes on from


def empty(path, step=0, job=None):
    """Make a folder that passes for a checkpoint until it is loaded."""
    path.mkdir(parents=True)
    (path / "run.json").write_text(
        json.dumps({"step": step, "settings": {"batch_size": 8}, "records": [], "job": job})
    )
    sum_ = storage.checksum_of(path / "run.json")
    (path / "SHA256SUMS").write_text(f"{sum_}  run.json\n")


def test_newest_checkpoint(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    for name in ("00000200", "00000090", ".00001000", "notes"):
        empty(tmp_path / name)
    (tmp_path / "00003000").touch()
    assert checkpoints.newest(tmp_path) == tmp_path / "00000200"


@pytest.mark.parametrize("resume", [None, True])
def test_a_checkpoint_without_its_run_is_damaged(tmp_path, resume):
    """It must not count as missing: a run that started afresh would overwrite it."""
    for step in (10, 20):
        empty(tmp_path / "checkpoints" / f"{step:08}", step)
    damaged = tmp_path / "checkpoints" / "00000020"
    (damaged / "run.json").unlink()
    with pytest.raises(OSError, match=rf"^{damaged}/run\.json is missing: remove {damaged} to go on from"):
        checkpoints.find(options(tmp_path, resume), {})
    shutil.rmtree(damaged)
    assert checkpoints.find(options(tmp_path, True), {})[1].step == 10


def test_resume_refuses_another_run(tmp_path):
    path = tmp_path / "00000001"
    with pytest.raises(FileNotFoundError, match=r"^--resume: there is no checkpoint"):
        checkpoints.find(options(tmp_path, path), {})
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"SHA256SUMS is missing: .* is no checkpoint of this script"):
        checkpoints.find(options(tmp_path, path), {})
    path.rmdir()
    empty(path, 1)
    with pytest.raises(ValueError, match=r"was trained with --batch-size 8, not 16\.$"):
        checkpoints.find(options(tmp_path, path), {"batch_size": 16})
    with pytest.raises(ValueError, match="is not a checkpoint of this script"):
        checkpoints.find(options(tmp_path, path), {"seed": 1})


def test_which_to_go_on_from(tmp_path):
    assert checkpoints.find(options(tmp_path, True), {}) == (None, Run())
    for step in (10, 20):
        empty(tmp_path / "checkpoints" / f"{step:08}", step)
    empty(tmp_path / "elsewhere", 30)
    path, run = checkpoints.find(options(tmp_path, True), {})
    assert (path.name, run.step) == ("00000020", 20)
    with pytest.raises(ValueError, match="is of an earlier run: go on from it with --resume"):
        checkpoints.find(options(tmp_path), {})
    # Going on from another one is refused: the next --resume would take that of step 20.
    for other in ("checkpoints/00000010", "elsewhere"):
        with pytest.raises(ValueError, match=r"is not .*00000020, which would be the one to go on from"):
            checkpoints.find(options(tmp_path, tmp_path / other), {})
    assert checkpoints.find(options(tmp_path / "new", tmp_path / "elsewhere"), {})[1].step == 30


def test_what_the_same_job_has_written_is_gone_on_from(tmp_path, monkeypatch):
    """Whatever --resume says: torchrun restarts processes with the same command."""
    empty(tmp_path / "checkpoints" / "00000010", 10, job="job 1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    for resume in (None, True, tmp_path / "elsewhere"):
        assert checkpoints.find(options(tmp_path, resume), {})[1].step == 10
    for name in ("job 2", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        with pytest.raises(ValueError, match="is of an earlier run"):
            checkpoints.find(options(tmp_path), {})


def test_what_is_started_again_goes_on(tmp_path, monkeypatch):
    """Restarted processes go on even if the job has no name: the first start refused other runs' files."""
    empty(tmp_path / "checkpoints" / "00000010", 10)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="is of an earlier run"):
        checkpoints.find(options(tmp_path), {})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert checkpoints.find(options(tmp_path), {})[1].step == 10


def test_a_job_without_a_name_is_no_other(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert checkpoints.job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's name for a job without one
    assert checkpoints.job() is None


# ----------------------------------------------------------------------------------------- two runs


def test_a_folder_has_one_run_at_a_time(tmp_path, capsys):
    first = Checkpoints(options(tmp_path), ALONE)
    model, optimizer = fresh()
    first.begin(Run(1), model, optimizer)
    with pytest.raises(SystemExit):
        Checkpoints(options(tmp_path), ALONE)
    assert capsys.readouterr().err == (
        f"error: --out: another run is writing to {tmp_path}: wait for its end, or choose another --out.\n"
    )
    first.finish()
    storage.check(checkpoints.newest(tmp_path / "checkpoints"))


def test_a_killed_run_holds_nothing(tmp_path):
    """Its lock is released when it dies, and a run that is started meanwhile waits for that."""
    ours, theirs = os.pipe()
    if (killed := os.fork()) == 0:
        try:
            files.lock(tmp_path, timedelta())
            os.write(theirs, b"locked")
            signal.pause()
        finally:
            os._exit(1)
    os.close(theirs)
    assert os.read(ours, 6) == b"locked"
    with pytest.raises(ValueError, match="another run is writing to"):
        files.lock(tmp_path, timedelta())
    threading.Timer(0.5, os.kill, (killed, signal.SIGKILL)).start()
    files.lock(tmp_path, timedelta(seconds=HANG))
    os.waitpid(killed, 0)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def none(_file, _operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"):
        Checkpoints(options(tmp_path), ALONE)


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"^--out: {tmp_path / 'file'} cannot be written: File exists$"):
        files.lock(tmp_path / "file", timedelta())


# -------------------------------------------------------------------------------------------- damage


FILES = ("__0_0.distcp", ".metadata", "run.json")


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def assert_refused(path, *told):
    """Assert that loading fails and changes neither the model nor the optimiser; return the error."""
    model, optimizer = fresh()
    learn(model, optimizer, range(3))
    expected, expected_optimizer = fresh()
    learn(expected, expected_optimizer, range(3))

    def go_on():
        checkpoints.find(options(path.parents[1], True), {"seed": 1})
        checkpoints.load(path, model, optimizer, ALONE)

    with pytest.raises((OSError, ValueError, SystemExit)) as caught:
        go_on()
    assert_same(model.state_dict(), expected.state_dict())
    assert_same_state(optimizer, expected_optimizer)
    return caught.value


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "one bit", "missing"])
def test_damage_is_told(copied, capsys, name, damage):
    path = copied / name
    for bit in (5, 10_000_019) if damage == "one bit" else (0,):
        content = path.read_bytes()
        if damage == "one bit":
            flip(path, bit)
        elif damage == "missing":
            path.unlink()
        else:
            os.truncate(path, len(content) // 2 if damage == "truncated" else 0)
        error = assert_refused(copied)
        told = str(error) + capsys.readouterr().err
        assert str(path) in told
        assert ("damaged" if damage != "missing" else "missing") in told
        path.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "garbage", "missing"])
def test_damaged_sums_are_told(copied, capsys, damage):
    path = copied / "SHA256SUMS"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-20], "emptied": b"", "garbage": b"\xff" * 200}[damage])
    error = assert_refused(copied)
    assert str(path) in str(error) + capsys.readouterr().err


def test_a_file_without_a_sum_is_not_read(copied):
    path = copied / "SHA256SUMS"
    path.write_text(
        "".join(line for line in path.read_text().splitlines(keepends=True) if "distcp" not in line)
    )
    flip(copied / "__0_0.distcp", 10_000_019)
    error = assert_refused(copied)
    assert f"{copied / '.metadata'} names '__0_0.distcp', of which SHA256SUMS has no sum" in str(error)


def test_checkpoint_of_another_model(copied):
    model, optimizer = fresh(width=24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OSError, match=r"00000005 cannot be read: .*[Ss]ize mismatch|shape"):
        checkpoints.load(copied, model, optimizer, ALONE)
    assert_same(model.state_dict(), before)
    assert int(optimizer.metrics()[0]["step"]) == 0


def test_checkpoint_of_another_optimizer(copied):
    torch.manual_seed(0)
    model = GPT(1, 16, 2, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OSError, match=r"00000005 cannot be read: .*Missing key in checkpoint.*step"):
        checkpoints.load(copied, model, optimizer, ALONE)
    assert_same(model.state_dict(), before)


# ------------------------------------------------------------------------------------------- pickles


class Evil:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def sign(path, name):
    """Correct a file's checksum, as an attacker would."""
    lines = (path / "SHA256SUMS").read_text().splitlines()
    lines = [line for line in lines if not line.endswith(f"  {name}")]
    (path / "SHA256SUMS").write_text(
        "\n".join([*lines, f"{storage.checksum_of(path / name)}  {name}"]) + "\n"
    )


def test_evil_metadata_is_refused(copied, tmp_path):
    with (copied / ".metadata").open("rb") as file:
        metadata = storage.MetadataUnpickler(file).load()
    metadata.planner_data = Evil(tmp_path / "made")
    (copied / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(copied, ".metadata")
    error = assert_refused(copied)
    assert "it asks for posix.mkdir, which describes no tensor" in str(error)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("torch", "load"), ("torch.distributed.checkpoint.metadata", "os.system")],
)
def test_only_what_describes_tensors_is_unpickled(module, name):
    pickled = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    with pytest.raises(pickle.UnpicklingError, match=f"it asks for {module}.{name}"):
        storage.MetadataUnpickler(io.BytesIO(pickled + b"\x93.")).load()


def test_nothing_is_changed_that_is_only_named():
    """A pickle may set attributes of objects, but not those of classes and functions."""
    named = pickle.dumps(MetadataIndex)[:-1]
    changed = named + b"N}(" + pickle.dumps("__hash__")[2:-1] + b"Nu\x86b."
    with pytest.raises(pickle.UnpicklingError, match="it sets attributes of MetadataIndex"):
        storage.MetadataUnpickler(io.BytesIO(changed)).load()
    assert MetadataIndex.__hash__ is not None


def test_evil_numbers_are_refused(tmp_path):
    model, optimizer = fresh()
    saved = Checkpoints(options(tmp_path), ALONE)
    learn(model, optimizer, range(1))
    optimizer.param_groups[0]["average_beta1"] = Evil(tmp_path / "made")
    saved.begin(Run(1, {"seed": 1}), model, optimizer)
    saved.finish()
    error = assert_refused(tmp_path / "checkpoints" / "00000001")
    assert "Weights only load failed" in str(error)
    assert not (tmp_path / "made").exists()
