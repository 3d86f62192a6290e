"""Muon for the hidden matrices of a model under FSDP2 × tensor parallelism.

torchrun --standalone --nproc-per-node 4 examples/muon_fsdp_tp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from prodigyplus import describe_groups, muon_groups
from prodigyplus_dist import ShardedProdigyPlusScheduleFree


class Model(nn.Module):
    """Predicts the next symbol of a sequence from the three before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.up = nn.Linear(96, 128)
        self.down = nn.Linear(128, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, symbols: Tensor) -> Tensor:
        """The logits of the next symbol, (batch, 16), after three, (batch, 3)."""
        hidden = nn.functional.gelu(self.up(self.embedding(symbols).flatten(1)))
        logits: Tensor = self.head(self.down(hidden))
        return logits


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """Symbols and what follows, of one part of the batch. Yours here."""
    symbols = torch.randint(16, (64, 3), generator=torch.Generator().manual_seed(1000 * step + part))
    return symbols, (symbols[:, 0] * symbols[:, 1] + symbols[:, 2]) % 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size() // 2, 2), mesh_dim_names=("fsdp", "tp"))

    torch.manual_seed(0)
    model = Model().to(device)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["fsdp"])

    # After the model is wrapped. Matrices of hidden layers by Muon; embeddings, the head and vectors by Adam.
    groups = muon_groups(model)
    optimizer = ShardedProdigyPlusScheduleFree(groups, step_size="balance", split_groups_mean=False)
    if dist.get_rank() == 0:
        print(describe_groups(groups))

    optimizer.train()
    for step in range(1, args.steps + 1):
        # Processes of one tensor-parallel group see the same data.
        symbols, following = (tensor.to(device) for tensor in batch(step, mesh["fsdp"].get_local_rank()))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(symbols), following)
        loss.backward()
        optimizer.step()
        if step % 100 == 0 and dist.get_rank() == 0:
            sizes = [f"{float(group['step_size']):.1e}" for group in optimizer.metrics()]
            print(f"step {step}: loss {loss.item():.3f}, step sizes {', '.join(sizes)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
