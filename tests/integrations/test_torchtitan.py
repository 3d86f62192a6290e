"""torchtitan's debug model with our optimiser: what is evaluated, saved and logged, and how runs resume."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchtitan", reason="pip install '.[torchtitan]'", exc_type=ImportError)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.torch[.]jit[.]:DeprecationWarning:torch[.]jit[.]_script"
    ),  # when imported
]

RUN = Path(__file__).with_name("torchtitan_run.py")
MESHES = {"fsdp2": (2, []), "fsdp2-tp2": (4, ["--tp", "2"])}


@pytest.fixture(scope="module", params=MESHES)
def ranks(request, tmp_path_factory):
    """The results that each rank has written."""
    processes, arguments = MESHES[request.param]
    out = tmp_path_factory.mktemp(request.param)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *(RUN, "--out", out, *arguments),
    ]
    environment = {
        **os.environ,
        "HF_HOME": str(out / "hf-home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture
def run(ranks):
    """The results that the first rank has written."""
    return ranks[0]


def later_than(step, numbers):
    return {key: value for key, value in numbers.items() if int(key) > step}


def test_an_evaluation_changes_nothing_of_the_training(run):
    # Its forward pass gathers the averaged weights; if they stayed gathered, training would use them.
    assert run["stopped"]["losses"] == {k: v for k, v in run["long"]["losses"].items() if int(k) <= 4}
    assert len(run["stopped"]["validation"]) == 3


def test_a_run_goes_on_in_its_middle_as_if_it_had_not_stopped(ranks):
    for rank in ranks:
        for name, of in {"stopped": "", "muon": "muon ", "groups": "groups "}.items():
            again = rank[f"{of}from the middle"]
            assert again["losses"] == later_than(2, rank[name]["losses"])
            assert again["numbers"] == later_than(2, rank[name]["numbers"])
            assert again["digest"] == rank[name]["digest"]


def test_a_run_goes_on_from_its_end_as_if_it_had_not_stopped(ranks):
    for rank in ranks:
        assert rank["from the end"]["losses"] == later_than(4, rank["long"]["losses"])
        assert rank["from the end"]["digest"] == rank["long"]["digest"]


def test_what_is_saved_of_the_model_alone_is_the_average(ranks):
    for rank in ranks:
        assert rank["exported"]["is x"]
        assert rank["exported"]["x is not y"]
        assert rank["hf"]["is x"]


def test_saving_the_average_changes_nothing(ranks):
    for rank in ranks:
        assert rank["exported"]["digest"] == rank["hf"]["digest"] == rank["stopped"]["digest"]


def test_what_is_evaluated_is_what_is_saved(run):
    # Compared with torchtitan's own validation of the saved weights.
    assert run["stopped"]["validation"]["4"] == run["stock validation"]


def test_the_step_size_is_logged_and_the_same_on_all_ranks(ranks):
    for name in ("long", "muon", "groups"):
        numbers = ranks[0][name]["numbers"]
        assert all(rank[name]["numbers"] == numbers for rank in ranks)
        steps = [of_step for _, of_step in sorted(numbers.items(), key=lambda item: int(item[0]))]
        key = "prodigyplus/d" if name == "long" else "prodigyplus/d/0"
        assert steps[0][key] > 1e-5
        assert all(before[key] < after[key] for before, after in itertools.pairwise(steps))
        assert {key, key.replace("/d", "/step_size"), key.replace("/d", "/skipped_steps")} <= steps[0].keys()


def test_groups_are_those_asked_for(run):
    # Two layers with five matrices each, one of them fused; five norms, embedding and head.
    assert run["muon groups"] == [10, 7]
    assert run["groups groups"] == [5, 12]
    assert run["muon share a mean"] == [False, False]
    assert run["groups share a mean"] == [True, True]


def test_stages_of_a_pipeline_share_one_step_size(ranks):
    """Tests only the container: torchtitan's pipeline schedules need a torch later than 2.13."""
    first = ranks[0]["stages"]
    assert first["d"] > 1e-5
    for rank in ranks:
        stages = rank["stages"]
        assert stages["d"] == first["d"] == stages["d of one optimiser"]
        assert stages["again"] == stages["digest"]
    assert sum(rank["stages"]["groups"][0] == 0 for rank in ranks) == len(ranks) - 1


