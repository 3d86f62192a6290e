"""Lightning: x is evaluated and saved, and a resumed run equals the run that was not stopped."""

import copy
import os
import re
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pl = pytest.importorskip("lightning.pytorch")

from lightning.fabric.utilities.load import _load_distributed_checkpoint  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402

from prodigyplus import ProdigyPlusScheduleFree  # noqa: E402
from prodigyplus_dist import ShardedProdigyPlusScheduleFree  # noqa: E402
from prodigyplus_dist.integrations import lightning  # noqa: E402
from prodigyplus_dist.integrations.lightning import WEIGHTS, ScheduleFreeCallback  # noqa: E402
from tests.dist.pool import Pool  # noqa: E402
from tests.single.problems import assert_same  # noqa: E402

pytestmark = [
    pytest.mark.xdist_group("integrations"),
    # Lightning's own warnings: of small data, few workers, and old names of torch that it still uses.
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore:::torch.distributed.checkpoint"),
    pytest.mark.filterwarnings("ignore:::torch.jit"),
]

BATCHES = 6  # in an epoch
TWO = {"prodigyplus/0/d", "prodigyplus/1/d"}  # what is logged for two optimisers
KINDS = ("ddp", "sharded", "full")  # on two processes; the last two are FSDP2 with either kind of checkpoint


def is_sharded(kind):
    return kind in ("sharded", "full")


HELD_OUT = torch.utils.data.DataLoader(
    [torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)], batch_size=None
)


