"""Runs that prodigy-plus-schedule-free has saved continue here; tests/golden/make_published.py saved them."""

import copy
import gzip
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree, import_published
from prodigyplus.published import Outcome
from tests.golden import GOLDEN, floors
from tests.golden.cases import Problem, distance
from tests.golden.published_cases import AFTER, EVERY, SAVED, SHAPES, TALL
from tests.single.problems import assert_same, snapshot

ROOT = Path(__file__).parents[2]

NAMES_2_0 = [name for name in SAVED if name.startswith("2.0") and name != "2.0_bfloat16"]
NAMES_1_9 = [name for name in SAVED if name.startswith("1.9")]


def golden(name):
    with gzip.open(GOLDEN / f"published_{name}.pt.gz") as file:
        return torch.load(file, weights_only=True)


def problem_and_optimizer(name, groups=None, **options):
    """The problem at the step at which a run was saved, but with initial weights; and a new optimiser."""
    saved = SAVED[name]
    problem = Problem(saved.dtype, shapes=SHAPES)
    for _ in range(saved.before):
        problem.backward()
    parameters = list(problem.parameters)
    sizes = [count for count, _ in groups or saved.groups]
    taken = [{"params": [parameters.pop(0) for _ in range(size)]} for size in sizes]
    return problem, ProdigyPlusScheduleFree(taken, **options)


def quietly(optimizer, state_dict):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_published(optimizer, state_dict)


def imported(name, **options):
    problem, optimizer = problem_and_optimizer(name, **options)
    saved = golden(name)
    with torch.no_grad():
        for p, value in zip(problem.parameters, saved["weights"], strict=True):
            p.copy_(value)
    report = quietly(optimizer, saved["optimizer"])
    return problem, optimizer, saved, report


def go_on(name, problem, optimizer, steps):
    for _ in range(steps):
        problem.backward()
        for number in SAVED[name].without_gradient:
            problem.parameters[number].grad = None
        optimizer.step()
        yield [float(group["d"]) for group in optimizer.metrics()]


def bounds(saved, name):
    """How far off "d" may be at each step that is compared, or weights after the "first" or "last" step."""
    window = floors.WINDOW if name == "d" else 0
    roundings = floors.ROUNDINGS_OF_A_STEP if name == "first" else floors.ROUNDINGS
    return floors.bounds(saved["floor"][name].numpy(), window=window, roundings=roundings)


def furthest(problem, expected, without=()):
    """The largest distance of any parameter from the published package's."""
    found = [p.detach().flatten()[::EVERY].float().numpy() for p in problem.parameters]
    return max(
        distance(ours, expected[number].float().numpy())
        for number, ours in enumerate(found)
        if number not in without
    )


@pytest.mark.parametrize("name", NAMES_2_0)
def test_2_0_goes_on_as_there(name):
    problem, optimizer, saved, _ = imported(name)
    optimizer.train()
    run = go_on(name, problem, optimizer, AFTER)
    d = [next(run)]
    assert furthest(problem, saved["first"]) <= bounds(saved, "first")
    d += run
    off = (torch.tensor(d, dtype=torch.float64) / saved["d"] - 1).abs().amax(dim=1).numpy()
    assert (off <= bounds(saved, "d")).all()  # at every step
    assert furthest(problem, saved["last"]) <= bounds(saved, "last")


def test_2_0_in_bfloat16():
    """One step from the saved state lands within a rounding of where the package's own landed."""
    problem, optimizer, saved, _ = imported("2.0_bfloat16")
    dtypes = {key: value.dtype for state in optimizer.state.values() for key, value in state.items()}
    assert {key for key, dtype in dtypes.items() if dtype == torch.bfloat16} == {"z", "exp_avg_sq", "p0", "s"}
    (d,) = next(go_on("2.0_bfloat16", problem, optimizer, 1))
    assert d == pytest.approx(float(saved["d"][0]), rel=2**-8)
    assert furthest(problem, saved["first"]) <= 2**-10


