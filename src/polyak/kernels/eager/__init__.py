"""Kernels of plain torch operations."""
