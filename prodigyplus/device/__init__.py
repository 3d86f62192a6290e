"""The passes of a step as kernels for GPUs: in Triton, with tables of what they move."""
