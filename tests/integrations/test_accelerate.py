"""The optimiser in a loop with accelerate: one process, DDP and FSDP2."""

import pytest
import torch

pytest.importorskip("accelerate")

from tests.integrations.processes import processes
from tests.integrations.toys import Rows, language_model, loss_of, shard_on_cpu


def start(layout, scheduled=None):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    from prodigyplus_dist import ShardedProdigyPlusScheduleFree

    plugin = None
    if layout == "fsdp2":
        shard_on_cpu()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = language_model(dropout=0.0)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), step_size="balance", d0=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduled) if scheduled else None
    loader = torch.utils.data.DataLoader(Rows(64), batch_size=4)
    return accelerator, *accelerator.prepare(model, optimizer, loader, *([scheduler] if scheduled else []))


def train(accelerator, model, optimizer, loader, steps):
    """Make these steps, each with the batch of its number; return their losses."""
    optimizer.train()
    losses = []
    for number, batch in enumerate(loader):
        if number in steps:
            optimizer.zero_grad()
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return losses


def check(folder, layout):
    from safetensors.torch import load_file

    accelerator, model, optimizer, loader = start(layout)
    plain = train(accelerator, model, optimizer, loader, range(6))

    accelerator, model, optimizer, loader = start(layout)
    ours = optimizer.optimizer
    assert train(accelerator, model, optimizer, loader, range(3)) == plain[:3]
    x = ours.averaged_state_dict(model, full=True)
    held_out = Rows(16, seed=9)
    accelerator.save_state(str(folder / "state"))
    with ours.averaged_parameters():
        accelerator.save_model(model, str(folder / "model"))
        evaluated = loss_of(model, held_out)  # FSDP2's root stays gathered until its weights are asked for
        with pytest.raises(RuntimeError, match="leave the with-block first"):
            optimizer.state_dict()
    accelerator.wait_for_everyone()
    saved = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(value, saved[key.removeprefix("module.")]) for key, value in x.items())
    fresh = language_model()
    fresh.load_state_dict(saved)
    assert evaluated == pytest.approx(loss_of(fresh, held_out), rel=2e-6)  # float32 sums in another order
    # Neither evaluating nor saving has changed the run.
    assert train(accelerator, model, optimizer, loader, range(3, 6)) == plain[3:]

    accelerator, model, optimizer, loader = start(layout)
    accelerator.load_state(str(folder / "state"))
    assert train(accelerator, model, optimizer, loader, range(3, 6)) == plain[3:]


@processes(1)
def test_a_loop_keeps_the_average_and_goes_on(tmp_path):
    check(tmp_path, "one")


@processes(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_loop_on_two_processes_keeps_the_average_and_goes_on(tmp_path, layout):
    check(tmp_path, layout)


@processes(2)
def test_a_scheduler_that_is_prepared_steps_once_for_each_process():
    accelerator, model, optimizer, loader, scheduler = start("ddp", lambda step: min(1.0, step / 8))
    optimizer.train()
    rates = []
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
