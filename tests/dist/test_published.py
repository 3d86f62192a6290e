"""State of the published package, imported on a mesh: the same as in one process, cut up."""

import pytest

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests.dist.meshes import Mesh, Placed, along, whole
from tests.golden.cases import Problem
from tests.golden.published_cases import SAVED, SHAPES
from tests.single.problems import assert_same
from tests.single.test_published import golden, quietly

STEPS = 10

MESHES = {"rows": Mesh((2,), SHAPES, along(0)), "columns": Mesh((2,), SHAPES, along(-1))}


def imported(name, mesh=None):
    """The state and report of an import, and d and the weights some steps later; on a mesh or without."""
    case, saved = SAVED[name], golden(name)
    problem = Problem(shapes=SHAPES)
    for p, value in zip(problem.parameters, saved["weights"], strict=True):
        p.data.copy_(value)
    placed = problem if mesh is None else Placed(problem, MESHES[mesh])
    optimizer = (ProdigyPlusScheduleFree if mesh is None else ShardedProdigyPlusScheduleFree)(
        [{"params": group["params"]} for group in case.grouped(placed.parameters)]
    )
    report = quietly(optimizer, saved["optimizer"])
    state = optimizer.state_dict()
    state["state"] = {
        number: {key: whole(value).clone() for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    optimizer.train()
    for _ in range(STEPS):
        for p, q in zip(problem.parameters, placed.parameters, strict=True):
            p.data.copy_(whole(q))
        placed.backward()
        optimizer.step()
    d = [float(group["d"]) for group in optimizer.metrics()]
    return state, str(report), d, [whole(p) for p in placed.parameters]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("2.0_default", "rows"),
        ("2.0_default", "columns"),
        ("2.0_speed", "columns"),
        ("2.0_unused_eval", "rows"),
        ("1.9_pooled", "rows"),
        ("1.9_muon", "columns"),
    ],
)
def test_as_in_one_process(pool, name, mesh):
    state, report, d, weights = imported(name)
    for found, found_report, found_d, found_weights in pool.run(2, imported, name, mesh):
        assert_same(found, state)
        assert found_report == report
        assert found_d == pytest.approx(d, rel=1e-6)
        for ours, expected in zip(found_weights, weights, strict=True):
            assert (ours - expected).norm() <= 1e-6 * expected.norm()
