"""Two networks that are trained together, as diffusers' scripts do, and an EMA beside the average."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.integrations.processes import needs, processes
from tests.integrations.toys import diffusion, diffusion_loss, images


def trained(ema_between=False):
    from diffusers.training_utils import EMAModel

    from prodigyplus import ProdigyPlusScheduleFree

    unet, text_encoder = diffusion()
    groups = [{"params": list(network.parameters())} for network in (unet, text_encoder)]
    optimizer = ProdigyPlusScheduleFree(groups, step_size="balance", split_groups_mean=False, d0=1e-3)
    ema = EMAModel(unet.parameters(), decay=0.9)
    torch.manual_seed(4)
    optimizer.train()
    for batch in images():
        optimizer.zero_grad()
        diffusion_loss(unet, text_encoder, batch).backward()
        optimizer.step()
        ema.step(unet.parameters())
        if ema_between:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            assert is_ema(unet, ema)
            ema.restore(unet.parameters())
    return unet, text_encoder, optimizer, ema


def is_ema(unet, ema):
    return all(torch.equal(p, shadow) for p, shadow in zip(unet.parameters(), ema.shadow_params, strict=True))


@needs("diffusers")
@processes(1)
def test_each_network_has_its_own_step_size():
    _, _, optimizer, _ = trained()
    scalars = optimizer.scalars()
    assert scalars["d/0"] != scalars["d/1"]
    assert [scalars[f"step_size/{k}"] / scalars[f"effective_lr/{k}"] for k in (0, 1)] == pytest.approx(
        [scalars[f"d/{k}"] for k in (0, 1)],
        rel=1e-6,  # both are float32
    )
    assert scalars["step/0"] == scalars["step/1"] == 8


@needs("diffusers")
@processes(1)
def test_an_ema_that_is_put_in_and_taken_out_changes_nothing():
    one, other = (trained(ema_between=between)[0] for between in (False, True))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@needs("diffusers")
@processes(1)
def test_eval_after_copy_to_moves_the_ema():
    """What the guide warns of; if it is ever otherwise, the warning can go."""
    unet, _, optimizer, ema = trained()
    ema.copy_to(unet.parameters())
    optimizer.eval()
    assert not is_ema(unet, ema)
