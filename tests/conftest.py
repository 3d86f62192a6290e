import gc
import os
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels are interpreted on the CPU. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

HERE = Path(__file__).parent

# As on the ranks of tests/dist: several tests run at once, and more threads would only wait.
torch.set_num_threads(1)


def pytest_addoption(parser, pluginmanager):
    # tests/cuda needs no plugin, but without pytest-timeout its setting in pyproject.toml is unknown.
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of pytest-timeout, which is not installed")


def pytest_configure(config):
    # xdist would start with the groups that have most tests. "launch" has few, but takes longest.
    config.option.loadscopereorder = False


GROUPS = ("launch", "dist", "compile", "gpt", "integrations")  # the longest first


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    # Tests that start processes run in one worker: one pool serves them, and few processes run at once.
    for item in items:
        for folder in ("dist", "integrations", "launch"):
            if HERE / folder in item.path.parents:
                item.add_marker(pytest.mark.xdist_group(folder))
    items.sort(key=lambda item: GROUPS.index(group) if (group := group_of(item)) else len(GROUPS))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # later collections need not search everything that was imported


def group_of(item):
    """The group that a test runs in: the closest mark decides, so a test's own comes first."""
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else None


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
