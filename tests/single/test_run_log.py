"""The rows of a run's log: written, read again, drawn and summed up."""

import json

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree, plot
from prodigyplus.run_log import RunLog, to_tensorboard
from tests.single.problems import Fed, pair, run


def logged(path, groups=1, steps=5, prefix=""):
    problem = Fed(*[(8, 8)] * groups)
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in problem.parameters])
    log = RunLog(path)
    for step in range(1, steps + 1):
        run(optimizer, problem, 1)
        log.add(step, optimizer.scalars(prefix), loss=1 / step)
    return optimizer


@pytest.mark.parametrize("name", ["a/run.jsonl", "a/run.csv"])
@pytest.mark.parametrize(("groups", "prefix"), [(1, ""), (2, "prodigyplus/"), (2, "a/b/")])
def test_what_is_written_is_read_again(tmp_path, name, groups, prefix):
    path = tmp_path / name
    optimizer = logged(path, groups, prefix=prefix)
    rows = plot.rows_of(path)
    assert len(rows) == 5
    assert rows[-1] == {**optimizer.scalars(prefix), "step": 5, "loss": 0.2}


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_a_resumed_run_goes_on_in_its_file(tmp_path, name):
    path = tmp_path / name
    logged(path, steps=5)
    log = RunLog(path)
    again = dict.fromkeys(plot.rows_of(path)[0], -1.0)
    for step in (4, 5, 6):
        log.add(step, again, loss=10.0 * step)
    rows = plot.rows_of(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6]
    steps, losses = plot.curves_of(rows, "loss")[""]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert losses == [1, 1 / 2, 1 / 3, 40, 50, 60]


def test_rows_of_csv_have_the_same_names(tmp_path):
    log = RunLog(tmp_path / "run.csv")
    log.add(1, loss=2.0)
    with pytest.raises(ValueError, match=r"columns loss, step, and a row differs in loss, lr: give"):
        log.add(2, lr=2.0)


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_tensors_are_read(tmp_path, name):
    path = tmp_path / name
    loss = torch.ones((), requires_grad=True) * 0.5
    RunLog(path).add(1, {"d": torch.tensor(0.25, dtype=torch.float64)}, loss=loss)
    assert plot.rows_of(path) == [{"step": 1.0, "d": 0.25, "loss": 0.5}]


def test_metrics_are_not_for_a_row(tmp_path):
    _, optimizer = pair((2, 2))
    with pytest.raises(TypeError, match=r"numbers is a list.*optimizer\.scalars\(\)"):
        RunLog(tmp_path / "run.jsonl").add(1, optimizer.metrics())


def test_curves_are_told_apart(tmp_path):
    rows = [{"step": 1, "p/d/0": 1.0, "p/d/1": 2.0, "p/d_hat/0": 3.0, "eval_loss": 4.0, "loss": 5.0}]
    assert plot.curves_of(rows, "d") == {"0": ([1], [1.0]), "1": ([1], [2.0])}
    assert plot.curves_of(rows, "d_hat") == {"0": ([1], [3.0])}
    assert plot.curves_of(rows, "loss") == {"": ([1], [5.0])}
    assert plot.curves_of(rows, "eval_loss|val_loss") == {"": ([1], [4.0])}


def test_losses_of_the_scripts_are_told_apart(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [{"kind": "run", "lr": 1.0}, {"kind": "train", "step": 1, "loss": 2.0}]
    records += [{"kind": kind, "step": 1, "loss": 3.0, "minutes": 1.0} for kind in ("held out", "test")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = plot.rows_of(path)
    assert found == [{"step": 1, "loss": 2.0}, *[{"step": 1, "eval_loss": 3.0, "eval_minutes": 1.0}] * 2]


def test_runs_are_drawn(tmp_path, capsys):
    logged(tmp_path / "one.jsonl")
    logged(tmp_path / "two.csv", groups=2)
    trainer = {"log_history": [{"step": 1, "loss": "nan", "prodigyplus/d": 0.1}, {"train_runtime": 3.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(trainer))
    files = [str(tmp_path / name) for name in ("one.jsonl", "two.csv", "trainer_state.json")]
    plot.main([*files, "--out", str(tmp_path / "runs.png")])
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    one, two, of_trainer, last = capsys.readouterr().out.splitlines()
    assert one.startswith(f"{files[0]}: 5 steps, loss 0.2, d ")
    assert one.endswith("skipped 0")
    assert "d of group 1 " in two
    assert of_trainer == f"{files[2]}: 1 steps, loss nan, d 0.1"
    assert last == f"drawn into {tmp_path / 'runs.png'}"


def test_what_spans_much_is_drawn_by_its_logarithm():
    rows = [{"step": step, "loss": 2.0 / step, "eval_loss": 2.0 - step / 100} for step in range(1, 101)]
    rows += [{"step": 100, "accuracy": 0.99}, {"step": 100, "eval_accuracy": 0.98}]
    axes = plot.draw({"run": rows, "other": rows[:3]}).axes
    shown = {its.get_title("left").split(" (")[0]: (its.get_yscale(), len(its.lines)) for its in axes}
    assert shown == {
        "training loss": ("log", 2),
        "loss in evaluations": ("linear", 2),
        "accuracy in evaluations": ("linear", 1),
    }


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "run.jsonl").write_text('{"kind": "run"}\n')
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "script.py").write_text("import torch\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    no_row, no_log = "no row with a 'step'", "is not a log of a run"
    for name, message in (
        ("run.jsonl", no_row),
        ("other.json", no_row),
        ("none.jsonl", "No such file"),
        ("script.py", f"script.py {no_log}"),
        ("list.jsonl", f"list.jsonl {no_log}"),
    ):
        with pytest.raises(SystemExit) as ended:
            plot.main([str(tmp_path / name), "--out", str(tmp_path / "runs.png")])
        assert ended.value.code == 1
        assert message in capsys.readouterr().err


def test_tensorboard_gets_each_number():
    class Writer:
        def __init__(self):
            self.written = []

        def add_scalar(self, *row):
            self.written.append(row)

    problem, optimizer = pair((4,))
    run(optimizer, problem, 3)
    writer = Writer()
    to_tensorboard(writer, optimizer.scalars("p/"), 3)
    assert {name: number for name, number, _ in writer.written} == optimizer.scalars("p/")
    assert {step for *_, step in writer.written} == {3}
