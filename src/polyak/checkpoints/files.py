"""An averager's state in one file: ``.safetensors``, or ``.pt`` as torch writes it; whole or absent."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from polyak.engine.averager import refuse_other
from polyak.errors import ConfigError, MissingFileError, StateError
from polyak.errors.extras import needed_for
from polyak.io.atomic import as_path, check_target, open_regular, write_whole
from polyak.io.tensor_file import TensorFile, write_tensors
from polyak.tensors.wrappers import dtensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from polyak.engine.averager import Averager
    from polyak.engine.bank import Bank
    from polyak.strategy.profile import Profile

__all__ = ["load", "save"]

_METADATA = "polyak"
_COMPLEX = "complex"
_COLUMNS = ("rates", "strides", "last", "lrs", "counted")  # the order of format 1
_PIECE = 1 << 20  # bytes that are read at a time


def save(averager: Averager | Bank, path: str | os.PathLike[str]) -> None:
    """Write the state of an averager or a bank, with checksums, to a file that is whole or absent.

    A ``.safetensors`` file says how it was made: its metadata hold the strategy, the options, the counters and the
    profile's half-life and mean age; the tensors are called ``average/<name>``, and
    ``slots/<slot>/<name>`` a strategy's other tensors. The checksums of a ``.pt`` file come from its zip archive.

    Args:
        averager: The averager; a bank for a ``.pt`` file.
        path: A file name that ends in ``.safetensors`` (needs the package safetensors), ``.pt`` or ``.pth``.

    Raises:
        ConfigError: If the file type is another, or the averager is sharded.
        MissingExtraError: If safetensors is not installed.
        WriteError: If the file cannot be written, as on a full disk. What was there before is unchanged.

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
    refuse_other("save", averager, path, "path")
    file = as_path(path, "the file of save()")
    suffix = _suffix(file)
    check_target(file)
    if suffix == ".safetensors":
        _check_safetensors()
    state = averager.state_dict()
    states = state["bank"].values() if "bank" in state else [state]
    kind = dtensor()
    if kind is not None and any(isinstance(t, kind) for one in states for t in one["slots"]["average"].values()):
        message = (
            "the averager is sharded over ranks, of which each would write its own parts over the others'; "
            "on all ranks call polyak.distributed.save(averager, folder), or dcp.save"
        )
        raise ConfigError(message)
    if suffix != ".safetensors":
        write_whole(file, lambda scratch: torch.save(state, scratch))
    elif "bank" in state:
        message = "got a bank and a .safetensors file, which holds one average; give a .pt file, or save bank[name]"
        raise ConfigError(message)
    else:
        _save_safetensors(state, cast("Averager", averager).profile(), file)


def load(averager: Averager | Bank, path: str | os.PathLike[str]) -> None:
    """Go on exactly where ``save`` left off.

    The file is compared with its checksums first. Files of earlier versions, which have none, are read as they are.

    Args:
        averager: An averager of the same model and strategy, or a bank of such averagers.
        path: What ``save`` wrote.

    Raises:
        MissingFileError: If there is no such file: a ``FileNotFoundError`` and a ``StateError``.
        StateError: If it is damaged, no averager's state, or of another model or strategy.
        ConfigError: If the file type is another.

    Nothing is changed when one is raised.

    Examples:
        >>> import polyak, torch
        >>> averager = polyak.average(torch.nn.Linear(2, 1), "swa")
        >>> polyak.load(averager, "missing.pt")
        Traceback (most recent call last):
        polyak.errors.MissingFileError: there is no file 'missing.pt'; expected what polyak.save() wrote
    """
    refuse_other("load", averager, path, "path")
    file = as_path(path, "the file of load()")
    suffix = _suffix(file)
    if file.is_dir() or not file.exists():
        folder = "; it is a folder: if polyak.distributed.save() wrote it, polyak.distributed.load() reads it"
        message = f"there is no file {str(file)!r}{folder * file.is_dir()}; expected what polyak.save() wrote"
        raise MissingFileError(message)
    try:
        with open_regular(file) as opened:  # one that takes its place meanwhile is another file
            state = _read_safetensors(file, opened) if suffix == ".safetensors" else _read_torch(opened)
    except StateError:
        raise
    except OSError as error:
        message = f"{str(file)!r} cannot be read: {error.strerror or error}"
        raise StateError(message) from error
    except pickle.UnpicklingError as error:  # of what torch does not load as plain tensors and numbers
        message = (
            f"{str(file)!r} holds a whole pickled object, not an averager's state; expected what polyak.save() wrote"
        )
        raise StateError(message) from error
    except Exception as error:  # each format has errors of its own
        message = f"{str(file)!r} is damaged or incomplete, or not from polyak.save(); resume from an earlier file"
        raise StateError(message) from error
    averager.load_state_dict(state)


