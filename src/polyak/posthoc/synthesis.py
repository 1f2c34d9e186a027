"""Any average of a run that was recorded: by least squares over profiles, and one pass over the snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyak.config import AveragerConfig
from polyak.config.chosen import AnyStrategy, plain_mapping
from polyak.errors import ConfigError, RateError
from polyak.errors.calls import warn_user
from polyak.errors.formatting import shown
from polyak.plot import POOR
from polyak.posthoc.combined import combined
from polyak.posthoc.labels import label
from polyak.posthoc.least_squares import Fit, fit, mixed
from polyak.posthoc.reader import Store
from polyak.posthoc.result import Synthesis
from polyak.posthoc.timeline import Timeline
from polyak.strategy.base import Strategy
from polyak.strategy.profile import Profile

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from polyak.posthoc.snapshot import Snapshot
    from polyak.strategy.updates import Updates

__all__ = [
    "Target",
    "combine",
    "nearest",
    "synthesize",
    "target_profile",
    "warn_of_poor",
]

Target = AnyStrategy | AveragerConfig | Profile
"""What is wanted: a strategy by name, as a class, an object or a config, or a profile."""

_CADENCE = frozenset({"start", "every", "origin"})
_ILL = 30.0  # of the coefficients' absolute sum: a few snapshots then cancel each other
_ROUNDED = 1e-3  # of the weights
_EXACT = 1e-9  # of the weights: less than a float32 holds
_REACHED = 1e-12  # of a profile: a smaller error is none


def synthesize(
    directory: str | os.PathLike[str] | Store,
    target: Target,
    *,
    at_step: int | None = None,
    nonnegative: bool = False,
    **settings: Any,
) -> Synthesis:
    """Return the average that a strategy would have had, from the snapshots of a run that never used it.

    ``sum(x_j * snapshot_j)`` with the coefficients, of sum 1, whose profile is nearest to the wanted one. Only
    snapshots up to ``at_step`` count. Memory: the result and two tensors, one of them in float64; and for the
    coefficients some 16 bytes for each update and snapshot.

    Args:
        directory: What ``Recorder`` wrote.
        target: A strategy by name or class with its ``settings`` (engine options ``start=``, ``every=`` and
            ``origin=`` among them), a strategy object, a mapping as in configs, or a ``Profile``.
        at_step: The optimiser step at which the average is wanted. Defaults to the last snapshot's.
        nonnegative: Whether no coefficient may be negative: a larger error, and no amplification (needs scipy).
        **settings: The strategy's own settings.

    Raises:
        StateError: If there are no snapshots, or damaged ones, or of different models.
        ConfigError: If a target is wrong.

    Warns:
        PolyakWarning: The profile error is above a tenth, or the problem is ill-conditioned: rounding is amplified more
            than it should.

    Source: Karras et al. (2023), arXiv:2312.02696, section 3.2 and appendix C, for power functions; here for every
    linear average, over exact shares and with coefficients that add up to 1.

    Often confused with: averaging checkpoints, whose single steps cannot replace the steps between them.

    Examples:
        >>> import polyak, tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> averager = polyak.average(model, "power", sigma_rel=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with polyak.posthoc.Recorder(averager, folder, every=10):
        ...         for step in range(100):
        ...             averager.update()
        ...     made = polyak.posthoc.synthesize(folder, "power", sigma_rel=0.12)
        >>> made.profile_error < 0.1, round(sum(made.coefficients.values()), 6)
        (True, 1.0)
    """
    store = directory if isinstance(directory, Store) else Store(directory)
    snapshots, step = store.until(at_step)
    wanted = target_profile(target, settings, store.snapshots, step)
    (found,) = nearest(snapshots, [wanted], nonnegative=nonnegative)
    warn_of_poor(found, label({"name": target, **settings} if isinstance(target, str) else target))
    return combine(snapshots, found, wanted, step)


def target_profile(target: Target, settings: Mapping[str, Any], snapshots: Sequence[Snapshot], step: int) -> Profile:
    """Return the profile that a target has at an optimiser step, updated as often as the recorded averages were.

    Args:
        target: What is wanted.
        settings: The settings given with it.
        snapshots: All of the run.
        step: The optimiser step.

    Raises:
        ConfigError: If ``target`` names no average, or has no updates up to that step.
    """
    if isinstance(target, Profile):
        if settings:
            message = f"the settings {sorted(settings)} came with a profile; give a strategy, or no settings"
            raise ConfigError(message)
        profile = target
    else:
        config = _config(target, settings)
        every = config.every if "every" in config.model_fields_set else None
        updates = Timeline(snapshots).updates(step, every, config.start)
        origin = "first" if config.start else config.strategy.engine().get("origin", "initial")
        profile = _at(config.strategy, updates, config.origin or origin)
    if not len(profile):
        message = f"the target has no update up to step {step}; check start= and every="
        raise ConfigError(message)
    if int(profile.steps[-1]) > step:
        message = (
            f"the target's profile ends at step {int(profile.steps[-1])}, and the average is wanted at step {step}"
        )
        raise ConfigError(message)
    return profile


def nearest(snapshots: Sequence[Snapshot], wanted: Sequence[Profile], *, nonnegative: bool) -> list[Fit]:
    """Return the combinations of snapshots that are nearest to what is wanted; their tensors are not read."""
    profiles, noise = [s.profile for s in snapshots], [s.precision for s in snapshots]
    tried = [(number, start) for number, profile in enumerate(wanted) for start in _starts(profile, snapshots)]
    starts = [*(s.about.start for s in snapshots), *(start for _, start in tried)]
    found = fit(profiles, [wanted[one] for one, _ in tried], noise=noise, nonnegative=nonnegative, starts=starts)
    best: dict[int, Fit] = {}
    for (number, _), one in zip(tried, found, strict=True):
        best[number] = min(best.get(number, one), one, key=_merit)
    return [*best.values()]


def _merit(found: Fit) -> tuple[float, float]:
    return (found.error if found.error > _REACHED else 0.0), found.amplification


def _starts(wanted: Profile, snapshots: Sequence[Snapshot]) -> list[str]:
    """Return the possible starts of a wanted average: of recorded averages that began with it, or the run's first."""
    begun = [(int(s.profile.steps[0]), s.about.start) for s in snapshots if len(s.profile) and s.profile.start]
    first = int(wanted.steps[0])
    if alike := [start for step, start in begun if step == first]:
        return [*dict.fromkeys(alike)]
    known = [(s.step, s.about.start) for s in snapshots if s.is_start] + begun
    return [min(known, key=lambda one: one[0], default=(0, ""))[1]]


def warn_of_poor(found: Fit, target: str) -> None:
    """Warn if a combination is far from its target, or amplifies what it should not."""
    if found.error > POOR:
        warn_user(
            f"{target} cannot be rebuilt accurately from these snapshots (profile error {found.error:.2g}; below "
            f"{POOR:g} is good). Record more often (smaller every=) or with blocks=True."
        )
    if (found.amplification > _ILL and found.rounding > _EXACT) or found.rounding > _ROUNDED:
        warn_user(
            f"the coefficients' absolute sum is {found.amplification:.3g}: what the snapshots were rounded by may grow "
            f"to {found.rounding:.1g} of the weights. Record more snapshots or block means, store float32, or take "
            "nonnegative=True"
        )


def combine(snapshots: Sequence[Snapshot], found: Fit, wanted: Profile, step: int) -> Synthesis:
    """Return the combination of snapshots, tensor by tensor."""
    used = [(snapshot, float(x)) for snapshot, x in zip(snapshots, found.coefficients, strict=True) if x]
    return Synthesis(
        state_dict=combined(used, snapshots[-1]),
        coefficients={snapshot.path.name: x for snapshot, x in used},
        profile_error=found.error,
        amplification=found.amplification,
        rounding=found.rounding,
        profile=mixed([snapshot.profile for snapshot in snapshots], found.coefficients, step),
        wanted=wanted,
        at_step=step,
    )


def _config(target: AnyStrategy | AveragerConfig, settings: Mapping[str, Any]) -> AveragerConfig:
    if "step" in settings:
        message = f"step: got {shown(settings['step'])}; the optimiser step of the average is given as at_step="
        raise ConfigError(message)
    if "name" in settings:
        message = f"name={shown(settings['name'])} came with the target {shown(target)}; give one of them"
        raise ConfigError(message)
    target = target.named() if isinstance(target, AveragerConfig) else plain_mapping(target)
    if isinstance(target, type) and issubclass(target, Strategy):
        target = target(**{key: value for key, value in settings.items() if key not in _CADENCE})
        settings = {key: value for key, value in settings.items() if key in _CADENCE}
    if isinstance(target, Strategy):
        if strange := settings.keys() - _CADENCE:
            message = f"the settings {sorted(strange)} came with the object {target!r}; set them on it instead"
            raise ConfigError(message)
        data: dict[str, Any] = {"strategy": target, **settings}
    elif isinstance(target, (str, Mapping)):
        own = {**({"name": target} if isinstance(target, str) else target), **settings}
        cadence = {key: own.pop(key) for key in _CADENCE & own.keys()}
        data = {**({"strategy": own} if "name" in own else own), **cadence}
    else:
        message = f"a target is a strategy's name, object or config, or a profile; got {shown(target)}"
        raise ConfigError(message)
    return AveragerConfig.of(data, "the target")


def _at(strategy: Strategy, updates: Updates, origin: str) -> Profile:
    try:
        return Profile.at(strategy, updates, origin)
    except RateError as error:
        message = (
            f"the target cannot be computed from what was recorded: {error} Learning rates are recorded with averages "
            "that use them"
        )
        raise ConfigError(message) from error
