"""Muon on meshes: the bits of one process, each matrix computed once, and no more bytes than needed."""

import pickle
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.exchange import OneProcess
from prodigyplus.formulas import muon
from prodigyplus.options import Options
from prodigyplus.terms.requests import Matrices, Method
from prodigyplus_dist import ShardedProdigyPlusScheduleFree, exchange, transport
from prodigyplus_dist.ownership import MatrixSharding, assign_owners
from tests.dist.meshes import EMPTY, EVEN, MESHES, UNEVEN, Mesh, Placed, along, both_dims, for_muon, whole
from tests.models import Transformer, Walks, fit
from tests.single.problems import Fed, assert_same
from tests.watching import Watch

METHODS = [
    Method(dtype, quintic, stable)
    for dtype, quintic, stable in (
        (torch.bfloat16, False, True),
        (torch.float32, False, False),
        (torch.bfloat16, True, False),
    )
]

# The meshes of the tests of exactness, and others: batches cut first or in the middle, copies, both dims cut.
LAYOUTS = MESHES | {
    "first_of_experts": Mesh((4,), tuple(shape for shape in EVEN + EMPTY if len(shape) > 1), along(0)),
    "middle": Mesh((3,), EVEN + UNEVEN, lambda shape: along(1 if len(shape) > 1 else 0)(shape)),
    "hsdp_empty": Mesh((2, 2), UNEVEN + EMPTY, MESHES["hsdp"].placements),
    "copies": Mesh((2, 2), EVEN, lambda shape: [Replicate(), Replicate()]),
    "both_dims": Mesh((2, 2), UNEVEN + EMPTY, both_dims),
}


def requests(tensors):
    """Requests for every tensor of two or more dimensions, by every method; also as a batch, if it can be."""
    return [
        (tensor, batched, method)
        for tensor in tensors
        if tensor.ndim > 1
        for batched in {False, tensor.ndim > 2}
        for method in METHODS
    ]


def orthogonalized(optimizer, tensors):
    """What the exchange makes of each request, put together, in order."""
    asked = requests(tensors)
    matrices = [
        (optimizer._placement.layout(p), Matrices(optimizer._placement.local(p), batched, method))
        for p, batched, method in asked
    ]
    results = {}
    for numbers, pieces in optimizer._exchange.orthogonalize(matrices):
        results.update(zip(numbers, pieces, strict=True))
    assert sorted(results) == list(range(len(asked)))
    o = Options.of(optimizer.param_groups[0])
    found = []
    for number, (p, _, method) in enumerate(asked):
        assert results[number].dtype == method.dtype
        found.append(whole(optimizer._placement.store(p, results[number], "z", o.slice_p)))
    return found


def directions(name, given):
    mesh = LAYOUTS[name]
    placed = Placed(Fed(*mesh.shapes), mesh)
    optimizer = ShardedProdigyPlusScheduleFree([nn.Parameter(torch.zeros(1))], **given)
    return orthogonalized(optimizer, [p.detach() for p in placed.parameters])


@pytest.mark.parametrize("name", LAYOUTS)
def test_directions_have_the_bits_of_one_process(pool, name):
    problem = Fed(*LAYOUTS[name].shapes)
    optimizer = ProdigyPlusScheduleFree([nn.Parameter(torch.zeros(1))])
    expected = orthogonalized(optimizer, [p.detach() for p in problem.parameters])
    # In one wave, in several, and with one for every matrix.
    for given in ({}, {"bucket_bytes": 4000}, {"bucket_bytes": 1, "all_to_all": False}):
        for found in pool.run(LAYOUTS[name].ranks, directions, name, given):
            assert_same(found, expected)


def test_one_process_in_small_buckets():
    problem = Fed(*EVEN, *UNEVEN)
    optimizer = ProdigyPlusScheduleFree(problem.parameters)
    tensors = [p.detach() for p in problem.parameters]
    expected = orthogonalized(optimizer, tensors)
    optimizer._exchange = OneProcess()
    for limit in (1, 4000):
        optimizer._exchange.bucket_bytes = limit
        assert_same(orthogonalized(optimizer, tensors), expected)


# --------------------------------------------------------------------------------- what is sent

# A transformer's matrices, so many that two and four ranks have equal shares.
BLOCKS = ((192, 64), (64, 64), (256, 64), (64, 256)) * 8
ELEMENTS = sum(rows * columns for rows, columns in BLOCKS)

