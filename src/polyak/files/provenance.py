"""How a file was made, in its metadata: inputs with size and sha256, weights, steps, settings, version."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from polyak.files.reading.inside import relative

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polyak.files.checkpoint import Checkpoint

__all__ = ["texts_of"]

_FORMAT = 1
_UNKNOWN = "0" * 64


def texts_of(
    kind: str,
    checkpoints: Sequence[Checkpoint],
    settings: Mapping[str, Any],
    sums: Mapping[str, str] | None,
    *,
    hashes: bool,
    model: Checkpoint,
) -> dict[str, str]:
    """Return the metadata of a result.

    Args:
        kind: The key: ``"polyak_average"``, ``"polyak_merge"`` or ``"polyak_soup"``.
        checkpoints: The inputs.
        settings: What was asked for and what came of it, in plain types.
        sums: The sha256 of each file by its path; None before they are known, which makes texts of the same length.
        hashes: Whether they will be.
        model: The input whose other metadata are kept.
    """
    inputs = [_about(checkpoint, sums, hashes=hashes) for checkpoint in checkpoints]
    record = {"format": _FORMAT, "polyak": version("polyak"), "inputs": inputs, **settings}
    others = {name: text for name, text in model.metadata.items() if not name.startswith("polyak") and name != "format"}
    return {"format": "pt", **others, kind: json.dumps(record)}


def _about(checkpoint: Checkpoint, sums: Mapping[str, str] | None, *, hashes: bool) -> dict[str, Any]:
    files: list[dict[str, Any]] = []
    for file in checkpoint.raw_files():
        files.append({"name": relative(file.path, checkpoint.path), "bytes": file.size})
        if hashes:
            files[-1]["sha256"] = _UNKNOWN if sums is None else sums[str(file.path)]
    about: dict[str, Any] = {"path": str(checkpoint.path), "step": checkpoint.step}
    about["bytes"] = sum(file["bytes"] for file in files)
    if len(files) == 1 and hashes:
        about["sha256"] = files[0]["sha256"]
    return {**about, "files": files} if checkpoint.path.is_dir() else about
