"""Any average of a run that was recorded: by least squares over profiles, and one pass over the snapshots."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyak.atomic import write_whole
from polyak.config import AveragerConfig
from polyak.errors import ConfigError, PolyakWarning
from polyak.posthoc.snapshot import Snapshot, safetensors
from polyak.posthoc.solve import Fit, fit, mixed
from polyak.posthoc.store import Store
from polyak.profile import Profile
from polyak.progress import track
from polyak.strategy import Strategy

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Synthesis", "Target", "combine", "synthesize", "target_profile"]

Target = str | Strategy | Mapping[str, Any] | Profile
"""What is wanted: a strategy by name, as an object or as a config, or a profile."""

_CADENCE = frozenset({"start", "every", "origin"})
_ILL = 30.0  # of the coefficients' absolute sum: a few snapshots then cancel each other
_ROUNDED = 1e-3  # of the weights


@dataclass(frozen=True)
class Synthesis:
    """An average that was made after the run.

    Attributes:
        state_dict: Names, shapes and dtypes of the model's ``state_dict()``.
        coefficients: What each snapshot file counts; their sum is 1.
        profile_error: How far its profile is from the wanted one: ``||got - wanted|| / ||wanted||``.
        amplification: ``sum(|coefficient|)``, at least 1: how much the snapshots' rounding and noise may grow.
        rounding: ``amplification`` times the rounding of the snapshots' dtype: what that may cost, relative to the
            weights.
        profile: What each optimiser step counts in it.
        wanted: The wanted profile.
        at_step: The optimiser step at which the average is.
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    coefficients: dict[str, float] = field(repr=False)
    profile_error: float
    amplification: float
    rounding: float
    profile: Profile = field(repr=False)
    wanted: Profile = field(repr=False)
    at_step: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state dict as a safetensors file whose metadata say how it was made; whole or absent.

        Raises:
            ConfigError: The name does not end in ``.safetensors``.
            MissingExtraError: safetensors is not installed.
        """
        file = Path(path)
        if file.suffix.lower() != ".safetensors":
            message = f"the file {str(file)!r} has the type {file.suffix or '(none)'!r}; expected .safetensors"
            raise ConfigError(message)
        about = {
            "at_step": self.at_step,
            "profile_error": self.profile_error,
            "amplification": self.amplification,
            "half_life": str(self.wanted.half_life),
            "mean_age": str(self.wanted.mean_age),
            "coefficients": self.coefficients,
        }
        # A file has no two names for one tensor.
        tensors = {key: tensor.clone() for key, tensor in self.state_dict.items()}
        metadata = {"polyak_synthesis": json.dumps(about), "format": "pt"}
        save = safetensors().save_file
        write_whole(file, lambda scratch: save(tensors, scratch, metadata=metadata))


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
    snapshots up to ``at_step`` count. Memory: the result and two tensors.

    Args:
        directory: What ``Recorder`` wrote.
        target: A strategy by name with its ``settings`` (engine options ``start=``, ``every=`` and ``origin=`` among
            them), a strategy object, a mapping as in configs, or a ``Profile``.
        at_step: The optimiser step at which the average is wanted; None: that of the last snapshot.
        nonnegative: Whether no coefficient may be negative: a larger error, and no amplification (needs scipy).
        **settings: The strategy's own settings.

    Raises:
        StateError: There are no snapshots, or damaged ones, or of different models.
        ConfigError: A wrong target.

    Warns:
        PolyakWarning: The problem is ill-conditioned: rounding is amplified more than it should.

    Source: Karras et al. (2023), arXiv:2312.02696, section 3.2 and appendix C, for power functions; here for every
    linear average, over exact shares and with coefficients that add up to 1.

    Often confused with: averaging checkpoints, whose single steps cannot stand for the steps between them.

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
    wanted = target_profile(target, settings, snapshots, step)
    (found,) = fit([snapshot.profile for snapshot in snapshots], [wanted], nonnegative=nonnegative)
    return combine(snapshots, found, wanted, step)


def target_profile(target: Target, settings: Mapping[str, Any], snapshots: Sequence[Snapshot], step: int) -> Profile:
    """Return the profile that a target has at an optimiser step, updated as often as the recorded averages were.

    Raises:
        ConfigError: The target is none, or has no updates up to that step.
    """
    if isinstance(target, Profile):
        if settings:
            message = f"the settings {sorted(settings)} were given beside a profile; give a strategy, or no settings"
            raise ConfigError(message)
        profile = target
    else:
        config = _config(target, settings, snapshots)
        profile = config.profile(step)
    if not len(profile):
        message = f"the target has no update up to step {step}; check start= and every="
        raise ConfigError(message)
    if int(profile.steps[-1]) > step:
        message = (
            f"the target's profile ends at step {int(profile.steps[-1])}, and the average is wanted at step {step}"
        )
        raise ConfigError(message)
    return profile


def combine(snapshots: Sequence[Snapshot], found: Fit, wanted: Profile, step: int) -> Synthesis:
    """Return the combination of snapshots, tensor by tensor."""
    used = [(snapshot, float(x)) for snapshot, x in zip(snapshots, found.coefficients, strict=True) if x]
    amplification = sum(abs(x) for _, x in used)
    rounding = amplification * max(snapshot.precision for snapshot, _ in used)
    if amplification > _ILL or rounding > _ROUNDED:
        warnings.warn(
            f"the coefficients' absolute sum is {amplification:.3g}: what the snapshots were rounded by may grow to "
            f"{rounding:.1g} of the weights. Record more snapshots or block means, store float32, or take "
            "nonnegative=True",
            PolyakWarning,
            stacklevel=3,
        )
    shares, start = mixed([snapshot.profile for snapshot in snapshots], found.coefficients, step)
    return Synthesis(
        state_dict=_state_dict(used, snapshots[-1]),
        coefficients={snapshot.path.name: x for snapshot, x in used},
        profile_error=found.error,
        amplification=amplification,
        rounding=rounding,
        profile=Profile(shares, np.arange(1, step + 1), start, 1),
        wanted=wanted,
        at_step=step,
    )


def _config(
    target: str | Strategy | Mapping[str, Any], settings: Mapping[str, Any], snapshots: Sequence[Snapshot]
) -> AveragerConfig:
    if isinstance(target, Strategy):
        if strange := settings.keys() - _CADENCE:
            message = f"the settings {sorted(strange)} were given beside the object {target!r}; set them on it instead"
            raise ConfigError(message)
        data: dict[str, Any] = {"strategy": target, **settings}
    elif isinstance(target, (str, Mapping)):
        own = {**({"name": target} if isinstance(target, str) else target), **settings}
        cadence = {key: own.pop(key) for key in _CADENCE & own.keys()}
        data = {**({"strategy": own} if "name" in own else own), **cadence}
    else:
        message = f"a target is a strategy's name, object or config, or a profile; got {target!r}"
        raise ConfigError(message)
    every = min((snapshot.profile.stride for snapshot in snapshots if snapshot.step), default=1)
    return AveragerConfig.of({"every": max(1, every), **data}, "the target")


def _state_dict(used: Sequence[tuple[Snapshot, float]], last: Snapshot) -> dict[str, Tensor]:
    layout = last.layout
    averaged = {*layout.averaged}
    tensors: dict[str, Tensor] = {}
    for name, dtype in track(layout.dtypes.items(), "combining snapshots"):
        if name not in averaged:
            tensors[name] = last.read_weights(name)
            continue
        total: Tensor | None = None
        for snapshot, x in used:
            weights = snapshot.read_weights(name)
            if total is None:
                total = torch.zeros_like(weights, dtype=torch.promote_types(weights.dtype, torch.float64))
            total.add_(weights, alpha=x)
        if total is not None:
            tensors[name] = total.to(getattr(torch, dtype))
    return {key: tensors[name] for key, name in layout.keys.items()}
