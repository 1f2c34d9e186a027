"""Names that people bring from other libraries, and what they are called here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["habit", "package_hint", "strategy_habit"]


class _Habit(NamedTuple):
    """A meaning that other libraries give other names.

    Attributes:
        here: Names for it here; the first that the strategy or the averager has is the answer.
        elsewhere: What other libraries call it.
        otherwise: The answer where none of the names fits.
        note: What to know about the first name.
    """

    here: tuple[str, ...]
    elsewhere: str
    otherwise: str = ""
    note: str = ""


_HABITS = (
    _Habit(
        ("decay",),
        "decay ema_decay decay_rate decay_factor beta ema_beta avg_decay averaging_decay ema_rate model_ema_decay "
        "max_decay max_value smoothing_factor",
        "It has no decay; 'ema' and 'ema_debiased' have one.",
    ),
    _Habit(
        ("decay",),
        "momentum alpha tau rho smoothing ema_momentum ema_alpha weight_of_new",
        "It has no decay; 'ema' and 'ema_debiased' have one.",
        "the part that is kept (1 minus the weight of the new value)",
    ),
    _Habit(("gamma", "warmup_gamma", "eta", "decay"), "gamma inv_gamma"),
    _Habit(
        ("power", "warmup_power", "gamma", "eta", "exponent"),
        "power exponent",
        "Choose the strategy 'power' (gamma=) or 'polynomial' (eta=).",
    ),
    _Habit(("halflife",), "half_life half_life_steps halflife_steps half_time", "Choose the strategy 'ema_halflife'."),
    _Habit(("min_decay",), "min_value decay_min", "Choose the strategy 'ema_v3' (min_decay=)."),
    _Habit(
        ("use_warmup",),
        "warmup warm_up use_ema_warmup ema_warmup model_ema_warmup warmup_steps ramp ramp_up",
        "A warm-up is a strategy: 'ema_debiased', 'ema_tf', or 'ema_v3' with use_warmup=True.",
    ),
    _Habit((), "debias debiased bias_correction zero_debias correct_bias", "Choose the strategy 'ema_debiased'."),
    _Habit((), "use_num_updates num_updates", "Choose the strategy 'ema_tf'."),
    _Habit(
        ("window", "length"),
        "window window_size k queue_size num_snapshots max_snapshots horizon",
        "Choose the strategy 'lawa' (window=).",
    ),
    _Habit(
        ("every",),
        "update_every ema_update_every ema_every update_interval interval frequency freq update_freq ema_update_freq "
        "swa_freq period every_n every_n_steps update_every_n_steps update_every_n_batches n_steps cadence",
    ),
    _Habit(
        ("update_after_step", "follow", "start"),
        "update_after_step start_step start_iter start_after ema_start ema_start_step swa_start swa_epoch_start "
        "step_start_ema update_starting_at_step begin start_epoch",
    ),
    _Habit(
        ("buffers",),
        "use_buffers include_buffers average_buffers exclude_buffers copy_buffers ignore_buffers",
        note='"average", "copy" or "skip"',
    ),
    _Habit(
        ("exclude",),
        "ignore ignore_names ignore_startswith_names param_or_buffer_names_no_ema skip_names exclude_names",
    ),
    _Habit(("include",), "param_names parameter_names include_names only"),
    _Habit(
        ("device",),
        "ema_device cpu_offload offload force_cpu model_ema_force_cpu store_on_cpu",
        note='"cpu" offloads it',
    ),
    _Habit(("dtype",), "precision ema_dtype storage_dtype torch_dtype"),
    _Habit(("kernel",), "foreach use_foreach fused", note='"auto", "foreach" or "fused"'),
    _Habit(
        (),
        "avg_fn multi_avg_fn avg_func update_fn ema_fn averaging_fn decay_fn schedule",
        "A rule of your own is a class: derive from polyak.Strategy and define rate().",
    ),
)
_STRATEGIES = {
    "ema": "exponential exponential_moving_average exponentialmovingaverage exp_moving_average moving_average "
    "model_ema modelema emamodel ema_model emacallback shadow decay mean_teacher byol momentum_encoder",
    "swa": "mean average avg uniform arithmetic polyak polyak_ruppert polyakruppert ruppert averagedmodel "
    "averaged_model stochastic_weight_averaging stochasticweightaveraging cumulative running_mean equal",
    "power": "karras edm2 posthoc post_hoc posthoc_ema power_function powerema",
    "ema_v3": "modelemav3 model_ema_v3 timm",
    "ema_v2": "modelemav2 model_ema_v2",
    "ema_debiased": "debiased debiased_ema bias_corrected bias_corrected_ema warmup warmup_ema",
    "ema_tf": "tf tensorflow num_updates",
    "ema_halflife": "halflife half_life",
    "lawa": "window latest_weight_averaging",
    "dema": "double double_ema",
}
_STRATEGY = {name: answer for answer, names in _STRATEGIES.items() for name in names.split()}
_STRANGERS = frozenset({"lookahead", "schedule_free", "schedulefree", "switch_ema"})
_FILES = (".toml", ".yaml", ".yml", ".json")
_PACKAGE = {
    "polyak.average(model, 'ema', decay=0.999)": "ema EMAModel ExponentialMovingAverage exponential_moving_average "
    "ModelEma ModelEMA AveragedModel average_model get_ema_multi_avg_fn EMACallback WeightAveraging EmaModel Averaging",
    "polyak.average(model, 'ema_v3', decay=0.9998)": "ModelEmaV3 ema_v3",
    "polyak.average(model, 'ema_v2', decay=0.9998)": "ModelEmaV2 ema_v2",
    "polyak.average(model, 'ema_v1', decay=0.9998)": "ema_v1",
    "polyak.average(model, 'swa')": "swa StochasticWeightAveraging swa_utils get_swa_multi_avg_fn",
    "polyak.average(model, 'lawa')": "lawa",
    "polyak.average(model, 'power')": "power PostHocEMA KarrasEMA",
    "polyak.recalibrate(averager, batches)": "update_bn update_batch_norm bn_update recalibrate_bn",
    "polyak.posthoc.Recorder": "Recorder recorder record",
    "polyak.posthoc.synthesize": "synthesize synthesise",
    "polyak.posthoc.sweep": "sweep Sweep",
    "polyak.optim.AdamW": "AdamW Adam",
    "polyak.AveragerConfig.from_file(path)": "from_file load_config from_config Config",
    "polyak.Averager": "Average",
    "polyak.attach(optimizer, averager)": "register hook",
    "polyak.testing.check_strategy": "check_strategy",
}
_IN_PACKAGE = {name: answer for answer, names in _PACKAGE.items() for name in names.split()}
_BY_NAME = {name: one for one in _HABITS for name in one.elsewhere.split()}


def habit(key: str, known: Collection[str]) -> str:
    """Return a hint for a setting that other libraries have; empty where it is not one of theirs.

    Args:
        key: The setting that was given.
        known: The settings that could have been given.

    Examples:
        >>> habit("ema_decay", {"decay", "every"})
        " Did you mean 'decay'?"
        >>> habit("debias", {"decay", "every"})
        " Choose the strategy 'ema_debiased'."
    """
    found = _BY_NAME.get(key)
    if found is None:
        return ""
    name = next((name for name in found.here if name in known and name != key), None)
    if name is None:
        return f" {found.otherwise}" if found.otherwise else ""
    note = f", {found.note}" if found.note and name == found.here[0] else ""
    return f" Did you mean {name!r}{note}?"


def package_hint(name: str) -> str:
    """Return a hint at the equivalent of a name that the package does not have, or "".

    Examples:
        >>> package_hint("Recorder")
        ' For that there is polyak.posthoc.Recorder.'
    """
    return f" For that there is {_IN_PACKAGE[name]}." if name in _IN_PACKAGE else ""


def strategy_habit(name: str) -> str:
    """Return a hint for a strategy's name in other libraries and in papers; empty if it is not one of theirs.

    Examples:
        >>> strategy_habit("exponential-moving-average")
        " Did you mean 'ema'?"
    """
    if name.lower().endswith(_FILES):
        return " A config file is read by polyak.AveragerConfig.from_file(path).build(model)."
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key in _STRANGERS:
        return " It writes to the weights that are trained, which no strategy does."
    return f" Did you mean {_STRATEGY[key]!r}?" if key in _STRATEGY else ""
