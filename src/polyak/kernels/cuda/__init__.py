"""Compiled CUDA kernels, which need Triton."""
