"""The shared device-aware iterator over a model's tensors, and what moves them.

Plugin authors use ``walk``; the engine uses the rest.

Examples:
    >>> import torch
    >>> from polyak.tensors import walk
    >>> emb, head = torch.nn.Embedding(5, 2), torch.nn.Linear(2, 5, bias=False)
    >>> head.weight = emb.weight
    >>> [(entry.name, entry.aliases) for entry in walk(torch.nn.ModuleDict({"emb": emb, "head": head}))]
    [('emb.weight', ('emb.weight', 'head.weight'))]
"""

from __future__ import annotations

from polyak.tensors.adapter import Adapter
from polyak.tensors.entries import Entry, Location, walk
from polyak.tensors.policies import policies
from polyak.tensors.wrappers import unwrap

__all__ = ["Adapter", "Entry", "Location", "policies", "unwrap", "walk"]
