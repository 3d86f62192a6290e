"""The optimiser in transformers' own Trainer: one process, DDP and FSDP2."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from tests.integrations.processes import processes
from tests.integrations.toys import Rows, language_model, loss_of, shard_on_cpu

HELD_OUT = {"rows": 16, "seed": 9}
FSDP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
LAYOUTS = ("one", "ddp", "fsdp2")


def arguments(folder, layout="one", **changed):
    """TrainingArguments for a run of a few steps, with what every user of our optimiser must set."""
    from transformers import TrainingArguments

    if layout == "fsdp2":
        shard_on_cpu()
        changed["fsdp"] = True
        changed.setdefault("fsdp_config", FSDP)
    plain = {
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4 if layout == "one" else 2,
        "per_device_eval_batch_size": 16,
        "max_steps": 8,  # two epochs
        "logging_steps": 1,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(output_dir=str(folder), **{**plain, **changed})


def trainer(args, *, plain=False, dropout=0.2, **changed):
    from transformers import Trainer

    from prodigyplus_dist import ShardedProdigyPlusScheduleFree
    from prodigyplus_dist.integrations.huggingface import ProdigyPlusTrainer

    options = {"step_size": "balance", "d0": 1e-3}  # d0 so large that a few steps move the weights
    if plain:
        changed["optimizer_cls_and_kwargs"] = ShardedProdigyPlusScheduleFree, options
    else:
        changed.setdefault("optimizer_options", options)
    data = {"train_dataset": Rows(16), "eval_dataset": Rows(**HELD_OUT)}
    if "model" not in changed and "model_init" not in changed:
        changed["model"] = language_model(dropout)
    return (Trainer if plain else ProdigyPlusTrainer)(args=args, **{**data, **changed})


def whole(model):
    """All weights of a model, on every rank, under the names of the unwrapped model."""
    from torch.distributed.tensor import DTensor

    state = model.state_dict()
    full = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
    return {key.removeprefix("module."): value.clone() for key, value in full.items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())


def history(done):
    """What was logged, without measured times."""
    clock = ("runtime", "per_second")
    return [
        {key: value for key, value in entry.items() if not key.endswith(clock)}
        for entry in done.state.log_history
        if "train_runtime" not in entry
    ]


def watch(its):
    """Record y and x at every step, and the model's weights when callbacks see an evaluation or the end."""
    from transformers import TrainerCallback

    seen = SimpleNamespace(y={}, x={}, evaluated={}, ended=None, logs=[])

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            seen.y[state.global_step] = whole(model)
            with optimizer.optimizer.averaged_parameters():
                seen.x[state.global_step] = whole(model)

        def on_evaluate(self, args, state, control, model, **kwargs):
            seen.evaluated[state.global_step] = whole(model)

        def on_train_end(self, args, state, control, model, **kwargs):
            seen.ended = whole(model)

        def on_log(self, args, state, control, logs, **kwargs):
            seen.logs.append(dict(logs))

    its.add_callback(Watching())
    return seen


# ------------------------------------------------------------------------------- what is set, and refused


@processes(1)
def test_one_step_size_found_at_lr_1(tmp_path):
    its = trainer(arguments(tmp_path))
    seen = watch(its)
    its.train()
    optimizer = its.optimizer.optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert {group["step_size"] for group in optimizer.param_groups} == {"balance"}
    d = optimizer.scalars()
    assert d["d/0"] == d["d/1"] != 1e-3
    # d is in the trainer's history, and in what reporters get.
    logged = [entry for entry in its.state.log_history if "loss" in entry]
    assert len(logged) == len([entry for entry in seen.logs if "loss" in entry]) == 8
    for entry, sent in zip(logged, seen.logs, strict=False):
        assert {key for key in entry if "prodigy" in key} == {"prodigyplus/d", "prodigyplus/step_size"}
        assert sent["prodigyplus/d"] == entry["prodigyplus/d"]
    assert logged[-1]["prodigyplus/d"] == d["d/0"]
    assert logged[-1]["prodigyplus/step_size"] == d["step_size/0"]
    assert not any(
        "prodigy" in key for entry in its.state.log_history if "loss" not in entry for key in entry
    )


@processes(1)
def test_several_step_sizes_are_logged_by_group(tmp_path):
    options = {"split_groups": True, "split_groups_mean": False}
    its = trainer(arguments(tmp_path, max_steps=3), optimizer_options=options)
    its.train()
    names = {key for key in its.state.log_history[0] if "prodigy" in key}
    assert names == {f"prodigyplus/{name}/{group}" for name in ("d", "step_size") for group in (0, 1)}


