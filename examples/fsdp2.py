"""FSDP2, with checkpoints by torch's DCP: a run can be stopped and resumed, on any number of processes.

torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --steps 300
torchrun --standalone --nproc-per-node 4 examples/fsdp2.py --steps 600 --resume run/step-300
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prodigyplus_dist import ShardedProdigyPlusScheduleFree


def batch(step: int, size: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A process's rows of a batch: points, and which of ten directions each is nearest to. Yours here."""
    directions = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    points = torch.randn(size, 32, generator=torch.Generator().manual_seed(step + 1))
    points = points[dist.get_rank() :: dist.get_world_size()]
    return points, (points @ directions.T).argmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3)), nn.Linear(32, 10))
    for block in model[:3]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), step_size="balance")

    weights, state = get_state_dict(model, optimizer)  # shards, on every process
    saved = {"model": weights, "optimizer": state, "step": 0}
    if args.resume:
        dcp.load(saved, checkpoint_id=args.resume)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        if saved["step"] >= args.steps:
            parser.error(f"{args.resume} has made {saved['step']} steps: ask for more with --steps")

    optimizer.train()
    for step in range(saved["step"] + 1, args.steps + 1):
        points, labels = (tensor.to(device) for tensor in batch(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        if step % 100 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}, step size {optimizer.scalars()['step_size']:.1e}")

    weights, state = get_state_dict(model, optimizer)  # y and z: what to resume from
    checkpoint = {"model": weights, "optimizer": state, "step": args.steps}
    dcp.save(checkpoint, checkpoint_id=args.out / f"step-{args.steps}")
    trained = optimizer.averaged_state_dict(model, full=True)  # x: the trained model, unsharded, on process 0
    if dist.get_rank() == 0:
        torch.save(trained, args.out / "model.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
