"""What the architecture promises and a reader of the imports could check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((path.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_one_process_knows_nothing_of_many():
    found = list(imports("prodigyplus"))
    assert found
    for path, name in found:
        assert not name.startswith(("torch.distributed", "prodigyplus_dist")), path


@pytest.mark.parametrize("package", ["prodigyplus", "prodigyplus_dist"])
def test_torch_is_the_only_dependency(package):
    import sys

    for path, name in imports(package):
        root = name.partition(".")[0]
        assert root in {"torch", "prodigyplus", "prodigyplus_dist"} | sys.stdlib_module_names, path
