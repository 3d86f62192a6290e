import pytest

from tests.integrations.processes import SERVER


@pytest.fixture(scope="session", autouse=True)
def _server():
    """One for all of them; it ends with them."""
    yield
    SERVER.stop()
