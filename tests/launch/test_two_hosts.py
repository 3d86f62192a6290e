"""The network between two hosts fails for a while, and the run ends as if it had not.

A host is a network namespace of this machine. A virtual cable joins the two.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import pytest
import ranks
from export import SAFETENSORS
from torch.distributed import HashStore

from tests.launch.running import launch
from tests.waiting import HANG, Hung, wait_until

ROOT = Path(__file__).parents[2]
MODEL = "model.safetensors" if SAFETENSORS else "model.pt"
TINY = ["--layers", 1, "--width", 32, "--context", 32, "--batch-size", 32, "--dropout", 0.1]
STEPS, SAVED, CUT = 16, 5, 12  # the cable is cut some steps after the second checkpoint
SPELLS = ["--steps", STEPS, "--save-every", SAVED, "--keep", 3, "--eval-every", 8, "--log-every", 1]
# Seconds after which processes give up on each other. The test waits for that. No step takes so long even on
# a busy machine; if one did, the run would restart once more.
SILENCE = 20
CABLE = "cable0"  # the name of both ends
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def ip(*arguments):
    command = ["ip", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True).stdout


class Host:
    """A network namespace, and the process that runs in it."""

    def __init__(self, name, log):
        ip("netns", "add", name)
        self.name, self._log, self.run = name, log, None

    def plug_in(self, address):
        self.address = address
        ip("-n", self.name, "address", "add", f"{address}/24", "dev", CABLE)
        self.cable("up")

    def cable(self, state):
        ip("-n", self.name, "link", "set", CABLE, state)

    def start(self, command, **environment):
        common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self._log.open("w") as log:
            self.run = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, command)],
                cwd=ROOT,
                env={**os.environ, **common, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ended(self):
        return None if self.run is None else self.run.poll()

    def printed(self):
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def remove(self):
        """Remove it, and kill all that runs in it: torchrun gives every process a session of its own."""
        while pids := ip("netns", "pids", self.name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        if self.run is not None:
            self.run.wait(HANG)
        ip("netns", "delete", self.name)


@pytest.fixture
def hosts(tmp_path):
    """Two hosts that are joined by a cable."""
    with ExitStack() as stack:
        hosts = []
        try:
            for name in ("one", "other"):
                hosts.append(Host(f"{name}-{os.getpid()}", tmp_path / f"{name}.log"))
                stack.callback(hosts[-1].remove)
                ip("-n", hosts[-1].name, "link", "set", "lo", "up")
            one, other = hosts
            end, peer = (("name", CABLE, "netns", host.name) for host in (one, other))
            ip("link", "add", *end, "type", "veth", "peer", *peer)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error}")
        one.plug_in("192.0.2.1")
        other.plug_in("192.0.2.2")
        yield one, other


@pytest.fixture
def wait(hosts):
    """Wait for a condition; if the run fails or prints no more, fail with all that it has printed."""

    def wait(what, is_so):
        def failed():
            return any(host.ended() for host in hosts)

        with suppress(Hung):
            wait_until(lambda: is_so() or failed(), lambda: [len(host.printed()) for host in hosts], what)
        if failed() or not is_so():
            logs = (f"----- {host.name}: status {host.ended()}\n{host.printed()}" for host in hosts)
            pytest.fail("\n".join((f"waited for {what}", *logs)))

    return wait


def records(out):
    """The records of the log without measured times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clock = {"minutes", "tokens_per_second"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["kind"] != "run"]


@pytest.mark.slow
def test_run_survives_a_cut_between_its_hosts(hosts, wait, tmp_path):
    one, other = hosts
    text, cut, whole, is_cut = (tmp_path / name for name in ("text", "cut", "whole", "is_cut"))
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text(f"The text of number {number}. " * 100)
    training = [*TINY, *SPELLS, "--mesh", "replicate=2,fsdp=2", "--data", text]

    for host in (one, other):
        launcher = [*TORCHRUN, "--nnodes", 2, "--nproc-per-node", 2, "--max-restarts", 3]
        launcher += ["--rdzv-id", "cut", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{one.address}:29500"]
        # Both namespaces have their machine's name, so torchrun cannot tell from it which one it is in.
        launcher += ["--local-addr", host.address]
        # A torchrun ends if the first host's is silent for read_timeout. The silence outlasts the cut, since
        # TCP doubles the time between its attempts.
        launcher += ["--rdzv-conf", f"is_host={int(host is one)},read_timeout={HANG}"]
        script = ["tests/launch/held.py", CUT, is_cut, *training, "--timeout", SILENCE, "--out", cut]
        host.start(
            [*launcher, *script],
            GLOO_SOCKET_IFNAME=CABLE,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            LOGLEVEL="INFO",  # so that torchrun reports its restarts
        )
    last = cut / "checkpoints" / f"{CUT // SAVED * SAVED:08}"
    wait("the last checkpoint before the cut", last.exists)

    def failures(host):
        return host.printed().count("Traceback")

    def restarts(host):
        return host.printed().count("will restart worker group")

    before = failures(one), failures(other), restarts(one)
    other.cable("down")
    is_cut.touch()
    # The hosts are idle for a while: time for the run that is never cut.
    done = launch("gpt_fsdp2.py", 4, *training, "--out", whole)
    assert done.returncode == 0, done.stderr
    wait("processes to give up on those of the other host", lambda: failures(one) > before[0])
    wait("processes of the other host to do so", lambda: failures(other) > before[1])
    # The other host's torchrun asks the first one's for news, and does nothing until it gets some.
    wait("torchrun to start over", lambda: restarts(one) > before[2])
    other.cable("up")
    wait("the end of the run", lambda: all(host.ended() == 0 for host in hosts))

    assert restarts(other)
    assert f"Going on from {last}" in one.printed()
    assert records(cut) == records(whole)
    assert [line["step"] for line in records(whole) if line["kind"] == "held out"] == [8, 16]
    assert (cut / MODEL).read_bytes() == (whole / MODEL).read_bytes()


@pytest.mark.parametrize(
    ("shared", "nodes", "restarts", "warned"),
    [("True", 2, 3, True), ("False", 2, 3, False), ("True", 1, 3, False), ("True", 2, 0, False)],
)
def test_restarts_on_several_nodes_need_stores_of_their_own(monkeypatch, shared, nodes, restarts, warned):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    monkeypatch.setattr(ranks, "rendezvous", lambda _: iter([(HashStore(), 0, 1)]))
    with pytest.warns(UserWarning, match="RDZV_TCP_STORE=1 in its environment") if warned else nullcontext():
        ranks._store()