SENT = {
    "fsdp2": Mesh((2,), (*BLOCKS, (64,)), along(0)),
    "fsdp4": Mesh((4,), (*BLOCKS, (64,)), along(0)),
    "columns": Mesh((4,), (*BLOCKS, (64,)), along(-1)),
    "hsdp": Mesh((2, 2), (*BLOCKS, (64,)), MESHES["hsdp"].placements),
    "fsdp_tp": Mesh((2, 2), (*BLOCKS, (64,)), MESHES["fsdp_tp"].placements),
}


def sent(calls):
    """The number of collectives by name, and the bytes of matrices that this rank sends to others."""
    counts, sizes = Counter(), Counter()
    for call in calls:
        if not call.is_collective:
            continue
        counts[call.name] += 1
        assert call.name in ("allreduce_", "alltoall_base_", "broadcast_", "send", "recv_", "barrier"), call
        if call.name == "alltoall_base_":
            _, buffer, group, _, splits, *_ = call.args
            place = dist.get_group_rank(dist.ProcessGroup.unbox(group), dist.get_rank())
            sizes[call.name] += (sum(splits) - splits[place]) * buffer.itemsize
        elif call.name == "broadcast_":
            (buffer,), group, source, *_ = call.args
            if source == dist.get_group_rank(dist.ProcessGroup.unbox(group), dist.get_rank()):
                sizes[call.name] += buffer.nbytes
        elif call.name == "send":
            sizes[call.name] += sum(tensor.nbytes for tensor in call.args[0])
    return dict(counts), dict(sizes)


def watched_step(name, given):
    """The collectives and bytes of the second step, and the matrices that this rank orthogonalises."""
    placed = Placed(Fed(*SENT[name].shapes), SENT[name])
    optimizer = ShardedProdigyPlusScheduleFree(for_muon(placed.parameters), **given)
    placed.backward()
    optimizer.step()
    placed.backward()
    orthogonalized = []
    compute = muon.newton_schulz

    def counting(matrices, **options):
        orthogonalized.extend([tuple(matrices.shape[1:])] * len(matrices))
        return compute(matrices, **options)

    with mock.patch.object(muon, "newton_schulz", counting), Watch() as watch:
        optimizer.step()
    return *sent(watch.calls), orthogonalized


@pytest.mark.parametrize("name", SENT)
@pytest.mark.parametrize("all_to_all", [True, False])
def test_bytes_collectives_and_matrices(pool, name, all_to_all):
    mesh = SENT[name]
    copies = mesh.size[0] if name == "hsdp" else 1
    shards = mesh.ranks // copies
    least = 2 * (2 * ELEMENTS / shards / copies) * (shards - 1) / shards
    ranks = pool.run(mesh.ranks, watched_step, name, {"all_to_all": all_to_all})
    for counts, sizes, _ in ranks:
        if all_to_all:
            # Along each axis that cuts: round 1, the matrices' evidence, and the vector's (which one axis
            # cuts). Along an axis of copies: round 1.
            assert counts.pop("allreduce_") == {"fsdp_tp": 5, "hsdp": 4}.get(name, 3)
            assert counts.pop("alltoall_base_") == 2
            assert counts.pop("broadcast_", 0) == (copies if copies > 1 else 0)
            assert not counts
        exchanged = sizes["alltoall_base_" if all_to_all else "send"]
        assert exchanged == pytest.approx(least, rel=0.05)
        if copies > 1:
            assert sizes["broadcast_"] == pytest.approx(2 * ELEMENTS / mesh.ranks, rel=0.05)
    total = sum(sizes["alltoall_base_" if all_to_all else "send"] for _, sizes, _ in ranks)
    assert total == least * mesh.ranks
    assert Counter(shape for *_, shapes in ranks for shape in shapes) == Counter(BLOCKS)


def test_more_buckets_are_two_all_to_alls_each(pool):
    """Each of two ranks has 12288, 4096 and twice 16384 bytes of a block; its largest matrix has 32768."""
    for counts, *_ in pool.run(2, watched_step, "fsdp2", {"bucket_bytes": 1}):
        # Waves of pairs: of the 16 largest matrices, of 8 with pieces of 12288, and of 8 with pieces of 4096
        # (of 8192 bytes whole, so the limit is smaller there).
        assert counts["alltoall_base_"] == 2 * (8 + 4 + 4)


