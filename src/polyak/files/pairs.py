"""The factors of adapters by the names that PEFT, kohya's scripts and diffusers give them, and their scale."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from polyak.errors import ConfigError
from polyak.errors.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from polyak.files.checkpoint import Checkpoint

__all__ = ["Pair", "pairs_in"]

_DOWN = re.compile(r"^(?P<module>.*?)\.?(?P<kind>lora_A|lora_embedding_A|lora_down|lora\.down)(?P<rest>(\.[\w-]+)*)$")
_UP = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B", "lora_down": "lora_up", "lora.down": "lora.up"}
_OTHERS = re.compile(r"lora_magnitude_vector|dora_scale|hada_w|lokr_w|lora_mid")
_PREFIX = "base_model.model."


class Pair(NamedTuple):
    """Two factors of one module.

    Attributes:
        down: The name of the first factor, of shape (rank, inputs).
        up: The name of the second factor, of shape (outputs, rank).
        alpha: The name of the number that scales them; empty: the config says it.
        scale: What multiplies the product.
    """

    down: str
    up: str
    alpha: str
    scale: float

    def named(self, down: Tensor, up: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return factors by their names."""
        return {self.down: down.to(dtype).contiguous(), self.up: up.to(dtype).contiguous()}


def pairs_in(checkpoint: Checkpoint, *, needs_scale: bool) -> dict[str, Pair]:
    """Return the factors in an adapter by module.

    Args:
        checkpoint: The adapter.
        needs_scale: Whether to refuse factors whose scale nothing says.

    Raises:
        ConfigError: If it is an adapter of another kind, a factor has no counterpart, or a scale is unknown.
    """
    config = checkpoint.config
    if config.get("use_dora") or config.get("lora_bias") or any(_OTHERS.search(name) for name in checkpoint.names):
        message = (
            f"{str(checkpoint.path)!r} is an adapter of another kind (DoRA, LoHa, LoKr or with biases), whose updates "
            "are no product of two factors; merge it into its base, and average those"
        )
        raise ConfigError(message)
    pairs = {}
    for name in checkpoint.names:
        if (found := _DOWN.match(name)) is None:
            continue
        module, kind, rest = found["module"], found["kind"], found["rest"]
        up = name[: found.start("kind")] + _UP[kind] + rest
        if up not in checkpoint.tensors:
            message = f"{str(checkpoint.path)!r} has the factor {name!r} without its counterpart {up!r}"
            raise ConfigError(message)
        alpha = f"{module}.alpha" if f"{module}.alpha" in checkpoint.tensors else ""
        own = module.removeprefix(_PREFIX)
        rank = checkpoint.shape(name)[0]
        scale = _scale(checkpoint, own, rank, alpha, kind)
        if scale is None:
            if needs_scale:
                message = (
                    f"{str(checkpoint.path)!r} says nothing of the scale of its factors; give the folder with "
                    "adapter_config.json"
                )
                raise ConfigError(message)
            scale = 1.0
        pairs[own] = Pair(name, up, alpha, scale)
    return pairs


def _scale(checkpoint: Checkpoint, module: str, rank: int, alpha: str, kind: str) -> float | None:
    if alpha:
        return float(checkpoint.read(alpha).item()) / rank
    config = checkpoint.config
    if "lora_alpha" not in config:  # kohya's scripts take the rank for it
        return 1.0 if kind in {"lora_down", "lora.down"} else None
    number = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if not isinstance(number, (int, float)):
        message = f"lora_alpha is {shown(number)} in {str(checkpoint.path)!r}; expected a number"
        raise ConfigError(message)
    return float(number) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(pattern: Any, module: str, usual: Any) -> Any:  # noqa: ANN401 - of a config
    """Return the value for a module; PEFT compares the end of its name."""
    table: Mapping[str, Any] = pattern if isinstance(pattern, dict) else {}
    for key, value in table.items():
        if module == key or module.endswith(f".{key.lstrip('^')}") or re.fullmatch(f"(.*\\.)?({key})", module):
            return value
    return usual
