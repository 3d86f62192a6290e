from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    # What starts processes stays together, so that one pool serves it and few processes run at a time.
    for item in items:
        for folder in ("dist", "launch"):
            if HERE / folder in item.path.parents:
                item.add_marker(pytest.mark.xdist_group(folder))


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
