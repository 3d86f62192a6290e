from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    # What starts processes runs in one of pytest-xdist's workers: one pool serves it, and two cores.
    for item in items:
        if {HERE / "dist", HERE / "launch"} & set(item.path.parents):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
