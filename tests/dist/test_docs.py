"""The documentation's blocks of Python that several processes run together; see tests/test_docs.py."""

import os
from pathlib import Path

import pytest

from tests import pages


def run(page, folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        return pages.run(page)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("page", pages.RANKS)
def test_blocks(pool, page, tmp_path):
    count = len(pages.python_of(page))
    assert count
    ranks = pages.RANKS[page]
    assert pool.run(ranks, run, page, str(tmp_path)) == [count] * ranks
