"""Compiles loops by Numba, and caches them on disk: one whole file for each version, processor and signature.

Numba's own cache has an index, and numbered files behind it. Processes that start together, or environments that share
a checkout, can read one version's index and another one's file.
"""

from __future__ import annotations

import pickle
import sys
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any
from uuid import uuid4

import llvmlite  # type: ignore[import-untyped]  # it ships no types
import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

from polyak.errors.calls import warn_user
from polyak.kernels.rounding import rounds_once

__all__ = ["jit"]

_DIGEST = 32  # bytes
_WARNED: list[str] = []


def jit(**options: Any) -> Any:
    """Return a decorator that compiles a function without Python's lock, and caches it on disk."""

    def decorate(function: Any) -> Any:
        compiled = njit(**{"nogil": True, "error_model": "numpy", **options})(function)
        try:
            compiled._cache = _Cache(function)  # noqa: SLF001 - Numba has no public way to replace its cache
        except Exception as error:  # noqa: BLE001 - no folder can be written, or this Numba caches otherwise
            _warn(error)
        return compiled

    return decorate


class _Cache(FunctionCache):
    """Numba's cache with files of ours; whatever goes wrong with them ends in a fresh compilation."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        files = _Files(Path(self._cache_path), f"{function.__module__}.{function.__qualname__}")
        self._cache_file = files  # type: ignore[assignment]  # it loads and saves as Numba's

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001 - whatever Numba and LLVM make of what they read
            _warn(error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:  # noqa: BLE001 - the function is compiled, and works without a file
            _warn(error)


class _Files:
    """Compiled functions in a folder, in the place of Numba's index and data files.

    A name says the versions, the processor and the signature. A file begins with digests of itself and of the sources.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def load(self, key: object) -> Any:
        """Return the code saved under a key, or None if there is none or it has other sources."""
        try:
            content = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, sources, data = content[:_DIGEST], content[_DIGEST : 2 * _DIGEST], content[2 * _DIGEST :]
        if self._digest(key, sources + data) != digest:
            with suppress(OSError):
                self._path(key).unlink()
            message = f"{self._path(key)} is damaged"
            raise ValueError(message)
        return pickle.loads(data) if sources == _sources() else None  # noqa: S301 - a file that this class wrote

    def save(self, key: object, data: object) -> None:
        """Save something under a key, whole or not at all."""
        path, content = self._path(key), _sources() + dumps(data)
        part = path.with_name(f"{path.name}.{uuid4().hex}")
        try:
            part.write_bytes(self._digest(key, content) + content)
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink()

    def _digest(self, key: object, content: bytes) -> bytes:
        return sha256(self._path(key).name.encode() + content).digest()

    def _path(self, key: object) -> Path:
        # The key has the signature and the processor.
        depends = sys.version, numba.__version__, llvmlite.__version__, rounds_once(), key
        return self._folder / f"{self._name}.{sha256(repr(depends).encode()).hexdigest()[:32]}.nbc"


@cache
def _sources() -> bytes:
    """Return a digest of all modules beside this one: compiled loops take functions from others of them."""
    found = sorted(resources.files(__package__).iterdir(), key=lambda file: file.name)
    modules = [file.read_bytes() for file in found if file.name.endswith(".py")]
    return sha256(repr(modules).encode()).digest()


def _warn(error: Exception) -> None:
    """Warn once in a process: what cannot be cached is compiled by each one, which takes seconds."""
    if _WARNED:
        return
    said = str(error).partition("\n")[0]
    _WARNED.append(said)
    message = (
        f"Numba's cache of polyak's kernels cannot be used ({type(error).__name__}: {said}); they are compiled anew. "
        "If this repeats, set NUMBA_CACHE_DIR to a folder that can be written."
    )
    warn_user(message)