def test_whole_matrices_stay_where_they_are(pool):
    """Experts that are whole on one rank do not travel."""
    for counts in pool.run(4, counts_of_experts):
        assert counts == {"c10d.allreduce_": 2}


def counts_of_experts():
    placed = Placed(Fed((8, 16, 24), (6, 5, 7), (3, 8, 8)), MESHES["fsdp4"])
    optimizer = ShardedProdigyPlusScheduleFree(for_muon(placed.parameters))
    placed.backward()
    optimizer.step()
    with CommDebugMode() as seen:
        optimizer.step()
    return {str(kind): count for kind, count in seen.get_comm_counts().items() if count}


def test_owners_share_evenly_and_agree(pool):
    first, *others = pool.run(4, loads_of_owners)
    loads, blocks = first
    assert len(blocks) == len(BLOCKS)
    assert max(loads.values()) <= 1.05 * sum(loads.values()) / 4
    for other in others:
        assert other == first


def loads_of_owners():
    placed = Placed(Fed(*BLOCKS), SENT["fsdp4"])
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters, use_muon_pp=True)
    shardings = [MatrixSharding(optimizer._placement.layout(p), batched=False) for p in placed.parameters]
    loads = Counter()
    blocks = assign_owners(shardings)
    for block in blocks:
        its = shardings[block.request]
        loads[block.piece] += block.size * muon.cost(its.rows, its.columns)
    return dict(loads), blocks


# ------------------------------------------------------------------------------------- overlap


def order_of_events():
    """The events of a step, in order; its elementwise parameters are in two buckets."""
    events = []
    placed = Placed(Fed(*((64, 32), (32, 64)) * 2, (48,), (40,)), MESHES["fsdp2"])
    groups = [{"params": placed.parameters[:4], "use_muon_pp": True}, {"params": placed.parameters[4:]}]
    optimizer = ShardedProdigyPlusScheduleFree(groups, bucket_bytes=96)
    placed.backward()
    optimizer.step()
    placed.backward()

    def noted(name, function):
        def call(*args, **kwargs):
            events.append(name)
            result = function(*args, **kwargs)
            if name != "send":
                return result

            def wait():
                events.append("wait")
                return result()

            return wait

        return call

    with (
        mock.patch.object(transport, "swap", noted("send", transport.swap)),
        mock.patch.object(exchange, "_all_reduce", noted("all-reduce", exchange._all_reduce)),
        mock.patch.object(muon, "newton_schulz", noted("orthogonalise", muon.newton_schulz)),
    ):
        optimizer.step()
    return events


def test_all_else_goes_on_while_the_first_pieces_travel(pool):
    first = ["all-reduce", "send", *["all-reduce"] * 3, "send"]
    for events in pool.run(2, order_of_events):
        # Round 1; the first pieces; the matrices' evidence and two buckets of others; the next pieces.
        assert events[: len(first)] == first
        assert events[len(first)] == "wait"
        assert set(events[len(first) :]) <= {"wait", "send", "orthogonalise"}


# -------------------------------------------------------------------------------- whole models


def hidden(model):
    """Groups of a Transformer: the matrices of its blocks, and the rest."""
    blocks = {p for p in model.blocks.parameters() if p.ndim == 2}
    return [
        {"params": [p for p in model.parameters() if p in blocks], "use_muon_pp": True},
        {"params": [p for p in model.parameters() if p not in blocks]},
    ]


def under_ddp(shares, fused):
    torch.manual_seed(0)
    model = Transformer()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=0.05)
    replicas = {"replicas": wrapped.process_group} if shares else {}
    optimizer = ShardedProdigyPlusScheduleFree(hidden(model), fused_back_pass=fused, **replicas)
    if fused:
        optimizer.fuse_backward(wrapped)
    calls = []
    compute = muon.newton_schulz
    with mock.patch.object(muon, "newton_schulz", lambda m, **o: calls.append(len(m)) or compute(m, **o)):
        d = fit(wrapped, optimizer, Walks(), 40, dist.get_rank(), dist.get_world_size())
    return [p.detach().clone() for p in model.parameters()], d, sum(calls)


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_of_ddp_share_the_work(pool, size):
    alone = pool.run(size, under_ddp, False, False)
    for fused in (False, True):
        shared = pool.run(size, under_ddp, True, fused)
        for one, other in zip(shared, alone, strict=True):
            assert_same(one[:2], alone[0][:2])
            assert other[2] == 8 * 40
        assert sum(calls for *_, calls in shared) == 8 * 40
        assert fused or max(calls for *_, calls in shared) <= 8 * 40 / 2


