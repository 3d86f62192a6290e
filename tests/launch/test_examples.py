"""The examples, run as they are."""

import re
from pathlib import Path

import pytest
import torch

from prodigyplus import plot
from tests.launch.running import ROOT, launch

pytestmark = pytest.mark.xdist_group("launch")


def run(name, processes, *options):
    done = launch(f"examples.{name}", processes, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(printed):
    return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", printed, re.MULTILINE)]


def test_they_are_short():
    files = sorted((ROOT / "examples").glob("*.py"))
    assert files
    for file in files:
        assert len(file.read_text().splitlines()) <= 80, file


def test_ddp(tmp_path):
    printed = run("ddp", 2, "--steps", 200, "--out", tmp_path / "model.pt")
    assert float(re.search(r"held out: ([\d.]+) % right", printed)[1]) > 85
    trained = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(trained) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_fsdp2_goes_on_where_it_was_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (loss,) = losses(run("fsdp2", 2, "--steps", 100, "--out", whole))
    assert loss < 1
    run("fsdp2", 2, "--steps", 50, "--out", parts)
    run("fsdp2", 2, "--steps", 100, "--out", parts, "--resume", parts / "step-50")
    trained, again = (torch.load(Path(out) / "model.pt", weights_only=True) for out in (whole, parts))
    for name, weight in trained.items():
        assert torch.equal(weight, again[name]), name


def test_muon_on_fsdp_and_tensor_parallelism():
    printed = run("muon_fsdp_tp", 4, "--steps", 100)
    assert re.search(r"^up.weight +\(128, 96\) +Muon$", printed, re.MULTILINE)
    (loss,) = losses(printed)
    assert loss < 2.5  # it starts at log 16 = 2.77


def test_two_networks(tmp_path):
    printed = run("two_networks", 0, "--steps", 200, "--out", tmp_path / "run.jsonl")
    encoder, denoiser = map(
        float, re.search(r"d of the encoder (\S+), of the denoiser (\S+)\n", printed).groups()
    )
    assert encoder != denoiser
    rows = plot.rows_of(tmp_path / "run.jsonl")
    assert plot.curves_of(rows, "d")["0"][1][-1] == pytest.approx(encoder, rel=0.05)
    assert set(torch.load(tmp_path / "run.pt", weights_only=True)) == {"encoder", "denoiser"}
