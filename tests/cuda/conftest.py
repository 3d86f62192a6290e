"""Tests of what only a GPU can show; skipped where there is none.

    PYTHONPATH=. python -m pytest tests/cuda tests/single/test_kernels.py

in a checkout needs only torch, Triton and pytest. The kernels of the second run on the GPU; without one, that
file runs them in Triton's interpreter.
"""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
