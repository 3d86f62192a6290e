"""The private names of torch that ``prodigyplus`` uses exist, and do what they are used for."""

import pytest
import torch
from torch import nn

from prodigyplus import torch_private


def test_inductor_has_our_options():
    assert torch_private.INDUCTOR_OPTIONS.keys() <= {*torch._inductor.list_options()}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # from torch.compile's imports
def test_a_function_is_compiled_for_more_kinds_of_arguments_than_torch_would():
    """The recompile limit of other code stays as it is."""
    limit = torch._dynamo.config.recompile_limit
    unsqueeze = torch_private.compiled(lambda x: x.unsqueeze(0))  # a view: nothing to generate code for
    for dims in range(limit + 3):
        x = torch.zeros((2,) * dims)
        assert unsqueeze(x).shape == (1, *x.shape)
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.parametrize("module", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_convolutions_have_one_base(module):
    assert issubclass(module, torch_private.CONVOLUTION)
    assert not issubclass(nn.Linear, torch_private.CONVOLUTION)


@pytest.mark.parametrize("module", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_batch_and_instance_norms_have_one_base(module):
    assert issubclass(module, torch_private.BATCH_OR_INSTANCE_NORM)
    assert not issubclass(nn.LayerNorm, torch_private.BATCH_OR_INSTANCE_NORM)


def test_the_compiler_leaves_a_function_alone():
    compiling = []

    @torch_private.disable_compiler
    def look(x):
        compiling.append(torch.compiler.is_compiling())
        return x + 1

    assert torch.compile(lambda x: look(x * 2) * 3, backend="eager")(torch.ones(2)).tolist() == [9, 9]
    assert compiling == [False]


def test_a_version_counts_changes_in_place():
    tensor = torch.zeros(2)
    before = torch_private.version_of(tensor)
    tensor.add_(1)
    assert torch_private.version_of(tensor) > before


def test_fsdp1_marks_its_flat_parameters():
    from torch.distributed.fsdp._common_utils import _set_fsdp_flattened

    flat = nn.Parameter(torch.zeros(3))
    assert not torch_private.is_fsdp1_parameter(flat)
    _set_fsdp_flattened(flat)
    assert torch_private.is_fsdp1_parameter(flat)


def test_many_are_copied_at_once():
    targets = [torch.zeros(2), torch.zeros(3)]
    torch_private.foreach_copy_(targets, [torch.ones(2), torch.ones(3)])
    assert [target.sum() for target in targets] == [2, 3]
