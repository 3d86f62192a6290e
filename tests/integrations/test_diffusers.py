"""Two networks trained together, as in diffusers' scripts, and an EMA besides the average."""

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
    for batch in images(steps=4):
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
def test_two_networks_and_an_ema():
    unet, _, optimizer, ema = trained()
    # Each network has its own step size.
    scalars = optimizer.scalars()
    assert scalars["d/0"] != scalars["d/1"]
    assert [scalars[f"step_size/{k}"] / scalars[f"effective_lr/{k}"] for k in (0, 1)] == pytest.approx(
        [scalars[f"d/{k}"] for k in (0, 1)],
        rel=1e-6,  # both are in float32
    )
    # Putting the EMA into the model and taking it out again changes nothing.
    other = trained(ema_between=True)[0]
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), other.parameters(), strict=True))
    # The guide warns of this. If it ever changes, the warning can go.
    ema.copy_to(unet.parameters())
    optimizer.eval()
    assert not is_ema(unet, ema)