class Batches:
    """A loader whose place a checkpoint keeps, also within an epoch; ranks have different batches."""

    def __init__(self):
        self.at = 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        for number in range(self.at % BATCHES, BATCHES):
            self.at = number + 1
            rank = dist.get_rank() if dist.is_initialized() else 0
            yield torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * number + rank))

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Module(pl.LightningModule):
    """Seeds dropout by the step, since Lightning's checkpoints do not keep the generator's state."""

    def __init__(self, kind="one", options=None, optimizers=1):
        super().__init__()
        self.kind, self.options = kind, options or {}
        self.automatic_optimization = optimizers == 1
        torch.manual_seed(0)
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))
            for _ in range(optimizers)
        )

    def configure_model(self):
        if is_sharded(self.kind) and not isinstance(self.nets[0][0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for net in self.nets:
                fully_shard(net[0], mesh=mesh)
                fully_shard(net, mesh=mesh)

    def loss(self, batch, net):
        return (net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, index):
        torch.manual_seed(1000 + self.global_step + (dist.get_rank() if dist.is_initialized() else 0))
        losses = [self.loss(batch, net) for net in self.nets]
        self.log("loss", sum(losses))
        if self.automatic_optimization:
            return losses[0]
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return None

    def validation_step(self, batch, index):
        loss = sum(self.loss(batch, net) for net in self.nets)
        self.log("val", loss, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, index):
        return torch.cat([net(batch) for net in self.nets])

    def configure_optimizers(self):
        make = ShardedProdigyPlusScheduleFree if is_sharded(self.kind) else ProdigyPlusScheduleFree
        options = {"d0": 1e-2, "step_size": "balance", **self.options}
        return [make(net.named_parameters(), **options) for net in self.nets]


def local(tensors):
    """Copies of this rank's pieces of tensors, by name."""
    named = tensors.items() if isinstance(tensors, dict) else tensors
    return {
        name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in named
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights_of(trainer):
    """This rank's pieces of the parameters, from the optimisers: a gathered FSDP2 module has others."""
    return local(
        (f"nets.{index}.{name}", p)
        for index, optimizer in enumerate(trainer.optimizers)
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    )


def averages(trainer, module, full=False):
    """x, as the optimisers themselves give it."""
    parts = [
        optimizer.averaged_state_dict(net, full=full)
        for optimizer, net in zip(trainer.optimizers, module.nets, strict=True)
    ]
    return {f"nets.{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()}


class Recorder(pl.Callback):
    """Records which weights the model holds at which time, and what is logged."""

    def __init__(self, *, whole=False):
        self.x, self.y, self.whole_x, self.losses = {}, {}, {}, {}
        self.whole = whole  # whether to gather x, too
        self.evaluated = []  # whether the model held x; whether it held y
        self.trained = []  # whether the model held y
        self.d = {}
        self.at_the_end = None

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step in self.y:
            self.trained.append(equal(weights_of(trainer), self.y[trainer.global_step]))

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        step = trainer.global_step
        self.y[step] = weights_of(trainer)
        self.x[step] = local(averages(trainer, module))
        if self.whole:
            self.whole_x[step] = averages(trainer, module, full=True)
        self.losses[step] = trainer.callback_metrics["loss"].item()
        self.d[step] = [optimizer.scalars()["d"] for optimizer in trainer.optimizers]

    def on_validation_batch_start(self, trainer, module, batch, batch_index, dataloader_idx=0):
        step = trainer.global_step
        if step in self.x:
            held = weights_of(trainer)
            self.evaluated.append((equal(held, self.x[step]), equal(held, self.y[step])))

    def on_train_end(self, trainer, module):
        self.at_the_end = weights_of(trainer)


class Logger(pl.loggers.Logger):
    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))


def trainer_for(kind, folder, *callbacks, **options):
    strategy = {"one": "auto", "ddp": "ddp"}.get(kind) or ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=kind == "sharded"
    )
    defaults = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False
    )
    defaults["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    defaults |= {"strategy": strategy, "logger": Logger()}
    defaults |= {"max_epochs": 2, "val_check_interval": 3, "log_every_n_steps": 2}
    return pl.Trainer(
        accelerator="cpu",
        devices=1 if kind == "one" else 2,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{**defaults, **options},
    )


def fit(kind, folder, *, every=0, ckpt_path=None, optimizers=1, known=None, **options):
    """Train two epochs.

    Args:
        kind, folder, ckpt_path, options: For the trainer.
        every: Save a checkpoint every so many steps. 0: every second step, and on all other occasions.
        optimizers: How many there are.
        known: The recorder of the run that is resumed.
    """
    recorder, saved = Recorder(whole=not every), {"save_top_k": -1}
    callbacks = [ScheduleFreeCallback(), recorder]
    if every:
        callbacks += [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, **saved)]
    else:
        callbacks += [
            ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_last=True, **saved),
            ModelCheckpoint(folder, "best-{step}", monitor="val"),
            ModelCheckpoint(folder, "val-{step}", every_n_epochs=1, save_on_train_epoch_end=False, **saved),
            ModelCheckpoint(folder, "weights-{step}", every_n_train_steps=4, save_weights_only=True, **saved),
        ]
    if kind == "ddp" and optimizers > 1:  # each loss depends on the parameters of one net only
        options["strategy"] = "ddp_find_unused_parameters_true"
    trainer = trainer_for(kind, folder, *callbacks, **options)
    module = Module(kind, optimizers=optimizers)
    if known is not None:
        recorder.x, recorder.y = dict(known.x), dict(known.y)
    trainer.fit(module, Batches(), HELD_OUT, ckpt_path=ckpt_path)
    return SimpleNamespace(trainer=trainer, module=module, recorder=recorder, folder=Path(folder))


# --------------------------------------------------------------------------------- whole runs, as stories


def saved_in(kind, path):
    """The whole weights and optimisers' states of a checkpoint."""
    if kind == "sharded":
        whole = _load_distributed_checkpoint(path)
        states = [whole[key] for key in sorted(whole) if key.startswith("optimizer_")]
        return whole["state_dict"], states
    whole = torch.load(path, weights_only=True)
    return whole["state_dict"], whole.get("optimizer_states")


def path_of(run, name):
    return run.folder / f"{name}.ckpt"


