"""Optimisers that move the average with the weights: one pass over memory instead of two."""

from polyak.optim.adamw import AdamW

__all__ = ["AdamW"]
