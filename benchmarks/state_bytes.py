"""How many bytes of state each optimiser keeps per parameter, on the shapes of a small GPT-2.

    python benchmarks/state_bytes.py [FOLDER ...]

Each FOLDER is where `pip install --no-deps --target FOLDER prodigy-plus-schedule-free==2.0.1` (or another
version) went: the package is measured too, in a process of its own, since it has our import name.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

WIDTH, LAYERS, VOCABULARY, CONTEXT = 512, 8, 8192, 512


def shapes() -> Iterator[tuple[int, ...]]:
    """The shapes of a GPT-2 of 29.7 M parameters, its head tied to its embedding."""
    yield from ((VOCABULARY, WIDTH), (CONTEXT, WIDTH))
    for _ in range(LAYERS):
        for out, into in ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)):
            yield from ((out, into), (out,))
        yield from ((WIDTH,),) * 4
    yield from ((WIDTH,),) * 2


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in what an optimiser keeps of a parameter."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def measure(make: Make, dtype: torch.dtype) -> float:
    """Bytes of state per parameter after two steps."""
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes()]
    optimizer = make(parameters)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    storages = [tensor.untyped_storage() for tensor in tensors(dict(optimizer.state))]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}  # some share one
    return sum(kept.values()) / sum(p.numel() for p in parameters)


def report(name: str, make: Make) -> None:
    """Print a row of the table."""
    with contextlib.redirect_stdout(io.StringIO()):  # one of them prints
        single, half = (measure(make, dtype) for dtype in (torch.float32, torch.bfloat16))
    print(f"| {name} | {single:.2f} | {half:.2f} |", flush=True)


def main(arguments: Iterable[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.only:  # the child process for one FOLDER
        (folder,) = args.folders
        sys.path.insert(0, folder)
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree

    if args.only:
        report(folder, ProdigyPlusScheduleFree)
        return
    count = sum(torch.Size(shape).numel() for shape in shapes())
    print(f"State bytes per parameter, {count:,} parameters in {len(list(shapes()))} tensors\n")
    print("| optimiser | float32 | bfloat16 |\n|---|---|---|", flush=True)
    report("torch AdamW", torch.optim.AdamW)
    report("ProdigyPlusScheduleFree", ProdigyPlusScheduleFree)
    report("the same, bfloat16_z=True", lambda p: ProdigyPlusScheduleFree(p, bfloat16_z=True))
    for folder in args.folders:
        subprocess.run([sys.executable, __file__, "--only", folder], check=True)


if __name__ == "__main__":
    main()