@pytest.mark.parametrize("name", ["1.9_groups", "1.9_speed", "1.9_frozen"])
def test_1_9_where_it_is_the_same_algorithm(name):
    """The first step is the same; with d frozen, all are. Tall tensors differ, as they do from 2.0.1."""
    problem, optimizer, saved, _ = imported(name)
    run = go_on(name, problem, optimizer, AFTER)
    next(run)
    assert furthest(problem, saved["first"], without=TALL) <= bounds(saved, "first")
    if name == "1.9_frozen":
        list(run)
        assert furthest(problem, saved["last"], without=TALL) <= bounds(saved, "last")


@pytest.mark.parametrize("name", NAMES_1_9)
def test_1_9_goes_on_well(name):
    problem, optimizer, saved, _ = imported(name)
    before = [float(group["d"]) for group in optimizer.param_groups]
    optimizer.train()
    assert problem.loss() == pytest.approx(float(saved["loss"][0]), rel=1e-5)
    first, *_ = go_on(name, problem, optimizer, AFTER)
    assert all(old <= new <= 1.2 * old for old, new in zip(before, first, strict=True))
    assert problem.loss() <= 1.5 * float(saved["loss"][-1]) or name == "1.9_focus"
    assert problem.loss() <= 0.6 * float(saved["loss"][0]) or name == "1.9_muon"  # it has only just begun


@pytest.mark.parametrize("name", ["1.9_default_eval", "1.9_pooled", "1.9_groups", "1.9_focus", "1.9_frozen"])
def test_units_of_1_9(name):
    _, optimizer = problem_and_optimizer(name)
    saved = golden(name)["optimizer"]
    if name == "1.9_frozen":
        saved["param_groups"][0]["d_prev"] /= 2  # out of date once d is frozen
    if name == "1.9_groups":
        saved["param_groups"][0]["prodigy_steps"] = 1000  # not reached yet
    exactly = {"rtol": 1e-6, "atol": 0}
    quietly(optimizer, saved)
    for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        leader = saved["param_groups"][0] if name == "1.9_pooled" else theirs
        last_d = leader["d" if name == "1.9_frozen" else "d_prev"]
        weight = theirs["d"] ** 1.5 / theirs["d0"] ** 0.5
        for key in ("d_numerator", "d_denom"):
            assert ours[key] == pytest.approx(weight * theirs[key], rel=1e-12)
        assert ours["weight_sum"] == theirs["weight_sum"]
        for number, p in zip(theirs["params"], ours["params"], strict=True):
            before, after = saved["state"][number], optimizer.state[p]
            if isinstance(before["exp_avg_sq"], list):
                torch.testing.assert_close(
                    after["exp_avg_sq_row"], last_d**2 * before["exp_avg_sq"][0], **exactly
                )
                torch.testing.assert_close(
                    after["exp_avg_sq_col"], last_d**2 * before["exp_avg_sq"][1], **exactly
                )
            else:
                key = "exp_avg_weight" if theirs["use_focus"] else "exp_avg_sq"
                torch.testing.assert_close(after[key], last_d**2 * before["exp_avg_sq"], **exactly)
            if "s" in before:
                torch.testing.assert_close(after["s"], weight * before["s"], rtol=2**-8, atol=0)


def test_speed_of_1_9_has_our_units():
    _, optimizer, saved, _ = imported("1.9_speed")
    (group,), (theirs,) = optimizer.param_groups, saved["optimizer"]["param_groups"]
    assert (group["d_numerator"], group["d_denom"]) == (theirs["d_numerator"], theirs["d_denom"])
    for number, p in enumerate(group["params"]):
        assert_same(optimizer.state[p]["s"], saved["optimizer"]["state"][number]["s"])


