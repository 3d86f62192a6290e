import pytest

from tests.integrations.processes import SERVER


@pytest.fixture(scope="session", autouse=True)
def _server():
    """Stop the server that these tests share, after the last of them."""
    yield
    SERVER.stop()
