"""Compiled CPU kernels, which need Numba."""
