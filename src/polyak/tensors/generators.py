"""The averager's own random generators: the same numbers on every rank, and the global generator left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["OwnGenerators"]


class OwnGenerators:
    """One generator per device for stochastic rounding, made when it is first asked for.

    Saved states wait as plain tensors until then, so that a state made on a GPU loads where there is none; one that
    was saved on another device of the same type continues here.

    Args:
        saved: The state of each generator, by the name of its device.
        seed: What generators that are made later begin with.

    Attributes:
        update: The number of the update that draws.
        seed: The seed.

    Raises:
        TypeError: If a saved state is not a tensor of bytes.
        RuntimeError: If a key names no device, or a value is not a state of a CPU's generator.
    """

    def __init__(self, saved: Mapping[str, Tensor] | None = None, seed: int = 0) -> None:
        self._saved = {torch.device(name): state for name, state in (saved or {}).items()}
        self.update, self.seed = 0, seed
        self._made: dict[torch.device, torch.Generator] = {}
        for device, state in self._saved.items():
            if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
                message = (
                    f"the generator of {device} has {type(state).__name__} as its state; expected a tensor of bytes"
                )
                raise TypeError(message)
            if device.type == "cpu":
                torch.Generator().set_state(state.cpu())

    def __call__(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device."""
        if device not in self._made:
            generator = torch.Generator(device).manual_seed(self.seed)
            alike = [state for other, state in self._saved.items() if other.type == device.type]
            if device in self._saved or alike:
                generator.set_state(self._saved.get(device, *alike[:1]).cpu())
            self._made[device] = generator
        return self._made[device]

    def of(self, part: str) -> Callable[[torch.device], torch.Generator]:
        """Return a generator for one shard of a tensor: the same numbers on every rank that holds it.

        They depend on nothing but the update and the part, so that a resume needs nothing, on however many ranks.
        """
        seed = crc32(f"{self.update} {part}".encode(), self.seed)
        made: dict[torch.device, torch.Generator] = {}

        def generator(device: torch.device) -> torch.Generator:
            if device not in made:
                made[device] = torch.Generator(device).manual_seed(seed)
            return made[device]

        return generator

    def restore(self, states: Mapping[str, Tensor]) -> None:
        """Draw from now on as after ``states`` was called; idempotent."""
        self._saved = {torch.device(name): state for name, state in states.items()}
        self._made.clear()

    def states(self) -> dict[str, Tensor]:
        """Return the state of each generator, by its device."""
        made = {device: generator.get_state() for device, generator in self._made.items()}
        return {str(device): state for device, state in {**self._saved, **made}.items()}
