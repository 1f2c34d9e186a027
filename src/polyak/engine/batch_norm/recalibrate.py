"""Batch norm statistics that belong to the averaged weights, measured on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyak.engine.averaged_module.hooks import undisturbed
from polyak.engine.averager import refuse_other
from polyak.engine.batch_norm.moments import Moments, joined
from polyak.engine.engine import Engine
from polyak.errors import ArgumentError, ConfigError, ModelError
from polyak.errors.formatting import shown
from polyak.io.progress import track
from polyak.tensors.entries import walk
from polyak.tensors.sharding.adapter import peers_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from polyak.engine.averager import Averager
    from polyak.tensors.sharding.adapter import Peers

__all__ = ["recalibrate"]

_READ_BY = ("__iter__", "__getitem__")  # a data set may have the second only

Forward = Callable[[nn.Module, Any], object]


def recalibrate(
    target: Averager | nn.Module, batches: Iterable[Any], forward: Forward | None = None, *, exact: bool = False
) -> None:
    """Measure the running statistics of all batch norm layers anew: mean and variance over all rows of all batches.

    Averaged weights produce other activations than those whose statistics were averaged with them. Every row counts
    the same, whatever batch it is in; the layers' momenta are not used, and their modes are restored. All ranks of a
    sharded model call it, each with as many batches of its own, and the rows of all ranks count. Recalibrate right
    before you evaluate or export: the next ``update()`` averages the model's running statistics into the measured ones.

    Args:
        target: An averager (its average gets the statistics, the model is left alone) or a module.
        batches: Batches of any structure; a data loader.
        forward: Called as ``forward(module, batch)``. None: a mapping becomes keyword arguments, the first item of a
            tuple or list is taken as the input, anything else is the input; moved to the module's device.
        exact: Whether each layer is measured behind layers that use their final statistics, as in one batch of all
            rows: one pass over ``batches`` per batch norm layer. Otherwise all are measured in one pass, in which
            each layer normalises with its batch's own statistics, which for all but the first layer is near that.

    Raises:
        ModelError: If there is no batch norm layer with running statistics, or the averager leaves them out.
        DistributedError: If a rank does not answer.
        ConfigError: If no batch was given, or ``exact`` needs several passes and ``batches`` can be read only once.

    Nothing is written when an exception is raised, the data's or the model's own included.

    Source: Izmailov et al. (2018), arXiv:1803.05407, section 3.2.

    Often confused with: ``torch.optim.swa_utils.update_bn``, which averages batches and not rows (64 rows of 0 and
    2 of 99 give 49.5 and not 3), runs dropout in training mode too, and takes no dictionaries.

    Examples:
        >>> import polyak, torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
        >>> polyak.recalibrate(model, [torch.zeros(64, 1), torch.full((2, 1), 99.0)])
        >>> round(model[0].running_mean.item(), 3)
        3.0
    """
    if not isinstance(target, nn.Module):
        refuse_other("recalibrate", target, batches, "batches")
    # The rows of a tensor may be batches, but not if they are single values or vectors of features.
    one = isinstance(batches, Tensor) and batches.dim() < (3 if batches.is_floating_point() else 2)
    if one or isinstance(batches, (Mapping, str)) or not any(hasattr(batches, name) for name in _READ_BY):
        message = (
            f"batches: got {shown(batches)}; expected an iterable of batches, such as a data loader. "
            "For one batch x write [x]" + ", or x.split(64)" * isinstance(batches, Tensor)
        )
        raise ArgumentError(message)
    if isinstance(target, Engine) and any(stored.spread for stored in target.stored):
        # Shards make no module of their own: the model computes with the average, and its statistics are put back.
        with target.applied():
            _recalibrate(target, cast("nn.Module", target.model), batches, forward or _forward, exact=exact)
    else:
        module = target if isinstance(target, nn.Module) else target.module
        _recalibrate(target, module, batches, forward or _forward, exact=exact)


def _recalibrate(
    target: Averager | nn.Module, module: nn.Module, batches: Iterable[Any], run: Forward, *, exact: bool
) -> None:
    layers, peers = _layers(module), peers_of(module)
    destinations = _destinations(target, module, layers)
    if exact and len(layers) > 1 and iter(batches) is batches:
        message = f"exact=True reads the batches {len(layers)} times; give a list or a loader, not an iterator"
        raise ConfigError(message)
    with torch.no_grad(), undisturbed(module), _prepared(module, layers) as saved:
        rounds = [[layer] for layer in _order_of_use(module, layers, batches, run)] if exact else [layers]
        measured: dict[_BatchNorm, Moments] = {}
        for i, group in enumerate(rounds):
            measured |= _measure(module, group, batches, run, f"recalibrating, pass {i + 1} of {len(rounds)}", peers)
            for layer in group:
                # One batch of all rows would be normalised with the variance of that batch, which is the biased one.
                measured[layer].write(layer, lost=0)
        _twice(lambda: _write(measured, destinations))
        saved.clear()


def _write(measured: Mapping[_BatchNorm, Moments], destinations: Sequence[tuple[Tensor, Tensor]]) -> None:
    for layer, moments in measured.items():
        moments.write(layer, lost=1)
    for buffer, stored in destinations:
        stored.copy_(buffer)


def _twice(act: Callable[[], None]) -> None:
    """Do what may be done twice; where it is interrupted, it is done all the same before the interruption goes on."""
    try:
        act()
    except BaseException:
        act()
        raise


def _measure(
    module: nn.Module,
    layers: list[_BatchNorm],
    batches: Iterable[Any],
    run: Forward,
    what: str,
    peers: Peers | None,
) -> dict[_BatchNorm, Moments]:
    moments = {layer: Moments() for layer in layers}

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        moments[layer].add(x)  # type: ignore[index]  # the hook is on batch norm layers only
        # One row has no variance; batch norm refuses it in training mode.
        layer.train(x.numel() > x.shape[1])

    with _hooked(layers, before):
        for batch in track(batches, what):
            run(module, batch)
    if peers is not None:
        joined(moments, peers)
    for layer in layers:
        layer.eval()
    if not any(moment.count for moment in moments.values()):
        message = "no batch reached a batch norm layer; is the loader empty or already used up?"
        raise ConfigError(message)
    return moments


def _order_of_use(
    module: nn.Module, layers: list[_BatchNorm], batches: Iterable[Any], run: Forward
) -> list[_BatchNorm]:
    used: dict[Any, None] = {}
    with _hooked(layers, lambda layer, *_: used.setdefault(layer)):
        for batch in batches:
            run(module, batch)
            break
    if not used:
        message = "no batch was given"
        raise ConfigError(message)
    return list(used)


@contextmanager
def _hooked(layers: Sequence[_BatchNorm], hook: Callable[..., None]) -> Iterator[None]:
    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))  # noqa: PERF401 - each is known at once
        yield
    finally:
        _twice(remove)


@contextmanager
def _prepared(module: nn.Module, layers: list[_BatchNorm]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Put all in eval mode and keep the layers' momenta at zero; write back what is still saved at the end."""
    modes = [(m, m.training) for m in module.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    saved = [(b, b.clone()) for layer in layers for b in layer.buffers(recurse=False)]

    def restore() -> None:
        for buffer, value in saved:
            buffer.copy_(value)
        for layer, momentum in momenta:
            layer.momentum = momentum
        for m, training in modes:
            m.training = training

    try:
        module.eval()
        for layer in layers:
            layer.momentum = 0.0
        yield saved
    finally:
        _twice(restore)


def _layers(module: nn.Module) -> list[_BatchNorm]:
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        message = (
            f"{type(module).__name__} has no batch norm layer with running statistics: there is nothing to recalibrate"
        )
        raise ModelError(message)
    return layers


def _destinations(
    target: Averager | nn.Module, module: nn.Module, layers: list[_BatchNorm]
) -> list[tuple[Tensor, Tensor]]:
    """Return which statistic of the averager's module goes into which of its tensors; a plain module keeps its own."""
    if isinstance(target, nn.Module):
        return []
    names = {id(location.tensor): entry.name for entry in walk(module) for location in entry.locations}
    buffers = [b for layer in layers for b in layer.buffers(recurse=False)]
    averages = target.averages
    if missing := [names[id(b)] for b in buffers if names[id(b)] not in averages]:
        message = f"the averager leaves {missing[0]} out, so it is the model's own; average or copy buffers instead"
        raise ModelError(message)
    return [(b, averages[names[id(b)]]) for b in buffers]


def _forward(module: nn.Module, batch: Any) -> object:  # noqa: ANN401 - whatever the loader gives
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return module(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return module(first.to(device) if isinstance(first, Tensor) else first)
