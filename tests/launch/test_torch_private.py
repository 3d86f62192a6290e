"""The private names of torch that the scripts use exist, and do what they are used for."""

import importlib
import pickle
from datetime import timedelta
from pathlib import Path

import pytest
import storage
import torch
import torch.distributed as dist
import torch_private
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in torch_private.METADATA_NAMES.items() for name in sorted(names)],
)
def test_metadata_is_described_by_names_that_torch_has(module, name):
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_names_nothing_else(tmp_path):
    save({"weight": nn.Linear(2, 3).weight, "step": 1}, checkpoint_id=tmp_path)
    named = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module, name):
            found = super().find_class(module, name)
            if not isinstance(found, torch.dtype) and module.startswith("torch"):
                named.add((module, name))
            return found

    with (tmp_path / storage.METADATA).open("rb") as file:
        Recorder(file).load()
    needed = {(module, name) for module, names in torch_private.METADATA_NAMES.items() for name in names}
    assert named == needed


def gloo_threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def test_the_timeout_of_a_group_is_set():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch_private.set_timeout(dist.group.WORLD, timedelta(seconds=77))
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


def test_released_groups_leave_no_thread():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "tp"))
        if not hasattr(mesh, "_pg_registry"):
            pytest.skip("up to torch 2.10, meshes hold no groups")
        (
            distribute_tensor(torch.ones(4), mesh["tp"], [Shard(0)]) * 2
        ).full_tensor()  # DTensor's caches now hold the mesh
        assert gloo_threads()
        torch_private.release_groups(mesh)
    finally:
        dist.destroy_process_group()
    assert gloo_threads() == []
