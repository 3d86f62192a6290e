from pathlib import Path

import pytest

from tests.dist.pool import Pool

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    # One pool on this machine, not one for each of pytest-xdist's workers.
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("dist"))


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()
