"""A small transformer that says which character comes next."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from characters.text import SYMBOLS, Text

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nn.Module):
    """Causal attention and a layer of neurons, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_neurons = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mixed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.neurons = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return what goes on to the next block; shape (batch, characters, WIDTH)."""
        parts = self.attention(self.before_attention(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mixed(seen.transpose(1, 2).flatten(2))
        return x + self.neurons(self.before_neurons(x))


class Network(nn.Module):
    """A character-level language model; one matrix both reads the characters and writes them (tied embeddings)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) * WIDTH**-0.5)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.last = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, SYMBOLS, bias=False)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.output.weight = self.embedding.weight

    def forward(self, symbols: Tensor) -> Tensor:
        """Return the scores of every next character; shape (batch, characters, SYMBOLS)."""
        logits: Tensor = self.output(self.last(self.blocks(self.embedding(symbols) + self.places[: symbols.shape[1]])))
        return logits


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss per character, in nats."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def measured(model: nn.Module, text: Text, count: int) -> float:
    """Return the loss on ``count`` windows that are spread over a text."""
    windows = text.windows(count, CONTEXT).split(64)
    return sum(loss(model, some).item() * len(some) for some in windows) / count
