"""Files that a command will write: what would fail after minutes of work fails before it."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from polyak.errors import ConfigError
from polyak.errors.extras import needed_for
from polyak.io.atomic import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = ["check_folder", "check_picture", "check_tensors", "picture"]

_PICTURES = (".pdf", ".png", ".svg")


def check_folder(*files: Path | None) -> None:
    """Refuse files in folders that do not exist, and folders in their place.

    Raises:
        ConfigError: If the file exists.
    """
    for file in filter(None, files):
        if not file.absolute().parent.is_dir():
            message = f"{file} cannot be written: there is no folder {file.absolute().parent}; make it first"
            raise ConfigError(message)
        if file.is_dir():
            message = f"{file} cannot be written: the path belongs to a folder; give another path"
            raise ConfigError(message)


def check_tensors(file: Path | None) -> None:
    """Refuse a file that weights cannot be written to.

    Raises:
        ConfigError: If the folder of the file does not exist, or the file type is unknown.
        MissingExtraError: If safetensors is not installed.
    """
    from polyak.posthoc.snapshot import safetensors

    safetensors()
    check_folder(file)
    if file is not None and file.suffix.lower() != ".safetensors":
        message = f"the file {str(file)!r} has the type {file.suffix or '(none)'!r}; expected .safetensors"
        raise ConfigError(message)


def check_picture(file: Path | None) -> None:
    """Refuse a file that no picture can be drawn to.

    Raises:
        ConfigError: If the folder of the file does not exist, or the file type is unknown.
        MissingExtraError: If matplotlib is not installed.
    """
    if file is None:
        return
    check_folder(file)
    if file.suffix.lower() not in _PICTURES:
        message = f"the picture {str(file)!r} has the type {file.suffix or '(none)'!r}; expected {', '.join(_PICTURES)}"
        raise ConfigError(message)
    with needed_for("the picture", "matplotlib"):
        import_module("matplotlib.figure")


def picture(file: Path, draw: Callable[[Axes], object], title: str) -> None:
    """Let ``draw`` fill axes and write them; the file is whole or absent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    write_whole(file, partial(figure.savefig, dpi=130, format=file.suffix[1:].lower()))
