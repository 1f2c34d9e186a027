"""Which part of a saved dictionary holds the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from polyak.errors import ConfigError, StateError
from polyak.errors.formatting import listed, shortened, shown
from polyak.files.reading.meanings import Instance, Opaque, View

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyak.files.reading.meanings import Saved

__all__ = ["Chosen", "choose", "recorded_step"]

_KEYS = ("state_dict", "model", "model_state_dict", "module", "params", "net", "weights")
_AVERAGES = frozenset(
    {"state_dict_ema", "ema", "current_model_state", "params_ema", "model_ema", "ema_state_dict", "ema_model",
     "model_ema_state_dict", "shadow_params", "teacher", "model_avg"}
)  # fmt: skip
_OTHERS = frozenset(
    {"optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim", "opt", "optimizer_state",
     "last_optimizer_state", "optimizer_history", "scheduler", "schedulers", "lr_scheduler", "lr_schedulers",
     "scheduler_state_dict", "scaler", "amp_scaler", "grad_scaler", "rng", "rng_state", "rng_states", "callbacks",
     "loops", "args", "cfg", "config", "hyper_parameters", "extra_state", "task_state", "loss", "criterion"}
)  # fmt: skip
_STEPS = ("global_step", "global_steps", "iter_num", "step", "iteration", "num_updates", "num_steps")
_HISTORY = "optimizer_history"  # of fairseq: one entry for each optimiser that the run had
_DEEPEST = 6
_SHOWN = 12


class Chosen(NamedTuple):
    """The weights in a dictionary.

    Attributes:
        tensors: The tensors by name.
        key: The path of keys to them, with dots between.
        notes: Names that were skipped, and other weights in the dictionary.
        path: The mappings on the way to them, the outermost first.
    """

    tensors: dict[str, View]
    key: str
    notes: list[str]
    path: list[Mapping[Any, Any]]


def choose(value: Saved, where: str, key: str | None) -> Chosen:
    """Return the weights in what was saved.

    Args:
        value: What was saved.
        where: The file, as messages name it.
        key: The path of keys to the weights, with dots between. Defaults to the one that is usual.

    Raises:
        ConfigError: If there are several candidates, or none under ``key``.
        StateError: If no weights are there, or no plain ones.
    """
    notes: list[str] = []
    path: list[Mapping[Any, Any]] = []
    keys: list[str] = []
    if key is not None:
        value = _at(value, where, key, keys, path)
    for _ in range(_DEEPEST):
        found = _mapping(value, where)
        path.append(found)
        if _is_averager(found):
            notes.append("it is polyak's own: the average of an averager")
            keys += ["slots", "average"]
            return Chosen(_tensors(found["slots"]["average"], where, notes), ".".join(keys), notes, path)
        if _is_mostly_tensors(found):
            return Chosen(_tensors(found, where, notes), ".".join(keys), notes, path)
        flat = _flattened(found)
        if keys and flat and not any(name in found for name in _KEYS):
            return Chosen(_tensors(flat, where, notes), ".".join(keys), notes, path)
        name = _next(found, where, keys, notes)
        keys.append(str(name))
        value = found[name]
    message = f"{where}: its dictionaries are nested too deep; name the weights by key"
    raise StateError(message)


def recorded_step(path: list[Mapping[Any, Any]]) -> Saved:
    """Return the step in the dictionaries around the weights, or None."""
    for found in path:
        for name in _STEPS:
            if name in found and not (isinstance(found[name], Mapping) or type(found[name]) in {str, bytes}):
                return found[name]
        history = found.get(_HISTORY)
        if isinstance(history, list) and history and isinstance(history[-1], Mapping):
            return history[-1].get("num_updates")
    return None


def _at(value: Saved, where: str, key: str, keys: list[str], path: list[Mapping[Any, Any]]) -> Saved:
    rest = key
    while rest:
        found = value if isinstance(value, Mapping) else {}
        path.append(found)
        names = {str(name): name for name in found}
        # A name may have dots itself: the longest one that fits.
        fits = [name for name in names if rest == name or rest.startswith(f"{name}.")]
        if not fits:
            message = f"{where} has no key {key!r}; there are {listed(map(repr, list(names)[:_SHOWN])) or 'no keys'}"
            raise ConfigError(message)
        name = max(fits, key=len)
        keys.append(name)
        value, rest = found[names[name]], rest[len(name) + 1 :]
    return value


def _mapping(value: Saved, where: str) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Instance):
        message = (
            f"{where} holds a whole pickled object of the class {value.of}, which only its own program can load; "
            "there, save model.state_dict()"
        )
    elif isinstance(value, (View, Opaque)):
        message = f"{where} holds a single tensor without a name; expected a dictionary of names and tensors"
    else:
        message = f"{where} holds {shown(value)}; expected a dictionary of names and tensors"
    raise StateError(message)


def _is_mostly_tensors(found: Mapping[Any, Any]) -> bool:
    tensors = sum(isinstance(value, (View, Opaque)) for value in found.values())
    half = len(found) / 2
    return tensors > half or (0 < tensors == half and not any(map(_holds_tensors, found.values())))


def _is_averager(found: Mapping[Any, Any]) -> bool:
    slots = found.get("slots")
    return "strategy" in found and isinstance(slots, Mapping) and isinstance(slots.get("average"), Mapping)


def _flattened(found: Mapping[Any, Any]) -> dict[str, View | Opaque]:
    """Return nested dictionaries of nothing but tensors as one, with dots in the names; empty if they are others."""
    flat: dict[str, View | Opaque] = {}
    stack: list[tuple[str, Any, int]] = [("", found, 0)]
    while stack:
        name, value, depth = stack.pop()
        if isinstance(value, (View, Opaque)):
            flat[name] = value
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            stack += [(f"{name}.{key}".lstrip("."), part, depth + 1) for key, part in reversed([*value.items()])]
        elif value is not None:
            return {}
    return flat


def _next(found: Mapping[Any, Any], where: str, keys: list[str], notes: list[str]) -> Saved:
    candidates = [name for name in found if str(name) not in _OTHERS and _holds_tensors(found[name])]
    averages = [name for name in candidates if str(name) in _AVERAGES]
    raw = [name for name in candidates if name not in averages]
    usual = [name for name in _KEYS if name in raw or isinstance(found.get(name), Instance)]
    chosen = usual if len(usual) == 1 else usual or raw or averages
    if len(chosen) == 1:
        if others := [name for name in averages if name not in chosen]:
            names = listed(repr(".".join([*keys, str(name)])) for name in others)
            notes.append(
                f"the weights in {chosen[0]!r} were taken; there is an average, too, in {names}; key= chooses it"
            )
        if rest := [name for name in raw if name not in chosen]:
            names = listed(repr(".".join([*keys, str(name)])) for name in rest)
            notes.append(f"skipped: further tensors in {names}; key= chooses them")
        return chosen[0]
    if not chosen:
        inside = listed(map(repr, list(found)[:_SHOWN]))
        message = f"{where} holds no dictionary of tensors; " + (f"its keys are {inside}" if inside else "it is empty")
        raise StateError(message)
    names = " or ".join(repr(".".join([*keys, str(name)])) for name in chosen[:_SHOWN])
    message = f"{where} holds several dictionaries of tensors; choose one by key (--key): {names}"
    raise ConfigError(message)


def _holds_tensors(value: Saved) -> bool:
    stack = [(value, 0)]
    while stack:
        part, depth = stack.pop()
        if isinstance(part, (View, Opaque)):
            return depth > 0
        if isinstance(part, Mapping) and depth < _DEEPEST and "param_groups" not in part:
            stack += [(inner, depth + 1) for inner in part.values()]
    return False


def _tensors(found: Mapping[Any, Any], where: str, notes: list[str]) -> dict[str, View]:
    opaque = [f"{name} is {value.kind}" for name, value in _items(found) if isinstance(value, Opaque)]
    if opaque:
        message = (
            f"{where} holds tensors that are no plain ones: {shortened(opaque, 4, '; ')}. Save them as plain tensors: "
            "dequantise, or gather the full state dict"
        )
        raise StateError(message)
    tensors = {name: value for name, value in _items(found) if isinstance(value, View)}
    if not tensors:
        message = f"{where} holds no tensors"
        raise StateError(message)
    if left := [name for name, value in _items(found) if not isinstance(value, View)]:
        notes.append(f"skipped, since they are no tensors: {shortened(left, _SHOWN, ', ')}")
    return tensors


def _items(found: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    return ((str(name), value) for name, value in found.items())
