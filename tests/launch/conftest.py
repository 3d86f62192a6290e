import signal
import sys
from pathlib import Path

import pytest

# The scripts import each other by plain name, as `torchrun launch/….py` lets them.
sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))


@pytest.fixture(scope="session", autouse=True)
def _heard():
    """SIGINT, which shells have ignored by what they start in the background, and by all that it starts."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _launcher(_heard):
    """One for all of them; it ends with them."""
    from tests.launch.running import LAUNCHER

    yield
    LAUNCHER.stop()
