"""The laws of merges as a test, for plugins and built-in ones alike."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import torch

from polyak.files.merge import as_merge
from polyak.files.merging import measured_tensors
from polyak.merges.about import About
from polyak.testing.rates import require

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from polyak.merges.base import Merge

__all__ = ["check_merge"]

_SHAPES = {"layer.weight": (7, 5), "layer.bias": (7,), "scale": ()}
_CLOSE = 1e-9
_PIECE = 4  # values


def check_merge(method: str | Merge | type[Merge] | Mapping[str, Any], **settings: Any) -> None:
    """Check that a merge obeys the laws of merges.

    Equal inputs are a fixed point; inputs may be permuted with their weights; pieces change nothing; a shift of all
    inputs and the base shifts the result; the same seed gives the same; settings survive JSON and pickle.

    Args:
        method: What ``polyak.files.merge`` takes: a name, a class, an object, or a mapping of a name and settings.
        **settings: The merge's own settings.

    Raises:
        AssertionError: If a law is broken. The message names each one.
        ConfigError: If there is no such merge, or a setting is wrong.

    Examples:
        >>> from polyak.testing import check_merge
        >>> check_merge("ties", density=0.5)
    """
    merge = as_merge(method, settings)
    problems = []
    for title, law in LAWS.items():
        try:
            law(merge)
        except Exception as error:  # noqa: BLE001 - the caller's thread raises it
            said = str(error) if isinstance(error, AssertionError) else f"raised {type(error).__name__}: {error}"
            problems.append(f"\n  {title}: {said}")
    if problems:
        message = f"{merge!r} breaks {len(problems)} of the laws of merges:{''.join(problems)}"
        raise AssertionError(message)


class _Run:
    """A merge of small models in memory.

    Args:
        merge: The merge.
        states: The inputs.
        base: The base.
        weights: What each input counts.
        seed: The seed.
    """

    def __init__(
        self,
        merge: Merge,
        states: Sequence[Mapping[str, Tensor]],
        base: Mapping[str, Tensor],
        weights: Sequence[float],
        seed: int = 0,
    ) -> None:
        self._merge, self._states, self._base = merge, states, base
        self._weights, self._seed = tuple(weights), seed

    def result(self, *, pieces: bool = False) -> dict[str, Tensor]:
        """Return the merged model."""
        statistics = measured_tensors(self._merge, self._measured)
        made = {}
        for name, shape in _SHAPES.items():
            count = self._base[name].numel()
            if not self._merge.in_pieces():
                made[name] = self._called(self._merge.merge, name, None, 0, count, statistics).reshape(shape)
                continue
            step = _PIECE if pieces else count
            parts = [
                self._called(self._merge.merge, name, (-1,), begin, min(count, begin + step), statistics).reshape(-1)
                for begin in range(0, count, step)
            ]
            made[name] = torch.cat(parts).reshape(shape)
        return made

    def _measured(self, statistics: Any) -> Any:  # noqa: ANN401 - any plain value
        for name in _SHAPES:
            shape = (-1,) if self._merge.in_pieces() else None
            yield self._called(self._merge.measure, name, shape, 0, self._base[name].numel(), statistics)

    def _called(
        self,
        function: Callable[..., Any],
        name: str,
        shape: tuple[int, ...] | None,
        begin: int,
        end: int,
        statistics: Any,  # noqa: ANN401 - any plain value
    ) -> Any:  # noqa: ANN401 - any plain value
        def values(state: Mapping[str, Tensor]) -> Tensor:
            return state[name].reshape(-1)[begin:end].clone().reshape(shape or _SHAPES[name])

        extras = tuple(torch.ones_like(values(state)) for state in self._states[: len(self._merge.extras())])
        about = About(name, _SHAPES[name], begin, end - begin, self._weights, statistics, self._seed, extras)
        base = None if self._merge.base == "none" else values(self._base)
        return function([values(state) for state in self._states], base, about)


def _state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        for name, shape in _SHAPES.items()
    }


def _count(merge: Merge) -> int:
    least, most = merge.inputs
    count = len(merge.extras()) or max(least, 3)
    return count if most is None else min(count, most)


def _weights(merge: Merge) -> list[float]:
    count = _count(merge)
    total = count * (count + 1) / 2
    if merge.weighing == "none":
        return [1.0 / count] * count
    return [(i + 1) / (total if merge.weighing == "mean" else 2.0) for i in range(count)]


def _run(merge: Merge, seed: int = 0) -> _Run:
    return _Run(merge, [_state(1 + i) for i in range(_count(merge))], _state(0), _weights(merge), seed)


def _apart(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    return max(float((got[name] - wanted[name]).abs().max()) for name in wanted)


def _equal_is_fixed(merge: Merge) -> None:
    state = _state(0)
    made = _Run(merge, [state] * _count(merge), state, _weights(merge)).result()
    require((error := _apart(made, state)) <= _CLOSE, f"equal inputs and base change by up to {error:.1e}")


def _order_does_not_matter(merge: Merge) -> None:
    if not merge.symmetric or merge.extras():
        return
    states, weights = [_state(1 + i) for i in range(_count(merge))], _weights(merge)
    made = _Run(merge, states, _state(0), weights).result()
    again = _Run(merge, states[::-1], _state(0), weights[::-1]).result()
    error = _apart(again, made)
    said = f"inputs in another order, with their weights, change the result by up to {error:.1e}"
    require(error <= _CLOSE, f"{said}; if that is meant, say symmetric = False")


def _pieces_do_not_matter(merge: Merge) -> None:
    if not merge.in_pieces():
        return
    error = _apart(_run(merge).result(pieces=True), _run(merge).result())
    said = f"pieces of {_PIECE} values change the result by up to {error:.1e}"
    require(error <= _CLOSE, f"{said}; if it needs whole tensors, say elementwise = False")


def _shift_moves_the_result(merge: Merge) -> None:
    if merge.base != "required":
        return
    states, base = [_state(1 + i) for i in range(_count(merge))], _state(0)
    shift = {name: tensor.round() for name, tensor in _state(99).items()}
    moved = [{name: tensor + shift[name] for name, tensor in state.items()} for state in (*states, base)]
    made = _Run(merge, states, base, _weights(merge)).result()
    again = _Run(merge, moved[:-1], moved[-1], _weights(merge)).result()
    wanted = {name: tensor + shift[name] for name, tensor in made.items()}
    require((error := _apart(again, wanted)) <= _CLOSE, f"a shift of inputs and base is off by up to {error:.1e}")


def _seed_decides(merge: Merge) -> None:
    first, second = _run(merge, 3).result(), _run(merge, 3).result()
    require(_apart(first, second) == 0, "the same seed gives another result; draw by about.uniform() alone")


def _settings_survive(merge: Merge) -> None:
    kind = type(merge)
    again = kind.model_validate(json.loads(json.dumps(merge.model_dump(mode="json"))))
    require(again == merge, f"JSON changes it: {merge!r} came back as {again!r}")
    kind.model_json_schema()
    copied = pickle.loads(pickle.dumps(merge))  # noqa: S301 - made one expression earlier
    require(copied == merge, f"pickle changes it: {merge!r} came back as {copied!r}")


LAWS: dict[str, Callable[[Merge], None]] = {
    "equal inputs are a fixed point": _equal_is_fixed,
    "inputs may be permuted with their weights": _order_does_not_matter,
    "pieces change nothing": _pieces_do_not_matter,
    "a shift of inputs and base shifts the result": _shift_moves_the_result,
    "a seed decides everything": _seed_decides,
    "settings survive JSON and pickle": _settings_survive,
}
"""Titles and laws."""
