"""What only a GPU shows; skipped where there is none.

    PYTHONPATH=. python -m pytest tests/cuda tests/single/test_kernels.py

from a checkout needs no more than torch, Triton and pytest. The second runs elsewhere through Triton's
interpreter; where there is a GPU, its kernels run there.
"""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
