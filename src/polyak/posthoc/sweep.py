"""Which average would have been best: many targets, one evaluation each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from polyak.config import AveragerConfig
from polyak.errors import ArgumentError, ConfigError, WriteError
from polyak.errors.calls import warn_user
from polyak.errors.formatting import shown
from polyak.io.atomic import as_path
from polyak.io.progress import track
from polyak.posthoc.journal import Journal
from polyak.posthoc.labels import label
from polyak.posthoc.reader import Store
from polyak.posthoc.result import Synthesis, check_savable
from polyak.posthoc.synthesis import Target, combine, nearest, target_profile, warn_of_poor
from polyak.strategy.base import Strategy
from polyak.strategy.profile import Profile

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from polyak.posthoc.least_squares import Fit
    from polyak.posthoc.snapshot import Snapshot

__all__ = ["Row", "Sweep", "sweep"]

_GRID = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)  # half-lives, of the run


class Row(NamedTuple):
    """One target that was tried.

    Attributes:
        label: Its name.
        half_life: Of its profile, as a fraction of the run.
        metric: What ``evaluate`` returned.
        profile_error: How far the synthesised profile is from the wanted one; see ``Synthesis``.
        amplification: How much rounding may grow; see ``Synthesis``.
    """

    label: str
    half_life: float
    metric: float
    profile_error: float
    amplification: float


@dataclass(frozen=True)
class Sweep:
    """What a grid of targets was worth.

    Attributes:
        rows: One for each target, in the order of their half-lives.
        best: The best row.
        synthesis: The best average.
        file: Where the best average was saved, or None if it could not be written (it is in ``synthesis``).
    """

    rows: list[Row]
    best: Row
    synthesis: Synthesis
    file: Path | None

    def table(self) -> str:
        """Return the rows as text, the best one marked."""
        lines = [f"{'target':36s} {'half-life/run':>13s} {'metric':>12s} {'profile error':>13s} {'sum |x|':>8s}"]
        for row in self.rows:
            figures = f"{row.half_life:13.2%} {row.metric:12.6g} {row.profile_error:13.2g} {row.amplification:8.2f}"
            lines.append(f"{row.label:36s} {figures}{'  <- best' * (row is self.best)}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, *, label: str = "metric", levels: Mapping[str, float] | None = None) -> Axes:
        """Draw the metric against the half-life as a fraction of the run; points of poor synthesis are hollow.

        Args:
            ax: Where to draw. Defaults to a new figure.
            label: What the metric is.
            levels: Metrics of other weights, as horizontal lines, by their labels, such as the raw weights'.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        from polyak.plot import metrics

        points = [(row.half_life, row.metric, row.profile_error) for row in self.rows if math.isfinite(row.half_life)]
        return metrics(
            points, best=(self.best.half_life, self.best.metric, self.best.label), levels=levels, ax=ax, label=label
        )


