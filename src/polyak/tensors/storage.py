"""Where the average lives and how precisely: its device, its dtype, one tensor per entry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from polyak.errors import ConfigError, ModelError
from polyak.errors.formatting import shown
from polyak.tensors.entries import PLAIN
from polyak.tensors.memory import clones

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from polyak.tensors.entries import Entry, Kind
    from polyak.tensors.policies import Policy
    from polyak.tensors.sharding.placement import Spread

__all__ = [
    "Precision",
    "Stored",
    "allocate",
    "as_device",
    "as_dtype",
    "check_storable",
    "encoded",
    "refuse_unfit",
    "storage_dtype",
    "unfit",
]

Precision = torch.dtype | Literal["model"] | None
"""How averages are stored: in a dtype, as the model is, or (None) as it is but in float32 for shorter floats."""
LAST_DEVICE = 127
"""The largest index of a device that torch keeps."""
_SHORT_FLOATS = {dtype for name, dtype in vars(torch).items() if name.startswith("float8")} | {
    torch.float16,
    torch.bfloat16,
}


@dataclass(slots=True)
class Stored:
    """One tensor of the average, and what it belongs to.

    Attributes:
        name: The canonical name of the entry it averages.
        aliases: All names of that entry, ``name`` first.
        kind: ``"parameter"`` or ``"buffer"``.
        policy: ``"average"`` or ``"copy"``.
        average: The tensor.
        slots: What else a strategy keeps of it, by the names of its slots; none where it is copied.
        spread: How the whole is spread over ranks, where these are this rank's parts of it; else None.
        persistent: Whether the tensor is part of ``model.state_dict()``.
        fresh: Whether the model filled it since the last update: until the next one, the average is its value.
    """

    name: str
    aliases: tuple[str, ...]
    kind: Kind
    policy: Policy
    average: Tensor = field(repr=False)
    slots: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    spread: Spread | None = None
    persistent: bool = True
    fresh: bool = False

    @property
    def follows(self) -> bool:
        """Whether it is a buffer that needs no past: it may come, go and change its shape with the model's."""
        return self.kind == "buffer" and (self.policy == "copy" or not self.persistent)

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self.average.shape if self.spread is None else self.spread.shape

    def whole(self, part: Tensor) -> Tensor:
        """Return a stored tensor as others see it: where it is this rank's part, a DTensor over the same memory."""
        return part if self.spread is None else self.spread.wrap(part)

    def named(self, entry: Entry) -> Stored:
        """Return this under the entry's names, where a tie was made or broken since."""
        return self if self.aliases == entry.aliases else replace(self, name=entry.name, aliases=entry.aliases)

    def on_device_of(self, live: Tensor) -> Stored:
        """Return this on the device of a live tensor."""
        device = live.device
        return self if self.average.device == device else self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """Return this with all its tensors changed."""
        return replace(
            self, average=change(self.average), slots={slot: change(tensor) for slot, tensor in self.slots.items()}
        )

    def slot(self, name: str) -> Tensor:
        """Return the tensor of a slot; ``average`` is the average itself."""
        return self.average if name == "average" else self.slots[name]

    @property
    def nbytes(self) -> int:
        """The memory of all its tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The average and the strategy's other slots."""
        return self.average, *self.slots.values()


def as_dtype(dtype: str | torch.dtype) -> Precision:
    """Return the dtype meant by an option, None for ``"auto"``, or ``"model"``.

    Raises:
        ConfigError: If ``dtype`` names no floating dtype.
    """
    if dtype == "auto":
        return None
    if dtype == "model":
        return "model"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize == 1:
        message = (
            f"got {shown(dtype)}; expected 'auto' (the model's, but float32 for shorter ones), 'model' (the model's), "
            "'float32', 'float64', 'bfloat16', 'float16' or one of these as a torch.dtype"
        )
        raise ConfigError(message)
    return found


def as_device(device: str | int | torch.device | None) -> torch.device | None:
    """Return the device meant by an option, or None for the model's own.

    Raises:
        ConfigError: If it names no device that this torch knows.
    """
    if device is None:
        return None
    try:
        # torch 2.6 knows no numbers on machines without an accelerator; later ones take cuda then.
        found = torch.device(
            f"cuda:{device:d}" if isinstance(device, int) and not torch.accelerator.is_available() else device
        )
    except (RuntimeError, TypeError):
        found = None
    # torch wraps numbers above 127 around, and takes True for 1.
    wrapped = isinstance(device, int) and not 0 <= device <= LAST_DEVICE
    if found is None or isinstance(device, bool) or wrapped or (found.index or 0) < 0:
        message = f"got {shown(device)}; expected None (with the model) or a device such as 'cpu' or 'cuda:0'"
        raise ConfigError(message)
    return found


