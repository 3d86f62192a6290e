import mnist_data
import mnist_ddp
import pytest
import torch
from ranks import Ranks
from torch.utils.data import TensorDataset

from tests.launch import running
from tests.launch.running import assert_same, assert_same_contents, contents, lines, newest, weights

SMALL = ["--limit", 200, "--batch-size", 8]  # an epoch has 25 steps


@pytest.fixture(scope="module")
def mnist():
    try:
        mnist_data.fetch(mnist_data.cache_folder())
    except OSError as error:
        pytest.skip(str(error))


def launch(*options):
    return running.launch("mnist_ddp.py", 2, *options)


def trained(*options):
    done = launch(*SMALL, *options)
    assert done.returncode == 0, done.stderr


def trained_by_a_user(processes, *options):
    done = running.run(running.command("mnist_ddp.py", processes, *SMALL, *options))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    # In float32, since many processors are slow to multiply in bfloat16.
    [[], ["--muon", "--option", "muon_fp32=True"], ["--optimizer", "adamw"]],
    ids=str,
)
def test_resumed_run_equals_an_uninterrupted_one(mnist, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained("--epochs", 2, *options, "--out", whole)
    trained("--epochs", 1, *options, "--out", parts)
    # A line that a killed run has logged after its last checkpoint; it must go.
    with (parts / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 26}\n')
    trained("--epochs", 2, *options, "--out", parts, "--resume")

    assert_same(weights(whole), weights(parts))
    assert_same_contents(newest(whole), newest(parts), tmp_path)
    assert lines(whole)[1:] == lines(parts)[1:]
    assert len([line for line in lines(whole) if line["kind"] == "test"]) == 2


@pytest.mark.xdist_group("launch")
def test_ddp_goes_on_within_an_epoch(tmp_path):
    """On three processes: there the rounding of sums depends on how DDP groups gradients."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # An epoch has 31 steps. Before steps 42, 52 and 62, each of them after a checkpoint, the optimiser looks
    # whether others have written to its weights.
    options = ["--batch-size", 3, "--epochs", 2, "--save-every", 10, "--option", "d0=0.01"]
    for out, resume in ((whole, []), (parts, ["--resume", whole / "checkpoints" / "00000051"])):
        done = running.launch("tests.launch.noise", 3, *options, *resume, "--out", out)
        assert done.returncode == 0, done.stderr
        assert "UserWarning" not in done.stderr
    assert_same(weights(whole), weights(parts))


@pytest.mark.slow
def test_run_tells_what_it_does(mnist, tmp_path):
    out = tmp_path / "new" / "folder"
    done = trained_by_a_user(2, "--epochs", 1, "--out", out)
    learning_rate, result, end = done.stdout.splitlines()
    run, *train, test = lines(out)
    d, correct = train[-1]["d"], round(test["accuracy"] * 200)
    share = f"{correct}/200 ({correct / 200:.2%})"
    assert learning_rate == f"Prodigy LR: {d:.6f}"
    assert result == f"Test set: Average loss: {test['loss']:.4f}, Accuracy: {share}"
    assert run["torch"] == torch.__version__
    assert run["processes"] == 2
    assert {"step", "epoch", "loss", "lr", "d", "d_hat", "effective_lr", "step_size"} < train[-1].keys()
    assert (out / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        *(".lock", "checkpoints", "log.jsonl", "model.json", "model.safetensors", "progress.png"),
    ]
    assert end == f"The trained model is in {out / 'model.safetensors'}"

    # The model is the average; the checkpoint has the training weights.
    saved, _ = contents(newest(out), tmp_path)
    net = mnist_ddp.network()
    net.load_state_dict(saved["model"])
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.lerp_(saved["state"][name]["z"], 1 - 1 / 0.9)
    torch.testing.assert_close(net.state_dict(), weights(out), rtol=1e-5, atol=1e-6)
    assert not torch.equal(saved["model"]["0.weight"], weights(out)["0.weight"])


@pytest.mark.slow
def test_one_process_needs_no_launcher(mnist, tmp_path):
    trained_by_a_user(0, "--epochs", 1, "--out", tmp_path)
    assert lines(tmp_path)[0]["processes"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "65"], "--batch-size 65 cannot be split evenly over 2 processes"),
        (["--resume", "README"], "there is no checkpoint README"),
        (["--resume", "DATA"], "DATA is no checkpoint of this script"),
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
