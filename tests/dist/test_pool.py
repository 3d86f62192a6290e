"""The pool itself: if a rank fails or hangs, the test fails and says where."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.pool import Failed


def rank_and_sum(value):
    total = torch.tensor([value * dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), total


def fail_on_one():
    if dist.get_rank() == 1:
        raise KeyError("deliberate")
    dist.barrier()


def hang_on_one():
    if dist.get_rank() == 1:
        time.sleep(3600)


def die_on_one():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order(pool):
    for size in (1, 3):
        results = pool.run(size, rank_and_sum, 2)
        assert [rank for rank, _ in results] == list(range(size))
        assert all(int(total) == size * (size - 1) for _, total in results)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_one, "rank 1 failed:[^$]*KeyError: 'deliberate'"),
        (hang_on_one, "rank 1 did not answer:[^$]*hang_on_one"),
        (die_on_one, "rank 1 failed:\nthe process died"),
    ],
)
def test_failures_are_told(pool, function, message):
    with pytest.raises(Failed, match=message):
        pool.run(2, function, limit=10)
    assert len(pool.run(2, rank_and_sum, 1)) == 2


def test_one_worker_runs_all_that_starts_processes(request):
    """Two xdist workers would start twice as many on the same cores, as pytest 9.2 with xdist 3.8 did."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@dist")
