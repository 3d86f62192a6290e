"""Start the scripts as a user would, and read what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parents[2]
TIMED = {"minutes", "tokens_per_second"}


def command(script, processes, *options):
    """Without processes, without a launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes else ()), f"launch/{script}", *map(str, options)]


def environment():
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "launch")))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(script, processes, *options):
    """Run a script; a run that hangs fails."""
    return subprocess.run(
        command(script, processes, *options),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def lines(folder, *kinds):
    """The records of a log, of some kinds or all, but for what the clock says."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    chosen = [record for record in records if not kinds or record["kind"] in kinds]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in chosen]


def weights(folder):
    """Those of the trained model."""
    return load_file(folder / "model.safetensors")


def newest(folder):
    """The newest checkpoint of a run."""
    return max((folder / "checkpoints").glob("[0-9]*"))


def contents(checkpoint, scratch):
    """All that a checkpoint holds: its tensors, and the rest, without what the clock says."""
    dcp_to_torch_save(checkpoint, scratch / "whole.pt")
    state = torch.load(scratch / "whole.pt", weights_only=True)
    run = json.loads((checkpoint / "run.json").read_text())
    del run["job"], run["minutes"]
    for record in run["records"]:
        for key in TIMED & record.keys():
            del record[key]
    return {"model": state["model"], "state": state["optimizer"].pop("state")}, [state["optimizer"], run]


def assert_same(one, other):
    """Tensors, or dicts of them, to the bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_same_contents(one, other, scratch, kinds=("train", "held out", "test")):
    """Of two checkpoints; their logs, as far as records are of these kinds."""
    (tensors, rest), (other_tensors, other_rest) = (contents(path, scratch) for path in (one, other))
    assert_same(tensors, other_tensors)
    for _, run in (rest, other_rest):
        run["records"] = [record for record in run["records"] if record["kind"] in kinds]
    assert rest == other_rest
