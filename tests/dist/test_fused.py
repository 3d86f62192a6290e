"""The fused backward pass where ranks share a model."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.state_table import SAMPLED_KEYS
from prodigyplus_dist import ShardedProdigyPlusScheduleFree, in_backward
from tests.dist.meshes import pieces_of, whole
from tests.dist.sharding import ranks, wrap
from tests.models import SYMBOLS, Transformer, Walks, distance, loss_of
from tests.single.problems import assert_same

STEPS = 30

# So small that a backward pass fills several.
BUCKET = 20_000


def train(called, optimizer, number, count, steps=STEPS, data=None):
    data = data or Walks()
    for _ in range(steps):
        loss_of(called, data.next().chunk(count)[number]).backward()
        optimizer.step()
        optimizer.zero_grad()


def result(model, optimizer):
    saved = [
        {key: whole(value) for key, value in optimizer.state[p].items() if key not in SAMPLED_KEYS}
        for p in model.parameters()
    ]
    numbers = {name: float(value) for name, value in optimizer.metrics()[0].items()}
    return [whole(p) for p in model.parameters()], saved, numbers


class Sometimes(Transformer):
    """A parameter is used in two of three calls; the third must leave it and its average alone."""

    def __init__(self):
        super().__init__(1)
        self.scale = nn.Parameter(torch.ones(SYMBOLS))
        self.calls = 0

    def forward(self, symbols):
        self.calls += 1
        return super().forward(symbols) * (self.scale if self.calls % 3 else 1)


def under_ddp(fused, how, options):
    torch.manual_seed(0)
    model = Sometimes() if how == "find_unused_parameters" else Transformer(1)
    if how == "static_graph":
        model.unused = nn.Parameter(torch.ones(3))
    wrapped = DistributedDataParallel(
        model, gradient_as_bucket_view=True, bucket_cap_mb=0.05, **({how: True} if how else {})
    )
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=fused, **options)
    if fused:
        optimizer.fuse_backward(wrapped)
    train(wrapped, optimizer, dist.get_rank(), dist.get_world_size())
    assert not fused or all(p.grad is None for p in model.parameters())
    return result(model, optimizer)


@pytest.mark.parametrize("how", [None, "find_unused_parameters", "static_graph"])
@pytest.mark.parametrize("size", [2, 4])
def test_ddp_has_the_bits_of_the_plain_step(pool, size, how):
    for options in ({"weight_decay": 0.1}, {"use_cautious": True, "use_schedulefree": False}):
        plain = pool.run(size, under_ddp, False, how, options)
        fused = pool.run(size, under_ddp, True, how, options)
        assert plain[0][2]["d"] > 1e-5
        assert_same(fused, plain)
        for other in fused[1:]:
            assert_same(other, fused[0])


def moved_in_backward():
    """How many parameters have moved when the backward pass is over, and how many there are."""
    torch.manual_seed(0)
    model = Transformer(1)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=0.05)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True, d0=1e-3)
    for _ in range(2):
        optimizer.fuse_backward(wrapped)  # again, as after add_param_group
    data = Walks()
    train(wrapped, optimizer, dist.get_rank(), 2, 2, data)  # DDP rearranges its buckets after one step
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(wrapped, data.next().chunk(2)[dist.get_rank()]).backward()
    moved = sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.step()
    return moved, len(before)


def of_two_optimizers(fused):
    """Two optimisers of one model, of which the first is replaced by another after a while."""
    torch.manual_seed(0)
    model = Transformer(1)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=0.05)
    halves = list(model.parameters())[::2], list(model.parameters())[1::2]

    def made(half):
        optimizer = ShardedProdigyPlusScheduleFree(half, fused_back_pass=fused, d0=1e-3)
        if fused:
            optimizer.fuse_backward(wrapped)
        return optimizer

    data, optimizers = Walks(), list(map(made, halves))
    for step in range(6):
        if step == 3:
            optimizers[0] = None  # no longer alive when the next one hooks into the same model
            optimizers[0] = made(halves[0])
        wrapped.zero_grad()
        loss_of(wrapped, data.next().chunk(2)[dist.get_rank()]).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_two_optimizers_of_one_model_under_ddp(pool):
    """DDP has one communication hook for both."""
    assert_same(pool.run(2, of_two_optimizers, True), pool.run(2, of_two_optimizers, False))


def test_ddp_moves_parameters_while_others_wait_for_their_gradients(pool):
    for moved, count in pool.run(2, moved_in_backward):
        assert count / 3 < moved < count


def add_unused(model):
    model.unused = nn.Linear(8, 8)


def under_fsdp(name, fused, options, prepare=None, warm_up=False):
    model, called, number, count = wrap(name, prepare=prepare)
    optimizer = ShardedProdigyPlusScheduleFree(
        model.parameters(), fused_back_pass=fused, bucket_bytes=BUCKET, **options
    )
    if fused:
        optimizer.fuse_backward(model)
    if warm_up:
        optimizer.param_groups[0]["lr"] = 0.0
        train(called, optimizer, number, count, 2)
        optimizer.param_groups[0]["lr"] = 1.0
    train(called, optimizer, number, count)
    if fused:
        data = Walks().next().chunk(count)[number]
        loss_of(called, data).backward()
        left = sum(pieces_of(p.grad).numel() for p in model.parameters() if p.grad is not None)
        assert left == 0
        optimizer.step()
    else:
        train(called, optimizer, number, count, 1)
    return result(model, optimizer)


@pytest.mark.parametrize("options", [{}, {"use_cautious": True}], ids=str)
@pytest.mark.parametrize("name", ["fsdp2", "fsdp4", "hsdp", "fsdp_tp"])
def test_fsdp_has_the_bits_of_the_plain_step(pool, name, options):
    """On mesh axes of two ranks; the order of a sum over four depends on what else is in the message."""
    plain = pool.run(ranks(name), under_fsdp, name, False, options)
    fused = pool.run(ranks(name), under_fsdp, name, True, options)
    assert plain[0][2]["d"] > 1e-5
    for other in fused[1:]:
        assert_same(other, fused[0])
    if name != "fsdp4":
        assert_same(fused, plain)
        return
    # Compared with how far plain steps on four ranks are from those on two; Cautious may flip a sign.
    on_two = pool.run(2, under_fsdp, "fsdp2", False, options)
    assert distance(fused[0][0], plain[0][0]) <= 4 * distance(on_two[0][0], plain[0][0])
    assert fused[0][2] == pytest.approx(plain[0][2], rel=1e-5)


def test_fsdp_with_parameters_that_nobody_uses(pool):
    plain = pool.run(2, under_fsdp, "fsdp2", False, {}, add_unused)
    assert_same(pool.run(2, under_fsdp, "fsdp2", True, {}, add_unused), plain)


def freeze(model):
    model.embed.requires_grad_(False)
    model.blocks[0].norm1.requires_grad_(False)


def test_fsdp_with_frozen_parameters(pool):
    plain = pool.run(2, under_fsdp, "fsdp2", False, {}, freeze)
    assert_same(pool.run(2, under_fsdp, "fsdp2", True, {}, freeze), plain)


def test_fsdp_with_a_learning_rate_that_starts_at_zero(pool):
    plain = pool.run(2, under_fsdp, "fsdp2", False, {}, None, True)
    assert plain[0][2]["step"] == STEPS + 1 + 2
    assert_same(pool.run(2, under_fsdp, "fsdp2", True, {}, None, True), plain)


def offloaded(fused):
    torch.manual_seed(0)
    model = Transformer(1)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=fused)
    if fused:
        optimizer.fuse_backward(model)
    train(model, optimizer, dist.get_rank(), 2)
    return result(model, optimizer)


def test_fsdp_offloaded_to_the_cpu(pool):
    """If there is a hook, FSDP2 of torch 2.13 waits for a gradient's copy to the CPU."""
    assert_same(pool.run(2, offloaded, True), pool.run(2, offloaded, False))


