"""What the scripts ask of the machine."""

import os

import pytest
import ranks


@pytest.mark.parametrize("tells", [True, False])
def test_cores_that_this_process_may_use(monkeypatch, tells):
    """A job that is bound to some cores of a large machine must not start threads for all of them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    if not tells:  # as on macOS
        monkeypatch.delattr(os, "sched_getaffinity")
    assert ranks._cores() == (3 if tells else 128)