def resumed(kind, run, name, optimizers=1, **options):
    """Resume a run from a checkpoint; return whether it equals that run from there on."""
    step = int(name.partition("=")[2])
    folder = run.folder.with_name(f"{run.folder.name}-{name}")
    options = {"optimizers": optimizers, "known": run.recorder, **options}
    later = {number: loss for number, loss in run.recorder.losses.items() if number > step}
    last = f"step={max(later)}"
    again = fit(kind, folder, every=max(later), ckpt_path=path_of(run, name), **options)
    if is_first():
        assert_same(saved_in(kind, path_of(again, last)), saved_in(kind, path_of(run, last)))
    return {
        "losses": again.recorder.losses == later,
        "y": again.recorder.trained,
        "x": [x and not y for x, y in again.recorder.evaluated],
        "end": equal(again.recorder.y[max(later)], run.recorder.y[max(later)]),
    }


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def as_rank():
    """Tell Lightning, as torchrun would, which processes there are."""
    warnings.simplefilter("ignore")
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def story(kind, folder):
    """Make a run, and runs that are resumed from it; return all that the tests below examine."""
    if kind != "one":
        as_rank()
    folder = Path(folder)
    run = fit(kind, folder / "run")
    seen, trainer, module = run.recorder, run.trainer, run.module
    last = max(seen.x)
    weights = {}
    if is_first():
        for path in sorted(run.folder.glob("*step=*.ckpt")):
            step = int(path.stem.partition("=")[2])
            weights[path.stem] = equal(saved_in(kind, path)[0], seen.whole_x[step])
    best = next(c for c in trainer.checkpoint_callbacks if c.monitor == "val")
    told = {
        "evaluated": [x and not y for x, y in seen.evaluated],
        "trained": seen.trained,
        "weights": weights,
        "train end": equal(seen.at_the_end, seen.x[last]),
        "fit end": equal(weights_of(trainer), seen.x[last]),
        "y is another": not equal(seen.y[last], seen.x[last]),
        "logged": {step: row["prodigyplus/d"] for step, row in trainer.logger.rows if "prodigyplus/d" in row},
        "d": {step: d for step, (d,) in seen.d.items()},
        "best": best.best_model_score.item(),
        "validated": [row["val"] for _, row in trainer.logger.rows if "val" in row],
        "predicted": torch.equal(torch.cat(trainer.predict(module, HELD_OUT)), _predicted(seen, kind, last)),
        "tested": trainer.test(module, HELD_OUT, ckpt_path=best.best_model_path, verbose=False)[0]["val"],
    }
    fresh = trainer_for(kind, folder, ScheduleFreeCallback())
    other = Module(kind)
    told["alone"] = fresh.validate(other, HELD_OUT, ckpt_path=best.best_model_path, verbose=False)[0]["val"]
    # Saved within an epoch and at its end, also after a validation there; not every case for every kind.
    names = {
        "one": ("step=2", "step=6", "val-step=6"),
        "ddp": ("val-step=3", "step=10"),
        "sharded": ("val-step=3", "step=6"),
        "full": ("step=10",),
    }
    told["resumed"] = {name: resumed(kind, run, name) for name in names[kind]}
    if kind != "full":
        two = fit(kind, folder / "two", every=8, optimizers=2)
        told["resumed"]["two"] = resumed(kind, two, "step=8", optimizers=2)
        told["two logged"] = {key for _, row in two.trainer.logger.rows for key in row if "/d" in key}
    if kind == "sharded":
        unseen = fit(kind, folder / "unseen", every=99, limit_val_batches=0)
        told["without validation"] = unseen.recorder.losses == seen.losses
    if kind == "ddp":
        refused = trainer_for(kind, folder, ScheduleFreeCallback(), StochasticWeightAveraging(0.1))
        with pytest.raises(ValueError, match="StochasticWeightAveraging"):
            refused.fit(module, Batches())
    return told


def _predicted(seen, kind, step):
    reference = Module()
    if not is_sharded(kind):
        reference.load_state_dict(seen.x[step])
    elif is_first():
        reference.load_state_dict(seen.whole_x[step])
    if is_sharded(kind):
        for p in reference.parameters():
            dist.broadcast(p.data, 0)
    reference.eval()
    with torch.no_grad():
        return torch.cat([reference.predict_step(batch, 0) for batch in HELD_OUT])


