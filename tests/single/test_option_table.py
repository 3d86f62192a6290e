"""The table of options is complete, and the lists drawn from it cover what they should."""

import warnings

import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree, options
from tests import option_table as table


def test_every_option_has_a_row():
    assert table.TABLE.keys() == set(options.NAMES) == table.defaults().keys()


@pytest.mark.parametrize("name", table.TABLE)
def test_a_value_is_not_the_default_and_needs_no_warning(name):
    row, default = table.TABLE[name], table.defaults()[name]
    assert row.values
    assert row.bad
    for given in row.values:
        assert next(iter(given)) == name
        assert not table.same(given[name], default)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ProdigyPlusScheduleFree([nn.Parameter(torch.ones(2, 2))], **given)


def test_what_is_packed_covers_all_without_a_warning():
    every = table.alone() + table.together()
    packed = table.packed(every)
    assert len(packed) < len(every) / 2
    for given in every:
        assert any(
            all(name in its and table.same(its[name], value) for name, value in given.items())
            for its in packed
        ), given
    for given in packed:
        assert options.resolve_exclusions_({**table.defaults(), **given}) == []
