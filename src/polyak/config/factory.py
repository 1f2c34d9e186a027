"""The one line before the training loop: ``polyak.average(model, "ema", decay=0.999)``, or a bank of several."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from polyak.config import AveragerConfig
from polyak.config.chosen import AnyStrategy, plain_mapping, refuse_swapped, written
from polyak.config.files import SUFFIXES
from polyak.engine.bank import Bank
from polyak.errors import ArgumentError, ConfigError
from polyak.errors.calls import explained
from polyak.errors.formatting import brief, listed, shown
from polyak.tensors.entries import as_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from polyak.engine import Engine
    from polyak.engine.averager import Averager
    from polyak.engine.nonfinite import Nonfinite
    from polyak.kernels.select import KernelName
    from polyak.tensors.entries import Given
    from polyak.tensors.matching import Match
    from polyak.tensors.policies import Buffers

__all__ = ["average", "bank", "config_of"]


@explained("Settings and options are given by name: polyak.average(model, 'ema', decay=0.999)")
def average(  # noqa: PLR0913 - each is one axis of an average, and users complete from this signature
    model: Given,
    strategy: AnyStrategy | AveragerConfig | os.PathLike[str] = "ema",
    *,
    start: int = 0,
    every: int = 1,
    origin: Literal["initial", "first"] | None = None,
    buffers: Buffers = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    match: Match | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int | None = None,
    nonfinite: Nonfinite = "hold",
    kernel: KernelName = "auto",
    capturable: bool = False,
    into: Given | None = None,
    **settings: Any,
) -> Averager:
    """Return an averager of a model's weights: ``average += rate * (weights - average)`` at each ``update()``.

    Args:
        model: The module that is trained, wrapped (DDP, torch.compile …) or not, a mapping of names to tensors, or
            tensors in order such as ``model.parameters()``, whose names are then "0", "1" and so on.
        strategy: A name or a class with its ``settings``, a strategy object, a mapping of a name and settings, a
            whole ``AveragerConfig``, or a config file (a path, or a name that ends in ``.toml``, ``.yaml``, ``.yml`` or
            ``.json``); a namespace or a dataclass counts as a mapping.
        start: The first optimiser step that may be averaged.
        every: Average one optimiser step in so many; decays keep their meaning per step.
        origin: Whether the weights at construction count ("initial") or the first update replaces them
            ("first"). Defaults to the strategy's own; "first" where ``start`` delays the average.
        buffers: "auto" (floating statistics averaged, the rest copied), one policy for all ("average", "copy",
            "skip"), or a mapping of glob to policy.
        include: Globs of the tensors to average. Defaults to all.
        exclude: Globs of tensors to skip.
        match: Pair tensors by "name" or by "order". Defaults to the strategy's choice, else by name.
        device: Where the average lives. Defaults to the model's device.
        dtype: How precisely it is stored. "auto": as the model, but float32 for shorter floats. "model": as the model.
        rounding: How averages in bfloat16 and float16 are rounded: "stochastic" keeps steps that are smaller than
            their resolution in the mean; "nearest" loses them, as other libraries do.
        seed: The seed of stochastic rounding. Defaults to 0.
        nonfinite: What an update does about NaN and infinities. "hold": an element whose new value would not be finite
            keeps its old one, and all others move (see ``Averager.held``). "skip": an update with any in the weights is
            skipped and counted; "raise": it raises, on a GPU at most one update later. Both read the weights once
            more, before. "propagate": it is averaged like any other.
        kernel: What moves the tensors: "auto" (the fastest that fits), "fused" (needs Numba on CPUs),
            "foreach", or the reference "loop".
        capturable: Whether ``update()`` can be part of a CUDA graph or of a compiled step (see ``Averager.advance``);
            needs ``nonfinite="hold"`` or ``"propagate"``.
        into: Your own tensors that hold the average, in their dtypes and on their devices: a copy of the module, which
            is ``averager.module`` then, a mapping, or a list in the order of the model's tensors. The average begins as
            they are. Whatever is loaded or written into them is the average; they may be moved and converted.
        **settings: The strategy's own settings.

    Raises:
        UnknownStrategyError: If no strategy, or more than one, has that name.
        ConfigError: If a setting, an option or a glob is wrong.
        ModelError: If ``model`` has no tensors, or uninitialised, meta or sparse ones.
        MismatchError: If ``into`` does not have the model's tensors.

    Often confused with: ``torch.optim.swa_utils.AveragedModel``, whose average starts with the first update
    (here: ``origin="first"``) and copies buffers (here: ``buffers="copy"``).

    Examples:
        >>> import polyak, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> averager = polyak.average(model, "ema", decay=0.99)
        >>> averager.update()
        >>> averager.n
        1
    """
    refuse_swapped("average", model, strategy)
    options = {
        "start": start, "every": every, "origin": origin, "buffers": buffers, "include": include, "exclude": exclude,
        "match": match, "device": device, "dtype": dtype, "rounding": rounding, "seed": seed, "nonfinite": nonfinite,
        "kernel": kernel, "capturable": capturable,
    }  # fmt: skip
    return config_of(strategy, options, settings, "average(): the settings").build(model, into=into)


def config_of(
    strategy: AnyStrategy | AveragerConfig | os.PathLike[str],
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    where: str,
) -> AveragerConfig:
    """Return the config that a strategy, or a whole config or its file, makes with options and settings.

    Args:
        strategy: What names a strategy or is a config; a path, or a name that ends as one of a config file, is read.
        options: Engine options; those of a config are completed by the ones that are no defaults.
        settings: The strategy's own settings.
        where: What is configured, for messages.

    Raises:
        ConfigError: If a file cannot be read, or a setting or an option is wrong or given twice.
    """
    if isinstance(strategy, os.PathLike) or (isinstance(strategy, str) and strategy.lower().endswith(SUFFIXES)):
        strategy = AveragerConfig.from_file(strategy)
    strategy = plain_mapping(strategy)
    if isinstance(strategy, AveragerConfig) or (isinstance(strategy, Mapping) and "strategy" in strategy):
        defaults = {name: field.default for name, field in AveragerConfig.model_fields.items()}
        given = {name: value for name, value in options.items() if value != defaults[name]}
        return _beside(strategy, {**given, **settings}, where)
    return AveragerConfig.of({"strategy": written(cast("AnyStrategy", strategy), settings), **options}, where)


def _beside(config: AveragerConfig | Mapping[str, Any], given: Mapping[str, Any], where: str) -> AveragerConfig:
    """Return a config with further settings."""
    said = config.named() if isinstance(config, AveragerConfig) else config
    if twice := sorted(said.keys() & given.keys()):
        message = f"{where} cannot be used: {listed(map(repr, twice))} given in the config, too; give it once"
        raise ConfigError(message)
    return AveragerConfig.of({**said, **given}, where)


@explained("Options are given by name: polyak.bank(model, {'short': 'ema', 'mean': 'swa'}, every=10)")
def bank(model: Given, averages: Mapping[str, AnyStrategy | AveragerConfig], **common: Any) -> Bank:
    """Return several averages of one model that are updated together: the weights are read once for all of them.

    Args:
        model: The module that is trained, wrapped or not, a mapping of names to tensors, or tensors in order.
        averages: For each average its name in the bank, and what ``polyak.average`` takes: the name of a strategy, a
            class or an object, a mapping of its name, settings and options (``{"name": "ema", "every": 10}``), or an
            ``AveragerConfig``.
        **common: Engine options of all, such as ``every=`` or ``dtype=``; one that an average names itself wins.

    Raises:
        ConfigError: If there is no average, a name is no text, or a setting is wrong.
        ModelError: If the model has nothing that can be averaged.

    Often confused with: ``copy.deepcopy(averager)``, which reads and moves all tensors in a pass of its own.

    Examples:
        >>> import polyak, torch
        >>> model = torch.nn.Linear(3, 1)
        >>> averages = polyak.bank(model, {"short": {"name": "ema", "decay": 0.9}, "mean": "swa"})
        >>> averages.update()
        >>> averages["short"].n, averages["mean"].rate
        (1, 1.0)
        >>> with averages.applied("mean"):
        ...     y = model(torch.zeros(2, 3))
    """
    refuse_swapped("bank", model, averages)
    model = as_model(model)
    if not isinstance(averages, AveragerConfig):
        averages = plain_mapping(averages)
    if not isinstance(averages, Mapping):
        message = f"a bank maps names to averages, such as {{'short': 'ema', 'mean': 'swa'}}; got {shown(averages)}"
        raise ArgumentError(message)
    if not averages:
        message = 'a bank holds at least one average; got none. Give e.g. {"short": "ema", "mean": "swa"}'
        raise ConfigError(message)
    made: dict[str, Engine] = {}
    problems: list[tuple[type[ConfigError], str]] = []
    for name, wanted in averages.items():
        if not isinstance(name, str) or not name:
            message = f"an average's name in a bank is a text; got {shown(name)}"
            raise ConfigError(message)
        try:
            made[name] = cast("Engine", _average(model, wanted, common))
        except ConfigError as error:
            problems.append((type(error), f"the average {shown(name)} of the bank: {error}"))
    if problems:
        raise problems[0][0](brief("\n".join(message for _, message in problems)))
    return Bank(made)


def _average(model: Given, wanted: AnyStrategy | AveragerConfig, common: Mapping[str, Any]) -> Averager:
    own = wanted.named() if isinstance(wanted, AveragerConfig) else plain_mapping(wanted)
    if not isinstance(own, dict):
        return average(model, wanted, **common)
    # "strategy" as in a config file, "name" as in a strategy.
    strategy = own.pop("strategy", None) or own.pop("name", "ema")
    return average(model, strategy, **{**common, **own})
