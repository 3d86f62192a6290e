"""benchmarks/quality: tasks train, runs that exist are skipped, and the report has the right numbers."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]

pytest.importorskip("matplotlib")
pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def quality():
    """The package; afterwards, other tests must not find its neighbours' names on the path."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import quality.report
    import quality.run
    import quality.tasks
    import quality.variants

    yield quality
    sys.path[:] = before


TASKS = (
    *("mnist", "mnist-mlp", "rotated-mnist", "noisy-mnist", "few-shot-mnist", "diffusion"),
    *("gpt-w64-b8", "gpt-w128-b4", "gpt-w128-b16", "gpt-w128-b64", "gpt-w192-b16", "gpt-w128-b16-c128"),
    "gpt-w128-b16-c128-prose",
    *("lora", "experts"),
    *("addition", "logistic-digits", "logistic-cancer", "logistic-wine", "tanh-regression"),
)
TINY = {
    "width": 32,
    "layers": 1,
    "context": 16,
    "windows": 2,
    "images": 8,
    "evaluated": 8,
    "experts": 4,
    "rank": 2,
    "pretraining": 1,
    "pretraining_batch": 2,
}


def tiny(task):
    """The task with two steps of a small batch, and a very small model."""
    scale = task.scales["small"]
    shape = {name: min(TINY[name], value) for name, value in scale.shape.items()}
    return replace(task, scales={"small": replace(scale, steps=2, batch=4, shape=shape)})


def images(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 28, 28, generator=generator), torch.arange(count) % 10


@pytest.fixture
def small_data(quality, monkeypatch):
    """A few images and a short text: reading data is tested elsewhere, and MNIST may be missing."""
    from quality.tasks import data

    sets = data.Images(*images(32)), data.Images(*images(16))
    monkeypatch.setattr(data, "mnist", lambda: sets)
    text = (torch.arange(4000) * 7 % 251).to(torch.uint8)
    corpus = data.corpus.Corpus(text, text, "a short text")
    monkeypatch.setattr(data, "library", lambda **_: corpus)
    monkeypatch.setattr(data, "prose", lambda: corpus)


def test_all_tasks_are_tested(quality):
    assert set(quality.tasks.TASKS) == set(TASKS)
    assert sum(task.held_out for task in quality.tasks.TASKS.values()) == 3


def setup_of(quality, task, folder):
    return quality.task.Setup(task.scales["small"], 1, torch.device("cpu"), folder)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.usefixtures("small_data")
def test_a_task_trains_and_repeats(quality, name, tmp_path):
    task = quality.tasks.TASKS[name]
    if not task.is_available:
        pytest.skip(f"{task.needs} is not installed")
    task = tiny(task)
    ours = quality.peers.OPTIMIZERS["ours"]
    runs = [
        quality.train.train(task, setup_of(quality, task, tmp_path), ours, quality.peers.Setting())
        for _ in range(2)
    ]
    assert runs[0]["curve"] == runs[1]["curve"]
    assert [point["step"] for point in runs[0]["curve"]] == [0, 1, 2]
    assert runs[0]["loss"] is not None
    assert (runs[0]["accuracy"] is not None) == bool(task.accuracy)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.usefixtures("small_data")
def test_a_seed_is_the_same_problem_for_all_optimizers(quality, name, tmp_path):
    task = quality.tasks.TASKS[name]
    if not task.is_available:
        pytest.skip(f"{task.needs} is not installed")
    task = tiny(task)
    problems = []
    for draws in (0, 5):
        problem = task.build(setup_of(quality, task, tmp_path))
        torch.rand(draws)
        torch.manual_seed(1)  # the training loop does so, for dropout
        problems.append((problem.loss(1).item(), problem.evaluate().loss))
    assert problems[0] == problems[1]


@pytest.mark.parametrize(
    "name",
    [
        "adamw-cosine",
        "adamw-wsd",
        "adamw-constant",
        pytest.param(
            "muon-cosine", marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.8")
        ),
    ],
)
@pytest.mark.usefixtures("small_data")
def test_peers_of_torch_train(quality, name, tmp_path):
    task, entry = tiny(quality.tasks.TASKS["gpt-w64-b8"]), quality.peers.OPTIMIZERS[name]
    result = quality.train.train(task, setup_of(quality, task, tmp_path), entry, entry.settings()[0])
    assert result["loss"] is not None


