"""Readers of checkpoints: which tensors a file holds and where they lie; nothing is executed."""
