"""An average that was made after the run, and what is known of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from polyak.errors import ConfigError, MismatchError
from polyak.errors.formatting import listed
from polyak.io.atomic import as_path, check_target
from polyak.io.tensor_file import write_tensors
from polyak.posthoc.snapshot import safetensors
from polyak.tensors.entries import as_model
from polyak.tensors.sharding.adapter import adapter_for
from polyak.tensors.swap import forget_computed
from polyak.tensors.wrappers import root_of
from polyak.tensors.writing import overwrite, writable

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from torch import Tensor

    from polyak.strategy.profile import Profile
    from polyak.tensors.entries import Given

__all__ = ["Synthesis", "check_savable"]

_SHOWN = 6


@dataclass(frozen=True)
class Synthesis:
    """An average that was made after the run.

    Attributes:
        state_dict: Names, shapes and dtypes of the model's ``state_dict()``.
        coefficients: What each snapshot file counts; their sum is 1.
        profile_error: How far its profile is from the wanted one: ``||got - wanted|| / ||wanted||``.
        amplification: ``sum(|coefficient|)``, at least 1: how much the snapshots' rounding and noise may grow.
        rounding: ``sum(|coefficient| * ulp / 2)`` of the snapshots' dtypes: what their rounding may cost, relative to
            the weights.
        profile: What each optimiser step counts in it.
        wanted: The wanted profile.
        at_step: The optimiser step at which the average is.
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    coefficients: dict[str, float] = field(repr=False)
    profile_error: float
    amplification: float
    rounding: float
    profile: Profile = field(repr=False)
    wanted: Profile = field(repr=False)
    at_step: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state dict as a safetensors file whose metadata say how it was made; whole or absent.

        Raises:
            ConfigError: If the name does not end in ``.safetensors``, or a tensor has a dtype that no such file has.
            MissingExtraError: If safetensors is not installed.
            WriteError: If the file cannot be written, as on a full disk.
        """
        safetensors()
        file = as_path(path, "the file of save()")
        check_savable(file, {str(tensor.dtype) for tensor in self.state_dict.values()})
        about = {
            "at_step": self.at_step,
            "profile_error": self.profile_error,
            "amplification": self.amplification,
            "half_life": str(self.wanted.half_life),
            "mean_age": str(self.wanted.mean_age),
            "coefficients": self.coefficients,
        }
        # A file has no two names for one tensor.
        tensors = {key: tensor.clone() for key, tensor in self.state_dict.items()}
        write_tensors(file, tensors, {"polyak_synthesis": json.dumps(about), "format": "pt"})

    def copy_to(self, model: Given) -> None:
        """Overwrite a model's weights with the average; a sharded model gets this rank's parts.

        Buffers that the average lacks stay as they are.

        Args:
            model: The model, wrapped or not, or a mapping of names to tensors.

        Raises:
            MismatchError: If a parameter is missing, or a shape differs. Nothing has changed then.
        """
        root = root_of(model) if isinstance(model, nn.Module) else as_model(model)
        adapter = adapter_for(root)
        adapter.before_swap(root)
        pairs: list[tuple[Tensor, Tensor]] = []
        problems: list[str] = []
        for entry in adapter.entries(root):
            made = next((self.state_dict[name] for name in entry.aliases if name in self.state_dict), None)
            shape = entry.tensor.shape if entry.spread is None else entry.spread.shape
            if made is None and entry.kind == "buffer":
                continue
            if made is None or made.shape != shape:
                what = "is missing" if made is None else f"has shape {(*made.shape,)}, not {(*shape,)}"
                problems.append(f"{entry.name} {what}")
                continue
            pairs.append((entry.tensor, made if entry.spread is None else entry.spread.part(made)))
        if problems:
            message = f"the average belongs to another model: {listed(problems[:_SHOWN])}"
            raise MismatchError(message)
        with torch.no_grad(), writable([live for live, _ in pairs]):
            for live, made in pairs:
                overwrite(live, made)
        forget_computed()
        adapter.after_swap(root)


def check_savable(file: Path, dtypes: Collection[str]) -> None:
    """Refuse a file that an average cannot be saved to.

    Raises:
        ConfigError: If it is no ``.safetensors`` file, or there is no such dtype in it.
        WriteError: If the path belongs to something other than a file.
    """
    if file.suffix.lower() != ".safetensors":
        message = f"the file {str(file)!r} has the type {file.suffix or '(none)'!r}; expected .safetensors"
        raise ConfigError(message)
    if not os.access(file.absolute().parent, os.W_OK):
        message = (
            f"{str(file)!r} cannot be written: {str(file.absolute().parent)!r} is no folder that can be written to"
        )
        raise ConfigError(message)
    check_target(file)
    if any("complex128" in dtype for dtype in dtypes):
        message = "a .safetensors file holds no complex128; save the synthesis' state_dict by torch.save"
        raise ConfigError(message)
