from pathlib import Path

import pytest

from tests.dist.pool import Pool

HERE = Path(__file__).parent

# What `make test` and CI have time for; all other tests of this folder are marked as slow. Something for each
# promise: one process's numbers, with even shards and with uneven or empty ones along two axes; a run that
# continues on another layout.
QUICK = (
    "test_bad_placements.py",
    "test_checkpoint.py",
    "test_docs.py",
    "test_exactness.py::test_exactness[fsdp2]",
    "test_exactness.py::test_exactness[fsdp_tp_uneven]",
    "test_pool.py",
    "test_published.py",
    "test_resume.py::test_from_one_layout_to_another[tp]",
    "test_situations.py",
    "test_torch_private.py",
    "test_wrapping.py",
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and not any(quick in item.nodeid for quick in QUICK):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()
