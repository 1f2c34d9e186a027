"""Weights that no average of tensors is right for: quantised ones, and factors of adapters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polyak.files.reading.raw import Stored

__all__ = ["LORA", "is_lora", "quantised"]

_SUFFIXES = (
    ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".qweight", ".qzeros", ".SCB", ".weight_packed",
    ".weight_format", ".weight_zero_point", ".g_idx", ".weight_shape",
)  # fmt: skip
_SCALES = re.compile(r"_scale(_inv|_2)?$")
_INTEGERS = {torch.uint8, torch.int8}
LORA = re.compile(
    r"(^|\.)(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_down|lora_up|lora\.down|lora\.up|lora_magnitude_vector"
    r"|dora_scale|hada_w[12]_[ab]|lokr_w[12](_[ab])?)(\.|$)"
)


def quantised(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> str:
    """Return in words why tensors are codes and no weights; empty if they are weights."""
    if isinstance(table := config.get("quantization_config"), dict):
        return f"its config.json has a quantization_config ({table.get('quant_method', 'of unknown method')})"
    for name, stored in tensors.items():
        if f".{name}".endswith(_SUFFIXES) or ".quant_state." in name:
            return f"{name!r} belongs to quantised weights"
        stem = _SCALES.sub("", name)
        if stem != name and stem in tensors and tensors[stem].dtype.itemsize == 1:
            return f"{name!r} scales the codes in {stem!r}"
        if stored.dtype in _INTEGERS and f".{name}".endswith(".weight") and len(stored.shape) > 1:
            return f"{name!r} is a weight of packed integers ({stored.dtype})"
    return ""


def is_lora(tensors: Mapping[str, Stored]) -> bool:
    """Return whether tensors are factors of an adapter."""
    return any(LORA.search(name) for name in tensors)
