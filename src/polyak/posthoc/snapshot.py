"""One average at one moment in a file, with its profile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from polyak.errors import SnapshotError, StateError, WriteError
from polyak.errors.extras import needed_for
from polyak.errors.formatting import shown
from polyak.io.tensor_file import TensorFile, write_tensors
from polyak.posthoc.constants import PREFIX, Joined
from polyak.posthoc.recipe import described, from_description
from polyak.posthoc.schema import About
from polyak.strategy.base import settings_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from polyak.io.tensor_file import Scratch
    from polyak.posthoc.constants import Constants
    from polyak.posthoc.packed import Packed
    from polyak.strategy.base import Strategy
    from polyak.strategy.profile import Profile

__all__ = ["BLOCKS", "START", "UNMARKED", "Layout", "Snapshot", "safetensors", "write"]

FORMATS = 1, 2
"""Files of the second one have their frozen tensors elsewhere."""
BLOCKS, START = UNMARKED = "blocks", "start"
"""The series of a recorder itself, which no average's history remembers."""

_ABOUT = "polyak_snapshot"


class Layout(NamedTuple):
    """The model that snapshots are of.

    Attributes:
        keys: Each key of its state dict, and the canonical name of the tensor there.
        dtypes: The model's dtype of each canonical name.
        averaged: The canonical names of what is averaged; the rest is copied from the last step.
    """

    keys: dict[str, str]
    dtypes: dict[str, str]
    averaged: list[str]

    def difference(self, other: Layout) -> str:
        """Return in words what differs between two models; empty if nothing does."""
        for name in (one for one in self.dtypes if one in other.dtypes):
            if (here := self.dtypes[name]) != (there := other.dtypes[name]):
                return f"the dtypes of {shown(name)} are {here} and {there}"
        if left := self.keys.keys() ^ other.keys.keys():
            return f"only one of them has {shown(min(left))}"
        if self.averaged != other.averaged:
            return "they average different tensors"
        return "" if self == other else "they name their tensors differently"