def sweep(
    directory: str | os.PathLike[str] | Store,
    evaluate: Callable[[dict[str, Tensor]], float],
    targets: Mapping[str, Target] | Iterable[Target] | None = None,
    *,
    at_step: int | None = None,
    mode: Literal["min", "max"] = "min",
    nonnegative: bool = False,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Sweep:
    """Evaluate many averages of a recorded run, and find the best.

    Args:
        directory: What ``Recorder`` wrote.
        evaluate: Returns the metric of an averaged state dict, such as the loss on held-out data.
        targets: What to try, as ``synthesize`` takes it, labelled or not. Defaults to bias-corrected EMAs with
            half-lives from 0.5 % to 50 % of the run.
        at_step: The optimiser step at which the averages are wanted. Defaults to the last snapshot's.
        mode: Whether a small metric is good ("min") or a large one ("max").
        nonnegative: Whether no coefficient may be negative.
        output: A ``.safetensors`` file for the best average so far. Defaults to ``best.safetensors`` in the folder. The
            metrics go to ``best.metrics.json`` in the same folder. Both are written as they come.
        resume: Whether targets that an earlier sweep with this ``output`` evaluated keep their metrics. Only you know
            whether ``evaluate`` and its data are the same.

    Raises:
        StateError: If there are no snapshots, or damaged ones, or of different models.
        ConfigError: If a target or the mode is wrong, there is no target, a metric is no number, ``evaluate`` ends the
            process by ``sys.exit()``, or the metrics to resume from are of other snapshots.

    What ``evaluate`` raises is raised, with a note of the metrics so far.

    Warns:
        PolyakWarning: If the best average or the metrics cannot be written, as on a full disk. The average is in
            ``Sweep.synthesis``.

    Often confused with: a sweep of training runs. Here one run is evaluated many times; choose by held-out data that
    is not the test set, as with any other setting.

    Examples:
        >>> import polyak, tempfile, torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> averager = polyak.average(model, "ema", decay=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with polyak.posthoc.Recorder(averager, folder, every=10):
        ...         for step in range(100):
        ...             _ = torch.nn.init.constant_(model.weight, step)
        ...             averager.update()
        ...     found = polyak.posthoc.sweep(
        ...         folder, lambda state: abs(state["weight"].mean() - 90), [{"name": "tail", "fraction": 0.2}, "swa"]
        ...     )
        >>> found.best.label
        'tail(fraction=0.2)'
    """
    if callable(directory) or not callable(evaluate):
        message = (
            f"sweep() got {shown(directory)} as the folder and {shown(evaluate)} as the function; expected "
            "polyak.posthoc.sweep(directory, evaluate), in this order"
        )
        raise ArgumentError(message)
    if mode not in ("min", "max"):
        message = f"mode: got {shown(mode)}; expected 'min' (a loss) or 'max' (an accuracy)"
        raise ConfigError(message)
    store = directory if isinstance(directory, Store) else Store(directory)
    snapshots, step = store.until(at_step)
    labels, wanted = _wanted(targets, store, step)
    file = store.directory / "best.safetensors" if output is None else as_path(output, "output")
    check_savable(file, snapshots[-1].layout.dtypes.values())
    if file.resolve() in {snapshot.path.resolve() for snapshot in store.snapshots}:
        message = f"output: {str(file)!r} is one of the snapshots; give another file"
        raise ConfigError(message)
    journal = Journal(file, snapshots, [step, nonnegative])
    if resume:
        journal.resume()
    fits = nearest(snapshots, wanted, nonnegative=nonnegative)
    rows: list[Row] = []
    sign = 1 if mode == "min" else -1
    best: tuple[Row, Fit, Profile] | None = None
    made: Synthesis | None = None
    saved: Path | None = None
    order = sorted(zip(labels, wanted, fits, strict=True), key=lambda one: one[1].half_life)
    for name, profile, found in track(order, "trying averages"):
        metric, tried = journal.metric(profile), None
        if metric is None:
            tried = combine(snapshots, found, profile, step)
            metric = _metric(evaluate, tried, rows)
            journal.note(name, profile, metric)
        rows.append(Row(name, profile.half_life / step, metric, found.error, found.amplification))
        if math.isfinite(metric) and (best is None or sign * metric < sign * best[0].metric):  # of equals the first
            best, made = (rows[-1], found, profile), tried
            saved = None if tried is None else _saved(tried, file)
    if best is None:
        message = "every metric was NaN or infinite; check evaluate()"
        raise ConfigError(message)
    row, found, profile = best
    if made is None:  # an earlier sweep evaluated it
        made = combine(snapshots, found, profile, step)
        saved = _saved(made, file)
    warn_of_poor(found, row.label)
    return Sweep(rows, row, made, saved)


def _wanted(
    targets: Mapping[str, Target] | Iterable[Target] | None, store: Store, step: int
) -> tuple[list[str], list[Profile]]:
    """Return the labels of the targets, and their profiles."""
    labelled = _labelled(targets, step)
    if not labelled:
        message = "there is nothing to try; give at least one target"
        raise ConfigError(message)
    return [name for name, _ in labelled], [_profile(name, target, store.snapshots, step) for name, target in labelled]


def _profile(name: str, target: Target, snapshots: Sequence[Snapshot], step: int) -> Profile:
    try:
        return target_profile(target, {}, snapshots, step)
    except ConfigError as error:
        message = f"the target {shown(name)}: {error}"
        raise type(error)(message) from error


def _saved(made: Synthesis, file: Path) -> Path | None:
    try:
        made.save(file)
    except WriteError as error:  # the evaluations may have taken hours
        warn_user(f"{error} The best average is in memory: sweep(...).synthesis.save(path)")
        return None
    return file


def _metric(evaluate: Callable[[dict[str, Tensor]], float], made: Synthesis, rows: Sequence[Row]) -> float:
    """Evaluate an average; errors get a note of the evaluations before."""
    state = {key: tensor.clone() for key, tensor in made.state_dict.items()}  # to do with as it likes
    try:
        value = evaluate(state)
    except SystemExit as error:
        message = (
            f"evaluate() ended the process by sys.exit({error.code!r}); expected a number. Let it return its metric"
        )
        raise _noted(ConfigError(message), rows) from error
    except BaseException as error:
        _noted(error, rows)
        raise
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor without a value
        message = f"evaluate() returned {shown(value)}; expected a number"
        raise ConfigError(message) from error


def _noted(error: BaseException, rows: Sequence[Row]) -> BaseException:
    if rows:
        error.add_note("Metrics so far: " + ", ".join(f"{row.label}: {row.metric:.6g}" for row in rows))
    return error


def _labelled(targets: Mapping[str, Target] | Iterable[Target] | None, step: int) -> list[tuple[str, Target]]:
    """Return the targets with labels, which are for reading only: several targets may have the same."""
    if targets is None:
        rates = [1 - 0.5 ** (1 / (part * step)) for part in _GRID if part * step >= 1]
        targets = [{"name": "ema_debiased", "decay": round(1 - float(f"{rate:.2g}"), 12)} for rate in rates]
    alone = isinstance(targets, (str, Strategy, AveragerConfig, Profile))
    if alone or not isinstance(targets, Iterable) or isinstance(targets, type):
        message = f"targets are a list or a mapping of targets; got {shown(targets)}. For one target: synthesize()"
        raise ConfigError(message)
    if isinstance(targets, Mapping):
        return [(str(name), target) for name, target in targets.items()]
    return [(label(target, number), target) for number, target in enumerate(targets, 1)]