@pytest.fixture(scope="module")
def pool():
    pool = Pool()
    # Workers are forked from a process that has imported all of this.
    pool._context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "lightning.pytorch"])
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=["one", *KINDS])
def ranks(request, tmp_path_factory):
    """What ``story`` returns on each rank."""
    folder = str(tmp_path_factory.mktemp(request.param))
    if request.param == "one":
        return [story("one", folder)]
    return request.getfixturevalue("pool").run(2, story, request.param, folder)


def test_a_run_evaluates_x_and_trains_y(ranks):
    for told in ranks:
        assert told["y is another"]
        assert len(told["evaluated"]) == 4 * len(HELD_OUT)
        assert len(told["trained"]) == 2 * BATCHES - 1
        assert all(told["evaluated"] + told["trained"])
        assert told["train end"]
        assert told["fit end"]


def test_every_file_holds_x(ranks):
    weights = ranks[0]["weights"]
    assert len(weights) == 6 + 4 + 3 + 1
    assert all(weights.values()), weights


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(ranks):
    for told in ranks:
        for name, again in told["resumed"].items():
            assert_is_the_same(again, name)


def assert_is_the_same(again, name):
    assert again["losses"], name
    assert again["end"], name
    assert len(again["y"]) > 1, name
    assert len(again["x"]) > 1, name
    assert all(again["y"] + again["x"]), name


def test_the_best_checkpoint_is_as_good_as_it_was_said_to_be(ranks):
    for told in ranks:
        assert told["best"] == min(told["validated"])
        assert told["tested"] == told["alone"] == told["best"]
        assert told["predicted"]


def test_d_is_logged_at_steps_that_are_logged(ranks):
    for told in ranks:
        assert told["logged"].keys() == {1, 3, 5, 7, 9, 11}
        for step, d in told["logged"].items():
            assert d == torch.tensor(told["d"][step + 1]).item()
        assert told.get("two logged", TWO) == TWO


def test_fsdp2_lets_go_of_what_validation_has_gathered(ranks):
    for told in ranks:
        assert told.get("without validation", True)


# --------------------------------------------------------------------------------------- one process


def fit_module(module, folder, *callbacks, ckpt_path=None, **options):
    trainer = trainer_for("one", folder, *callbacks, **options)
    trainer.fit(module, Batches(), HELD_OUT, ckpt_path=ckpt_path)
    return trainer


def test_weights_that_are_loaded_are_x(tmp_path):
    fit("one", tmp_path, every=6)
    path = tmp_path / "step=12.ckpt"
    module = Module.load_from_checkpoint(path)
    assert_same(dict(module.state_dict()), saved_in("one", path)[0])


def test_validating_without_a_fit(tmp_path):
    module = Module()
    before = local(module.named_parameters())
    trainer = trainer_for("one", tmp_path, ScheduleFreeCallback())
    for run in (trainer.validate, trainer.test, trainer.predict):
        assert run(module, HELD_OUT)
    assert_same(local(module.named_parameters()), before)


