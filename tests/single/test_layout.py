"""A layout's samples and positions, on every way to cut a small tensor."""

import itertools

import pytest
import torch

from prodigyplus.layout import Layout


def pieces(size, count):
    """``count`` ranges as DTensor cuts ``size``: the last ones may be short or empty."""
    step = -(-size // count)
    return [range(min(i * step, size), min((i + 1) * step, size)) for i in range(count)]


def cut(tensor, layout):
    for dim, indices in enumerate(layout.indices):
        tensor = tensor.index_select(dim, torch.tensor(indices, dtype=torch.int64))
    return tensor


@pytest.mark.parametrize("every", [1, 3, 11])
@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((), ()), ((50,), (1,)), ((50,), (4,)), ((7,), (9,)), ((13, 5), (3, 1)), ((13, 5), (1, 2)),
        ((13, 27), (3, 2)), ((6, 7, 5), (4, 1, 1)), ((6, 7, 5), (1, 3, 1)), ((6, 7, 5), (2, 1, 3)), ((0, 4), (2, 1)),
    ],
)  # fmt: skip
def test_shards_sample_what_the_whole_samples(shape, cuts, every):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    layouts = [
        Layout(shape, indices)
        for indices in itertools.product(*(pieces(*args) for args in zip(shape, cuts, strict=True)))
    ]
    found = []
    for layout in layouts:
        local = cut(whole, layout)
        assert layout.local_shape == local.shape
        torch.testing.assert_close(layout.positions(torch.device("cpu")), local.to(torch.int32))
        sample = layout.sample(local, every)
        assert sample.tolist() == [v for v in local.flatten().tolist() if v % every == 0]
        found += sample.tolist()
    assert sorted(found) == Layout(shape).sample(whole, every).tolist()


def test_indices_with_gaps():
    """As a dimension that two mesh axes share may have them."""
    whole = torch.arange(60).view(10, 6)
    layout = Layout((10, 6), ((0, 1, 5, 6), range(6)))
    local = cut(whole, layout)
    torch.testing.assert_close(layout.positions(torch.device("cpu")), local.to(torch.int32))
    assert layout.sample(local, 7).tolist() == [v for v in local.flatten().tolist() if v % 7 == 0]


def test_positions_wrap_around():
    layout = Layout((1 << 20, 1 << 20), (range((1 << 20) - 1, 1 << 20), range(3)))
    assert layout.positions(torch.device("cpu")).tolist() == [[-(1 << 20), 1 - (1 << 20), 2 - (1 << 20)]]
    assert layout.sample(torch.arange(3).view(1, 3), 1).tolist() == [0, 1, 2]
