"""What runs where polyak is not installed: load the weights of a file and print their loss on held-out digits.

python examples/trainers/serve.py model.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from data import Network, loss


def weights(file: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a network in a file of any of the trainers."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        found = load_file(file)
    else:
        found = torch.load(file, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found)  # a checkpoint of Lightning
    return {name.removeprefix("network."): tensor for name, tensor in found.items()}


if __name__ == "__main__":
    sys.modules["polyak"] = None  # type: ignore[assignment]  # as where it is not installed: importing it fails
    network = Network()
    network.load_state_dict(weights(Path(sys.argv[1])))
    print(f"{loss(network):.6f}")