class SavesWhileValidating(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking and trainer.global_step == 3:
            self.held = local(module.named_parameters())
            trainer.save_checkpoint(self.path)
            assert equal(local(module.named_parameters()), self.held)


def test_a_checkpoint_saved_within_validation(tmp_path):
    path = tmp_path / "within.ckpt"
    saves, first, again = SavesWhileValidating(path), Recorder(), Recorder()
    fit_module(Module(), tmp_path, ScheduleFreeCallback(), saves, first)
    assert_same(saved_in("one", path)[0], saves.held)
    assert equal(saves.held, first.x[3])
    again.y = dict(first.y)
    fit_module(Module(), tmp_path, ScheduleFreeCallback(), again, ckpt_path=path)
    assert again.trained[0]
    assert equal(again.y[12], first.y[12])


class Interrupted(Exception):
    pass


class FailsWhileValidating(pl.Callback):
    def on_validation_batch_start(self, trainer, module, batch, index, dataloader_idx=0):
        if trainer.global_step == 9:
            raise Interrupted


def test_an_exception_in_validation(tmp_path):
    module, recorder = Module(), Recorder()
    trainer = trainer_for("one", tmp_path, ScheduleFreeCallback(), FailsWhileValidating(), recorder)
    with pytest.raises(Interrupted):
        trainer.fit(module, Batches(), HELD_OUT)
    # The model is left with x, which callers evaluate and save; going on from there rounds y once.
    assert equal(weights_of(trainer), recorder.x[9])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    weights, (state,) = saved_in("one", tmp_path / "after.ckpt")
    assert equal(weights, recorder.x[9])
    assert equal({"": state["state"][0][WEIGHTS]}, {"": recorder.x[9]["nets.0.0.weight"]})

    # Whatever is done with the model next is done at x, and testing a checkpoint leaves its weights in place.
    trainer.test(module, HELD_OUT, ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert equal(weights_of(trainer), recorder.x[9])


class Interrupts(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 9:
            raise KeyboardInterrupt


@pytest.mark.parametrize("on_exception", [False, True])
def test_ctrl_c(tmp_path, on_exception):
    """In a notebook the model lives on. What Lightning saves on an exception still has y."""
    module, recorder, again = Module(), Recorder(), Recorder()
    saves = ModelCheckpoint(tmp_path, save_on_exception=True, save_last=True) if on_exception else Recorder()
    trainer = trainer_for("one", tmp_path, ScheduleFreeCallback(), Interrupts(), recorder, saves)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, Batches(), HELD_OUT)
    assert equal(weights_of(trainer), recorder.x[9])
    if on_exception:
        whole = Recorder()
        fit_module(Module(), tmp_path / "whole", ScheduleFreeCallback(), whole)
        fit_module(Module(), tmp_path, ScheduleFreeCallback(), again, ckpt_path=tmp_path / "last.ckpt")
        assert equal(again.y[12], whole.y[12])


class Keeps(Module):
    """A module that has one optimiser for all its fits."""

    def configure_optimizers(self):
        if not hasattr(self, "kept"):
            self.kept = super().configure_optimizers()
        return self.kept


def test_an_optimiser_that_is_fitted_twice(tmp_path):
    """The hooks of its first fit do not take the weights of the second."""
    path, module = tmp_path / "step=6.ckpt", Keeps()
    first = Recorder()
    files = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    fit_module(module, tmp_path, ScheduleFreeCallback(), files, first)
    for again in (module, Keeps()):
        recorder = Recorder()
        fit_module(again, tmp_path / "again", ScheduleFreeCallback(), recorder, ckpt_path=path)
        assert equal(recorder.y[12], first.y[12])


class SeesValidation(pl.Callback):
    def __init__(self):
        self.held = set()

    def on_validation_epoch_end(self, trainer, module):
        self.on_validation_end(trainer, module)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.held.add(trainer.optimizers[0].holds_average)

    def on_train_epoch_end(self, trainer, module):
        assert not trainer.optimizers[0].holds_average


def test_validation_ends_at_x(tmp_path):
    sees = SeesValidation()
    fit_module(Module(), tmp_path, ScheduleFreeCallback(), sees)
    assert sees.held == {True}


def test_going_on_from_what_was_saved_after_the_fit(tmp_path):
    first, one, other = Recorder(), Recorder(), Recorder()
    path = tmp_path / "end.ckpt"
    trainer = fit_module(Module(), tmp_path, ScheduleFreeCallback(), first)
    trainer.save_checkpoint(path)
    assert equal(saved_weights(path), first.x[12])
    whole = fit_module(Module(), tmp_path, ScheduleFreeCallback(), one, max_epochs=3)
    again = fit_module(Module(), tmp_path, ScheduleFreeCallback(), other, max_epochs=3, ckpt_path=path)
    assert whole.global_step == again.global_step == 18
    # y is recomputed from x in float32, and 6 more steps amplify its rounding.
    assert other.losses.keys() == set(range(13, 19))
    for step, loss in other.losses.items():
        assert loss == pytest.approx(one.losses[step], rel=1e-4)


def test_without_the_callback_a_state_with_weights_is_refused(tmp_path):
    fit("one", tmp_path, every=6)
    with pytest.raises(ValueError, match=f"holds .*'{WEIGHTS}'.*resume with that callback"):
        fit_module(Module(), tmp_path, ckpt_path=tmp_path / "step=6.ckpt")


def test_a_checkpoint_of_before_there_was_the_callback(tmp_path):
    path = tmp_path / "before"
    recorder = Recorder()
    fit_module(Module(), path, ModelCheckpoint(path, "{step}", every_n_train_steps=6, save_top_k=-1))
    fit_module(Module(), tmp_path, ScheduleFreeCallback(), recorder, ckpt_path=path / "step=6.ckpt")
    assert equal(recorder.y[12], saved_weights(path / "step=12.ckpt"))


def saved_weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_bfloat16_weights(tmp_path):
    run = fit("one", tmp_path, every=4, precision="bf16-true")
    assert all(weights.dtype == torch.bfloat16 for weights in run.recorder.x[12].values())
    assert equal(saved_weights(tmp_path / "step=8.ckpt"), run.recorder.x[8])
    again = resumed("one", run, "step=8", precision="bf16-true")
    assert_is_the_same(again, "step=8")


class Fused(Module):
    def __init__(self):
        super().__init__(options={"fused_back_pass": True})

    def on_fit_start(self):
        self.trainer.optimizers[0].fuse_backward(self.trainer.model)


def test_a_fused_backward_pass(tmp_path):
    first, again, path = Recorder(), Recorder(), tmp_path / "step=4.ckpt"
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    fit_module(Fused(), tmp_path, ScheduleFreeCallback(), first, checkpoints)
    assert equal(saved_weights(path), first.x[4])
    fit_module(Fused(), tmp_path, ScheduleFreeCallback(), again, ckpt_path=path)
    assert equal(again.y[12], first.y[12])
    with pytest.raises(ValueError, match=r"gradient_clip_val=1\.0"):
        fit_module(Fused(), tmp_path, ScheduleFreeCallback(), gradient_clip_val=1.0)
    scaled = pl.plugins.MixedPrecision("16-mixed", device="cpu")
    with pytest.raises(ValueError, match=r'precision="?\W16-mixed.*before the scaler'):
        fit_module(Fused(), tmp_path, ScheduleFreeCallback(), plugins=[scaled])


class FailsWithinBackward(pl.Callback):
    def on_after_backward(self, trainer, module):
        if trainer.global_step == 9:
            raise Interrupted


@pytest.mark.filterwarnings("ignore:ScheduleFreeCallback. the model is left with the training weights y")
def test_an_exception_within_a_fused_backward_pass(tmp_path):
    """A step has begun. The callback leaves y, and can be used again."""
    callback, module = ScheduleFreeCallback(), Fused()
    trainer = trainer_for("one", tmp_path, callback, FailsWithinBackward())
    with pytest.raises(Interrupted):
        trainer.fit(module, Batches(), HELD_OUT)
    optimizer = trainer.optimizers[0]
    assert not optimizer.holds_average
    trainer.test(module, HELD_OUT, verbose=False)
    optimizer.step()
    optimizer.eval()
    fit_module(Fused(), tmp_path, callback)


def test_numbers_are_read_at_steps_that_are_logged_alone(tmp_path, monkeypatch):
    reads, scalars = [], ProdigyPlusScheduleFree.scalars

    def counted(self, *args, **kwargs):
        reads.append(trainer.global_step)
        return scalars(self, *args, **kwargs)

    monkeypatch.setattr(ProdigyPlusScheduleFree, "scalars", counted)
    for callback, expected in ((ScheduleFreeCallback(), [5, 10]), (ScheduleFreeCallback(log=()), [])):
        reads.clear()
        trainer = trainer_for("one", tmp_path, callback, log_every_n_steps=5)
        trainer.fit(Module(), Batches())
        assert reads == expected
    assert {key for _, row in trainer.logger.rows for key in row if "prodigyplus" in key} == set()


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (lambda: StochasticWeightAveraging(swa_lrs=0.1), "StochasticWeightAveraging"),
        (EMAWeightAveraging, "EMAWeightAveraging"),
        (LearningRateFinder, "LearningRateFinder"),
    ],
)
def test_callbacks_that_are_refused(tmp_path, callback, match):
    with pytest.raises(ValueError, match=match):
        fit_module(Module(), tmp_path, ScheduleFreeCallback(), callback())


