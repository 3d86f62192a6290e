"""The tensors and indices that formulas are written in: layouts, requests, numbers of a step, stacks."""
