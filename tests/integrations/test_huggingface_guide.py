"""What a reader copies runs: the guide's code, in order, and the example."""

import os
import re
import runpy
import sys

import pytest
import torch

pytest.importorskip("transformers")

from tests.integrations.processes import ROOT, needs, processes
from tests.integrations.toys import (
    Rows,
    batches,
    diffusion,
    diffusion_loss,
    images,
    language_model,
    loss_of,
    text_dataset,
    tokenizer,
)

GUIDE = ROOT / "docs/guides/huggingface.md"


@needs("accelerate", "peft", "trl", "diffusers")
@processes(1)
def test_the_guide_runs(tmp_path):
    os.chdir(tmp_path)
    unet, text_encoder = diffusion()
    held_out = Rows(16, seed=9)
    names = {
        "model": language_model(),
        "train_dataset": Rows(32),
        "eval_dataset": held_out,
        "loader": torch.utils.data.DataLoader(Rows(32), batch_size=4),
        "evaluate": lambda model: loss_of(model, held_out),
        "base": language_model(),
        "batches": batches(),
        "text_dataset": text_dataset(),
        "tokenizer": tokenizer(),
        "unet": unet,
        "text_encoder": text_encoder,
        "image_batches": images(),
        "diffusion_loss": diffusion_loss,
    }
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    saved = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("runs/*")}
    assert saved == {
        f"runs/{name}"
        for name in (
            "trainer",
            "trained",
            "model",
            "state",
            "adapter",
            "tuned",
            "unet",
            "text_encoder",
            "unet-ema",
        )
    }


@processes(1)
def test_the_example_runs(tmp_path):
    from safetensors.torch import load_file

    script = ROOT / "examples/trainer.py"
    assert len(script.read_text().splitlines()) <= 80
    small = ["--out", str(tmp_path), "--width", "16", "--files", "3"]
    for options in (["--steps", "4"], ["--steps", "6", "--resume"]):
        sys.argv = [str(script), *small, *options]
        runpy.run_path(str(script), run_name="__main__")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{k}" for k in range(1, 7)}
    assert load_file(tmp_path / "model.safetensors")