def test_names_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'rate'\] is none of d, d_hat"):
        fit_module(Module(), tmp_path, ScheduleFreeCallback(log=("d", "rate")))


def test_float16_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match='precision="16-true"'):
        fit_module(Module(), tmp_path, ScheduleFreeCallback(), precision="16-true")


def test_strategies_that_flatten_parameters_are_refused(tmp_path):
    trainer = trainer_for("one", tmp_path, callback := ScheduleFreeCallback())
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match=r"FSDPStrategy.*ModelParallelStrategy"):
        callback.setup(trainer, Module(), "fit")
    assert pl.strategies.FSDPStrategy.__name__ == "FSDPStrategy"
    assert pl.strategies.DeepSpeedStrategy.__name__ == "DeepSpeedStrategy"


def warnings_of(module, folder):
    """The callback's own warnings among all those of a fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_module(module, folder, ScheduleFreeCallback(), max_epochs=1)
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if "Schedule-Free" in message or "ScheduleFree" in message]


class Adam(Module):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def test_another_optimiser(tmp_path):
    (message,) = warnings_of(Adam(), tmp_path)
    assert re.fullmatch(r"ScheduleFreeCallback has nothing to do.*AdamW.*", message)


class Average(pl.Callback):
    """As an EMA that puts its weights into the model for each validation."""

    def on_validation_start(self, trainer, pl_module):
        pass


def test_a_callback_that_would_lend_other_weights_first(tmp_path):
    def warned(*callbacks):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit_module(Module(), tmp_path, *callbacks, max_epochs=1)
        return [str(its.message) for its in caught if "Put ScheduleFreeCallback first" in str(its.message)]

    assert len(warned(Average(), ScheduleFreeCallback())) == 1
    assert warned(ScheduleFreeCallback(), Average(), ModelCheckpoint()) == []


def test_a_callback_can_be_copied():
    assert copy.deepcopy(ScheduleFreeCallback(log=("d",)))._names == ("d",)


@pytest.mark.parametrize(
    ("imported", "there", "expected"),
    [
        (("pytorch_lightning",), True, "pytorch_lightning"),
        (("pytorch_lightning", "lightning.pytorch"), True, "lightning.pytorch"),
        ((), True, "lightning.pytorch"),
        ((), False, "pytorch_lightning"),
    ],
)
def test_the_package_that_is_in_use(monkeypatch, imported, there, expected):
    monkeypatch.setattr(lightning.sys, "modules", dict.fromkeys(imported))
    monkeypatch.setattr(lightning.importlib.util, "find_spec", lambda name: there or None)
    found = lightning._framework()
    monkeypatch.undo()
    assert found == expected


# ---------------------------------------------------------------------------- what users will copy

ROOT = Path(__file__).parents[2]


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "lightning_autoencoder.py"
    assert len(path.read_text().splitlines()) <= 80
    left = runpy.run_path(str(path), run_name="__main__")
    assert left["error"] < 0.2  # of the variance; a model that has learnt nothing leaves all of it, 1


def test_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "guides" / "lightning.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    scope = {"__name__": "guide"}
    for block in blocks:
        exec(block, scope)
    trained = scope["trained"].state_dict()
    assert equal(dict(trained), saved_weights(scope["best"]))
