"""Tensors that do not change in a run, such as the frozen base of an adapter: stored once, in a file of their own."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from polyak.errors import MissingFileError, StateError
from polyak.io.checksums import bytes_of
from polyak.io.tensor_file import TensorFile, write_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from polyak.io.tensor_file import Scratch

__all__ = ["PREFIX", "Constants", "Joined"]

PREFIX = "constants-"
_DIGEST = 16  # digits


class Constants:
    """Takes out of each snapshot what is as it was in the first one.

    Args:
        folder: The folder of the snapshots.
        frozen: The canonical names of the parameters that are not trained.
    """

    def __init__(self, folder: Path, frozen: Collection[str]) -> None:
        self._folder, self._frozen = folder, {f"weights/{name}" for name in frozen}
        self._digests: dict[str, str] | None = None
        self._file = ""

    def apart(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        """Return the tensors that a snapshot has to hold itself, and the file that holds the others, or "".

        Raises:
            WriteError: If the file of the others cannot be written, as on a full disk.
        """
        now = {name: _digest(tensor) for name, tensor in tensors.items() if name in self._frozen}
        if not now:
            return {**tensors}, ""
        if self._digests is None or not (self._folder / self._file).is_file():
            mark = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:_DIGEST]
            self._file = f"{PREFIX}{mark}.safetensors"
            if not (self._folder / self._file).is_file():  # where a run is resumed, it is there
                write_tensors(self._folder / self._file, {name: tensors[name] for name in now}, {})
            self._digests = now
        same = {name for name, digest in now.items() if self._digests.get(name) == digest}
        if same != self._digests.keys():  # some were thawed: a snapshot refers to all of a file or to nothing
            return {**tensors}, ""
        return {name: tensor for name, tensor in tensors.items() if name not in same}, self._file


class Joined:
    """A snapshot's file, and the constants that it refers to.

    Raises:
        StateError: If the file of the constants is missing or damaged.
    """

    def __init__(self, file: TensorFile, constants: str) -> None:
        self.path, self._own = file.path, file
        try:
            self._constants = TensorFile(file.path.with_name(constants))
        except MissingFileError as error:
            message = (
                f"{str(file.path)!r} has its frozen tensors in {constants!r}, which is missing; copy it there from the "
                "folder that was recorded"
            )
            raise StateError(message) from error
        self.names = [*file.names, *(name for name in self._constants.names if name not in file.names)]

    def holds_apart(self, name: str) -> str:
        """Return the file of the constants if that has a tensor, or ""."""
        return "" if name in self._own.names else self._constants.path.name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which is not read."""
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is not read."""
        return self._of(name).dtype(name)

    def read(self, name: str, scratch: Scratch | None = None) -> Tensor:
        """Return a tensor; in the scratch memory where that is given.

        Raises:
            StateError: If its file is cut off or gone, or the tensor is not what was written.
        """
        return self._of(name).read(name, scratch)

    def _of(self, name: str) -> TensorFile:
        return self._own if name in self._own.names else self._constants


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {[*tensor.shape]}".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()