def _read_torch(opened: IO[bytes]) -> Any:  # noqa: ANN401 - checked by load_state_dict
    _check_archive(opened)
    opened.seek(0)
    return torch.load(opened, map_location="cpu", weights_only=True)


def _check_archive(opened: IO[bytes]) -> None:
    """Compare an archive with the checksums that torch writes and does not read.

    Raises:
        ValueError: If it would grow in memory.
        zipfile.BadZipFile: If it is not an archive, or damaged.
    """
    with zipfile.ZipFile(opened) as archive:
        records = archive.infolist()
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if not stored or sum(record.file_size for record in records) > os.fstat(opened.fileno()).st_size:
            message = "its records are larger than the file"
            raise ValueError(message)
        for record in records:
            if record.CRC:  # 0: torch.serialization.set_crc32_options(False) was called
                with archive.open(record) as read:
                    while read.read(_PIECE):
                        pass  # it compares by itself, at the end


def _read_safetensors(file: Path, opened: IO[bytes]) -> dict[str, Any]:
    read = TensorFile(file, opened)
    if _METADATA not in read.metadata:
        message = (
            f"{str(file)!r} holds weights and no averager's state; a model loads them: "
            "model.load_state_dict(safetensors.torch.load_file(...))"
        )
        raise StateError(message)
    rest = json.loads(read.metadata[_METADATA])
    tensors = {name: read.read(name) for name in read.names}
    for key in rest.pop(_COMPLEX):
        tensors[key] = torch.view_as_complex(tensors[key])
    rest.pop("profile")
    parts: dict[str, dict[str, Tensor]] = {"average": {}, "history": {}, "generators": {}, "slots": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    slots: dict[str, dict[str, Tensor]] = {"average": parts.pop("average")}
    for key, tensor in parts.pop("slots").items():
        slot, _, name = key.partition("/")
        slots.setdefault(slot, {})[name] = tensor
    columns = parts["history"]
    if rest["format"] == 1:
        history = *(columns[key] for key in _COLUMNS if key in columns), *rest.pop("changes", ())
    else:
        history = ({**columns, **rest.pop("history")},)
    return {**rest, "slots": slots, "history": history, "generators": tuple(parts["generators"].items())}


def _save_safetensors(state: Mapping[str, Any], profile: Profile, file: Path) -> None:
    tensors, rest = _flattened(state)
    summary = {"updates": len(profile), "half_life": profile.half_life, "mean_age": profile.mean_age}
    texts = {key: str(value) for key, value in summary.items()} if len(profile) else {}
    metadata = json.dumps({**rest, "profile": texts})
    write_tensors(file, tensors, {_METADATA: metadata})


def _flattened(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        f"average/{name}" if slot == "average" else f"slots/{slot}/{name}": tensor
        for slot, own in state["slots"].items()
        for name, tensor in own.items()
    }
    (history,) = state["history"]
    columns = {key: part for key, part in history.items() if isinstance(part, torch.Tensor)}
    tensors |= {f"history/{key}": tensor for key, tensor in columns.items()}
    tensors |= {f"generators/{key}": tensor for key, tensor in state["generators"]}
    rest = {key: value for key, value in state.items() if key not in {"slots", "generators"}}
    rest["history"] = {key: part for key, part in history.items() if key not in columns}
    rest[_COMPLEX] = [key for key, tensor in tensors.items() if tensor.is_complex()]
    real = {key: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for key, t in tensors.items()}
    return real, rest


def _suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix not in {".safetensors", ".pt", ".pth"}:
        message = f"the file {str(file)!r} has the type {suffix or '(none)'!r}; expected .safetensors, .pt or .pth"
        raise ConfigError(message)
    return suffix


def _check_safetensors() -> None:
    with needed_for("a .safetensors file (a .pt file does not)", "safetensors"):
        import safetensors.torch  # noqa: F401 - whether it is there