@pytest.mark.parametrize("name", SAVED)
def test_numbers_and_options(name):
    options = {"beta4": 0.5, "slice_p": 3, "d_limiter": False, "muon_quintic": True}
    _, optimizer = problem_and_optimizer(name, **options)
    optimizer.param_groups[-1]["muon_fp32"] = True
    saved = golden(name)["optimizer"]
    if "max_d_numerator" in saved["param_groups"][0]:
        saved["param_groups"][0]["max_d_numerator"] *= 2
    report = quietly(optimizer, saved)
    assert report.train_mode is (SAVED[name].mode == "train")
    for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        same = {"lr", "betas", "eps", "weight_decay", "factored", "use_grams", "use_adopt", "use_orthograd"}
        same |= {"d", "train_mode", "prodigy_steps"}
        if report.version == "2.0":
            same |= {"d_numerator", "d_denom", "max_d_numerator", "effective_lr", "use_schedulefree"}
            same |= {"schedulefree_c", "split_groups", "split_groups_mean", "d_limiter"}
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        assert ours["calls"] == theirs["k"] - 1 == SAVED[name].before
        assert ours["k"] == (ours["calls"] if ours["params"] else 0)
        assert ours["use_speed"] == (
            theirs["use_speed"] and ("relative" if report.version == "2.0" else True)
        )
        assert (ours["beta4"], ours["slice_p"], ours["muon_quintic"]) == (0, 11, True)
        assert ours["muon_fp32"] is (ours is optimizer.param_groups[-1])
        assert ours["d_limiter"] is (report.version == "2.0")
        if theirs["use_speed"]:
            assert ours["d_hat"] == theirs["d"]
        elif theirs["params"]:
            assert ours["d_hat"] == pytest.approx(theirs["d_numerator"] / theirs["d_denom"])
    _, another = problem_and_optimizer(name)
    another.load_state_dict(optimizer.state_dict())  # its state dict is complete
    assert_same(another.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("factor", [1, 3])
def test_step_size_in_use(factor):
    """The groups' mean continues as it was. 1.9 does not save it; there it is computed from their d."""
    for name in ("2.0_groups", "1.9_groups"):
        _, optimizer = problem_and_optimizer(name)
        saved = golden(name)["optimizer"]
        first, second = saved["param_groups"]
        first["d"] *= factor
        mean = 2 / (1 / first["d"] + 1 / second["d"])
        quietly(optimizer, saved)
        assert [group["shared_d"] for group in optimizer.param_groups] == pytest.approx([mean] * 2)
    second["weight_sum"] = 0.0  # as if it had never moved
    quietly(optimizer, saved)
    shared = [group["shared_d"] for group in optimizer.param_groups]
    assert shared == pytest.approx([first["d"], second["d"]], rel=1e-12)


def test_a_group_that_never_moved():
    """Its d0 does not hold the others' step size down, as it does in 2.0."""
    _, optimizer = problem_and_optimizer("2.0_adam_groups")
    saved = golden("2.0_adam_groups")["optimizer"]
    moved, idle = saved["param_groups"]
    assert "shared_d (" not in str(quietly(optimizer, saved))
    assert all(group["weight_sum"] > 0 for group in optimizer.param_groups)
    for number in idle["params"]:
        del saved["state"][number]
    idle["d"] = idle["d0"]
    for group in (moved, idle):
        group["shared_d"] = 2 / (1 / moved["d"] + 1 / idle["d"])
    line = "shared_d (2 groups): the mean of the groups with evidence, not of all"
    assert line in str(quietly(optimizer, saved))
    shared = [group["shared_d"] for group in optimizer.param_groups]
    assert shared == pytest.approx([moved["d"], idle["d0"]], rel=1e-12)
    before = SAVED["2.0_adam_groups"].before
    assert [(group["k"], group["calls"]) for group in optimizer.param_groups] == [
        (before, before),
        (0, before),
    ]
    assert [group["weight_sum"] > 0 for group in optimizer.param_groups] == [True, False]


def test_pooled_groups_of_1_9_are_seen():
    for name, split in (("1.9_pooled", False), ("1.9_groups", True)):
        _, optimizer, _, _ = imported(name)
        assert [group["split_groups"] for group in optimizer.param_groups] == [split, split]
    for split in (True, False):
        _, optimizer, _, _ = imported("1.9_speed", split_groups=split)
        assert optimizer.param_groups[0]["split_groups"] is split


def test_2_0_0_has_no_schedulefree_c():
    _, optimizer = problem_and_optimizer("2.0_default", schedulefree_c=7.0)
    saved = golden("2.0_default")["optimizer"]
    del saved["param_groups"][0]["schedulefree_c"]
    quietly(optimizer, saved)
    assert optimizer.param_groups[0]["schedulefree_c"] == 0


def test_keys_of_the_group_itself_stay():
    problem, optimizer = problem_and_optimizer("2.0_default")
    saved = golden("2.0_default")["optimizer"]
    saved["param_groups"][0] |= {"initial_lr": 0.5, "use_muon_pp": True}  # 2.0.0 took any option
    report = quietly(optimizer, saved)
    (group,) = optimizer.param_groups
    assert group["initial_lr"] == 0.5
    assert group["use_muon_pp"] is False
    assert not group.keys() & {"optimiser_version", "d_prev", "running_d_denom"}
    assert any(item.names == ("initial_lr",) for item in report.of(Outcome.EXACT))
    list(go_on("2.0_default", problem, optimizer, 1))


@pytest.mark.parametrize("name", ["2.0_bfloat16", "2.0_default", "1.9_default_eval"])
def test_state_that_the_package_has_loaded(name):
    """The package loads by torch's loader, which casts all state to the dtype of the weights."""

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(SAVED[name].dtype)
        return list(map(cast, value)) if isinstance(value, list) else value

    problem, optimizer = problem_and_optimizer(name)
    saved = golden(name)["optimizer"]
    for state in saved["state"].values():
        state.update({key: cast(value) for key, value in state.items()})
    quietly(optimizer, saved)
    for key, value in ((key, value) for state in optimizer.state.values() for key, value in state.items()):
        assert value.dtype == (torch.float32 if key == "exp_avg_sq_mean" else SAVED[name].dtype)
    optimizer.train()
    list(go_on(name, problem, optimizer, 2))
    assert all(p.isfinite().all() for p in problem.parameters)


def test_nothing_is_shared_or_changed():
    for name in ("2.0_default", "1.9_default_eval"):
        problem, optimizer = problem_and_optimizer(name)
        saved = golden(name)["optimizer"]
        kept = copy.deepcopy(saved)
        quietly(optimizer, saved)
        optimizer.train()
        list(go_on(name, problem, optimizer, 3))
        assert_same(saved, kept)


# ---------------------------------------------------------------------------------- what does not fit


def changed(group=None, state=None, **entries):
    """A function that changes entries of a state dict's group, or of a parameter's state."""

    def change(saved):
        target = saved["param_groups"][group or 0] if state is None else saved["state"][state]
        target.update(entries)
        for key in [key for key, value in target.items() if value is None and key in entries]:
            del target[key]

    return change


BAD = {
    "no state": ("2.0_default", lambda saved: saved.pop("state"), "has no 'state'"),
    "version": ("2.0_default", changed(optimiser_version=(2, 1, 0)), r"optimiser_version \[\(2, 1\)\]"),
    "versions": ("2.0_groups", changed(optimiser_version=None), r"optimiser_version \[\(1, 9\), \(2, 0\)\]"),
    "another package": (
        "1.9_speed",
        changed(d_prev=None),
        r"param_groups\[0\] .* has no d_prev: it is not of",
    ),
    "option missing": ("2.0_groups", changed(1, use_focus=None), r"param_groups\[1\] .* no use_focus"),
    "option wrong": ("2.0_default", changed(lr=-1.0), "lr=-1.0: must be"),
    "diverged": ("2.0_default", changed(d_numerator=float("nan")), r"param_groups\[0\] .* d_numerator=nan"),
    "a group less": ("2.0_groups", lambda saved: saved["param_groups"].pop(), "1 parameter groups, .* 2"),
    "a parameter less": (
        "2.0_groups",
        lambda saved: saved["param_groups"][1]["params"].pop(),
        r"param_groups\[1\] .* has 5 parameters, the optimiser's 6",
    ),
    "other shape": (
        "2.0_groups",
        changed(state=5, z=torch.zeros(36, 8)),
        r"parameter 1 of param_groups\[1\] has shape \(8, 36\), .* of shape \(36, 8\)",
    ),
    "no z": ("2.0_default", changed(state=3, z=None), "parameter 3 .* has no z nor exp_avg"),
    "other samples": (
        "2.0_default",
        changed(state=5, p0=torch.zeros(288)),
        r"parameter 5 .* 'p0' of shape \(288,\) .* every 11th element, here of shape \(27,\)",
    ),
    "no s": ("2.0_default", changed(state=5, s=None), "parameter 5 .* has no 's'"),
    "unknown state": ("2.0_default", changed(state=5, hessian=torch.zeros(8, 36)), "parameter 5 .*'hessian'"),
    "factors of another": (
        "2.0_default",
        changed(state=5, exp_avg_sq_row=torch.zeros(36, 1)),
        "parameter 5 .* 'exp_avg_sq_row' .* has shape",
    ),
    "no second moment": ("2.0_default", changed(state=0, exp_avg_sq=None), "parameter 0 .* holds"),
    "vectors in Muon": (
        "1.9_groups",
        changed(use_muon_pp=True),
        r'parameter 0 .* has shape \(\), .*\["param_groups"\]\[0\]\["use_muon_pp"\] = False',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_changes_nothing(case):
    name, change, message = BAD[case]
    problem, optimizer = problem_and_optimizer(name)
    list(go_on(name, problem, optimizer, 2))
    before = snapshot(optimizer)
    saved = golden(name)["optimizer"]
    change(saved)
    with pytest.raises(ValueError, match=message):
        import_published(optimizer, saved)
    assert_same(snapshot(optimizer), before)


def test_state_of_ours_is_not_theirs():
    _, optimizer = problem_and_optimizer("2.0_default")
    with pytest.raises(ValueError, match="State of ours is for load_state_dict"):
        import_published(optimizer, optimizer.state_dict())


# ------------------------------------------------------------------------------------------ the report


def test_muon_of_1_9_goes_on():
    _, optimizer, _, report = imported("1.9_muon")
    assert [group["use_muon_pp"] for group in optimizer.param_groups] == [False, True]
    for p in optimizer.param_groups[1]["params"]:
        assert optimizer.state[p].keys() == {"z", "p0", "s"}
    assert "use_muon_pp (1 group): has other polynomials" in str(report)


def test_muon_of_1_9_without():
    problem, optimizer = problem_and_optimizer("1.9_muon")
    saved = golden("1.9_muon")["optimizer"]
    saved["param_groups"][1]["use_muon_pp"] = False
    with pytest.warns(UserWarning, match=r"second moment \(7 parameters\): Muon had none"):
        report = import_published(optimizer, saved)
    assert [item.count for item in report.of(Outcome.ANEW)] == [7]
    for p in optimizer.param_groups[1]["params"]:
        moments = [value for key, value in optimizer.state[p].items() if key.startswith("exp_avg_sq")]
        assert moments
        assert not any(value.any() for value in moments)
    list(go_on("1.9_muon", problem, optimizer, 3))


@pytest.mark.parametrize("name", SAVED)
def test_it_warns_where_the_run_differs(name):
    _, optimizer = problem_and_optimizer(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = import_published(optimizer, golden(name)["optimizer"])
    notable = report.of(Outcome.CHANGES, Outcome.ANEW)
    assert len(caught) == bool(notable)
    for warning in caught:
        assert warning.filename == __file__
        assert all(str(item) in str(warning.message) for item in notable)
    tall = [item.count for item in notable if item.names == ("exp_avg_sq_row",)]
    numbers = set(TALL) - set(SAVED[name].without_gradient)
    full = SAVED[name].options.get("factored") is False or name == "1.9_muon"
    assert tall == ([] if full else [len(numbers)])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"use_cautious": True}, "use_cautious (1 group): applies its mask"),
        ({"use_adopt": True}, "use_adopt (1 group): normalises d·g"),
        ({"d_coef": 0.9, "use_speed": False}, "d_limiter (1 group): limits d_coef·d_hat"),
    ],
    ids=str,
)
def test_where_2_0_does_otherwise(changes, line):
    _, optimizer = problem_and_optimizer("2.0_adam_groups")
    saved = golden("2.0_adam_groups")["optimizer"]
    assert line not in str(quietly(optimizer, saved))
    saved["param_groups"][1].update(changes)
    assert line in str(quietly(optimizer, saved))


