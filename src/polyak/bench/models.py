"""The models that are averaged, with random weights, and for each a small batch to train on."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak.bench.gpt import GPT
from polyak.errors import ConfigError, MissingExtraError, PolyakError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["MODELS", "Known", "Subject", "build", "imported", "layers", "size"]


class Known(NamedTuple):
    """How a model is made, and the batch of its training step.

    Attributes:
        make: Makes the model.
        batch: Makes its inputs.
        description: The batch in words.
        needs: The package that the model comes from, where that is not torch.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    description: str
    needs: str = ""


class Subject(NamedTuple):
    """A model on its device and its inputs; without inputs it cannot be trained here."""

    name: str
    model: nn.Module
    inputs: Sequence[Tensor] = ()
    description: str = ""


def layers(count: int) -> nn.Module:
    """Return ``count`` tensors of 64 values, two in each layer."""
    return nn.Sequential(*(nn.LayerNorm(64) for _ in range(count // 2)))


def _batchnorms() -> nn.Module:
    return nn.Sequential(*(nn.BatchNorm2d(64) for _ in range(200)))


def _vision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = getattr(import_module("torchvision.models"), name)()
        return model

    return make


def _images(count: int, pixels: int) -> tuple[Callable[[], Tensor], str, str]:
    return lambda: torch.randn(count, 3, pixels, pixels), f"{count} images of {pixels} × {pixels}", "torchvision"


MODELS: dict[str, Known] = {
    "resnet18": Known(_vision("resnet18"), *_images(16, 64)),
    "resnet50": Known(_vision("resnet50"), *_images(16, 64)),
    "convnext_tiny": Known(_vision("convnext_tiny"), *_images(16, 64)),
    "vit_b_16": Known(_vision("vit_b_16"), *_images(2, 224)),
    "gpt2": Known(GPT, lambda: torch.randint(50_257, (2, 128)), "2 texts of 128 words"),
    "tiny-tensors": Known(lambda: layers(4_000), lambda: torch.randn(32, 64), "32 rows of 64 values"),
    "batchnorms": Known(_batchnorms, lambda: torch.randn(32, 64, 4, 4), "32 images of 64 × 4 × 4"),
}
"""torchvision's networks, a language model with tied embeddings, and two models of many small tensors."""


def build(name: str, device: torch.device) -> Subject:
    """Return the model of a name, or of ``"module:callable"``, with the same random weights each time.

    The callable returns a module, or a module and the inputs of a training step.

    Raises:
        ConfigError: If nothing that can be imported under that name makes a module.
        MissingExtraError: If the model comes from a package that is not installed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if ":" in name:
            model, *inputs = _imported(name)
            description = "its own inputs" if inputs else ""
        else:
            known = MODELS[name]
            model, inputs, description = _made(name, known), [known.batch()], known.description
        return Subject(name, model.to(device), [tensor.to(device) for tensor in inputs], description)


def imported(name: str) -> Any:  # noqa: ANN401 - whatever has that name
    """Import ``"module:name"``, also from the current directory."""
    module, _, called = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # where an installed command does not look by itself
        sys.path.insert(0, str(Path.cwd()))
    return getattr(import_module(module), called)


def size(model: nn.Module) -> tuple[int, int]:
    """Return how many distinct floating tensors a model has, and how many values are in them."""
    floats = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    return len(floats), sum(tensor.numel() for tensor in floats)


def _made(name: str, known: Known) -> nn.Module:
    try:
        return known.make()
    except ImportError as error:
        others = [other for other, one in MODELS.items() if one.needs == known.needs]
        alone = [other for other, one in MODELS.items() if not one.needs]
        message = (
            f"the model {name!r} needs {known.needs}, which cannot be imported ({error}): pip install {known.needs}. "
            f"So do {', '.join(others)}; {', '.join(alone)} need torch alone."
        )
        raise MissingExtraError(message) from error


def _imported(name: str) -> tuple[nn.Module, *tuple[Tensor, ...]]:
    try:
        made = imported(name)()
    except PolyakError:
        raise
    except Exception as error:
        message = f"the model {name!r} cannot be made: {type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(message) from error
    model, *inputs = made if isinstance(made, tuple) else (made,)
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):  # a module and a tuple of its inputs means the same
        inputs = [*inputs[0]]
    if not isinstance(model, nn.Module) or not all(isinstance(tensor, Tensor) for tensor in inputs):
        message = (
            f"{name!r} made {type(made).__name__}; it must return a torch.nn.Module, or a tuple of one and the "
            f"tensors that it is called with, as in `return model, x`"
        )
        raise ConfigError(message)
    return model, *inputs
