import signal
import sys
from pathlib import Path

import pytest

# The scripts import each other by plain names, as they can under `torchrun launch/….py`.
sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))


@pytest.fixture(scope="session", autouse=True)
def _heard():
    """Let SIGINT be heard: a shell makes background processes, and all that they start, ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _launcher(_heard):
    """Stop the launcher that these tests share, after the last of them."""
    from tests.launch.running import LAUNCHER

    yield
    LAUNCHER.stop()