def storage_dtype(live: torch.dtype, wanted: Precision) -> torch.dtype:
    """Return the dtype an averaged tensor of dtype ``live`` is stored in."""
    if wanted == "model":
        wanted = None if live.is_complex or live.itemsize == 1 else live  # of these no average is kept
    if live.is_complex:
        # A complex of halves cannot be averaged.
        wide = live if wanted is None or wanted in _SHORT_FLOATS else wanted
        return torch.promote_types(wide, torch.complex64)
    if wanted is not None:
        return wanted
    return torch.float32 if live in _SHORT_FLOATS else live


def check_storable(entries: Sequence[Entry], policies: Sequence[Policy]) -> None:
    """Refuse a model that cannot be averaged, before anything is made.

    Raises:
        ModelError: If there is no tensor to average, or one is uninitialised, meta or sparse.
    """
    if not entries:
        message = "the model has no parameters and no buffers; give the module that is trained"
        raise ModelError(message)
    if "average" not in policies:
        message = (
            f"nothing is left to average: all {len(entries)} tensors are copied or excluded; "
            "check include=, exclude= and the model's dtypes"
        )
        raise ModelError(message)
    refuse_unfit([entry for entry, policy in zip(entries, policies, strict=True) if policy != "skip"])


def refuse_unfit(entries: Iterable[Entry]) -> None:
    """Refuse tensors that cannot be stored.

    Raises:
        ModelError: If one of them has no values of its own, or is sparse.
    """
    for entry in entries:
        if problem := unfit(entry.tensor):
            message = f"{entry.name} {problem}"
            raise ModelError(message)


def encoded(tensor: Tensor) -> bool:
    """Return whether a tensor is quantised: one of torch's, or a subclass that holds codes of its values."""
    if tensor.is_quantized:
        return True
    if type(tensor) in PLAIN or not tensor.is_floating_point() or not hasattr(tensor, "__tensor_flatten__"):
        return False
    inside = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    held = [part for part in inside if isinstance(part, Tensor)]
    return any(not part.is_floating_point() or part.dtype.itemsize == 1 or encoded(part) for part in held)


def unfit(tensor: Tensor) -> str:
    """Return why a tensor cannot be stored, and what to do; empty where it can."""
    if is_lazy(tensor):
        return "is not initialised yet (a lazy module); run one forward pass, then build the averager"
    if encoded(tensor):
        return (
            f"holds quantised values ({type(tensor).__name__}, {tensor.dtype}), which have no average; freeze it with "
            "requires_grad_(False), or name it in exclude=, to leave it alone"
        )
    if tensor.is_meta:
        return "is on the meta device and has no values; materialise the model (to_empty() and initialise it) first"
    if tensor.layout != torch.strided and tensor.layout != torch._mkldnn:  # type: ignore[attr-defined]  # noqa: SLF001, PLR1714 - the stubs lack this layout
        return (
            f"is sparse ({tensor.layout}), which has no average in place; make it dense, or leave it out with exclude="
        )
    return ""


def allocate(
    entries: Sequence[tuple[Entry, Policy]],
    slots: Sequence[str],
    *,
    device: torch.device | None,
    dtype: Precision,
) -> list[Stored]:
    """Return a tensor of its own for each entry, and one for each slot of those that are averaged, holding its value.

    Raises:
        ConfigError: If the device is not there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"device: {str(device)!r} cannot be used on this machine: {str(error).splitlines()[0]}"
        raise ConfigError(message) from None
    places = []
    for entry, policy in entries:
        live = entry.tensor
        own = storage_dtype(live.dtype, dtype) if policy == "average" else live.dtype
        places.append((device or live.device, own))
    # Normal tensors even under torch.inference_mode(): an inference tensor could never be updated outside of it.
    with torch.inference_mode(mode=False), torch.no_grad():
        averages = clones([entry.tensor for entry, _ in entries], places)
        averaged = [i for i, (_, policy) in enumerate(entries) if policy == "average"]
        values, where = [entries[i][0].tensor for i in averaged], [places[i] for i in averaged]
        kept: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(entries))}
        for slot in slots:
            for i, tensor in zip(averaged, clones(values, where), strict=True):
                kept[i][slot] = tensor
    return [
        Stored(entry.name, entry.aliases, entry.kind, policy, average, kept[i], entry.spread, entry.persistent)
        for i, ((entry, policy), average) in enumerate(zip(entries, averages, strict=True))
    ]
