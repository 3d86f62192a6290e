import json
import os
import subprocess
import sys
from pathlib import Path

import mnist_data
import mnist_ddp
import pytest
import torch
from ranks import Ranks
from torch.utils.data import TensorDataset

from prodigyplus import ProdigyPlusScheduleFree

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def mnist():
    try:
        mnist_data.fetch(mnist_data.cache_folder())
    except OSError as error:
        pytest.skip(str(error))


def launch(*options, processes=2):
    """Run the script; a run that hangs fails."""
    command = [
        sys.executable,
        *(TORCHRUN if processes == 2 else ()),
        "launch/mnist_ddp.py",
        *map(str, options),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def trained(*options, **kwargs):
    done = launch("--limit", 640, "--batch-size", 16, *options, **kwargs)
    assert done.returncode == 0, done.stderr
    return done


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--muon"], ["--optimizer", "adamw"]], ids=str)
def test_resumed_run_equals_an_uninterrupted_one(mnist, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained("--epochs", 2, *options, "--out", whole)
    trained("--epochs", 1, *options, "--out", parts)
    # What a run was killed over is not in its checkpoint, and goes.
    with (parts / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 41}\n')
    trained("--epochs", 2, *options, "--out", parts, "--resume")

    assert_same(load(whole / "model.pt"), load(parts / "model.pt"))
    one, other = load(whole / "checkpoint.pt"), load(parts / "checkpoint.pt")
    assert_same(one.pop("model"), other.pop("model"))
    assert_same(one["optimizer"].pop("state"), other["optimizer"].pop("state"))
    assert one == other
    assert lines(whole)[1:] == lines(parts)[1:]
    assert len([line for line in lines(whole) if line["kind"] == "test"]) == 2


@pytest.mark.slow
def test_run_tells_what_it_does(mnist, tmp_path):
    out = tmp_path / "new" / "folder"
    done = trained("--epochs", 1, "--out", out)
    learning_rate, result = done.stdout.splitlines()
    run, *train, test = lines(out)
    d, correct = train[-1]["d"], round(test["accuracy"] * 640)
    share = f"{correct}/640 ({correct / 640:.2%})"
    assert learning_rate == f"Prodigy LR: {d:.6f}"
    assert result == f"Test set: Average loss: {test['loss']:.4f}, Accuracy: {share}"
    assert run["torch"] == torch.__version__
    assert run["processes"] == 2
    assert {"step", "epoch", "loss", "lr", "d", "d_hat", "effective_lr", "step_size"} < train[-1].keys()
    assert (out / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        *("checkpoint.pt", "log.jsonl", "model.pt", "progress.png"),
    ]

    # model.pt is the average; the checkpoint is in the mode of training.
    checkpoint, average = load(out / "checkpoint.pt"), load(out / "model.pt")
    net = mnist_ddp.network()
    optimizer = ProdigyPlusScheduleFree(net.parameters())
    net.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    optimizer.train()
    assert_same(net.state_dict(), checkpoint["model"])
    optimizer.eval()
    assert_same(net.state_dict(), average)


@pytest.mark.slow
def test_one_process_needs_no_launcher(mnist, tmp_path):
    trained("--epochs", 1, "--out", tmp_path, processes=1)
    assert lines(tmp_path)[0]["processes"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "65"], "--batch-size 65 cannot be split evenly over 2 processes"),
        (["--resume"], "there is no checkpoint OUT/checkpoint.pt"),
        (["--resume", "README"], "README is not a checkpoint of this script"),
        (["--data", "DATA"], "DATA has no file train-labels-idx1-ubyte"),
    ],
)
def test_error_is_told_once_and_ends_all_processes(mnist, tmp_path, options, message):
    out, data, readme = tmp_path / "out", tmp_path / "data", tmp_path / "readme"
    readme.write_text("not a checkpoint")
    data.mkdir()
    images = "train-images-idx3-ubyte"
    (data / images).symlink_to(mnist_data.cache_folder() / images)

    def place(text):
        return text.replace("OUT", str(out)).replace("DATA", str(data)).replace("README", str(readme))

    done = launch("--out", out, *map(place, options))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert place(message) in done.stderr
    assert done.stdout == ""
    assert not out.exists()


def test_resume_refuses_another_setting(tmp_path):
    net = mnist_ddp.network()
    optimizer = torch.optim.AdamW(net.parameters())
    settings = {"optimizer": "adamw", "batch_size": 64}
    mnist_ddp.save(tmp_path, net, optimizer, 3, settings, [])
    path = tmp_path / "checkpoint.pt"
    assert mnist_ddp.resume(path, net, optimizer, settings) == (3, [])
    with pytest.raises(ValueError, match=r"was trained with --batch-size 64, not 32\.$"):
        mnist_ddp.resume(path, net, optimizer, {**settings, "batch_size": 32})


@pytest.mark.parametrize("size", [2, 3, 50])
def test_processes_share_the_test_set(size):
    torch.manual_seed(0)
    net = mnist_ddp.network()
    data = TensorDataset(
        torch.randint(256, (40, 28, 28), dtype=torch.uint8), torch.randint(10, (40,), dtype=torch.uint8)
    )

    def evaluate(rank, size):
        return torch.tensor(mnist_ddp.evaluate(net, data, Ranks(rank, size, rank, size)))

    shares = sum(evaluate(rank, size) for rank in range(size))
    torch.testing.assert_close(shares, evaluate(0, 1))
