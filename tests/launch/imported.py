"""What processes have imported that launcher.py starts: they are forked from one that has imported this."""

# ruff: noqa: F401

import gc

import gpt_fsdp2
import matplotlib.backends.backend_agg  # this and torch._dynamo are else imported late
import mnist_ddp
import torch._dynamo

gc.freeze()  # the scripts collect garbage as they end: not among all that was there before