def offloaded_to_pinned_memory():
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    (group,) = in_backward.fsdp_groups_of([model])
    for fsdp_param in group.fsdp_params:
        fsdp_param.pin_memory = True  # which takes a GPU
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    for waits in (False, True):
        expected = contextlib.nullcontext() if waits else pytest.raises(ValueError, match="pin_memory=False")
        with mock.patch.object(in_backward, "HOOKS_WAIT_FOR_OFFLOAD", waits), expected:
            optimizer.fuse_backward(model)


def test_hooks_that_would_not_wait_for_pinned_memory_are_refused(pool):
    pool.run(2, offloaded_to_pinned_memory)


def collectives_of_backward_and_step(name, fused):
    model, called, number, count = wrap(name)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=fused, bucket_bytes=BUCKET)
    if fused:
        optimizer.fuse_backward(model)
    data = Walks()
    train(called, optimizer, number, count, 2, data)
    loss = loss_of(called, data.next().chunk(count)[number])
    with CommDebugMode() as seen:
        loss.backward()
        optimizer.step()
    local = sum(-(-p.numel() // count) * p.element_size() for p in model.parameters())
    return seen.get_comm_counts()[torch.ops.c10d.allreduce_], local


def test_all_reduces_are_two_a_bucket(pool):
    for (found, local), (plain, _) in zip(
        pool.run(2, collectives_of_backward_and_step, "fsdp2", True),
        pool.run(2, collectives_of_backward_and_step, "fsdp2", False),
        strict=True,
    ):
        buckets = local / BUCKET
        assert plain <= 1 + 2 * buckets + 1
        assert 4 <= found <= 2 * (buckets + 1)


def one_bad_backward(name):
    """A backward pass with infinite gradients below the head, on every rank.

    Returns the parameters that have not moved, and whether d is as before, among others.
    """
    model, called, number, count = wrap(name)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True, bucket_bytes=BUCKET)
    optimizer.fuse_backward(model)
    data = Walks()
    train(called, optimizer, number, count, 20, data)
    before, d = [whole(p) for p in model.parameters()], float(optimizer.metrics()[0]["d"])
    handle = called.head.register_full_backward_hook(
        lambda module, ingoing, outgoing: tuple(g * float("inf") for g in ingoing)
    )
    loss_of(called, data.next().chunk(count)[number]).backward()
    optimizer.step()
    handle.remove()
    after = [whole(p) for p in model.parameters()]
    numbers = {key: float(value) for key, value in optimizer.metrics()[0].items()}
    names = [name for name, _ in model.named_parameters()]
    skipped = [n for n, a, b in zip(names, after, before, strict=True) if torch.equal(a, b)]
    return skipped, numbers["d"] == d, numbers["skipped_steps"], numbers["step"], after


@pytest.mark.parametrize("name", ["fsdp2", "hsdp"])
def test_a_bad_gradient(pool, name):
    first, *others = pool.run(ranks(name), one_bad_backward, name)
    skipped, kept_d, skipped_steps, steps, weights = first
    assert kept_d
    assert (skipped_steps, steps) == (1, 21)
    assert "head.weight" not in skipped
    assert "blocks.0.up.weight" in skipped
    assert all(weight.isfinite().all() for weight in weights)
    for other in others:
        assert_same(other, first)


def refused(kind):
    torch.manual_seed(0)
    model = Transformer(1)
    mesh = init_device_mesh("cpu", (2,))
    optimizer_class = ShardedProdigyPlusScheduleFree
    called = model
    if kind == "one process under DDP":
        called, optimizer_class = DistributedDataParallel(model), ProdigyPlusScheduleFree
    elif kind == "one process around DDP":
        called, optimizer_class = nn.Sequential(DistributedDataParallel(model)), ProdigyPlusScheduleFree
    elif kind == "ignored by FSDP2":
        weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Replicate()]))
        model.head.weight = weight
        fully_shard(model, mesh=mesh, ignored_params={weight})
    elif kind == "streams":
        model = called = model.to("meta")
        copied = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copy", "fsdp"))
        fully_shard(model.head, mesh=copied)
        fully_shard(model, mesh=mesh)
    elif kind == "DDP without views":
        called = DistributedDataParallel(model)
    elif kind == "tensor parallel":
        parallelize_module(model.blocks[0], mesh, {"up": ColwiseParallel()})
        optimizer = optimizer_class(model.blocks[0].up.parameters(), fused_back_pass=True)
    if kind != "tensor parallel":
        optimizer = optimizer_class(model.parameters(), fused_back_pass=True)
    try:
        optimizer.fuse_backward(called)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("one process under DDP", ("DistributedDataParallel", "ShardedProdigyPlusScheduleFree")),
        ("one process around DDP", ("DistributedDataParallel", "ShardedProdigyPlusScheduleFree")),
        ("ignored by FSDP2", ("'head.weight'", "fully_shard")),
        ("streams", ("kind of mesh",)),
        ("DDP without views", ("gradient_as_bucket_view=True",)),
        ("tensor parallel", ("'blocks.0.up.weight'", "fully_shard")),
        ("nothing wrapped", ("'embed.weight'", "2 ranks", "fully_shard", "DistributedDataParallel")),
    ],
)
def test_what_no_hook_could_get_right_is_refused(pool, kind, expected):
    for text in pool.run(2, refused, kind):
        assert all(part in text for part in expected), text


