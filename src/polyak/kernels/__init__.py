"""Kernels: the loops that move averages, and the choice of one."""