@processes(1)
def test_warm_up_and_rates_that_are_refused(tmp_path):
    from transformers import Adafactor, TrainingArguments

    from prodigyplus_dist.integrations import huggingface

    warm = arguments(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=4, learning_rate=1.0)
    its = trainer(warm)
    its.train()
    rates = [entry["learning_rate"] for entry in its.state.log_history if "loss" in entry]
    assert rates[:6] == [0, 0.25, 0.5, 0.75, 1, 1]

    default = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"lr_scheduler_type='linear'.*Set\s+lr_scheduler_type=\"constant\""):
        trainer(default)
    with pytest.raises(ValueError, match=r"learning_rate=0.001.*Leave learning_rate out"):
        trainer(arguments(tmp_path, learning_rate=1e-3))
    # Without Schedule-Free a schedule is needed, and allowed.
    options = {"use_schedulefree": False}
    trainer(arguments(tmp_path, lr_scheduler_type="cosine"), optimizer_options=options).train()

    model = language_model()
    with pytest.raises(ValueError, match=r"optimizers=\(Adafactor"):
        trainer(arguments(tmp_path), optimizers=(Adafactor(model.parameters()), None))
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs="):
        trainer(arguments(tmp_path), optimizer_cls_and_kwargs=(Adafactor, {}))
    # It would have no effect: the Trainer gives each group a weight decay.
    with pytest.raises(ValueError, match=r"weight_decay=0\.2.*TrainingArguments"):
        trainer(arguments(tmp_path), optimizer_options={"weight_decay": 0.2})
    with pytest.raises(RuntimeError, match=r"has no train, evaluate.*in this order"):
        type("Alone", (huggingface.ProdigyPlusMixin,), {})()
    for name, cure in (("is_deepspeed_enabled", "Use FSDP2"), ("is_fsdp_enabled", "Set version=2")):
        plugin = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
        its = SimpleNamespace(
            is_deepspeed_enabled=False, accelerator=SimpleNamespace(state=plugin), args=its.args
        )
        setattr(its, name, True)
        with pytest.raises(ValueError, match=cure):
            huggingface._check_backend(its)


def test_processes_that_accelerate_does_not_join(monkeypatch):
    """On CPUs accelerate shards nothing, and without use_cpu processes are not joined; it says neither."""
    from prodigyplus_dist.integrations import huggingface

    def check(*, fsdp, size):
        args = SimpleNamespace(fsdp=fsdp, world_size=size)
        huggingface._check_backend(
            SimpleNamespace(is_deepspeed_enabled=False, is_fsdp_enabled=False, args=args)
        )

    monkeypatch.setenv("WORLD_SIZE", "2")
    check(fsdp=None, size=2)
    with pytest.warns(UserWarning, match=r"falls back\s+to DDP with use_cpu=True"):
        check(fsdp=True, size=2)
    with pytest.warns(UserWarning, match=r"WORLD_SIZE=2.*set use_cpu=True"):
        check(fsdp=None, size=1)


@processes(1)
def test_args_that_are_changed_later_are_refused(tmp_path):
    """As a search for hyperparameters changes them."""
    for name, value in (("lr_scheduler_type", "linear"), ("learning_rate", 1e-3)):
        its = trainer(arguments(tmp_path))
        setattr(its.args, name, value)
        with pytest.raises(ValueError, match=f"{name}="):
            its.train()


@processes(1)
def test_a_trainer_that_makes_its_own_optimiser(tmp_path):
    from transformers import Trainer

    from prodigyplus_dist.integrations.huggingface import ProdigyPlusMixin

    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    its = type("Mine", (ProdigyPlusMixin, Own), {})(
        language_model(), arguments(tmp_path), train_dataset=Rows(16)
    )
    with pytest.raises(ValueError, match=r"Mine\.create_optimizer has made AdamW"):
        its.train()


