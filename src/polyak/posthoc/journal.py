"""The metrics of a sweep in a file, written as they come, so that another sweep can go on from there."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from polyak.errors import ConfigError, WriteError
from polyak.errors.calls import warn_user
from polyak.io.atomic import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polyak.posthoc.snapshot import Snapshot
    from polyak.strategy.profile import Profile

__all__ = ["Journal"]

_FORMAT = 1
_DIGEST = 32  # digits


class Journal:
    """The metrics of averages, by the profiles that were wanted.

    Args:
        file: Where the best average goes; the metrics go to the same folder.
        snapshots: What the averages are computed from.
        settings: What else decides their values.

    Attributes:
        path: The file of the metrics.
    """

    def __init__(self, file: Path, snapshots: Sequence[Snapshot], settings: Sequence[object]) -> None:
        self.path = file.with_suffix(".metrics.json")
        made = [(s.path.name, s.about.run, s.about.mark, s.path.stat().st_size) for s in snapshots]
        self._of = _digest(json.dumps([made, [*settings]]).encode())
        self._rows: dict[str, dict[str, str]] = {}
        self._warned = False

    def resume(self) -> None:
        """Take the metrics of an earlier sweep over the same snapshots; nothing where there is none.

        Raises:
            ConfigError: If the file is damaged, or the metrics are of averages of other snapshots.
        """
        try:
            found = json.loads(self.path.read_text("utf-8"))
            rows, of = {key: _row(row) for key, row in found["rows"].items()}, found["of"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{str(self.path)!r} holds no metrics of a sweep ({error}); remove it, or leave resume=True out"
            raise ConfigError(message) from error
        if of != self._of:
            message = (
                f"{str(self.path)!r} holds the metrics of a sweep over other snapshots, or with another at_step= or "
                "nonnegative=; give another output=, or leave resume=True out to evaluate all targets again"
            )
            raise ConfigError(message)
        self._rows = rows

    def metric(self, wanted: Profile) -> float | None:
        """Return the metric of a wanted average; None where it was not evaluated."""
        row = self._rows.get(_key(wanted))
        return None if row is None else float(row["metric"])

    def note(self, label: str, wanted: Profile, metric: float) -> None:
        """Write a metric; a disk that is full costs a warning, since the evaluations may have taken hours."""
        self._rows[_key(wanted)] = {"label": label, "metric": repr(metric)}
        text = json.dumps({"format": _FORMAT, "of": self._of, "rows": self._rows}, indent=1) + "\n"
        try:
            write_whole(self.path, lambda scratch: scratch.write_text(text, encoding="utf-8"))
        except WriteError as error:
            if not self._warned:
                self._warned = True
                warn_user(f"{error} The sweep continues, and cannot be resumed.")


def _row(raw: Any) -> dict[str, str]:  # noqa: ANN401 - whatever the file holds
    row = {"label": str(raw["label"]), "metric": str(raw["metric"])}
    float(row["metric"])
    return row


def _key(wanted: Profile) -> str:
    return _digest(wanted.shares.tobytes(), wanted.steps.tobytes(), repr(float(wanted.start)).encode())


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:_DIGEST]
