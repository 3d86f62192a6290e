"""A step sends a few all-reduces, however many parameters and groups there are, and nothing else."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree, exchange
from tests import option_table as table
from tests.dist.meshes import MESHES, Placed, whole
from tests.single.problems import Fed, assert_same
from tests.watching import Watch

# All-reduces of a step: two along an axis that cuts a parameter, one along an axis that only copies.
EXPECTED = {"fsdp4": 2, "hsdp": 3, "tp": 2, "fsdp_tp": 4, "uneven": 2, "mixed": 2, "two_meshes": 6}


def collectives_of_a_step(mesh_name, repeat, per_group, bucket_bytes, **options):
    mesh = MESHES[mesh_name]
    placed = Placed(Fed(*mesh.shapes * repeat), mesh)
    parameters = placed.parameters
    groups = [{"params": parameters[i : i + per_group]} for i in range(0, len(parameters), per_group)]
    optimizer = ShardedProdigyPlusScheduleFree(groups, bucket_bytes=bucket_bytes, **options)
    placed.backward()
    optimizer.step()  # the first step creates state, and finds out where samples are
    placed.backward()
    with CommDebugMode() as seen, Watch(reads=False):
        optimizer.step()
    return {str(kind): count for kind, count in seen.get_comm_counts().items() if count}


@pytest.mark.parametrize("mesh_name", EXPECTED)
def test_all_reduces_do_not_depend_on_parameters_or_groups(pool, mesh_name):
    ranks = MESHES[mesh_name].ranks
    for repeat, per_group in ((1, 100), (3, 100), (3, 2)):
        for counts in pool.run(ranks, collectives_of_a_step, mesh_name, repeat, per_group, 1 << 26):
            assert counts == {"c10d.allreduce_": EXPECTED[mesh_name]}, (repeat, per_group)


# The options that add all-reduces along an axis that cuts a parameter, and how many.
ADDED = {"use_cautious": 1}
ALONE = table.elementwise(table.alone(table.named("passes")))
CUTTING = {"fsdp4": 1, "hsdp": 1, "fsdp_tp": 2, "uneven": 1}


def collectives_with_options(mesh_name):
    counts = {}
    for options in table.packed([*ALONE, *table.without_schedulefree(ALONE)], most=3):
        counts[tuple(options.items())] = collectives_of_a_step(mesh_name, 1, 100, 1 << 26, **options)
    return counts


@pytest.mark.parametrize("mesh_name", CUTTING)
def test_options_add_one_all_reduce_at_most(pool, mesh_name):
    for counts in pool.run(MESHES[mesh_name].ranks, collectives_with_options, mesh_name):
        for options, count in counts.items():
            added = sum(ADDED.get(name, 0) for name, _ in options) * CUTTING[mesh_name]
            assert count == {"c10d.allreduce_": EXPECTED[mesh_name] + added}, options


def test_one_more_for_each_half_of_a_bucket(pool):
    """A rank holds pieces of 4096, 4096, 2592, 2560 and 5184 bytes, and a few smaller ones."""
    for counts in pool.run(2, collectives_of_a_step, "fsdp2", 1, 100, 16384):
        assert counts == {"c10d.allreduce_": 1 + 3}
    for counts in pool.run(2, collectives_of_a_step, "fsdp2", 1, 100, 1 << 15):
        assert counts == {"c10d.allreduce_": 1 + 1}


def in_small_buckets(mesh_name, bucket_bytes):
    mesh = MESHES[mesh_name]
    placed = Placed(Fed(*mesh.shapes), mesh)
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters, bucket_bytes=bucket_bytes)
    counts = []
    for _ in range(20):
        placed.backward()
        with CommDebugMode() as seen:
            optimizer.step()
        counts.append(seen.get_total_counts())
    return counts, float(optimizer.metrics()[0]["d"]), [whole(p) for p in placed.parameters]


@pytest.mark.parametrize("mesh_name", ["uneven", "empty", "fsdp_tp_uneven", "nine"])
def test_ranks_with_more_and_with_less_cut_the_same_buckets(pool, mesh_name):
    ranks = MESHES[mesh_name].ranks
    whole_run = pool.run(ranks, in_small_buckets, mesh_name, 1 << 26)
    for bucket_bytes in (1, 1000, 4000):
        first, *others = pool.run(ranks, in_small_buckets, mesh_name, bucket_bytes)
        assert bucket_bytes > 1 or first[0][0] > whole_run[0][0][0]
        assert_same(first[1:], whole_run[0][1:])
        for other in others:
            assert_same(other, first)


def sums_of_two_dtypes():
    values = [torch.full((3, 1), 0.1), torch.tensor(0.1, dtype=torch.float64)]
    return exchange._all_reduce(values, dist.group.WORLD)()


def test_what_travels_together_keeps_its_precision(pool):
    for single, double in pool.run(2, sums_of_two_dtypes):
        torch.testing.assert_close(single, torch.full((3, 1), 0.2), rtol=0, atol=0)
        torch.testing.assert_close(double, torch.tensor(0.2, dtype=torch.float64), rtol=0, atol=0)


def ddp_step():
    problem = Fed((40, 12), (5,))
    problem.backward()
    with CommDebugMode() as seen:
        for optimizer_class in (ProdigyPlusScheduleFree, ShardedProdigyPlusScheduleFree):
            optimizer_class(problem.parameters).step()
    return seen.get_total_counts()


def test_plain_parameters_send_nothing(pool):
    assert pool.run(2, ddp_step) == [0, 0]


def stage(rank, shapes):
    """A run of one stage of a pipeline, which has every second parameter of the problem."""
    problem = Fed(*shapes)
    mine = problem.parameters[rank::2]
    group = dist.group.WORLD
    optimizer = ShardedProdigyPlusScheduleFree(split(mine), process_group=group)
    return spoilt_run(optimizer, problem), [p.detach() for p in mine]


def unlike_stages():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    groups = [{"params": [p]}, *[{"params": []}] * dist.get_rank()]
    optimizer = ShardedProdigyPlusScheduleFree(groups, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="different numbers of parameter groups"):
        optimizer.step()


def test_stages_must_have_as_many_groups(pool):
    pool.run(2, unlike_stages)


def split(parameters):
    matrices = [p for p in parameters if p.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in parameters if p.ndim <= 1], "d_coef": 2.0}]


def spoilt_run(optimizer, problem):
    """``d`` of every group at every step; a NaN spoils some of the steps."""
    d = []
    for step in range(60):
        problem.backward()
        if step % 7 == 5:
            problem.parameters[0].grad[0] = float("nan")
        optimizer.step()
        d.append([float(group["d"]) for group in optimizer.metrics()])
    return d


def run_stage(shapes):
    return stage(dist.get_rank(), shapes)


@pytest.mark.parametrize("shapes", [((40, 12), (12, 40), (9,), (5,)), ((40, 12), (12, 40)), ((40, 12),)])
def test_stages_of_a_pipeline_share_their_step_size(pool, shapes):
    """Also if a stage has no parameters in a group, or none at all."""
    problem = Fed(*shapes)
    optimizer = ProdigyPlusScheduleFree(split(problem.parameters))
    expected = spoilt_run(optimizer, problem)
    assert expected[-1][0] > 1e-4
    stages = pool.run(2, run_stage, shapes)
    for rank, (d, weights) in enumerate(stages):
        torch.testing.assert_close(torch.tensor(d), torch.tensor(expected), rtol=1e-9, atol=0)
        for found, p in zip(weights, problem.parameters[rank::2], strict=True):
            torch.testing.assert_close(found, p.detach(), rtol=1e-6, atol=1e-7)
