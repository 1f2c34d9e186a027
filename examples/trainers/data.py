"""Scikit-learn's handwritten digits, and a small network for them: shared by the scripts beside it."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Network(nn.Sequential):
    """A convolutional network with batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(256, 10),
        )  # fmt: skip


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the digits to learn from and those to choose the best weights by."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    learn, choose = order[:1400], order[1400:]
    return TensorDataset(images[learn], labels[learn]), TensorDataset(images[choose], labels[choose])


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Return the loss on the digits that were held out."""
    images, labels = digits()[1].tensors
    logits: Tensor = model.eval()(images)
    return nn.functional.cross_entropy(logits, labels).item()
