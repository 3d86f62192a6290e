"""The private names of torch that ``prodigyplus_dist`` uses exist, and do what they are used for."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from prodigyplus_dist import torch_private


def test_a_placement_splits_as_dtensor_does():
    pieces = torch_private.split(Shard(0), torch.arange(5), 3)
    assert [piece.tolist() for piece in pieces] == [[0, 1], [2, 3], [4]]


def looked_up():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = fully_shard(nn.Linear(4, 4), mesh=mesh)
    model = fully_shard(nn.Sequential(inner, nn.Linear(4, 2)), mesh=mesh)
    groups = torch_private.fsdp_groups_of(model.modules())
    managed = {p.sharded_param for group in groups for p in group.fsdp_params}
    model(torch.ones(1, 4))
    root = model[1].weight
    gathered = type(root) is nn.Parameter
    torch_private.reshard_modules_of({*managed})
    before = torch_private.groups_of_this_rank()
    made = dist.new_group(timeout=timedelta(seconds=77))
    dist.barrier()  # no rank may leave before all have connected to the new group
    return (
        managed == {*model.parameters()},
        [bool(group._is_hsdp) for group in groups],
        gathered,
        type(model[1].weight) is not nn.Parameter or model[1].weight in managed,
        torch_private.groups_of_this_rank() - before,
        torch_private.timeout_of(made, torch.device("cpu")),
        torch_private.object_device(),
    )


def test_what_is_looked_up_is_there(pool):
    expected = True, [False, False], True, True, 1, timedelta(seconds=77), torch.device("cpu")
    assert pool.run(2, looked_up) == [expected] * 2
