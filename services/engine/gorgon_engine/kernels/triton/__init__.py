"""Triton kernels for GPUs. Imported only where torch sees a CUDA device (or by tests, through Triton's interpreter)."""
