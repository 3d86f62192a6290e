"""Every block of Python in the documentation runs as printed; none is left out."""

import datetime
import re
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import pages
from tests.pages import ELSEWHERE, LANGUAGES, NEEDS, PAGES, RANKS, ROOT

# Pages that show a warning of the optimiser, and its text.
WARN = {
    "docs/published.md": "the run will continue differently",
    "docs/guides/migrating.md": "the run will continue differently",
}

OTHERS = {*RANKS, *ELSEWHERE}


@pytest.fixture(scope="module")
def _one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("docs") / "store"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(seconds=60),
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("page", [page for page in PAGES if pages.python_of(page) and page not in OTHERS])
def test_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if page in NEEDS:
            warnings.simplefilter("ignore")  # that package's own warnings
            pytest.importorskip(NEEDS[page])
        warnings.filterwarnings("ignore", message=WARN.get(page, "no warning is this"))
        assert pages.run(page) == len(pages.python_of(page))


def test_every_block_is_found():
    """A looser search finds no more blocks of Python; the lists of special pages are up to date."""
    for page in PAGES:
        fences = re.findall(r"^\s*```.*python", (ROOT / page).read_text(), re.MULTILINE | re.IGNORECASE)
        assert len(fences) == len(pages.python_of(page)), page
    assert {*OTHERS, *NEEDS} <= set(PAGES)
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_languages(page):
    """Every fence names a known language, so no Python escapes being run under another name."""
    text = (ROOT / page).read_text()
    assert sum(line.lstrip().startswith("```") for line in text.splitlines()) == 2 * len(
        pages.blocks_of(page)
    )
    for block in pages.blocks_of(page):
        assert block.language in LANGUAGES, f"{page}:{block.line} has the language {block.language!r}"
