from pathlib import Path

import pytest

from tests.dist.pool import Pool

HERE = Path(__file__).parent

# What `make test` and CI have time for; all else here is slow. Of the matrix of exactness, one layout.
QUICK = ("test_bad_placements.py", "test_checkpoint.py", "test_exactness.py::test_exactness[fsdp2]")


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and not any(quick in item.nodeid for quick in QUICK):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()
