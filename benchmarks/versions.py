"""Run the tests on releases of torch, each in an environment of its own, and write a table of the results.

    python benchmarks/versions.py 2.8.0 2.14.1 --index-url https://download.pytorch.org/whl/cpu

An existing environment is used as it is. A row of the table is replaced when the same tests run again on the
same release; the other rows, and the text around them, stay.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import subprocess
import venv
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
HEADER = "| torch | Python | date | tests | passed | failed | skipped |\n|---|---|---|---|---|---|---|\n"
TESTS = "-n 2 --dist loadgroup -m 'not slow' tests"
VERSIONS = "import platform, torch; print(torch.__version__, platform.python_version())"


class Outcome(NamedTuple):
    """The results: how many tests passed and were skipped, and which failed."""

    passed: int
    failed: list[str]
    skipped: int


def environment(version: str, folder: Path, index_url: str | None) -> Path:
    """The interpreter of an environment with a release of torch and what tests need; made if missing."""
    python = folder / version / "bin" / "python"
    if not python.exists():
        venv.create(folder / version, with_pip=True)
        # torch comes first, since its index may have none of the rest.
        install = [str(python), "-m", "pip", "install", "--quiet"]
        index = ["--index-url", index_url] if index_url else []
        subprocess.run([*install, *index, f"torch=={version}"], check=True)
        subprocess.run([*install, f"torch=={version}", "--editable", f"{ROOT}[test]"], check=True)
    return python


def outcome_of(report: Path) -> Outcome:
    """The results in pytest's JUnit report."""
    passed, failed, skipped = 0, [], 0
    for case in ET.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            module = case.get("classname", "").replace(".", "/")
            failed.append(f"{module}.py::{case.get('name')}" if module else str(case.get("name")))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Outcome(passed, failed, skipped)


def run(python: Path, tests: list[str], report: Path) -> Outcome:
    """Run tests with an interpreter.

    Raises:
        SystemExit: pytest did not finish, or ran nothing.
    """
    report.unlink(missing_ok=True)
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={report}", *tests]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"error: pytest ended with {done.returncode}: {' '.join(command)}")
    return outcome_of(report)


def row_of(installed: str, tests: list[str], outcome: Outcome) -> tuple[tuple[str, str], str]:
    """A row of the table, and its key.

    Args:
        installed: The releases of torch and of Python.
        tests: pytest's arguments.
        outcome: The results.
    """
    torch, python = installed.split()
    failed = f"{len(outcome.failed)}" + "".join(f"<br>`{name}`" for name in outcome.failed)
    command = f"`{shlex.join(tests)}`"
    today = datetime.date.today().isoformat()
    cells = [torch, python, today, command, str(outcome.passed), failed, str(outcome.skipped)]
    return (torch, command), f"| {' | '.join(cells)} |\n"


def write(table: Path, key: tuple[str, str], row: str) -> None:
    """Put a row in the table; it replaces the one with the same key.

    Args:
        table: The document that has the table, with its header; the rows follow at once.
        key: Of the row: torch's release and the tests.
        row: The row, with its line break.
    """
    before, header, after = table.read_text(encoding="utf-8").partition(HEADER)
    assert header, f"{table} has no table with the header of this script"
    lines = after.splitlines(keepends=True)
    count = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
    cells = ([cell.strip() for cell in line.split("|")] for line in lines[:count])
    rows = {(its[1], its[4]): line for its, line in zip(cells, lines, strict=False)} | {key: row}
    ordered = sorted(rows, key=lambda its: ([int(x) for x in its[0].partition("+")[0].split(".")], its[1]))
    text = before + header + "".join(rows[its] for its in ordered) + "".join(lines[count:])
    table.write_text(text, encoding="utf-8")


def main() -> None:
    """Test each release in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="releases of torch")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "torch", help="of the environments")
    parser.add_argument("--index-url", help="where pip takes torch from")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "versions.md", help="what has the table")
    parser.add_argument("--tests", default=TESTS, help="pytest's arguments, in one string")
    given = parser.parse_args()
    tests = shlex.split(given.tests)
    folder = given.folder.resolve()
    for version in given.versions:
        python = environment(version, folder, given.index_url)
        installed = subprocess.run([python, "-W", "ignore", "-c", VERSIONS], stdout=-1, text=True, check=True)
        outcome = run(python, tests, folder / f"{version}.xml")
        write(given.out, *row_of(installed.stdout, tests, outcome))
        print(f"torch {version}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
