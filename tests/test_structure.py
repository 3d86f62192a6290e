"""What the architecture promises and a reader of the imports could check."""

import ast
from fnmatch import fnmatch
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


# Who may import whom, from the top down: what stands in a line imports only from lines below it.
WINGS = (
    ("prodigy_plus_schedulefree", "__init__"),
    ("published",),
    ("optimizer",),
    ("checkpoint", "eval_mode", "metrics", "monitor"),
    ("constraints", "parameters"),
    ("muon_groups", "placement"),
    ("engine",),
    ("state",),
    ("formulas",),
    ("terms", "options"),
    ("reporting", "torch_private"),
)


def wing_of(module):
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return next((floor for floor, wings in enumerate(WINGS) if name in wings), None)


def test_imports_go_one_way():
    for path in sorted((ROOT / "prodigyplus").rglob("*.py")):
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prodigyplus")):
                continue
            for alias in node.names:
                module = node.module if "." in node.module else f"{node.module}.{alias.name}"
                assert wing_of(module) is not None, module
                inside = own.split(".")[1] == module.split(".")[1]
                assert inside or wing_of(own) < wing_of(module), f"{own} imports {module}"


def private_names(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (part for part in node.module.split(".") if part.startswith("_"))
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ("torch", "dist", "nn"):
                yield node.attr


@pytest.mark.parametrize("package", ["prodigyplus", "prodigyplus_dist"])
def test_private_names_of_torch_are_in_one_file(package):
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        found[path.name] = list(private_names(path))
    assert found.pop("torch_private.py")
    assert not any(found.values()), found


def test_a_wheel_has_every_package():
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("include = "))
    patterns = ast.literal_eval(line.removeprefix("include = "))
    for package in ("prodigyplus", "prodigyplus_dist"):
        for path in (ROOT / package).rglob("__init__.py"):
            name = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(fnmatch(name, pattern) for pattern in patterns), name
