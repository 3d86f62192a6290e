"""The passes of a step as Triton kernels for GPUs, with tables of the tensors that they move."""
