"""Try a wheel as a user would: python tests/packaged.py DIST, a folder with one wheel and one sdist.

The wheel is installed into an empty folder, without its dependencies, which must be installed already. It
is then run from another empty folder, so that nothing can be imported from a checkout by accident.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

TRIAL = """
import sys
from importlib import metadata
from pathlib import Path

import torch
import prodigyplus, prodigyplus_dist
from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

for package in (prodigyplus, prodigyplus_dist):
    folder = Path(package.__file__).parent
    assert folder.parent == Path(sys.argv[1]), folder
    assert (folder / "py.typed").exists(), folder
assert prodigyplus.__version__ == metadata.version("prodigyplus-dist") != "unknown"
assert metadata.requires("prodigyplus-dist")[0].startswith("torch")

model = torch.nn.Linear(8, 8)
for cls in (ProdigyPlusScheduleFree, ShardedProdigyPlusScheduleFree):
    for step_size in ("prodigy", "balance"):
        optimizer = cls(model.parameters(), step_size=step_size)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(torch.eye(8)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
print(prodigyplus.__version__)
"""


def main() -> None:
    dist = Path(sys.argv[1]).resolve()
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in (
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "prodigyplus/optimizer.py",
        "prodigyplus_dist/py.typed",
    ):
        assert wanted in names, f"{sdist} lacks {wanted}"
    with TemporaryDirectory() as installed, TemporaryDirectory() as elsewhere:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            installed,
            str(wheel),
        ]
        subprocess.run(pip, check=True)
        environment = {**os.environ, "PYTHONPATH": installed}
        python = [sys.executable, "-W", "error", "-c", TRIAL, str(Path(installed).resolve())]
        subprocess.run(python, check=True, cwd=elsewhere, env=environment)
        help_ = [sys.executable, "-m", "prodigyplus.plot", "--help"]
        subprocess.run(help_, check=True, cwd=elsewhere, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
