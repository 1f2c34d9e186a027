"""Who takes part: how each makes an average of a model, updates it, and lets it be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import polyak
from polyak.bench.libraries import LIBRARIES, installed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor, nn

    from polyak.bench.settings import Settings

__all__ = ["DECAY", "PROPAGATE", "REFERENCE", "Entrant", "entrants", "libraries", "polyaks", "start"]

DECAY = 0.9
"""The cost of an update does not depend on it, and at 0.9 an average that does not move is seen at once."""
PROPAGATE = "polyak propagate"
"""The row with ``nonfinite="propagate"``, which lets NaN in as other libraries do; all others are as polyak comes."""
REFERENCE = "timm-v3"


@dataclass(frozen=True)
class Entrant:
    """One way of averaging.

    Attributes:
        name: What it is called in tables.
        group: Whose it is.
        make: Makes the average of a model, stored in a dtype (None: as the one who makes it chooses).
        update: Makes one update.
        averages: Returns the averaged tensors by the model's names.
        strategy: The strategy of polyak that means the same.
        buffers: Whether it averages floating buffers.
    """

    name: str
    group: Literal["polyak", "library"]
    make: Callable[[nn.Module, torch.dtype | None], Any]
    update: Callable[[Any, nn.Module], object]
    averages: Callable[[Any, nn.Module], Mapping[str, Tensor]]
    strategy: str = "ema"
    buffers: bool = True


def entrants(settings: Settings) -> list[Entrant]:
    """Return all that a run is asked for: polyak's strategies and kernels, then the libraries."""
    return [*polyaks(settings), *libraries(settings)]


def polyaks(settings: Settings) -> list[Entrant]:
    """Return polyak as it comes with each strategy and kernel, and once letting NaN in."""
    chosen = settings.chosen_strategies()
    named = [(strategy, kernel) for strategy in chosen for kernel in settings.chosen_kernels(strategy)]
    ours = [
        _polyak(f"polyak {kernel}" if strategy == "ema" else f"polyak {strategy} {kernel}", strategy, kernel=kernel)
        for strategy, kernel in named
    ]
    return [*ours, _polyak(PROPAGATE, chosen[0], nonfinite="propagate")]


def libraries(settings: Settings) -> list[Entrant]:
    """Return the libraries that were asked for, or all that are installed.

    Raises:
        MissingExtraError: If a library that was asked for is not installed.
    """
    return [_library(name) for name in installed(settings.against)]


def start(
    model: nn.Module, strategy: str, dtype: torch.dtype | None = None, *, kernel: str = "auto", nonfinite: str = "hold"
) -> polyak.Averager:
    """Return polyak's average of a model."""
    fields = polyak.strategies()[strategy].model_fields
    options: dict[str, Any] = {"kernel": kernel, "nonfinite": nonfinite, "dtype": dtype or "auto"}
    if "decay" in fields:
        options["decay"] = DECAY
    return polyak.average(model, strategy, **options)


def _polyak(name: str, strategy: str, *, kernel: str = "auto", nonfinite: str = "hold") -> Entrant:
    def make(model: nn.Module, dtype: torch.dtype | None) -> polyak.Averager:
        return start(model, strategy, dtype, kernel=kernel, nonfinite=nonfinite)

    def update(averager: polyak.Averager, _: nn.Module) -> None:
        averager.update()

    def update_with_rate(averager: polyak.Averager, _: nn.Module) -> None:
        averager.update(lr=0.1)

    # Strategies of plugins may ask for a learning rate; the plain call is what users write.
    call = update if strategy == "ema" else update_with_rate
    return Entrant(name, "polyak", make, call, lambda averager, _: averager.averages, strategy)


def _library(name: str) -> Entrant:
    library = LIBRARIES[name]

    def make(model: nn.Module, dtype: torch.dtype | None) -> object:
        return library.make(model, DECAY, dtype)

    return Entrant(name, "library", make, library.update, library.averages, library.strategy, library.buffers)
