"""The other libraries: how each is made on the fastest path that it ships, updated, and read."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from polyak.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor, nn

__all__ = ["LIBRARIES", "Library", "installed"]


class Library(NamedTuple):
    """How a library is asked.

    Attributes:
        package: What is imported.
        distribution: What is installed.
        call: The call that makes the average, as a user would write it.
        make: Makes the average of a model with a decay, stored in a dtype (None: the model's).
        update: Makes one update.
        averages: Returns the averaged tensors by the model's names.
        strategy: The strategy of polyak that means the same.
        buffers: Whether it averages floating buffers.
        typed: Whether the average can be stored in another dtype.
    """

    package: str
    distribution: str
    call: str
    make: Callable[[nn.Module, float, torch.dtype | None], Any]
    update: Callable[[Any, nn.Module], object]
    averages: Callable[[Any, nn.Module], Mapping[str, Tensor]]
    strategy: str = "ema"
    buffers: bool = True
    typed: bool = False


def _timm(version: str, inside: str) -> Library:
    def make(model: nn.Module, decay: float, dtype: torch.dtype | None) -> object:
        cls = getattr(import_module("timm.utils"), f"ModelEma{version}")
        return cls(model, decay=decay, **({} if dtype is None else {"dtype": dtype}))

    return Library(
        "timm", "timm", f"ModelEma{version}(model)", make,
        lambda average, model: average.update(model),
        lambda average, _: getattr(average, inside).state_dict(), typed=version == "V3",
    )  # fmt: skip


def _make_torch(model: nn.Module, decay: float, _: torch.dtype | None) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]  # torch's own


def _make_ema_pytorch(model: nn.Module, decay: float, _: torch.dtype | None) -> object:
    settings = {"min_value": decay, "update_after_step": 0, "update_every": 1, "use_foreach": True}
    return import_module("ema_pytorch").EMA(model, beta=decay, **settings)


def _make_torch_ema(model: nn.Module, decay: float, _: torch.dtype | None) -> object:
    averaging = import_module("torch_ema").ExponentialMovingAverage
    return averaging(list(model.parameters()), decay=decay, use_num_updates=False)


def _make_diffusers(model: nn.Module, decay: float, _: torch.dtype | None) -> object:
    averaging = import_module("diffusers.training_utils").EMAModel
    return averaging(list(model.parameters()), decay=decay, min_decay=decay, foreach=True)


def _all_of(inside: str, average: Any, _: nn.Module) -> dict[str, Tensor]:  # noqa: ANN401 - another library's object
    module = getattr(average, inside)
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _shadows(average: Any, model: nn.Module) -> dict[str, Tensor]:  # noqa: ANN401 - another library's object
    return dict(zip(dict(model.named_parameters()), average.shadow_params, strict=True))


_torch = Library(
    "torch", "torch", "AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn())", _make_torch,
    lambda average, model: average.update_parameters(model), partial(_all_of, "module"), buffers=False,
)  # fmt: skip

LIBRARIES: dict[str, Library] = {
    "timm-v1": _timm("", "ema"),
    "timm-v2": _timm("V2", "module"),
    "timm-v3": _timm("V3", "module"),
    "torch": _torch,
    "torch-swa": _torch._replace(
        call="AveragedModel(model)", make=lambda model, *_: AveragedModel(model), strategy="swa"
    ),
    "ema-pytorch": Library(
        "ema_pytorch", "ema-pytorch", "EMA(model, update_after_step=0, update_every=1, use_foreach=True)",
        _make_ema_pytorch, lambda average, _: average.update(), partial(_all_of, "ema_model"),
    ),
    "torch-ema": Library(
        "torch_ema", "torch-ema", "ExponentialMovingAverage(model.parameters())", _make_torch_ema,
        lambda average, _: average.update(), _shadows, buffers=False,
    ),
    "diffusers": Library(
        "diffusers", "diffusers", "EMAModel(model.parameters(), foreach=True)", _make_diffusers,
        lambda average, model: average.step(model.parameters()), _shadows, buffers=False,
    ),
}  # fmt: skip
"""Names to libraries."""


def installed(wanted: Sequence[str] | None) -> list[str]:
    """Return the wanted libraries, or where None are named all that are installed.

    Raises:
        MissingExtraError: If a library that was asked for is not installed.
    """
    there = [name for name, library in LIBRARIES.items() if find_spec(library.package) is not None]
    for name in wanted or ():
        if name not in there:
            distribution = LIBRARIES[name].distribution
            found = ", ".join(there)
            message = f"the library {name!r} is not installed: pip install {distribution}; installed are {found}"
            raise MissingExtraError(message)
    return there if wanted is None else list(wanted)