@pytest.mark.parametrize("option", ["use_cautious", "use_adopt"])
def test_with_schedule_free_they_are_the_same(option):
    _, optimizer = problem_and_optimizer("2.0_full_eval")
    saved = golden("2.0_full_eval")["optimizer"]
    saved["param_groups"][0][option] = True
    assert not quietly(optimizer, saved).of(Outcome.CHANGES)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"use_stableadamw": True}, "use_stableadamw (1 group): divides by the root"),
        ({"eps": None}, "eps=None (1 group): steps are 4/π"),
        ({"use_orthograd": True}, "use_orthograd (1 group): projects the direction"),
        ({"prodigy_steps": 3}, "d_prev (1 group): does not shorten"),
    ],
    ids=str,
)
def test_where_1_9_does_otherwise(changes, line):
    _, optimizer = problem_and_optimizer("1.9_groups")
    saved = golden("1.9_groups")["optimizer"]
    assert line not in str(quietly(optimizer, saved))
    saved["param_groups"][1].update(changes)
    assert line in str(quietly(optimizer, saved))


def test_what_did_not_take_part():
    _, optimizer, _, report = imported("2.0_unused_eval")
    numbers = {p: number for number, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    assert {numbers[p] for p in optimizer.state} == set(range(10)) - {1, 7}
    for p in optimizer.state:
        zero = numbers[p] in SAVED["2.0_unused_eval"].zero_at_first
        assert optimizer.state[p]["p0"].shape == optimizer.state[p]["s"].shape
        assert optimizer.state[p]["p0"].any() == (not zero)
    assert "no state (2 parameters): no gradient yet" in str(report)
    assert "p0 (3 parameters): one zero stood for all" in str(report)
    assert "saved in eval mode" in str(report)


def test_a_large_model_has_a_short_report():
    saved = golden("1.9_default_eval")["optimizer"]
    (group,) = saved["param_groups"]
    group["params"] = list(range(500))
    saved["state"] = {number: saved["state"][number % 10] for number in range(500)}
    optimizer = ProdigyPlusScheduleFree(
        [torch.nn.Parameter(torch.zeros(SHAPES[number % 10])) for number in range(500)]
    )
    report = str(quietly(optimizer, saved))
    assert "z (500 parameters)" in report
    assert len(report.splitlines()) <= 30
    assert max(map(len, report.splitlines())) <= 100


def test_the_report_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "published.md").read_text()
    *_, report = imported("2.0_default")
    assert str(report) in page


@pytest.mark.parametrize("beside", [False, True])
def test_the_published_package_beside_this_one_is_told_of(tmp_path, beside):
    """Both install into the same folder, and pip does not warn."""
    if beside:
        info = tmp_path / "prodigy_plus_schedule_free-2.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: prodigy-plus-schedule-free\nVersion: 2.0.1\n")
    done = subprocess.run(
        [sys.executable, "-c", "import prodigyplus"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("Uninstall both" in done.stderr) == beside
