"""The adapter for models with sharded tensors: FSDP2, tensor parallel, and both."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from polyak.ranks.consensus import agreement
from polyak.tensors.adapter import Adapter
from polyak.tensors.entries import walk
from polyak.tensors.sharding.placement import Spread
from polyak.tensors.wrappers import dtensor, each_module, refuse_sharded, shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch.distributed import ProcessGroup

    from polyak.tensors.entries import Entry, Model

__all__ = ["Peers", "Sharded", "adapter_for", "peers_of"]

_local = attrgetter("_local_tensor")


def adapter_for(model: Model | None) -> Adapter:
    """Return how to reach the tensors of a model, by what they are now.

    Raises:
        ModelError: If the tensors are sharded by an engine that hides what is written into them from the next forward.
    """
    if isinstance(model, nn.Module):
        refuse_sharded(model)
        return Sharded() if _is_spread(model) else Adapter()
    spread = isinstance(model, Mapping) and _any_spread(model, dtensor())
    return Sharded() if spread else Adapter()


class Sharded(Adapter):
    """Reaches the shards that this rank holds; an update needs nothing of the other ranks.

    Under FSDP2 a module shows its whole parameters after a forward without a backward, and computes with them again in
    the next one, whatever was written into the shards: so FSDP drops them before tensors are walked or written.
    """

    @override
    def entries(self, model: Model) -> list[Entry]:
        _reshard(model)
        return [_local_entry(entry) for entry in walk(model)]

    @override
    def holds(self, entries: Sequence[Entry], live: Sequence[Tensor]) -> bool:
        wholes = [(entry.locations[0].tensor, part) for entry, part in zip(entries, live, strict=True) if entry.spread]
        return all(map(is_, map(_local, [whole for whole, _ in wholes]), [part for _, part in wholes]))

    @override
    def before_swap(self, model: Model) -> None:
        _reshard(model)
        # The first forward may give the shards other memory, with the values that they have then.
        for group in _groups(model):
            group.lazy_init()

    @override
    def agree(self, entries: Sequence[Entry]) -> Callable[[bool], bool] | None:
        return agreement([entry.spread.mesh for entry in entries if entry.spread])


class Peers(NamedTuple):
    """Ranks that train one model with data of their own.

    Attributes:
        groups: Whoever sums along each of these sums over all of them.
        ranks: Their numbers.
        device: Where they talk.
    """

    groups: list[ProcessGroup]
    ranks: list[int]
    device: torch.device


def peers_of(model: nn.Module) -> Peers | None:
    """Return the ranks that FSDP2 shards a model over or has replicas on; None where it has none of it.

    Those of a tensor parallel mesh have the same data.
    """
    group = next(_groups(model), None)
    if group is None:
        return None
    info = group.mesh_info
    groups = [getattr(info, name, None) for name in ("shard_process_group", "replicate_process_group")]
    ranks = [int(rank) for rank in info.mesh.mesh.flatten()]
    return Peers([one for one in groups if one is not None], ranks, group.device)


def _is_spread(model: nn.Module) -> bool:
    kind = dtensor()
    if kind is None:
        return False
    own = ((shards(module), module._parameters, module._buffers) for module in each_module(model))  # noqa: SLF001 - see entries.py
    return any(
        sharded or _any_spread(parameters, kind) or _any_spread(buffers, kind) for sharded, parameters, buffers in own
    )


def _any_spread(tensors: Mapping[str, Any], kind: Any) -> bool:  # noqa: ANN401 - a class or None
    return kind is not None and any(isinstance(tensor, kind) for tensor in tensors.values())


def _local_entry(entry: Entry) -> Entry:
    whole: Any = entry.tensor
    kind = dtensor()
    if kind is None or not isinstance(whole, kind):
        return entry
    return entry._replace(tensor=_local(whole), spread=Spread.of(whole))


def _reshard(model: Model) -> None:
    for group in _groups(model):
        # What was asked for by unshard(async_op=True) is on its way with the values of then.
        if group._all_gather_result is not None:  # noqa: SLF001 - FSDP2 has no public way to ask
            group.wait_for_unshard()
        group.reshard()
        if not group.is_sharded:  # a forward was interrupted
            group._to_sharded()  # noqa: SLF001 - reset_iter_state() would drop the gradients, too


def _groups(model: Model) -> Iterator[Any]:
    for module in each_module(model) if isinstance(model, nn.Module) else ():
        if shards(module):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]  # noqa: SLF001 - reshard() leaves out what is on its way
            one = getattr(state, "_fsdp_param_group", None)
            yield from getattr(state, "_fsdp_param_groups", None) or ([] if one is None else [one])