def config():
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    return llama3_debugmodel()


def ours(**options):
    from prodigyplus_dist.integrations.torchtitan import with_prodigyplus

    return with_prodigyplus(config(), **options)


def test_a_configuration_keeps_what_is_torchtitans():
    before, after = config(), ours()
    assert after.validator.freq == before.validator.freq == 5
    assert after.checkpoint.interval == before.checkpoint.interval == 10
    assert after.metrics.log_freq == before.metrics.log_freq == 1
    assert (after.lr_scheduler.warmup_steps, after.lr_scheduler.decay_ratio) == (0, 0.0)


def test_options_can_be_given_on_the_command_line(tmp_path, monkeypatch):
    from torchtitan.config import ConfigManager

    (tmp_path / "mine.py").write_text(
        "from torchtitan.models.llama3.config_registry import llama3_debugmodel\n"
        "from prodigyplus_dist.integrations.torchtitan import with_prodigyplus\n"
        "def debug():\n"
        "    groups = {'norm': {'weight_decay': 0.0}}\n"
        "    return with_prodigyplus(llama3_debugmodel(), step_size='balance', groups=groups)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--module", "mine", "--config", "debug", "--lr_scheduler.warmup_steps", "7"]
    parsed = ConfigManager().parse_args([*arguments, "--validator.freq", "3", "--optimizer.muon"])
    assert (parsed.lr_scheduler.warmup_steps, parsed.validator.freq, parsed.optimizer.muon) == (7, 3, True)
    assert parsed.optimizer.options == {"step_size": "balance"}
    assert type(parsed.checkpoint) is type(ours().checkpoint)


@pytest.mark.parametrize("decay_ratio", [None, 0.1, 1.0])
def test_a_schedule_that_decays_is_refused(decay_ratio):
    schedule = ours().lr_scheduler
    schedule.decay_ratio = decay_ratio
    with pytest.raises(ValueError, match=re.escape(f"lr_scheduler.decay_ratio={decay_ratio}")):
        schedule.build(optimizers=[], training_steps=10)


def test_bad_configurations_are_refused():
    from dataclasses import dataclass, replace

    from torch import nn
    from torchtitan.components.checkpointer import CheckpointManager

    from prodigyplus_dist.integrations.torchtitan import with_prodigyplus

    class Other(CheckpointManager):
        @dataclass(kw_only=True, slots=True)
        class Config(CheckpointManager.Config):
            pass

    with pytest.raises(ValueError, match=r"config\.checkpoint is a .*Other\.Config"):
        with_prodigyplus(replace(config(), checkpoint=Other.Config()))
    with pytest.raises(ValueError, match="Leave one out"):
        ours(groups={"norm": {}}, muon=True)
    model = nn.Linear(2, 2)
    optimizers = ours(groups={"nowhere": {"lr": 0.5}}).optimizer.build(model_parts=[model])
    with pytest.raises(ValueError, match="'nowhere' is found in no name"):
        optimizers.build_(None)
    implementation = replace(ours().optimizer, implementation="foreach")
    with pytest.raises(ValueError, match=r"optimizer\.implementation='foreach'"):
        implementation.build(model_parts=[model])
    with pytest.raises(ValueError, match="model_spec was replaced"):
        ours().lr_scheduler.build(optimizers=ours().optimizer.build(model_parts=[model]), training_steps=10)


def test_weights_are_not_lent_while_a_checkpoint_reads_them():
    from torch import nn

    optimizers = ours().optimizer.build(model_parts=[nn.Linear(2, 2)])
    optimizers.build_(None)
    waited = []
    optimizers.before_lending = lambda: waited.append(optimizers.optimizers[0].holds_average)
    with optimizers.averaged_parameters():
        assert optimizers.optimizers[0].holds_average
    assert waited == [False]
