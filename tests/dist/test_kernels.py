"""The kernels of ``prodigyplus/device`` on shards: they make the steps that one process makes."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.device.jit import interprets
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import Mesh, Placed, along, fsdp_and_tensor_parallel, whole
from tests.single.problems import Fed

pytest.importorskip("triton")

# Matrices that are cut evenly or unevenly; one whose shards are read 16 bytes at a time, and the second of
# which begins between samples; a tensor whose two largest dimensions are not its last; a bias; and a single
# element, so that one rank holds nothing.
SHAPES = ((33, 40), (3, 40), (64, 48), (35, 6, 3), (13,), (1,))
MATRICES = ((33, 40), (3, 40), (35, 6, 3), (40, 33))
ON = {
    "rows": Mesh((2,), SHAPES, along(0)),
    "columns": Mesh((2,), SHAPES, along(-1)),
    "strided": Mesh((2, 2), SHAPES, fsdp_and_tensor_parallel),
    "rows of matrices": Mesh((2,), MATRICES, along(0)),
    "columns of matrices": Mesh((2,), MATRICES, along(-1)),
}

NOISY = {"bfloat16_z": True, "factored": False, "slice_p": 3}
CASES = [
    ("rows", {}),
    ("rows", {"use_speed": "relative", "use_schedulefree": False}),
    ("columns", {"weight_decay": 0.1}),
    ("columns", NOISY),
    ("strided", NOISY),
]


def play(optimizer_class, problem, options):
    if interprets():
        import tests.interpreting  # noqa: F401
    optimizer = optimizer_class(problem.parameters, d0=1e-3, **options)
    sizes = set()
    for _ in range(3):
        problem.backward()
        optimizer.step()
        reusable = optimizer._cache.steps.reusable
        sizes.add(0 if reusable is None else sum(len(batch.ordinals) for batch in reusable.batches))
    if optimizer_class is ShardedProdigyPlusScheduleFree:
        optimizer.check_replicas()
    return [whole(p) for p in problem.parameters], optimizer.metrics()[0]["d"], sizes


def on_mesh(name, options):
    mesh = ON[name]
    return play(ShardedProdigyPlusScheduleFree, Placed(Fed(*mesh.shapes), mesh), options)


@pytest.mark.skipif(not interprets(), reason="the ranks of these tests are on the CPU")
@pytest.mark.parametrize(("mesh", "options"), CASES, ids=str)
def test_as_in_one_process(pool, mesh, options):
    expected, d, _ = play(ProdigyPlusScheduleFree, Fed(*SHAPES), {**options, "fused": False})
    first, *others = pool.run(ON[mesh].ranks, on_mesh, mesh, {**options, "fused": True})
    for found, found_d, batched in (first, *others):
        assert batched == {len(SHAPES)}
        assert found_d == pytest.approx(d.item(), rel=1e-6)
        for value, reference, on_first in zip(found, expected, first[0], strict=True):
            assert torch.equal(value, on_first)
            # Relative to the largest weight, which is about 2; 1.2e-7 is the most seen.
            torch.testing.assert_close(value, reference, rtol=0, atol=2e-6)


@pytest.mark.skipif(not interprets(), reason="the ranks of these tests are on the CPU")
@pytest.mark.parametrize(
    ("mesh", "options"),
    [("rows of matrices", {}), ("columns of matrices", {"use_schedulefree": False, "weight_decay": 0.1})],
    ids=str,
)
def test_matrices_as_in_one_process(pool, mesh, options):
    options = {"use_muon_pp": True, "muon_fp32": True, **options}
    expected, d, _ = play(ProdigyPlusScheduleFree, Fed(*MATRICES), {**options, "fused": False})
    for found, found_d, batched in pool.run(2, on_mesh, mesh, {**options, "fused": True}):
        assert batched == {len(MATRICES)}
        assert found_d == pytest.approx(d.item(), rel=1e-6)
        for value, reference in zip(found, expected, strict=True):
            # The largest weight is about 2.
            torch.testing.assert_close(value, reference, rtol=0, atol=2e-6)
