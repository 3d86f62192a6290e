"""A layout's samples, positions and runs, for many ways to cut a small tensor."""

import functools
import itertools

import pytest
import torch

from prodigyplus.terms import samples
from prodigyplus.terms.layout import Layout


def pieces(size, count):
    """``count`` ranges as DTensor cuts ``size``: the last ones may be short or empty."""
    step = -(-size // count)
    return [range(min(i * step, size), min((i + 1) * step, size)) for i in range(count)]


def cut(tensor, layout):
    for dim, indices in enumerate(layout.indices):
        tensor = tensor.index_select(dim, torch.tensor(indices, dtype=torch.int64))
    return tensor


CUTS = pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((), ()), ((50,), (1,)), ((50,), (4,)), ((7,), (9,)), ((13, 5), (3, 1)), ((13, 5), (1, 2)),
        ((13, 27), (3, 2)), ((6, 7, 5), (4, 1, 1)), ((6, 7, 5), (1, 3, 1)), ((6, 7, 5), (2, 1, 3)),
        ((0, 4), (2, 1)),
    ],
)  # fmt: skip


def whole_of(terms):
    return functools.reduce(torch.add, terms, torch.zeros((), dtype=torch.int32))


def check_positions(layout, local):
    torch.testing.assert_close(layout.positions(), local)
    terms = layout.index_terms(torch.device("cpu"))
    assert len(terms) == local.ndim
    torch.testing.assert_close(whole_of(terms), local.to(torch.int32))


def all_layouts(shape, cuts):
    indices = itertools.product(*(pieces(*args) for args in zip(shape, cuts, strict=True)))
    return [Layout(shape, each) for each in indices]


@pytest.mark.parametrize("every", [1, 3, 11])
@CUTS
def test_shards_sample_what_the_whole_samples(shape, cuts, every):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    found = []
    for layout in all_layouts(shape, cuts):
        local = cut(whole, layout)
        assert layout.local_shape == local.shape
        check_positions(layout, local)
        sample = layout.sample(local, every)
        assert sample.tolist() == [v for v in local.flatten().tolist() if v % every == 0]
        found += sample.tolist()
    assert sorted(found) == Layout(shape).sample(whole, every).tolist()


def test_indices_with_gaps():
    """If two mesh axes cut the same dimension, a shard's indices may have gaps."""
    whole = torch.arange(60).view(10, 6)
    layout = Layout((10, 6), ((0, 1, 5, 6), range(6)))
    local = cut(whole, layout)
    check_positions(layout, local)
    assert layout.sample(local, 7).tolist() == [v for v in local.flatten().tolist() if v % 7 == 0]


def test_positions_wrap_around():
    layout = Layout((1 << 20, 1 << 20), (range((1 << 20) - 1, 1 << 20), range(3)))
    assert whole_of(layout.index_terms(torch.device("cpu"))).tolist() == [[(i - (1 << 20)) for i in range(3)]]
    assert layout.positions().tolist() == [[(1 << 40) - (1 << 20) + i for i in range(3)]]
    assert layout.sample(torch.arange(3).view(1, 3), 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("every", [1, 3, 11])
@CUTS
def test_rows_of_shards_are_pieces_of_the_rows_of_the_whole(shape, cuts, every):
    whole = torch.randn(shape)
    layout = Layout(shape)
    rows = samples.spread(layout.sample(whole, every), layout, every)
    assert rows.shape == samples.rows_shape(shape, every)
    torch.testing.assert_close(samples.collect(rows, layout, every), layout.sample(whole, every))

    sums = {}  # over the pieces along the last dimension
    for piece in all_layouts(shape, cuts):
        mine = samples.spread(piece.sample(cut(whole, piece), every), piece, every)
        sums[piece.indices[:-1]] = sums.get(piece.indices[:-1], 0) + mine
        its_rows = cut(rows, Layout(tuple(rows.shape), (*piece.indices[:-1], range(rows.shape[-1]))))
        torch.testing.assert_close(
            samples.collect(its_rows, piece, every), piece.sample(cut(whole, piece), every)
        )
    for leading, found in sums.items():
        expected = cut(rows, Layout(tuple(rows.shape), (*leading, range(rows.shape[-1]))))
        torch.testing.assert_close(found, expected)


@CUTS
def test_runs_are_the_positions(shape, cuts):
    for indices in itertools.product(*(pieces(size, count) for size, count in zip(shape, cuts, strict=True))):
        check_runs(Layout(shape, indices))


def test_runs_of_a_strided_shard():
    check_runs(Layout((12, 4), ((0, 1, 2, 6, 7, 8), range(4))), length=12)
    check_runs(Layout((12, 4), ((0, 1, 2, 3, 7, 8), range(4))), length=8)
    check_runs(Layout((3, 12), (range(3), (0, 4, 5))), length=1)


def check_runs(layout, length=None):
    runs = layout.runs()
    assert length in (None, runs.length)
    if layout.positions().numel():
        found = runs.firsts.unsqueeze(1) + torch.arange(runs.length)
        assert torch.equal(found.view(-1), layout.positions().reshape(-1))