def under_fsdp(fused):
    torch.manual_seed(0)
    model = Transformer()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = ShardedProdigyPlusScheduleFree(hidden(model), fused_back_pass=fused, bucket_bytes=20_000)
    if fused:
        optimizer.fuse_backward(model)
    d = fit(model, optimizer, Walks(), 40, dist.get_rank(), dist.get_world_size())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return [whole(p) for p in model.parameters()], d


def test_fsdp_fused_has_the_bits_of_the_plain_step(pool):
    plain, fused = (pool.run(2, under_fsdp, fused) for fused in (False, True))
    assert plain[0][1][-1] > 10 * plain[0][1][0]
    for found in (*plain, *fused):
        assert_same(found, plain[0])


# ------------------------------------------------------------------------------ groups of processes


def beside_other_groups():
    """A mesh of four of five ranks. Two of these are in another group, too; a new group is made."""
    dist.new_group([0, 1])
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
    if dist.get_rank() == 4:
        return None
    problem = Fed((8, 12))
    p = nn.Parameter(
        distribute_tensor(problem.parameters[0].detach(), mesh, both_dims((8, 12)), src_data_rank=None)
    )
    before = len(dist.distributed_c10d._world.pg_names)
    optimizers = [
        ShardedProdigyPlusScheduleFree([p], use_muon_pp=True, all_to_all=which) for which in (True, False)
    ]
    for optimizer in optimizers:
        p.grad = distribute_tensor(torch.ones(8, 12), mesh, both_dims((8, 12)), src_data_rank=None)
        optimizer.step()
    return len(dist.distributed_c10d._world.pg_names) - before


def test_ranks_that_are_in_other_groups_too(pool):
    """torch names a new group by how many a rank is in; ranks that differ in that would wait for ever."""
    first, second, third, fourth, fifth = pool.run(5, beside_other_groups)
    assert (first, second, fifth) == (1, 1, None)
    assert third == fourth == 2  # each made one more, of itself alone, to be in as many as the others


def groups_made(name):
    """How many groups the steps of two optimisers add on this rank."""
    mesh = MESHES[name]
    placed = Placed(Fed(*mesh.shapes), mesh)
    before = len(dist.distributed_c10d._world.pg_names)
    for _ in range(2):
        optimizer = ShardedProdigyPlusScheduleFree(for_muon(placed.parameters))
        placed.backward()
        optimizer.step()
        pickle.loads(pickle.dumps(optimizer._exchange._orthogonalizer))
    return len(dist.distributed_c10d._world.pg_names) - before


@pytest.mark.parametrize(("name", "count"), [("fsdp2", 1), ("hsdp", 2), ("fsdp_tp", 1), ("two_meshes", 1)])
def test_matrices_travel_in_groups_of_their_own(pool, name, count):
    assert pool.run(MESHES[name].ranks, groups_made, name) == [count] * MESHES[name].ranks


def on_some_ranks():
    """A mesh of two of three ranks; one of the two is in another group, too."""
    dist.new_group([1])
    mesh = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() == 2:
        return None
    p = nn.Parameter(distribute_tensor(torch.ones(8, 12), mesh, along(0)((8, 12)), src_data_rank=None))
    before = len(dist.distributed_c10d._world.pg_names)
    optimizer = ShardedProdigyPlusScheduleFree([p], use_muon_pp=True)
    p.grad = distribute_tensor(torch.ones(8, 12), mesh, along(0)((8, 12)), src_data_rank=None)
    optimizer.step()
    return len(dist.distributed_c10d._world.pg_names) - before


def test_groups_that_are_there_serve_where_not_all_ranks_have_matrices(pool):
    assert pool.run(3, on_some_ranks) == [0, 0, None]


def owners_by_turn():
    placed = Placed(Fed((64, 32)), MESHES["hsdp"])
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters)
    sharding = MatrixSharding(optimizer._placement.layout(placed.parameters[0]), batched=False)
    return [
        sharding.layout.ranks[b.copy][b.piece] for turn in range(4) for b in assign_owners([sharding], turn)
    ]


def test_where_matrices_come_one_at_a_time_owners_take_turns(pool):
    for owners in pool.run(4, owners_by_turn):
        assert sorted(owners) == [0, 1, 2, 3]
