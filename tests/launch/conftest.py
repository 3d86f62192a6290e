import sys
from pathlib import Path

import pytest

# The scripts import each other by plain name, as `torchrun launch/….py` lets them.
sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))


@pytest.fixture(scope="session", autouse=True)
def _launcher():
    """One for all of them; it ends with them."""
    from tests.launch.running import LAUNCHER

    yield
    LAUNCHER.stop()
