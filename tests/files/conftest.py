"""What the tests of files share: checkpoints on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file


def weights(seed: int, **more) -> dict[str, torch.Tensor]:
    """Return the tensors of a small model, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(40, 8, generator=generator),
        "layer.weight": torch.randn(30, 8, generator=generator).to(torch.bfloat16),
        "layer.bias": torch.randn(30, generator=generator),
        "norm.num_batches_tracked": torch.tensor(10 + seed),
        **more,
    }


def mean(states, shares=None, name="embed.weight"):
    """Return the weighted mean in float64."""
    if shares is None:
        return sum(state[name].double() for state in states) / len(states)
    return sum(share * state[name].double() for share, state in zip(shares, states, strict=True))


@pytest.fixture
def states():
    return [weights(seed) for seed in range(3)]


@pytest.fixture
def run(states, tmp_path):
    """Three checkpoints of a run as safetensors files."""
    paths = [tmp_path / f"step-{step}.safetensors" for step in (100, 200, 400)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    return paths


@pytest.fixture
def left(tmp_path):
    """Return the names of what lies in the folder, scratch folders among them."""
    return lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