@pytest.mark.parametrize("after_flatten", [True, False])
def test_dense_layers_after_flatten_may_keep_adams_direction(quality, after_flatten):
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 25), nn.Unflatten(1, (1, 5, 5)), inner, nn.Linear(8, 2))
    setting = quality.peers.Setting()
    (optimizer,) = quality.peers.ours_muon(model, setting, 1, after_flatten=after_flatten)
    muon = {p for group in optimizer.param_groups if group["use_muon_pp"] for p in group["params"]}
    found = [name for name, p in model.named_parameters() if p in muon]
    hidden = ["3.0.weight", "3.4.weight"]
    assert found == (["1.weight", "3.0.weight", "3.2.weight", "3.4.weight"] if after_flatten else hidden)


def test_schedules(quality):
    setting, entries = quality.peers.Setting(1.0, warm_up=True), quality.peers.OPTIMIZERS

    def factors(name):
        return [entries[name].factor(setting, k, 100) for k in (0, 4, 50, 90)]

    assert factors("adamw-constant") == pytest.approx([0.2, 1, 1, 1])
    assert factors("adamw-wsd") == pytest.approx([0.2, 1, 1, 0.5])
    assert factors("adamw-cosine") == pytest.approx([0.2, 0.99606, 0.5, 0.02447], abs=1e-5)
    assert factors("schedulefree-adamw") == [1, 1, 1, 1]  # it warms up by itself


def test_every_tuned_optimizer_has_seven_rates_with_and_without_warm_up(quality):
    for entry in quality.peers.OPTIMIZERS.values():
        settings = entry.settings()
        if entry.tuned != "nothing":
            assert len({its.rate for its in settings if its.warm_up}) >= 7
            assert len({its.rate for its in settings if not its.warm_up}) >= 7


@pytest.mark.usefixtures("small_data")
def test_what_is_done_is_skipped(quality, monkeypatch, tmp_path, capsys):
    name, out = "tanh-regression", tmp_path / "runs.jsonl"
    monkeypatch.setitem(quality.run.TASKS, name, tiny(quality.tasks.TASKS[name]))
    command = ["--out", str(out), "--tasks", name, "--optimizers", "ours", "adamw-wsd", "--rates", "1e-3"]
    command += ["--cache", str(tmp_path), "--seeds"]
    quality.run.main([*command, "1"])
    first = out.read_text()
    assert len(first.splitlines()) == 3  # ours, and AdamW with and without warm-up

    capsys.readouterr()
    quality.run.main([*command, "1"])
    assert out.read_text() == first
    assert not capsys.readouterr().out

    out.write_text(first[:-20])  # as if the process had died while writing
    quality.run.main([*command, "1"])
    assert len(out.read_text().splitlines()) == 3

    quality.run.main([*command, "1", "2", "--best", "1"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["optimizer"] for row in rows if row["seed"] == 2) == ["adamw-wsd", "ours"]
    assert {"torch", "processor", "threads", "commit", "package"} <= set(rows[-1]["environment"])


def row(optimizer, rate, seed, loss, accuracy=0.5):
    """A made-up run."""
    curve = [{"fraction": 0.0, "loss": 52.0}] if optimizer == "ours" else []
    curve += [{"fraction": fraction, "loss": loss} for fraction in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)]
    return {
        "task": "mnist",
        "size": "small",
        "scale": {"steps": 10, "batch": 4},
        "optimizer": optimizer,
        "setting": {"rate": rate, "warm_up": rate is not None},
        "seed": seed,
        "device": "cpu",
        "curve": curve,
        "loss": loss,
        "accuracy": accuracy,
        "cpu_seconds": 1.0,
        "environment": dict.fromkeys(("torch", "python", "processor", "threads", "commit", "package"), "x"),
    }


