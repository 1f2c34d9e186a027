"""An averager's state in one file: ``.safetensors``, or ``.pt`` as torch writes it; whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polyak.atomic import write_whole
from polyak.errors import ConfigError, MissingExtraError, StateError
from polyak.tensors.wrappers import dtensor

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

    from polyak.averager import Averager

__all__ = ["load", "save"]

_METADATA = "polyak"
_COMPLEX = "complex"
_CHANGES = "changes"
_HISTORY = ("rates", "strides", "last")


def save(averager: Averager, path: str | os.PathLike[str]) -> None:
    """Write the state of an averager, written beside and then renamed: the file is whole or absent.

    A ``.safetensors`` file says how it was made: its metadata hold the strategy, the options, the counters and the
    profile's half-life and mean age; the tensors are called ``average/<name>``, and
    ``slots/<slot>/<name>`` what a strategy keeps beside.

    Args:
        averager: The averager.
        path: A file name that ends in ``.safetensors`` (needs the package safetensors), ``.pt`` or ``.pth``.

    Raises:
        ConfigError: The file type is another.
        MissingExtraError: safetensors is not installed.

    Often confused with: ``averager.averaged_state_dict()``, which is the averaged *model*, without what a resume needs.

    Examples:
        >>> import polyak, tempfile, torch
        >>> averager = polyak.average(torch.nn.Linear(2, 1), "swa")
        >>> averager.update()
        >>> other = polyak.average(torch.nn.Linear(2, 1), "swa")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     polyak.save(averager, f"{folder}/average.pt")
        ...     polyak.load(other, f"{folder}/average.pt")
        >>> other.n
        1
    """
    file = Path(path)
    state = averager.state_dict()
    kind = dtensor()
    if kind is not None and any(isinstance(tensor, kind) for tensor in state["slots"]["average"].values()):
        message = (
            "the averager is sharded over ranks, of which each would write its own parts over the others'; "
            "on all ranks call polyak.distributed.save(averager, folder), or dcp.save"
        )
        raise ConfigError(message)
    if _suffix(file) == ".safetensors":
        tensors, rest = _flattened(state)
        profile = averager.profile()
        about = (
            {"updates": len(profile), "half_life": profile.half_life, "mean_age": profile.mean_age}
            if averager.n
            else {}
        )
        write = _safetensors().save_file
        metadata = {_METADATA: json.dumps({**rest, "profile": {key: str(value) for key, value in about.items()}})}
        write_whole(file, lambda scratch: write(tensors, scratch, metadata=metadata))
    else:
        write_whole(file, lambda scratch: torch.save(state, scratch))


def load(averager: Averager, path: str | os.PathLike[str]) -> None:
    """Go on exactly where ``save`` left off.

    Args:
        averager: An averager of the same model and strategy.
        path: What ``save`` wrote.

    Raises:
        StateError: The file is missing, damaged, no averager's state, or of another model or strategy.
        ConfigError: The file type is another.
        MissingExtraError: safetensors is not installed.

    Nothing is changed when one is raised.

    Examples:
        >>> import polyak, torch
        >>> averager = polyak.average(torch.nn.Linear(2, 1), "swa")
        >>> polyak.load(averager, "missing.pt")
        Traceback (most recent call last):
        polyak.errors.StateError: there is no file 'missing.pt'; expected what polyak.save() wrote
    """
    file = Path(path)
    if not file.is_file():
        folder = "; it is a folder: if polyak.distributed.save() wrote it, polyak.distributed.load() reads it"
        message = f"there is no file {str(file)!r}{folder * file.is_dir()}; expected what polyak.save() wrote"
        raise StateError(message)
    read = _read_safetensors if _suffix(file) == ".safetensors" else _read_torch
    try:
        state = read(file)
    except MissingExtraError:
        raise
    except Exception as error:  # each format has errors of its own, pickle's and zip's among them
        message = f"{str(file)!r} cannot be read as an averager's state: {type(error).__name__}: {error}"
        raise StateError(message) from error
    averager.load_state_dict(state)


def _read_torch(file: Path) -> Any:  # noqa: ANN401 - checked by load_state_dict
    return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(file: Path) -> dict[str, Any]:
    with _safetensors().safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata() or {}
        if _METADATA not in metadata:
            message = "it holds weights and no averager's state; model.load_state_dict(safetensors.torch.load_file(…))"
            raise StateError(message)
        rest = json.loads(metadata[_METADATA])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    for key in rest.pop(_COMPLEX):
        # A copy: what lies in the file may begin where no complex number may, and torch would crash.
        tensors[key] = torch.view_as_complex(tensors[key].clone())
    rest.pop("profile")
    parts: dict[str, dict[str, Tensor]] = {"average": {}, "history": {}, "generators": {}, "slots": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    slots: dict[str, dict[str, Tensor]] = {"average": parts.pop("average")}
    for key, tensor in parts.pop("slots").items():
        slot, _, name = key.partition("/")
        slots.setdefault(slot, {})[name] = tensor
    history = (*(parts["history"][key] for key in _HISTORY), *rest.pop(_CHANGES, ()))
    return {**rest, "slots": slots, "history": history, "generators": tuple(parts["generators"].items())}


def _flattened(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        f"average/{name}" if slot == "average" else f"slots/{slot}/{name}": tensor
        for slot, own in state["slots"].items()
        for name, tensor in own.items()
    }
    tensors |= {f"history/{key}": tensor for key, tensor in zip(_HISTORY, state["history"], strict=False)}
    tensors |= {f"generators/{key}": tensor for key, tensor in state["generators"]}
    rest = {key: value for key, value in state.items() if key not in {"slots", "history", "generators"}}
    if changes := state["history"][len(_HISTORY) :]:
        rest[_CHANGES] = changes
    rest[_COMPLEX] = [key for key, tensor in tensors.items() if tensor.is_complex()]
    real = {key: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for key, t in tensors.items()}
    return {key: tensor.contiguous() for key, tensor in real.items()}, rest


def _suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix not in {".safetensors", ".pt", ".pth"}:
        message = f"the file {str(file)!r} has the type {suffix or '(none)'!r}; expected .safetensors, .pt or .pth"
        raise ConfigError(message)
    return suffix


def _safetensors() -> Any:  # noqa: ANN401 - an optional package
    try:
        import safetensors.torch
    except ImportError as error:
        message = 'safetensors is not installed: pip install "polyak[safetensors]", or use a .pt file'
        raise MissingExtraError(message) from error
    return safetensors.torch
