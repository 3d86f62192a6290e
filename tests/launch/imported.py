"""Imported by the process that launcher.py forks others from, so that they need not import it again."""

# ruff: noqa: F401

import gc

import gpt_fsdp2
import matplotlib.backends.backend_agg  # the scripts import this and torch._dynamo only when needed
import mnist_ddp
import torch._dynamo

gc.freeze()  # the scripts collect garbage as they end, and need not search all of this