def test_the_report(quality, tmp_path):
    rows = [
        *(row("ours", None, seed, loss) for seed, loss in ((1, 1.9), (2, 2.1))),
        *(row("adamw-cosine", 1e-3, seed, loss) for seed, loss in ((1, 3.0), (2, 5.0))),
        *(row("adamw-cosine", 1e-2, seed, loss) for seed, loss in ((1, 2.0), (2, None))),
        row("adamw-cosine", 1e-1, 1, 0.1),  # one seed only, so not the best
        *(row("published", None, seed, 2.5) for seed in (1, 2)),
        *(row("prodigy-cosine", factor, seed, 2.5) for factor in (0.5, 1.0, 2.0) for seed in (1, 2)),
    ]
    source, out = tmp_path / "runs.jsonl", tmp_path / "quality.md"
    source.write_text("".join(json.dumps(its) + "\n" for its in rows))
    quality.report.main([str(source), "--out", str(out)])
    text = out.read_text()
    best = "prodigy-cosine, × 0.5, warm-up (edge of the grid)"
    assert f"| mnist | ours | 2 ± 0.1 (2) | {best} | 2.5 ± 0 (2) | 0.800 | -1.0% |" in text
    assert "| adamw-cosine | 0.001, warm-up (edge of the grid) | 4 ± 1 (2) | 2.000 | 50.00% | 1 |" in text
    assert "| ours | 2 | 2 | 2 | 2 | 2 | 2 |" in text
    assert "| ours | adamw-cosine | 1 of 1 | 1 of 1 |" in text
    assert "| published | ours | 0 of 1 | 1 of 1 |" in text  # higher by 0.5, 1 % of the range of 50
    assert "| published | prodigy-cosine | 1 of 1 | 1 of 1 |" in text
    assert (tmp_path / "quality" / "mnist.png").stat().st_size > 10_000


def test_a_line_that_is_no_run_is_refused(quality, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"task": "mnist"}\n')
    with pytest.raises(ValueError, match="line 1 is not a run"):
        quality.results.read([path])


@pytest.mark.usefixtures("small_data")
def test_variants_are_trained_once_and_compared(quality, monkeypatch, tmp_path):
    from quality import peers, results, runs, variants

    name, out = "tanh-regression", tmp_path / "runs.jsonl"
    monkeypatch.setitem(variants.TASKS, name, tiny(quality.tasks.TASKS[name]))
    compared = {
        "ours": variants.Variant(peers.ours),
        "nudged": variants.Variant(partial(peers.ours, d0=1.1e-6), "ours", "nudged"),
    }
    for _ in range(2):
        planned = variants.planned(compared, names=list(compared), tasks=[name], seeds=[1])
        assert runs.finish(out, planned, results.read([out]), folder=tmp_path)
        assert len(out.read_text().splitlines()) == 2
    planned = variants.planned(compared, names=list(compared), tasks=[name], seeds=[2])
    assert not runs.finish(out, planned, results.read([out]), folder=tmp_path, until=0.0)
    change = variants.changes(results.read([out]).values(), compared)["nudged"][name]
    assert change.verdict == "nothing"
    assert change.noise == pytest.approx(abs(math.log(change.ratio)))


@pytest.mark.usefixtures("quality")
def test_what_sensitivity_tells():
    import sensitivity

    losses = {("mnist-mlp", name): 1.0 for name in sensitivity.OURS} | {("mnist-mlp", "lr=3"): 1.1}
    of_adamw = zip(sensitivity.RATES, (9, 5, 2, 4, 8, 9), strict=True)
    losses |= {("mnist-mlp", sensitivity.at(rate)): loss for rate, loss in of_adamw}
    losses |= {("gpt: width 32", "untuned"): 1.5}  # AdamW has not run yet
    lines = list(sensitivity.report(losses))
    assert "| mnist-mlp | 1 | 1 | 1.1 | 1 | 1 | 1 | 1 | 10.0% | 0.0% | 150.0% |" in lines
    assert not any(line.startswith("| 32") for line in lines)
    losses |= {("gpt: width 32", sensitivity.at(rate)): 2.0 for rate in sensitivity.RATES}
    assert "| 32 | 1.500 |" + " 2.000 |" * len(sensitivity.RATES) + " 0.750 |" in sensitivity.report(losses)
