"""Exporting the trained model: the average is written, and training is not disturbed."""

import json

import export
import pytest
import torch
from export import save_model
from ranks import Ranks
from safetensors.torch import load_file
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from tests.launch.running import assert_same

ALONE = Ranks(0, 1, 0, 1)


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[1].weight = model[0].weight  # tied, which safetensors refuses
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("safetensors", [True, False])
def test_average_is_written_and_training_undisturbed(tmp_path, monkeypatch, safetensors):
    monkeypatch.setattr(export, "SAFETENSORS", safetensors)
    model, optimizer = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = optimizer.averaged_state_dict(model)
    path = save_model(tmp_path, model, optimizer, ALONE, {"width": 8})
    assert_same(model.state_dict(), before)
    saved = load_file(path) if safetensors else torch.load(path, weights_only=True)
    assert_same(saved, dict(expected))
    assert not torch.equal(saved["0.weight"], before["0.weight"])
    assert json.loads((tmp_path / "model.json").read_text()) == {"width": 8}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", path.name]
