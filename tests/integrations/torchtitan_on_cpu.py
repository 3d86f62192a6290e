"""Lets torchtitan 0.3 run on a CPU, and without pauses: import this before torchtitan.

Six places are patched: the name of the device; the memory that the log shows; FlexAttention, which has no
backward pass on a CPU; the reduction of gradients, in which NCCL divides by 1 and gloo cannot divide; the
barrier at which time-outs of process groups are shortened; and two seconds of sleep at the end of each run.
"""

import time
from types import SimpleNamespace

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

torch._utils._get_available_device_type = lambda: "cpu"
for name, value in {
    "get_device_name": "cpu",
    "get_device_properties": SimpleNamespace(total_memory=2**30),
    "memory_stats": {},
    "empty_cache": None,
    "reset_peak_memory_stats": None,
}.items():
    setattr(torch.cpu, name, lambda *_, value=value: value)

from torchtitan import trainer  # noqa: E402
from torchtitan.distributed import utils  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402


def attention(q, k, v, *, block_mask, scale, enable_gqa, **_):
    """The same attention by ``scaled_dot_product_attention``."""
    batch, _, length, _ = q.shape
    mask = create_mask(block_mask.mask_mod, batch, 1, length, length, device="cpu")
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa), None


FlexAttention._compiled_flex_attn = attention
utils.set_pg_timeouts = lambda **_: None
trainer.time = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
set_gradient_divide_factor = FSDPModule.set_gradient_divide_factor


def divided_by_one(self, factor):
    """Sum the gradients first, then divide."""
    set_gradient_divide_factor(self, factor)
    self.set_force_sum_reduction_for_comms(True)


FSDPModule.set_gradient_divide_factor = divided_by_one
