"""Run the tests against the golden runs with each instruction set that this processor has.

    python tests/golden/processors.py [--next] [PYTEST ARGUMENT ...]

torch has CPU kernels for several instruction sets, which round differently, and takes the best ones unless it
is told otherwise. With ``--next``, only the second-best are used, or the best if there are no others: the
test suite itself runs with the best, but leaves pairs of options to this script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PUBLISHED = (
    "2_0_goes_on_as_there",
    "2_0_in_bfloat16",
    "1_9_where_it_is_the_same_algorithm",
    "1_9_goes_on_well",
)
TESTS = ["tests/single/test_parity.py"] + [
    f"tests/single/test_published.py::test_{name}" for name in PUBLISHED
]
CHOICE = "ATEN_CPU_CAPABILITY"
KERNELS = ["default", "avx2", "avx512"]  # a processor has the first one, two or three of these


def best() -> str:
    """The kernels that torch takes by default, as a process without the variable reports them."""
    environment = {key: value for key, value in os.environ.items() if key != CHOICE}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    return asked.stdout.decode().strip().lower()


def main() -> int:
    arguments = sys.argv[1:]
    own = best()
    available = KERNELS[: KERNELS.index(own) + 1] if own in KERNELS else ["default", own]
    chosen = available[-2:][:1] if "--next" in arguments else available
    failed = []
    for name in chosen:
        print(f"{CHOICE}={name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, *(a for a in arguments if a != "--next")]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, CHOICE: name}, check=False).returncode:
            failed.append(name)
    if failed:
        print("failed with the kernels of:", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
