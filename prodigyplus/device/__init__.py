"""The passes of a step as kernels for GPUs: tables of what to move, and the kernels in Triton that move it."""
