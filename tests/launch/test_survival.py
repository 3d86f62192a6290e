"""Processes die, saves are cut short, SIGTERM and SIGINT come: the run ends as it would have without them."""

import random
import signal

import mnist_data
import pytest
import storage

from tests.launch import running
from tests.launch.running import assert_same, assert_same_contents, lines, newest

STEPS, SAVED = 20, 5
TINY = ["--layers", "1", "--width", "32", "--context", "32", "--batch-size", "32", "--dropout", "0.1"]
RUN = [*TINY, *running.TEXT, "--log-every", str(SAVED), "--eval-every", str(STEPS)]
PERIODIC = [*RUN, "--steps", str(STEPS), "--save-every", str(SAVED), "--mesh", "replicate=2,fsdp=2"]


def at_random(seed):
    """The death of a random process, at a random moment of a step other than the first."""
    draw = random.Random(seed)
    return draw.randrange(4), f"step:{draw.randint(2, STEPS - 1)}:{draw.uniform(0, 0.03):.4f}"


DEATHS = {f"seed {seed}": at_random(seed) for seed in range(6)}
# Deaths within the second save; rank 0 completes what all have written.
IN_SAVE = {
    "before": (3, "save:2:before"),
    "half": (2, "save:2:half"),
    "written": (0, "save:2:written"),
    "named": (0, "save:4:named"),  # counts files, of which each save writes two
    "renamed": (0, "save:2:renamed"),
}
TOLD = {"told": (1, f"told:{SAVED + 2}:0")}  # SIGTERM to one of four processes


def survived(out, death=None):
    """Make a run of which a process may die; return how often its processes were started."""
    options = [*PERIODIC, "--out", out]
    done, starts = running.LAUNCHER.run("gpt_fsdp2.py", 4, options, death=death, restarts=3)
    assert done.returncode == 0, done.stdout + done.stderr[-10_000:]
    return starts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert survived(out) == 1
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DEATHS, *IN_SAVE, *TOLD])
def test_run_ends_as_if_nobody_had_died(undisturbed, tmp_path, name):
    out = tmp_path / "out"
    assert survived(out, {**DEATHS, **IN_SAVE, **TOLD}[name]) == 2
    assert_same(running.weights(out), running.weights(undisturbed))
    assert lines(out, "train", "held out")[-1] == lines(undisturbed, "train", "held out")[-1]
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert left == [f"{step:08}" for step in (10, 15, 20)]
    for path in (out / "checkpoints").iterdir():
        storage.check(path)
    if name not in TOLD:  # its log has one line more, where it ended
        assert_same_contents(newest(out), newest(undisturbed), tmp_path)


@pytest.mark.slow
def test_the_run_itself_is_what_torchrun_makes(undisturbed, tmp_path):
    """Runs by torchrun itself equal those of the other tests, which the shared launcher starts."""
    done = running.run(running.command("gpt_fsdp2.py", 4, *PERIODIC, "--out", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert_same_contents(newest(tmp_path / "out"), newest(undisturbed), tmp_path)


def interrupted(script, out, number, *options):
    """End a run of two processes by a signal soon after its first line of log; return its steps."""
    with running.started(running.command(script, 2, *options, "--out", out)) as run:
        run.wait_until(
            lambda: (out / "log.jsonl").exists() and lines(out, "train"), "the first line of the log"
        )
        run.process.send_signal(number)
        run.wait()
        assert run.returncode != 0
        steps = int(newest(out).name)
        assert f"Ended by {number.name} after {steps} steps: --resume goes on from there." in run.stdout
        assert run.stderr.count("Traceback") == 1, run.stderr  # torchrun's own
    assert not (out / "model.safetensors").exists()
    return steps


def assert_goes_on(script, out, whole, *options):
    """Assert that an ended run, when resumed, comes to the weights of a run that was never ended."""
    for folder, resume in ((out, ["--resume"]), (whole, [])):
        done = running.launch(script, 2, *options, *resume, "--out", folder)
        assert done.returncode == 0, done.stderr
    assert_same(running.weights(out), running.weights(whole))


@pytest.mark.slow
def test_sigterm_saves_and_exits(tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    steps = interrupted("gpt_fsdp2.py", out, signal.SIGTERM, *RUN, "--steps", 100_000)
    assert_goes_on("gpt_fsdp2.py", out, whole, *RUN, "--steps", steps + 7)


@pytest.mark.slow
def test_ctrl_c_within_an_epoch(tmp_path):
    try:
        mnist_data.fetch(mnist_data.cache_folder())
    except OSError as error:
        pytest.skip(str(error))
    out, whole, small = tmp_path / "out", tmp_path / "whole", ["--limit", 640, "--batch-size", 8]
    steps = interrupted("mnist_ddp.py", out, signal.SIGINT, *small, "--epochs", 1000)
    assert_goes_on("mnist_ddp.py", out, whole, *small, "--epochs", steps // 80 + 1)
