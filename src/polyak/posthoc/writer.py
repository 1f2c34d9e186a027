"""The folder that a recorder writes to: of a sharded average the first rank does so, for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from polyak import errors
from polyak.distributed.sync import rank
from polyak.errors import PolyakError, StateError
from polyak.errors.calls import warn_user
from polyak.posthoc.claim import Claim
from polyak.posthoc.constants import Constants
from polyak.posthoc.packed import Packed, digest_of
from polyak.posthoc.paths import file_name, files_of, make_folder
from polyak.posthoc.reader import Store
from polyak.posthoc.snapshot import START, UNMARKED, Layout, write
from polyak.posthoc.strangers import newer_marks, refuse_other_start
from polyak.ranks.consensus import first_rank, from_first, ranks_of
from polyak.ranks.unresponsive import answered

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from polyak.posthoc.strangers import Past
    from polyak.strategy.base import Strategy
    from polyak.strategy.profile import Profile

__all__ = ["Folder"]

T = TypeVar("T")

_REST = "All ranks build the recorder, update and close it; this snapshot was not written, and those before are whole."


class Folder:
    """Where the snapshots of one run go.

    Args:
        path: The folder; made where it is missing.
        layout: The model.
        dtype: The dtype of averaged tensors. Defaults to their own, but float32 at the least.
        keep: How many snapshots of each average are kept. Defaults to all.
        digested: The canonical names of the tensors that identify an average.
        frozen: The canonical names of the parameters that are not trained.
        meshes: The ranks that have parts of the tensors, if these are sharded. All of them then call, the first one
            writes, and what it raises is raised by all.

    Raises:
        ConfigError: If the folder cannot be made.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        *,
        dtype: torch.dtype | None,
        keep: int | None,
        digested: Collection[str],
        frozen: Collection[str],
        meshes: Sequence[DeviceMesh],
    ) -> None:
        self.path, self.layout, self._digested = path, layout, digested
        self._dtype, self._keep, self._meshes = dtype, keep, meshes
        self._first = first_rank(meshes) if meshes else 0  # under DDP every rank has the same average
        self._run, self._claim, self._warned = uuid4().hex, Claim(path), False
        self._constants = Constants(path, frozen)
        self._by_first(lambda: make_folder(path), lambda: None)

    def put(
        self,
        average: str,
        step: int,
        weights: Mapping[str, Tensor],
        profile: Profile,
        strategy: Strategy,
        *,
        start: str = "",
        suffix: str = "",
    ) -> str:
        """Write a snapshot, and remove the oldest ones of its average where there are more than are kept.

        Returns:
            The digest of the weights in it; what no history remembers has none on other ranks.

        Raises:
            SnapshotError: If the snapshot cannot be written.
        """
        whole = self._gathered(weights) if self._meshes else weights

        def act() -> str:
            self._claim.check()
            packed = self._packed(whole, self._dtype)
            write(
                self.path / file_name(average, step, suffix), packed, run=self._run, average=average, step=step,
                start=start, profile=profile, strategy=strategy, layout=self.layout, constants=self._constants,
            )  # fmt: skip
            if self._keep is not None and average != START:
                for old in files_of(self.path, average)[: -self._keep]:
                    old.unlink(missing_ok=True)
            self._warn_of_kept(packed.kept)
            return packed.digest

        if average in UNMARKED:
            return self._by_first(act, str)
        return self._by_first(act, lambda: self._packed(whole, self._dtype).digest)

    def _warn_of_kept(self, kept: Sequence[str]) -> None:
        """Warn once of values that do not fit into the dtype of the snapshots."""
        if kept and not self._warned:
            self._warned = True
            dtype = str(self._dtype).removeprefix("torch.")
            message = (
                f"the values of {kept[0]!r} are too large or too small for {dtype}; snapshots keep such tensors "
                f"({len(kept)} now) in a longer dtype. Record with dtype='bfloat16', which has the range of float32, "
                "or with dtype='auto'."
            )
            warn_user(message)

    def digest(self, weights: Mapping[str, Tensor]) -> str:
        """Return the digest of weights, whatever dtype snapshots have."""
        whole = self._gathered(weights) if self._meshes else weights
        return self._by_first(lambda: digest_of(whole, self._digested), lambda: digest_of(whole, self._digested))

    def release(self) -> None:
        """Let another recorder have the folder."""
        self._claim.release()

    def _packed(self, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> Packed:
        return Packed.of(weights, self.layout, self._digested, dtype)

    def take_over(
        self, last: int | None, pasts: Mapping[str, Past], starts: Collection[str], *, restored: bool
    ) -> dict[str, tuple[tuple[int, str], ...]]:
        """Look whether what lies in the folder is this run's, and leave there what is.

        Args:
            last: The last optimiser step that was averaged before; None where the run has just begun.
            pasts: The averages before this update, by name.
            starts: The identities of the starts of those that begin with it.
            restored: Whether the averager's state was loaded, so that steps may be made again.

        Returns:
            The marks of snapshots that were written after the state of their average was saved.

        Raises:
            StateError: If the snapshot belongs to another run.
        """

        def act() -> dict[str, tuple[tuple[int, str], ...]]:
            return self._take_over(last, pasts, starts, restored=restored)

        return self._by_first(act, dict)

    def _take_over(
        self, last: int | None, pasts: Mapping[str, Past], starts: Collection[str], *, restored: bool
    ) -> dict[str, tuple[tuple[int, str], ...]]:
        self._claim.take()
        found = Store(self.path).snapshots
        if found and (difference := found[0].layout.difference(self.layout)):
            message = (
                f"{str(self.path)!r} holds snapshots of another model than this run's: {difference}. Give this run a "
                "folder of its own, or build the model as before."
            )
            raise StateError(message)
        recorded = [snapshot for snapshot in found if not snapshot.is_start]
        # Those of step 0 are the run's own starts, whenever it begins.
        over = -1 if last is None else last
        later = [snapshot for snapshot in found if snapshot.step > over and (snapshot.step or not snapshot.is_start)]
        if later and not restored:
            message = (
                f"{str(self.path)!r} holds {len(recorded)} snapshots of another run, up to step {found[-1].step}, "
                f"and this one has {'just begun' if last is None else f'come to step {last}'}; give it a folder of its "
                "own, or load the state of the averager to continue that run"
            )
            raise StateError(message)
        if last is None:
            refuse_other_start(self.path, found, starts)
        marks = {name: newer_marks(self.path, name, past, found, over) for name, past in pasts.items()}
        if found and (restored or last is not None):
            self._run = found[-1].about.run or self._run
        if later:
            warn_user(
                f"{len(later)} snapshots after step {last}, where this run continues, are removed: they belong to "
                "steps that are repeated"
            )
            for snapshot in later:
                snapshot.path.unlink(missing_ok=True)
        return marks

    def _gathered(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors on the CPU of the first rank, gathered one by one, and none elsewhere."""
        whole: dict[str, Tensor] = {}
        with answered("gather a snapshot", _REST, ranks=ranks_of(self._meshes)):
            for name, tensor in weights.items():
                part: Any = tensor
                gathered = part.full_tensor() if hasattr(part, "full_tensor") else part
                if rank() == self._first:
                    whole[name] = gathered.detach().cpu()
        return whole

    def _by_first(self, act: Callable[[], T], elsewhere: Callable[[], T]) -> T:
        """Return the result of the first rank's call; ranks with whole averages call it themselves."""
        if not self._meshes:
            return act() if rank() == self._first else elsewhere()
        problem, done = None, None
        if rank() == self._first:
            try:
                done = act()
            except PolyakError as error:
                problem = type(error).__name__, str(error)
            except Exception as error:  # noqa: BLE001 - the others wait for an answer
                problem = "SnapshotError", f"{type(error).__name__}: {error}"
        problem, done = from_first(
            self._meshes, (problem, done), f"let rank {self._first} write to {str(self.path)!r}", _REST
        )
        if problem is not None:
            msg = f"rank {self._first}: {problem[1]}"
            raise getattr(errors, problem[0], errors.SnapshotError)(msg)
        answer: Any = done
        result: T = answer
        return result
