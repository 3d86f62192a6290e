"""How many bytes of state each optimiser keeps per parameter, on the shapes of a small GPT-2.

    python benchmarks/state_bytes.py [--peers FOLDER]

With a FOLDER, prodigy-plus-schedule-free is measured too: it is installed there, if it is not there yet, and
measured in a process of its own, since it shares our import name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness.peers import OURS, PUBLISHED, install, load
from harness.shapes import gpt, numel
from harness.tables import head, parser, row
from harness.tensors import state_bytes, with_gradients
from harness.workers import Worker

LIMIT = 300  # seconds for a package in a process of its own


class Measure:
    """Bytes of state per parameter after two steps."""

    def of(self, place: str, options: dict[str, Any]) -> list[float]:
        """Those of an optimiser, in float32 and in bfloat16."""
        return [self._of(place, options, dtype) for dtype in (torch.float32, torch.bfloat16)]

    def _of(self, place: str, options: dict[str, Any], dtype: torch.dtype) -> float:
        optimizer = load(place)(with_gradients(gpt(), dtype), **options)
        for _ in range(2):
            optimizer.step()
        return state_bytes(optimizer) / numel(gpt())


def main() -> None:
    """Print the table."""
    cli = parser(__doc__)
    cli.add_argument("--peers", type=Path, metavar="FOLDER")
    peers = cli.parse_args().peers
    print(f"State bytes per parameter, {numel(gpt()):,} parameters in {len(gpt())} tensors\n")
    print(head("optimiser | float32 | bfloat16"), flush=True)
    optimizers: dict[str, tuple[str, dict[str, Any]]] = {
        "torch AdamW": ("torch.optim:AdamW", {}),
        "ProdigyPlusScheduleFree": (OURS, {}),
        "the same, bfloat16_z=True": (OURS, {"bfloat16_z": True}),
    }
    for name, (place, options) in optimizers.items():
        print(row(name, *(f"{size:.2f}" for size in Measure().of(place, options))), flush=True)
    if peers is not None:
        worker = Worker(Measure, path=[install(PUBLISHED, peers.resolve())], said=Path("/dev/null"))
        found = worker.ask(LIMIT, "of", OURS, {})
        print(row(f"{PUBLISHED.distribution} {PUBLISHED.version}", *(f"{size:.2f}" for size in found)))
        worker.close()


if __name__ == "__main__":
    main()
