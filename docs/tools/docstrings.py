"""An extension of griffe: docstrings as Python's help shows them, in the Markdown of the site.

The roles of reStructuredText become links, its tables those of Markdown, and lines of ``>>>`` code.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

_PACKAGES = ("prodigyplus", "prodigyplus_dist")
# What the API reference has, by the name that a docstring may call it.
_OF_CLASS = "prodigyplus.ProdigyPlusScheduleFree"

_ROLE = re.compile(r":(?P<role>class|func|meth|mod):`(?P<name>[\w.]+)`")
_RULE = re.compile(r"^ *=+(  =+)+$")


class Markdown(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Griffe calls this for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring = Docstring(
                markdown(obj.docstring.value),
                lineno=obj.docstring.lineno,
                endlineno=obj.docstring.endlineno,
                parent=obj,
                parser=obj.docstring.parser,
                parser_options=obj.docstring.parser_options,
            )


def markdown(text: str) -> str:
    """A docstring with its roles, tables and examples in Markdown."""
    return _ROLE.sub(_link, _examples(_tables(text)).replace("``", "`"))


def _link(role: re.Match[str]) -> str:
    name, kind = role["name"], role["role"]
    if kind == "mod":
        return f"`{name}`"
    target = name if name.startswith(_PACKAGES) else f"{_OF_CLASS}.{name}" if kind == "meth" else ""
    if not target:
        target = f"prodigyplus.{name}"
    short = name.rpartition(".")[2]
    return f"[`{short}`][{target}]"


def _examples(text: str) -> str:
    """Lines that begin with ``>>>`` as a block of Python."""
    lines, inside = [], False
    for line in text.splitlines():
        is_example = line.startswith((">>> ", "... "))
        if is_example != inside:
            lines.append("```python" if is_example else "```")
        lines.append(line[4:] if is_example else line)
        inside = is_example
    return "\n".join([*lines, "```"] if inside else lines)


def _tables(text: str) -> str:
    """Simple tables of reStructuredText as those of Markdown."""
    lines: list[str] = []
    table: list[str] = []  # its lines so far, from the first rule on
    for line in text.splitlines():
        if table or _RULE.match(line):
            table.append(line)
        else:
            lines.append(line)
        rules = [number for number, its in enumerate(table) if _RULE.match(its)]
        # A second rule ends a table without a header: what follows it is then no row.
        if len(rules) == 3 or (len(rules) == 2 and not line.strip()):
            lines += [*_table(table, has_header=len(rules) == 3), ""]
            table = []
    return "\n".join(lines + (_table(table, has_header=False) if table else []))


def _table(lines: list[str], *, has_header: bool) -> list[str]:
    spans = [match.span() for match in re.finditer("=+", lines[0])]
    ends = [start for start, _ in spans[1:]] + [None]
    rows: list[list[str]] = []
    for line in lines:
        if not line.strip() or _RULE.match(line):
            continue
        cells = [line[start:end].strip() for (start, _), end in zip(spans, ends, strict=True)]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    header = rows.pop(0) if has_header else [""] * len(spans)
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(spans), *rows)]
