"""A hook of mkdocs: pages that are not in docs/, and links from pages to files that the site does not have.

Pages are also read in the repository, so their links are relative to where they lie there. On the site, a
link to another page stays a link. A link to any other file of the repository becomes one to ``repo_url``;
where mkdocs.yml has none, only its text is left.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Where the repository has them, and where the site does.
ELSEWHERE = {
    "launch/README.md": "launch.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}

_LINK = re.compile(
    r"(?P<code>^ *```.*?^ *```|`[^`\n]+`)"  # where brackets are something else
    r"|(?P<text>!?\[[^\]]*\])\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere in the repository."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(_root(config) / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of docs/ into links that the site can follow.

    Raises:
        PluginError: A link leads to no file.
    """
    here = next((source for source, name in ELSEWHERE.items() if name == page.file.src_uri), None)
    source = here or f"docs/{page.file.src_uri}"

    def replaced(link: re.Match[str]) -> str:
        text, target, anchor = link["text"], link["target"], link["anchor"] or ""
        if link["code"] or not target or ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (_root(config) / path).exists():
            raise PluginError(f"{source} links to {target}, which is not there.")
        on_site = ELSEWHERE.get(path) or ("docs/" in path and path.removeprefix("docs/"))
        if on_site and files.get_file_from_path(on_site):
            start = posixpath.dirname(page.file.src_uri)
            return f"{text}({posixpath.relpath(on_site, start or '.')}{anchor})"
        if config.repo_url:
            return f"{text}({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text[1:-1]

    return _LINK.sub(replaced, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent
