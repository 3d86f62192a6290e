"""Memory: a step leaves nothing behind, and what it needs meanwhile is bounded by a bucket."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests import option_table as table
from tests.dist.meshes import MESHES, Mesh, Placed, along
from tests.single.problems import Fed


def peak_of_a_step(optimizer, problem):
    """The most bytes that a step allocates beyond what was there before."""
    problem.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        optimizer.step()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def peak_of_steps(optimizer, problem, steps):
    """That of the step which allocates least, of some, after two that make what is kept."""
    for _ in range(2):
        problem.backward()
        optimizer.step()
    return min(peak_of_a_step(optimizer, problem) for _ in range(steps))


def objects():
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), len(gc.get_objects())


def counts_over_time(mesh_name):
    mesh = MESHES[mesh_name]
    placed = Placed(Fed(*mesh.shapes), mesh)
    optimizer = ShardedProdigyPlusScheduleFree([{"params": [p]} for p in placed.parameters])
    counts = []
    for step in range(260):
        placed.backward()
        optimizer.step()
        optimizer.metrics()
        if step in (59, 259):  # not earlier: some checks are first made after some steps
            counts.append(objects())
    return counts


@pytest.mark.parametrize("mesh_name", ["fsdp2", "fsdp_tp"])
def test_live_objects_are_flat_over_200_steps(pool, mesh_name):
    for (tensors, everything), (later_tensors, later_everything) in pool.run(
        MESHES[mesh_name].ranks, counts_over_time, mesh_name
    ):
        assert later_tensors == tensors
        assert later_everything <= everything + 50


SQUARES = Mesh((2,), ((128, 256),) * 16, along(0))
PIECE = 64 * 256 * 4  # the bytes of each that a rank holds


def peak_on_two_ranks(options, bucket_bytes, dtype=torch.float32):
    placed = Placed(Fed(*SQUARES.shapes, dtype=dtype), SQUARES)
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters, bucket_bytes=bucket_bytes, **options)
    # Of several steps, since on a busy machine gloo's thread lets go of an exchange's buffers late.
    return peak_of_steps(optimizer, placed, steps=4)


# What options need beyond the bucket, in sizes of the parameter at work; all others need 1.
MORE = [
    ({"use_adopt": True}, 1.25),  # a mask
    ({"use_adopt": True, "factored": False}, 2),  # the old moment, and the squares that it is updated by
    ({"bfloat16_z": True}, 3),  # weights and z in float32, and noise
    ({"slice_p": 1}, 5),  # samples of the gradient and of z, and results of their size
    ({"slice_p": 3}, 1.75),
    ({"use_orthograd": True}, 4),  # direction and weights in float64, of at most 2**18 elements
]
OPTIONS = [
    {},
    *table.elementwise(table.alone(table.named("passes"))),
    {"use_cautious": True, "use_schedulefree": False},
    {"use_adopt": True, "use_schedulefree": False},
    {"use_adopt": True, "factored": False},
]


def temporaries(options):
    return max((more for given, more in MORE if given.items() <= options.items()), default=1)


@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_a_step_needs_a_bucket_and_one_parameter_more(pool, options):
    """It holds a bucket's updates (at least two), temporaries of the parameter at work, and small tensors."""
    small = 2 * 16 * (64 + 256) * 4 + 100_000
    for pieces in (1, 4):
        for most in pool.run(2, peak_on_two_ranks, options, pieces * PIECE):
            assert most <= (max(2, pieces) + temporaries(options)) * PIECE + small


@pytest.mark.parametrize("options", [{}, {"use_schedulefree": False}], ids=str)
def test_matrices_need_three_times_their_bfloat16(pool, options):
    """They are sent, received and made whole: 3 times their bytes. With several waves, 7 matrices at once."""
    matrix, small = 128 * 256 * 2, 2 * 16 * (64 + 256) * 4 + 100_000
    computing = 5 * matrix  # to compute one: the matrix twice, and two squares of its shorter side
    for most in pool.run(2, peak_on_two_ranks, {"use_muon_pp": True, **options}, 16 * matrix):
        assert most <= 3 * 16 * matrix / 2 + small
    for most in pool.run(2, peak_on_two_ranks, {"use_muon_pp": True, **options}, matrix):
        assert most <= 7 * matrix + computing + small


def test_rounding_needs_some_more_of_one_parameter(pool):
    """The parameter at work needs weights and z in float32, and noise; the rest of the bucket, updates."""
    for most in pool.run(2, peak_on_two_ranks, {}, 8 * PIECE, torch.bfloat16):
        assert most <= (8 + 6) * PIECE + 150_000


@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_one_process_needs_two_of_the_largest_parameter(options):
    problem = Fed(*((512, 512),) * 8, (1024, 512))
    optimizer = ProdigyPlusScheduleFree(problem.parameters, **options)
    largest = 1024 * 512 * 4
    samples = 5 * largest / 11  # of the gradient, the weights and p0, and a product of these in float64
    most = peak_of_steps(optimizer, problem, steps=1)
    assert most <= (1 + temporaries(options)) * largest + samples + 50_000
