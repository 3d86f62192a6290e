import gc
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


def pytest_configure(config):
    # xdist would begin with the groups of most tests, and be left with launch, whose few take longest.
    config.option.loadscopereorder = False


GROUPS = ("launch", "dist", "gpt", "integrations")  # those that take longest first


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    # What starts processes stays together, so that one pool serves it and few processes run at a time.
    for item in items:
        for folder in ("dist", "integrations", "launch"):
            if HERE / folder in item.path.parents:
                item.add_marker(pytest.mark.xdist_group(folder))
    items.sort(key=lambda item: GROUPS.index(group) if (group := group_of(item)) else len(GROUPS))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # tests make garbage: not among all that was imported


def group_of(item):
    """The group that a test runs with: that of its own mark, which stands nearest."""
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else None


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