def wrapped_for(kind):
    if kind == "ddp":
        torch.manual_seed(0)
        model = Transformer(1)
        return model, DistributedDataParallel(model, gradient_as_bucket_view=True)
    return wrap("fsdp2")[:2]


def accumulated(kind):
    model, called = wrapped_for(kind)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True, bucket_bytes=0)
    optimizer.fuse_backward(called)
    data = Walks(4)
    try:
        for _ in range(2):
            loss_of(called, data.next()).backward()
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_accumulation_is_refused_on_every_rank(pool, kind):
    for text in pool.run(2, accumulated, kind):
        assert "second gradient" in text
        assert "fused_back_pass" in text


def summed(kind, fused):
    """Accumulation that hooks do not see: FSDP2 and DDP keep gradients back until the last backward pass."""
    model, called = wrapped_for(kind)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=fused)
    if fused:
        optimizer.fuse_backward(called)
    data = Walks()
    for _ in range(STEPS):
        one, other = data.next().chunk(2)[dist.get_rank()].chunk(2)
        if kind == "ddp":
            with called.no_sync():
                loss_of(called, one).backward()
        else:
            called.set_requires_gradient_sync(False)
            loss_of(called, one).backward()
            called.set_requires_gradient_sync(True)
        loss_of(called, other).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_accumulation_before_the_gradients_are_summed(pool, kind):
    plain = pool.run(2, summed, kind, False)
    assert plain[0][2]["d"] > 1e-5
    assert_same(pool.run(2, summed, kind, True), plain)
