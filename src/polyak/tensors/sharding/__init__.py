"""Sharded tensors: the local part of each, and where the others are."""
