"""NCCL process groups with one process, and the launch scripts, on a GPU."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.cuda.feeding import D0, GPU
from tests.dist.meshes import whole
from tests.models import Tiny, Walks, distance, fit

BACKEND = "nccl"
ROOT = Path(__file__).parents[2]
STEPS = 20

OPTIONS = [{}, {"fused": False}, {"use_muon_pp": True, "muon_fp32": True}]


@pytest.fixture
def process_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(BACKEND, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class OnGpu:
    """Batches of walks, sent to the GPU."""

    def __init__(self):
        self._walks = Walks()

    def next(self):
        return self._walks.next().to(GPU)


def train(make, options, wrap=lambda model: model):
    """Train a wrapped model; return its weights, and d at every step."""
    torch.manual_seed(0)
    model = Tiny().to(GPU)
    called = wrap(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    of_muon = options.get("use_muon_pp", False)
    groups = [
        {"params": [p for p in trained if p.ndim == 2], **options},
        {"params": [p for p in trained if p.ndim != 2], **options, "use_muon_pp": False, "muon_fp32": False},
    ]
    optimizer = make(groups if of_muon else trained, d0=D0, **({} if of_muon else options))
    d = fit(called, optimizer, OnGpu(), STEPS)
    if make is ShardedProdigyPlusScheduleFree:
        optimizer.check_replicas()
    return [whole(p) for p in trained], d


def sharded(model):
    return fully_shard(model, mesh=init_device_mesh(GPU.type, (1,)))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # that its output is a view
@pytest.mark.parametrize("wrap", [sharded, DistributedDataParallel])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_in_one_process(options, wrap, process_group):
    expected, expected_d = train(ProdigyPlusScheduleFree, options)
    found, d = train(ShardedProdigyPlusScheduleFree, options, wrap)
    assert expected_d[-1] > D0
    assert d == pytest.approx(expected_d, rel=1e-5)
    assert distance(found, expected) <= 1e-5


def launch(script, out, *options):
    """Run a script on a GPU to its end; return the records of its log."""
    for package in ("matplotlib", "numpy", "safetensors", "tqdm"):
        pytest.importorskip(package)
    from tests.launch import running

    environment = running.environment()
    del environment["CUDA_VISIBLE_DEVICES"]  # it would hide the GPUs
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    command = running.command(script, 1, *options, "--out", out)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    first, *_ = records = running.lines(out)
    assert GPU.type in str(first["device"])
    return records


def losses(records):
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("options", [(), ("--muon",)], ids=str)
def test_gpt(tmp_path, options):
    size = ("--layers", 2, "--width", 32, "--heads", 4, "--context", 32, "--batch-size", 32)
    spells = ("--steps", 30, "--eval-every", 15, "--log-every", 1)
    records = launch("gpt_fsdp2.py", tmp_path, *size, *spells, "--data", "prodigyplus_dist", *options)
    assert len(losses(records)) == 30
    assert losses(records)[-1] < losses(records)[0]


def test_mnist(tmp_path, monkeypatch):
    pytest.importorskip("numpy")
    monkeypatch.syspath_prepend(ROOT / "launch")
    import mnist_data

    folder = mnist_data.cache_folder()
    try:
        mnist_data.load(folder)
    except (OSError, ValueError) as error:
        pytest.skip(f"MNIST is not here: {error}")
    options = ("--epochs", 1, "--limit", 640, "--batch-size", 32, "--data", folder)
    records = launch("mnist_ddp.py", tmp_path, *options)
    assert losses(records)
    assert any(record["kind"] == "test" for record in records)
