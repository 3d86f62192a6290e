"""The kernels of ``prodigyplus/device`` on shards: what they move on a mesh is what one process moves."""

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.device.launches import interprets
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import MESHES, Mesh, Placed, along, whole
from tests.single.problems import Fed

pytest.importorskip("triton")

# Rows that are cut evenly, unevenly, and so that a rank holds none; a convolution, whose two largest
# dimensions are not its last; a bias, and one of a single element.
SHAPES = ((33, 40), (3, 40), (35, 6, 3), (13,), (1,))
MATRICES = ((33, 40), (3, 40), (35, 6, 3), (40, 33))
ON = {
    "matrices": Mesh((2,), MATRICES, along(0)),
    "rows": Mesh((2,), SHAPES, along(0)),
    "columns": MESHES["last_dim"],
}

OPTIONS = [{"weight_decay": 0.1}, {"use_speed": "relative", "use_schedulefree": False}]


def play(optimizer_class, problem, options):
    if interprets():
        import tests.interpreting  # noqa: F401
    optimizer = optimizer_class(problem.parameters, d0=1e-3, **options)
    for _ in range(3):
        problem.backward()
        optimizer.step()
    if optimizer_class is ShardedProdigyPlusScheduleFree:
        optimizer.check_replicas()
    return [whole(p) for p in problem.parameters], optimizer.metrics()[0]["d"]


def on_mesh(name, options):
    mesh = ON[name]
    return play(ShardedProdigyPlusScheduleFree, Placed(Fed(*mesh.shapes), mesh), options)


@pytest.mark.skipif(not interprets(), reason="the ranks of these tests are on the CPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_on_rows_as_in_one_process(pool, options):
    expected, d = play(ProdigyPlusScheduleFree, Fed(*SHAPES), {**options, "fused": False})
    first, *others = pool.run(2, on_mesh, "rows", {**options, "fused": True})
    for found, found_d in (first, *others):
        assert found_d == pytest.approx(d.item(), rel=1e-6)
        for value, reference, on_first in zip(found, expected, first[0], strict=True):
            assert torch.equal(value, on_first)
            # In units of the largest weight, some 2: 1.2e-7 was seen.
            torch.testing.assert_close(value, reference, rtol=0, atol=2e-6)


@pytest.mark.skipif(not interprets(), reason="the ranks of these tests are on the CPU")
@pytest.mark.parametrize("options", [{}, {"use_schedulefree": False, "weight_decay": 0.1}], ids=str)
def test_matrices_on_rows_as_in_one_process(pool, options):
    options = {"use_muon_pp": True, "muon_fp32": True, **options}
    expected, d = play(ProdigyPlusScheduleFree, Fed(*MATRICES), {**options, "fused": False})
    for found, found_d in pool.run(2, on_mesh, "matrices", {**options, "fused": True}):
        assert found_d == pytest.approx(d.item(), rel=1e-6)
        for value, reference in zip(found, expected, strict=True):
            # In units of the largest weight, some 2.
            torch.testing.assert_close(value, reference, rtol=0, atol=2e-6)


@pytest.mark.skipif(not interprets(), reason="the ranks of these tests are on the CPU")
def test_beside_what_is_not_for_them(pool):
    """Columns of a matrix are no run of its elements: the passes operator by operator move them."""
    expected, _ = play(ProdigyPlusScheduleFree, Fed(*ON["columns"].shapes), {"fused": False})
    for found, _ in pool.run(2, on_mesh, "columns", {"fused": True}):
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=0, atol=2e-6)
