"""DistributedDataParallel: the optimiser of one process, on every process.

torchrun --standalone --nproc-per-node 2 examples/ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prodigyplus import ProdigyPlusScheduleFree


def batch(step: int, rank: int, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A process's part of a batch: points, and which of ten directions each is nearest to. Yours here."""
    directions = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    points = torch.randn(size, 32, generator=torch.Generator().manual_seed(1000 * step + rank + 1))
    return points, (points @ directions.T).argmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", default="model.pt")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 10)).to(device)
    model = DistributedDataParallel(net)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), step_size="balance")

    optimizer.train()  # the model holds y, the weights to train at
    for step in range(1, args.steps + 1):
        points, labels = (tensor.to(device) for tensor in batch(step, rank))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        if step % 100 == 0 and rank == 0:
            print(f"step {step}: loss {loss.item():.3f}, step size {optimizer.scalars()['step_size']:.1e}")

    with torch.no_grad(), optimizer.averaged_parameters():  # the model holds x, the weights to evaluate
        points, labels = (tensor.to(device) for tensor in batch(0, rank, 2000))
        hits = (net(points).argmax(dim=1) == labels).float().mean()
    dist.all_reduce(hits)
    if rank == 0:
        print(f"held out: {100 * hits.item() / dist.get_world_size():.1f} % right")
        torch.save(optimizer.averaged_state_dict(net, full=True), args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
