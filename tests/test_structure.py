"""The architecture's promises about imports, private names and packaging, checked in the source."""

import ast
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.parent.name == "integrations":  # adapters for frameworks, which nothing imports
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((path.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_folder_of_tests_is_collected(pytestconfig):
    """By default, pytest silently skips folders of some names, such as "dist"."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for folder in path.relative_to(ROOT).parent.parts:
            patterns = pytestconfig.getini("norecursedirs")
            assert not any(fnmatch(folder, pattern) for pattern in patterns), folder


def test_one_process_knows_nothing_of_many():
    found = list(imports("prodigyplus"))
    assert found
    for path, name in found:
        assert not name.startswith(("torch.distributed", "prodigyplus_dist")), path


# Packages that are imported only when used, and where: Triton for kernels on a GPU, matplotlib to draw.
WHEN_USED = {
    "triton": (
        *("kernels.py", "square_kernels.py", "group_kernels.py", "tiles.py", "symmetric.py"),
        *("jit.py", "launches.py"),
    ),
    "matplotlib": ("plot.py",),
}


@pytest.mark.parametrize("package", ["prodigyplus", "prodigyplus_dist"])
def test_torch_is_the_only_dependency(package):
    for path, name in imports(package):
        root = name.partition(".")[0]
        if path in WHEN_USED.get(root, ()):
            continue
        assert root in {"torch", "prodigyplus", "prodigyplus_dist"} | sys.stdlib_module_names, path
        assert "integrations" not in name, path


# Who may import whom: a module imports only from the lines below its own.
WINGS = (
    ("prodigy_plus_schedulefree", "__init__"),
    ("published", "plot"),
    ("optimizer",),
    ("checkpoint", "eval_mode", "metrics", "monitor", "steps"),
    ("view",),
    ("constraints", "muon_groups"),
    ("engine",),
    ("state_table", "device", "exchange", "placement"),
    ("formulas",),
    ("terms", "options"),
    ("reporting", "run_log", "torch_private"),
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


def private_names(path, of_any_object):
    """The private names of torch that a file uses; ``of_any_object``: of any object but ``self``, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [name for alias in node.names for name in alias.name.split(".") if "torch." in alias.name]
        elif isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            root = root.id if isinstance(root, ast.Name) else None
            if root in ("torch", "dist", "nn") or (of_any_object and root != "self"):
                names = [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and of_any_object:
            names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
        yield from (name for name in names if name.startswith("_") and not name.startswith("__"))


@pytest.mark.parametrize("folder", ["prodigyplus", "prodigyplus_dist", "launch"])
def test_private_names_of_torch_are_in_one_file(folder):
    found = {
        path.relative_to(ROOT): list(private_names(path, of_any_object=folder == "launch"))
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    assert found.pop(Path(folder) / "torch_private.py")
    assert not any(found.values()), found


def test_a_wheel_has_every_package():
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("include = "))
    patterns = ast.literal_eval(line.removeprefix("include = "))
    for package in ("prodigyplus", "prodigyplus_dist"):
        for path in (ROOT / package).rglob("__init__.py"):
            name = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(fnmatch(name, pattern) for pattern in patterns), name
