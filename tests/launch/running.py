"""Starting the scripts as a user would, and reading what they leave."""

import json
import os
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.run import get_args_parser

from tests.serving import ROOT, Server, kill
from tests.waiting import HANG, Hung, wait_until

# A text that every machine has. A text that changes while tests run, as this project's own sources do,
# would change their weights.
TEXT = ["--data", Path(sysconfig.get_paths()["stdlib"]) / "asyncio", "--pattern", "*.py"]
TIMED = {"minutes", "tokens_per_second"}

_HAS_TIMEOUT = "--shutdown-timeout" in get_args_parser().format_help()  # not in torch 2.11


def command(script, processes, *options):
    """The command that runs a script under torchrun; with 0 processes, without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if _HAS_TIMEOUT:  # time for the processes to save, when they are told to end
        torchrun += ["--shutdown-timeout", str(HANG)]
    return [sys.executable, *(torchrun if processes else ()), f"launch/{script}", *map(str, options)]


def environment():
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "launch")))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Started:
    """A process and its output. As long as it prints, even a progress bar, it does not count as hanging.

    Args:
        command: The command to start.
        folder: Where to keep its output.
    """

    def __init__(self, command, folder):
        self._printed = [folder / name for name in ("stdout", "stderr")]
        with self._printed[0].open("w") as out, self._printed[1].open("w") as err:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=err)

    @property
    def stdout(self):
        return self._printed[0].read_text()

    @property
    def stderr(self):
        return self._printed[1].read_text()

    @property
    def returncode(self):
        return self.process.poll()

    def wait_until(self, is_so, what):
        """Wait for a condition; if the process hangs, or ends before that, fail with all its output."""

        def over():
            return is_so() or self.returncode is not None

        try:
            wait_until(over, lambda: [path.stat().st_size for path in self._printed], what)
        except Hung as hung:
            raise Hung(f"{hung}\n{self.stdout}\n{self.stderr}") from None
        assert is_so(), f"ended before {what}\n{self.stdout}\n{self.stderr}"

    def wait(self):
        """Wait for its end."""
        self.wait_until(lambda: self.returncode is not None, "the end")


@contextmanager
def started(command):
    """A process that does not outlive the with-block."""
    with TemporaryDirectory() as folder:
        its = Started(command, Path(folder))
        try:
            yield its
        finally:
            kill(its.process.pid)
            its.process.wait()


class Launcher(Server):
    """The launcher that a run of pytest shares: see launcher.py."""

    def __init__(self):
        super().__init__("tests.launch.launcher", environment())

    def run(self, script, processes, options, **how):
        """Run a script to its end; return it, and how often its processes were started."""
        with TemporaryDirectory() as name:
            folder = Path(name)
            its = {"script": script, "processes": processes, "options": [*map(str, options)], "folder": name}
            files = [folder / name for name in ("stdout", "stderr", "status")]
            for file in files:
                file.touch()
            try:
                self.ask(
                    its | how,
                    lambda: files[2].read_text().endswith("\n"),
                    lambda: [file.stat().st_size for file in files],
                    f"the end of {script}",
                )
            except Hung as hung:
                raise Hung("\n".join((str(hung), *(file.read_text() for file in files)))) from None
            stdout, stderr, status = (file.read_text() for file in files)
            assert status, f"the launcher has ended\n{stdout}\n{stderr}\n{self.said()}"
            starts = int((folder / "starts").read_text()) if status == "0\n" else None
            return subprocess.CompletedProcess(its, int(status), stdout, stderr), starts


LAUNCHER = Launcher()


def launch(script, processes, *options):
    """Run a script to its end, by the shared launcher; :func:`run` runs a command as a user would."""
    done, _ = LAUNCHER.run(script, processes, options)
    return done


def run(command):
    """Run a command to its end; fail if it hangs."""
    with started(command) as its:
        its.wait()
        return subprocess.CompletedProcess(command, its.returncode, its.stdout, its.stderr)


def lines(folder, *kinds):
    """The records of a log, all or only those of some kinds, without measured times."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    chosen = [record for record in records if not kinds or record["kind"] in kinds]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in chosen]


def weights(folder):
    """The weights of the trained model."""
    return load_file(folder / "model.safetensors")


def newest(folder):
    """The newest checkpoint of a run."""
    return max((folder / "checkpoints").glob("[0-9]*"))


def contents(checkpoint, scratch):
    """All that a checkpoint holds: its tensors, and the rest without measured times."""
    dcp_to_torch_save(checkpoint, scratch / "whole.pt")
    state = torch.load(scratch / "whole.pt", weights_only=True)
    run = json.loads((checkpoint / "run.json").read_text())
    del run["job"], run["minutes"]
    for record in run["records"]:
        for key in TIMED & record.keys():
            del record[key]
    return {"model": state["model"], "state": state["optimizer"].pop("state")}, [state["optimizer"], run]


def assert_same(one, other):
    """Assert that tensors, or dicts of them, are equal to the bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_same_contents(one, other, scratch, kinds=("train", "held out", "test")):
    """Assert that two checkpoints hold the same; in their logs, only records of these kinds count."""
    (tensors, rest), (other_tensors, other_rest) = (contents(path, scratch) for path in (one, other))
    assert_same(tensors, other_tensors)
    for _, run in (rest, other_rest):
        run["records"] = [record for record in run["records"] if record["kind"] in kinds]
    assert rest == other_rest
