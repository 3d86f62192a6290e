import os
from pathlib import Path

import pytest
import torch

# Triton's kernels run on the CPU where there is no GPU; Triton looks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

HERE = Path(__file__).parent

# As the ranks of tests/dist: tests run beside each other, and threads would only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser, pluginmanager):
    # The tests of tests/cuda need no plugin; what pyproject.toml sets for this one is unknown without it.
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of pytest-timeout, which is not installed")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    # What starts processes stays together, so that one pool serves it and few processes run at a time.
    for item in items:
        for folder in ("dist", "integrations", "launch"):
            if HERE / folder in item.path.parents:
                item.add_marker(pytest.mark.xdist_group(folder))


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