@dataclass(frozen=True)
class Snapshot:
    """One average at one moment, in a file.

    Attributes:
        file: The file.
        about: What its metadata say.
        layout: The model.
    """

    file: TensorFile | Joined
    about: About
    layout: Layout

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the snapshot in a file, its tensors unread; None where the file is another's.

        Raises:
            StateError: If the file is damaged, or was written by a newer polyak.
        """
        file = TensorFile(path)
        if _ABOUT not in file.metadata:
            return None
        try:
            raw = json.loads(file.metadata[_ABOUT])
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, Mapping) or type(raw.get("format")) is not int:
            message = f"{str(path)!r} is a damaged snapshot: what its metadata say is incomplete; remove it"
            raise StateError(message)
        if raw["format"] not in FORMATS:
            message = (
                f"{str(path)!r} has format {shown(raw['format'])}, and this polyak reads {FORMATS[-1]}; upgrade polyak"
            )
            raise StateError(message)
        constants = raw.get("constants")
        whole = Joined(file, _checked_name(constants, path)) if constants else file
        about = About.of(raw, repr(str(path)), {name: whole.shape(name) for name in whole.names})
        layout = about.layout
        if strange := [name for name in layout.averaged if not whole.dtype(f"weights/{name}").is_floating_point]:
            message = (
                f"{str(path)!r} is a damaged snapshot: {shown(strange[0])} is averaged and holds no floats; remove it"
            )
            raise StateError(message)
        return cls(whole, about, Layout(layout.keys, layout.dtypes, layout.averaged))

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def average(self) -> str:
        """The name of its average: in the bank, or ``"average"``; ``"blocks"`` for means of blocks."""
        return self.about.average

    @property
    def step(self) -> int:
        """The optimiser step of its last update; of a start, the one before the first update."""
        return self.about.step

    @property
    def is_start(self) -> bool:
        """Whether it holds the weights that an average started from."""
        return self.average == START

    def difference(self, other: Snapshot) -> str:
        """Return in words what differs between the models of two snapshots; empty if nothing does."""
        if found := self.layout.difference(other.layout):
            return found
        for name in self.layout.averaged:  # the last snapshot's copies count alone
            shapes = [snapshot.file.shape(f"weights/{name}") for snapshot in (self, other)]
            if shapes[0] != shapes[1]:
                return f"the shapes of {shown(name)} are {shapes[0]} and {shapes[1]}"
        return ""

    @cached_property
    def profile(self) -> Profile:
        """What each step counts in it."""
        names = [name for name in self.file.names if name.startswith("profile/")]
        tensors = {name.removeprefix("profile/"): self.file.read(name) for name in names}
        return from_description(self.about, tensors)

    def constant(self, name: str) -> str:
        """Return the file that holds one of its tensors for other snapshots too, or ""."""
        return self.file.holds_apart(f"weights/{name}") if isinstance(self.file, Joined) else ""

    @property
    def precision(self) -> float:
        """The relative rounding of a value in it: half a unit in the last place of its shortest dtype."""
        names = [f"weights/{name}" for name in self.layout.averaged]
        return max(torch.finfo(self.file.dtype(name)).eps for name in names) / 2

    def read_weights(self, name: str, scratch: Scratch | None = None) -> Tensor:
        """Return one of its tensors by canonical name; in the scratch memory where that is given."""
        tensor = self.file.read(f"weights/{name}", scratch)
        if name not in self.about.complex:
            return tensor
        # There are hardly any operations on complex halves.
        return torch.view_as_complex(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))


def write(
    path: Path,
    packed: Packed,
    *,
    run: str,
    average: str,
    step: int,
    start: str,
    profile: Profile,
    strategy: Strategy,
    layout: Layout,
    constants: Constants,
) -> None:
    """Write a snapshot; the file is whole or absent.

    Args:
        path: The file.
        packed: The tensors.
        run: What the snapshots of one run have in common.
        average: Its name.
        step: The optimiser step of its last update; for the weights at the start, the step before the first.
        start: The digest of the weights that it started from.
        profile: What each step counts in them.
        strategy: What made the profile.
        layout: The model.
        constants: What it need not hold itself.

    Raises:
        SnapshotError: If the file cannot be written, as on a full disk.
    """
    try:
        weights, apart = constants.apart(packed.tensors)
    except WriteError as error:
        raise _refused(path, error) from error
    shares, tensors = described(profile, strategy)
    tensors = {f"profile/{name}": tensor for name, tensor in tensors.items()}
    tensors |= weights
    summary = {"half_life": profile.half_life, "mean_age": profile.mean_age} if len(profile) else {}
    about = {
        "format": FORMATS[bool(apart)],
        **({"constants": apart} if apart else {}),
        "run": run,
        "average": average,
        "step": step,
        "start": start,
        "mark": packed.digest,
        "strategy": settings_of(strategy),
        "profile": shares,
        "summary": {key: str(value) for key, value in summary.items()},
        "layout": layout._asdict(),
        "complex": packed.complex,
    }
    sums = {name: value for name, value in packed.sums.items() if name in tensors}
    try:
        write_tensors(path, tensors, {_ABOUT: json.dumps(about)}, sums)
    except WriteError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: WriteError) -> SnapshotError:
    return SnapshotError(
        f"the snapshot {path.name!r} could not be written: {error} "
        "The average is whole and training can continue; only this snapshot is missing."
    )


def _checked_name(constants: object, path: Path) -> str:
    if not isinstance(constants, str) or not constants.startswith(PREFIX) or {*constants} & {*"/\\\0"}:
        message = f"{str(path)!r} is a damaged snapshot: {shown(constants)} is no file of constants; remove it"
        raise StateError(message)
    return constants


def safetensors() -> Any:  # noqa: ANN401 - an optional package
    """Return the package that writes the files.

    Raises:
        MissingExtraError: If safetensors is not installed.
    """
    with needed_for("a recorder", "safetensors"):
        import safetensors.torch as package
    return package
