"""Batches that are reused from step to step on a mesh, where ranks may differ in whether they reuse them."""

from unittest import mock

import pytest
import torch
from torch.distributed.tensor import Replicate

from prodigyplus.device import jit
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import Mesh, Placed, along, pieces_of
from tests.single.problems import Fed

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not jit.interprets(), reason="the ranks of these tests are on the CPU")

SHAPES = ((6, 3), (5,), (4, 4))
ON = {"rows": Mesh((2,), SHAPES, along(0)), "mixed": Mesh((2,), SHAPES, along(0), plain=True)}


def unchanged(parameters, optimizer, rank):
    pass


def no_gradient_on_a_rank(parameters, optimizer, rank):
    if rank == 1:
        parameters[0].grad = None


def no_gradient(parameters, optimizer, rank):
    parameters[0].grad = None


def frozen(parameters, optimizer, rank):
    parameters[0].requires_grad_(False)


def frozen_without_gradient(parameters, optimizer, rank):
    parameters[0].requires_grad_(False)
    parameters[0].grad = None


def piece_moved_on_a_rank(parameters, optimizer, rank):
    if rank == 1:
        p = parameters[0]
        p._local_tensor = p._local_tensor.clone()


def entry_moved(parameters, optimizer, rank):
    entry = optimizer.state[parameters[0]]["z"]
    entry._local_tensor = entry._local_tensor.clone()


def gradient_by_columns(parameters, optimizer, rank):
    grad = parameters[2].grad
    grad._local_tensor = grad._local_tensor.t().contiguous().t()


# For each change, whether rank 0 and rank 1 reuse their batches: in its step, and in the next.
CHANGES = {
    unchanged: ([True, True], [True, True]),
    no_gradient_on_a_rank: ([True, False], [True, True]),
    no_gradient: ([False, False], [True, True]),
    frozen: ([True, True], [True, True]),
    frozen_without_gradient: ([False, False], [True, True]),
    piece_moved_on_a_rank: ([True, False], [True, True]),
    entry_moved: ([False, False], [True, True]),
    gradient_by_columns: ([False, False], [True, True]),
}


def steps(mesh, changes):
    """Two equal runs: one may reuse its batches, the other makes new ones in every step.

    Returns:
        For each step, whether the first run reused its batches; and whether both end with the same weights.
    """
    import tests.interpreting  # noqa: F401

    rank = torch.distributed.get_rank()
    problems = [Placed(Fed(*SHAPES), ON[mesh]) for _ in range(2)]
    optimizers = [
        ShardedProdigyPlusScheduleFree(problem.parameters, d0=1e-3, fused=True) for problem in problems
    ]
    stood = []
    for change in changes:
        before = optimizers[0]._cache.steps.reusable
        optimizers[1]._cache.steps.reusable = None
        for problem, optimizer in zip(problems, optimizers, strict=True):
            problem.backward()
            change(problem.parameters, optimizer, rank)
            optimizer.step()
        stood.append(before is not None and optimizers[0]._cache.steps.reusable is before)
        optimizers[0].check_replicas()
    ours, anew = ([pieces_of(p.detach()) for p in problem.parameters] for problem in problems)
    return stood, all(map(torch.equal, ours, anew))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_has_them_found_anew(pool, change):
    first, second = pool.run(2, steps, "rows", [unchanged, unchanged, change, unchanged])
    at_change, after = CHANGES[change]
    for rank, (stood, is_same) in enumerate((first, second)):
        assert stood == [False, True, at_change[rank], after[rank]]
        assert is_same


def test_a_parameter_that_is_frozen(pool):
    """In the first step after it was frozen it still takes part, as other ranks may have its gradient."""
    changes = [unchanged, unchanged, frozen, *[frozen_without_gradient] * 3]
    assert pool.run(2, steps, "rows", changes) == [([False, True, True, False, True, True], True)] * 2


def test_plain_tensors_among_pieces(pool):
    assert pool.run(2, steps, "mixed", [unchanged] * 3) == [([False, True, True], True)] * 2


def elsewhere():
    import tests.interpreting  # noqa: F401

    problem = Placed(Fed(*SHAPES), ON["rows"])
    optimizer = ShardedProdigyPlusScheduleFree(problem.parameters, fused=True)
    with mock.patch.object(jit, "launch"):
        for _ in range(2):
            problem.backward()
            optimizer.step()
        assert optimizer._cache.steps.reusable is not None
        problem.backward()
        p = problem.parameters[0]
        p.grad = p.grad.redistribute(p.device_mesh, [Replicate()])
        optimizer.step()
        problem.backward()
        optimizer.step()
        return optimizer._cache.steps.reusable is not None


def test_a_gradient_that_lies_elsewhere(pool):
    assert pool.run(2, elsewhere) == [True, True]
