"""The engine's options: every axis of an average that is not its rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from polyak.engine.nonfinite import Nonfinite
from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.kernels.select import KernelName
from polyak.strategy.frozen import Frozen, nearest
from polyak.strategy.numbers import Count, Steps
from polyak.tensors.matching import Match
from polyak.tensors.policies import Buffers
from polyak.tensors.storage import LAST_DEVICE, as_device, as_dtype

if TYPE_CHECKING:
    from polyak.strategy.base import Strategy

__all__ = ["Options"]


_POLICIES = ("auto", "average", "copy", "skip")


def _dtype_name(value: Any) -> Any:  # noqa: ANN401 - a validator takes whatever the user wrote
    found = as_dtype(value)
    return "auto" if found is None else str(found).removeprefix("torch.")  # "model" stays


def _device_name(value: Any) -> Any:  # noqa: ANN401 - as above
    found = as_device(int(value) if isinstance(value, float) and value.is_integer() else value)
    return None if found is None else str(found)


def _globs(value: Any) -> Any:  # noqa: ANN401 - as above
    if callable(value):
        message = f"got {shown(value)}; expected a name or a glob, or a list of them, and no function"
        raise ValueError(message)  # noqa: TRY004 - pydantic turns only these into a located error
    return (value,) if isinstance(value, str) else value


def _buffers(value: Any) -> Any:  # noqa: ANN401 - as above
    if isinstance(value, Mapping) or value in _POLICIES:
        return value
    message = f"got {shown(value)}; expected {', '.join(map(repr, _POLICIES))}, or a mapping of globs to policies."
    raise ValueError(message + (nearest(value, _POLICIES) if isinstance(value, str) else ""))


Globs = Annotated[tuple[str, ...] | None, BeforeValidator(_globs, json_schema_input_type=str | list[str] | None)]

_DEVICES = (
    "cpu|cuda|xpu|mps|meta|hpu|mtia|npu|maia|xla|hip|ipu|ve|fpga|vulkan|lazy|privateuseone|mkldnn|ideep|opengl|opencl"
)
_INDEX = "[0-9]|[1-9][0-9]|1[01][0-9]|12[0-7]"
_DEVICE = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "pattern": f"^({_DEVICES})(:({_INDEX}))?$"},
            {"type": "integer", "minimum": 0, "maximum": LAST_DEVICE},
            {"type": "null"},
        ]
    }
)
_DTYPE = WithJsonSchema(
    {
        "anyOf": [
            {"enum": ["auto", "model", "float32", "float64", "bfloat16", "float16"]},
            {"type": "string", "pattern": r"^(torch\.)?(bfloat16|float16|float32|float64|half|float|double)$"},
        ]
    }
)


_OPEN = frozenset({"match", "origin", "kernel", "buffers", "device", "dtype", "include", "exclude"})
"""The options whose default leaves the choice open."""


class Options(Frozen):
    """All that ``polyak.average`` takes beside the model and the strategy; frozen and validated.

    Examples:
        >>> Options(every=10, include="*.weight").include
        ('*.weight',)
    """

    start: Steps = 0
    """The first optimiser step that may be averaged."""
    every: Count = 1
    """Average one optimiser step in so many; decays are raised to this power."""
    origin: Literal["initial", "first"] | None = None
    """Whether the weights at construction count ("initial") or the first update replaces them ("first").
    None: the strategy's default, and "first" where ``start`` delays the average."""
    buffers: Annotated[Buffers, BeforeValidator(_buffers)] = "auto"
    """One policy for all buffers, or a mapping of glob to policy."""
    include: Globs = None
    """Globs of the tensors to average; None: all."""
    exclude: Globs = None
    """Globs of tensors to leave alone."""
    match: Match | None = None
    """How a model's tensors find their averages: by name or by order. None: the strategy's default, else by name."""
    device: Annotated[str | None, BeforeValidator(_device_name), _DEVICE] = None
    """Where the average lives; None: with the model."""
    dtype: Annotated[str, BeforeValidator(_dtype_name), _DTYPE] = "auto"
    """How precisely the average is stored; "auto": as the model, but float32 for shorter floats; "model": as it is."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How averages in short dtypes are rounded; to the nearest they stand still once steps are small."""
    seed: Steps | None = None
    """The seed of what is drawn for stochastic rounding; None: 0."""
    nonfinite: Nonfinite = "hold"
    """What an update does about NaN and infinities."""
    kernel: KernelName = "auto"
    """What moves the tensors; "auto": the fastest that fits."""
    capturable: bool = False
    """Whether updates can be part of a CUDA graph or of a compiled step, with the rate in a tensor."""

    def completed(self, strategy: Strategy) -> Options:
        """Return these options with everything left open chosen by the strategy, else by the engine."""
        chosen = strategy.engine()
        if strange := sorted(chosen.keys() - _OPEN):
            message = (
                f"{type(strategy).__name__}.engine() names {', '.join(map(repr, strange))}; "
                f"a strategy may choose {', '.join(sorted(_OPEN))}"
            )
            raise ConfigError(message)
        open_ = {"match": "name", "origin": "initial", "kernel": "auto", "buffers": "auto", **chosen}
        if self.start:
            open_["origin"] = "first"
        left = {key: value for key, value in open_.items() if getattr(self, key) in (None, "auto")}
        return self.model_validate({**self.model_dump(), **left})
