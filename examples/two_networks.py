"""Two networks trained together, each with a step size of its own; and how to plot these.

python examples/two_networks.py
python -m prodigyplus.plot two_networks.jsonl --out two_networks.png
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.run_log import RunLog


def pictures(step: int) -> tuple[Tensor, Tensor]:
    """Grey 8 × 8 pictures of one square each, and where it is: words from 0 to 35. Yours here."""
    words = torch.randint(36, (64,), generator=torch.Generator().manual_seed(step))
    rows, columns = words // 6, words % 6
    images = torch.zeros(64, 8, 8)
    for dy in range(3):
        for dx in range(3):
            images[torch.arange(64), rows + dy, columns + dx] = 1.0
    return images.flatten(1), words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("two_networks.jsonl"))
    args = parser.parse_args()

    torch.manual_seed(0)
    encoder = nn.Embedding(36, 16)  # of a text, say
    denoiser = nn.Sequential(nn.Linear(64 + 16 + 1, 256), nn.GELU(), nn.Linear(256, 64))

    # split_groups_mean=False: neither step size holds back the other. With Prodigy, by default they would.
    groups = [{"params": encoder.parameters()}, {"params": denoiser.parameters()}]
    optimizer = ProdigyPlusScheduleFree(groups, step_size="balance", split_groups_mean=False)

    log = RunLog(args.out)
    optimizer.train()
    for step in range(1, args.steps + 1):
        images, words = pictures(step)
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(images.shape, generator=generator)
        level = torch.rand(len(images), 1, generator=generator)
        noisy = (1 - level) * images + level * noise
        optimizer.zero_grad()
        guess = denoiser(torch.cat([noisy, encoder(words), level], dim=1))
        loss = nn.functional.mse_loss(guess, images)
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            log.add(step, optimizer.scalars(), loss=loss.item())

    encoders, denoisers = (float(group["d"]) for group in optimizer.metrics())
    print(f"loss {loss.item():.4f}; d of the encoder {encoders:.1e}, of the denoiser {denoisers:.1e}")
    with optimizer.averaged_parameters():  # of both
        trained = {"encoder": encoder.state_dict(), "denoiser": denoiser.state_dict()}
        torch.save(trained, args.out.with_suffix(".pt"))


if __name__ == "__main__":
    main()