@processes(1)
def test_an_exception_leaves_the_average(tmp_path):
    """And a checkpoint that is then loaded is evaluated as it is."""
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **its):
            if state.global_step == 7:
                raise KeyboardInterrupt

    args = arguments(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True)
    its = trainer(args, dropout=0.0, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        its.train()
    held_out = Rows(**HELD_OUT)
    assert its.optimizer.optimizer.holds_average
    assert its.evaluate()["eval_loss"] == pytest.approx(loss_of(its.model, held_out), rel=1e-6)
    good = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    its.model.load_state_dict(good, strict=False)
    assert its.evaluate()["eval_loss"] == pytest.approx(loss_of(its.model, held_out), rel=1e-6)
    its.save_model(str(tmp_path / "again"))
    assert same(load_file(tmp_path / "again" / "model.safetensors"), good)


@processes(1)
def test_every_step_begins_from_y(tmp_path):
    """Also where a training_step() does not call optimizer.train(), and a checkpoint has left x."""
    from prodigyplus_dist.integrations.huggingface import ProdigyPlusTrainer

    at_average = []

    class Own(ProdigyPlusTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            at_average.append(self.optimizer.optimizer.holds_average)
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    Own(language_model(), args, train_dataset=Rows(16), optimizer_options={"step_size": "balance"}).train()
    assert at_average == [False] * 8


@processes(1)
def test_a_checkpoint_between_the_backward_pass_and_the_step(tmp_path):
    """As transformers saves one when it is told to end (``enable_jit_checkpoint``)."""
    from transformers import TrainerCallback

    class Saves(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 5:
                its._save_checkpoint(model, trial=None)

    its = trainer(arguments(tmp_path), dropout=0.0)
    its.add_callback(Saves())
    for steps in (8, 8):  # twice: its hook is there once
        assert its.train().global_step == steps
        assert its.optimizer.optimizer.holds_average
        assert len(its.optimizer.optimizer._optimizer_step_pre_hooks) == 0
    assert (tmp_path / "checkpoint-5").is_dir()


def test_groups_of_ones_own_last(tmp_path):
    """An optimiser that the Trainer makes again has the same groups; of a new model, they cannot be."""
    its = trainer(arguments(tmp_path))
    groups = [{"params": list(its.model.parameters()), "weight_decay": 0.3}]
    mine = trainer(arguments(tmp_path), model=its.model, optimizer_options={"params": groups})
    for _ in range(2):
        mine.optimizer = None
        mine.create_optimizer()
        assert [group["weight_decay"] for group in mine.optimizer.param_groups] == [0.3]
    with pytest.raises(ValueError, match="model_init makes a new model"):
        trainer(arguments(tmp_path), model_init=lambda: its.model, optimizer_options={"params": groups})


def test_an_optimiser_that_was_made_before(tmp_path):
    from prodigyplus import ProdigyPlusScheduleFree

    model = language_model()
    optimizer = ProdigyPlusScheduleFree(model.parameters(), step_size="balance")
    from prodigyplus_dist.integrations.huggingface import ProdigyPlusTrainer

    its = ProdigyPlusTrainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=Rows(8), optimizers=(optimizer, None)
    )
    its.train()
    assert optimizer.holds_average
    assert optimizer.metrics()[0]["step"] == 2

    linear, data = arguments(tmp_path, lr_scheduler_type="linear"), {"train_dataset": Rows(8)}
    plain = ProdigyPlusScheduleFree(model.parameters(), use_schedulefree=False)
    ProdigyPlusTrainer(model, linear, optimizers=(plain, None), **data)
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        ProdigyPlusTrainer(model, linear, optimizers=(optimizer, None), **data)


# -------------------------------------------------------------------------------- what is kept is the average


def check_kept(folder, layout, strategy):
    from safetensors.torch import load_file

    args = arguments(
        folder,
        layout,
        eval_strategy="epoch" if strategy == "epoch" else "steps",
        save_strategy=strategy,
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        # The highest loss counts as the best, so that the best step is not the last.
        greater_is_better=True,
    )
    its = trainer(args)
    seen = watch(its)
    its.train()
    its.save_model(str(folder / "final"))
    its.accelerator.wait_for_everyone()  # under DDP, rank 0 writes
    last = max(seen.x)
    kept = {int(path.name.partition("-")[2]): path for path in folder.glob("checkpoint-*")}
    assert kept
    model, rows = language_model(), Rows(**HELD_OUT)
    losses = {entry["step"]: entry["eval_loss"] for entry in its.state.log_history if "eval_loss" in entry}
    assert losses.keys() >= kept.keys()
    # Under FSDP2 sums are in another order; the loss is a mean of a few hundred in float32.
    near = {"rel": 2e-6}
    for step, path in kept.items():
        saved = load_file(path / "model.safetensors")
        assert same(saved, seen.x[step])
        assert not same(saved, seen.y[step])
        if layout == "fsdp2":
            assert same(torch.load(path / "pytorch_model_fsdp.bin", weights_only=True), seen.x[step])
    for step, loss in losses.items():
        model.load_state_dict(seen.x[step])
        assert loss == pytest.approx(loss_of(model, rows), **near)
        model.load_state_dict(seen.y[step])
        assert loss != pytest.approx(loss_of(model, rows), **near)
        assert same(seen.evaluated[step], seen.x[step])
    best = its.state.best_global_step
    assert best < last
    assert best in kept
    for found in (whole(its.model), seen.ended, load_file(folder / "final" / "model.safetensors")):
        assert same(found, seen.x[best])


@processes(1)
@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_what_is_kept_is_the_average(tmp_path, strategy):
    check_kept(tmp_path, "one", strategy)


@processes(2)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_what_is_kept_on_two_processes_is_the_average(tmp_path, layout):
    check_kept(tmp_path, layout, "steps")


@processes(1)
def test_without_a_best_the_last_average_is_left(tmp_path):
    from safetensors.torch import load_file

    its = trainer(arguments(tmp_path, max_steps=5, save_strategy="no"))
    seen = watch(its)
    its.train()
    its.save_model(str(tmp_path))
    for found in (whole(its.model), seen.ended, load_file(tmp_path / "model.safetensors")):
        assert same(found, seen.x[5])


# -------------------------------------------------------------------------------- evaluating, and going on


def check_evaluations(folder, layout):
    """Neither evaluating nor saving only the model changes a run."""
    ends = []
    for number, changed in enumerate(
        ({}, {"eval_strategy": "steps", "eval_steps": 1, "save_only_model": True})
    ):
        # Without dropout: reading evaluation data draws from the generator that dropout draws from.
        its = trainer(arguments(folder / str(number), layout, max_steps=5, **changed), dropout=0.0)
        # Without watch(): asking FSDP2 for its weights makes it drop those that it has gathered.
        if changed:
            from transformers import TrainerCallback

            class Saving(TrainerCallback):
                def on_step_end(self, args, state, control, its=its, **kwargs):
                    control.should_save = state.global_step == 3
                    if state.global_step == 4:
                        its.save_model(str(folder / "model"))

            its.add_callback(Saving())
        its.train()
        logged = [(e["loss"], e["prodigyplus/d"]) for e in its.state.log_history if "loss" in e]
        ends.append((logged, whole(its.model)))
    assert len(ends[0][0]) == 5
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


@processes(1)
def test_evaluating_changes_nothing(tmp_path):
    check_evaluations(tmp_path, "one")


@processes(2)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_evaluating_on_two_processes_changes_nothing(tmp_path, layout):
    check_evaluations(tmp_path, layout)


def check_resumed(folder, layout, every, *steps):
    """A run that is resumed from a step equals, to its end, the run that was not stopped."""
    changed = {"save_strategy": "steps", "save_steps": every, "eval_strategy": "steps", "eval_steps": 2}
    changed["max_steps"] = 6
    if layout == "fsdp2":  # saved as shards; check_kept has the other kind, which is the default
        changed["fsdp_config"] = {**FSDP, "state_dict_type": "SHARDED_STATE_DICT"}
    straight = trainer(arguments(folder / "straight", layout, **changed))
    seen = watch(straight)
    straight.train()
    straight.accelerator.wait_for_everyone()
    for step in steps:
        its = trainer(arguments(folder / str(step), layout, **changed))
        resumed = watch(its)
        its.train(resume_from_checkpoint=str(folder / "straight" / f"checkpoint-{step}"))
        assert resumed.y.keys() == set(range(step + 1, 7))
        assert all(same(resumed.y[k], seen.y[k]) and same(resumed.x[k], seen.x[k]) for k in resumed.y)
        assert history(its)[-3:] == history(straight)[-3:]


@processes(1)
def test_a_resumed_run_is_the_same(tmp_path):
    check_resumed(tmp_path, "one", 2, 2, 4)  # an epoch has four steps


@processes(2)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_resumed_run_on_two_processes_is_the_same(tmp_path, layout):
    check_resumed(tmp_path, layout, 3, 3)


@processes(1)
def test_the_plain_trainer_goes_on_from_our_checkpoint(tmp_path):
    """It does not know that the file has x, but the optimiser's state does."""
    its = trainer(arguments(tmp_path, save_strategy="steps", save_steps=4))
    seen = watch(its)
    its.train()
    plain = trainer(arguments(tmp_path), plain=True, optimizer_cls_and_kwargs=None)
    resumed = watch(plain)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(resumed.y[8], seen.y[8])
    # The plain Trainer leaves y, and logs no d. If that ever changes, the mixin can go.
    assert same(resumed.ended, resumed.y[8])
    assert not any("prodigy" in key for key in plain.state.log_history[-2])
