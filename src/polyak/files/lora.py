"""Adapters (LoRA): the mean of products of factors, which is not the product of mean factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from polyak.errors import ConfigError, MismatchError, NonFiniteError
from polyak.errors.formatting import shown
from polyak.files.kinds import is_lora
from polyak.files.pairs import Pair, pairs_in
from polyak.files.plan import widest
from polyak.strategy.numbers import given_integer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polyak.files.checkpoint import Checkpoint

__all__ = ["Adapters", "Lora", "combined"]

Lora = Literal["concatenate", "svd", "factors"]
_CHOICES = ("concatenate", "svd", "factors")


@dataclass(frozen=True)
class Adapters:
    """The factors of an averaged adapter.

    Attributes:
        tensors: The factors by name.
        names: The names in the inputs that they replace.
        edits: Changes of ``adapter_config.json``.
        notes: What a user should know: the error.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class _Made(NamedTuple):
    """Factors with scale 1, and the squared sizes of the error and of the whole."""

    down: Tensor
    up: Tensor
    error: float
    size: float


def combined(
    inputs: Sequence[Checkpoint],
    shares: Sequence[float],
    how: Lora | None,
    rank: int | None,
    dtype: torch.dtype | None,
) -> Adapters:
    """Return the mean of adapters; nothing if the inputs are none.

    With factors A and B of scale s, the mean of the products is ``sum(w s B A)``. ``concatenate`` writes it as one
    product ``[w s B ...] [A; ...]`` whose rank is the sum of all; ``svd`` takes the best product of a rank.

    Args:
        inputs: The checkpoints.
        shares: What each counts.
        how: Which of the ways.
        rank: The rank of "svd".
        dtype: The dtype of the factors. Defaults to the widest of the inputs.

    Raises:
        ConfigError: If they are adapters and no way is chosen, or it is not possible for them.
        MismatchError: If they adapt different tensors.
        NonFiniteError: If a factor has a NaN or an infinity.
    """
    if how is not None and how not in _CHOICES:
        message = f"lora: got {shown(how)}; expected {', '.join(map(repr, _CHOICES))}"
        raise ConfigError(message)
    if (how == "svd") != (rank is not None):
        message = f"lora={shown(how)} came with rank={shown(rank)}; 'svd' needs a rank (--rank 16), and only it has one"
        raise ConfigError(message)
    if not any(is_lora(one.tensors) for one in inputs):
        if how is not None:
            message = f"lora={shown(how)}: the files hold no adapter; leave lora out"
            raise ConfigError(message)
        return Adapters()
    if how is None:
        message = (
            f"{str(inputs[0].path)!r} holds the factors of an adapter (LoRA), and the product of mean factors is not "
            "the mean of the products. Choose lora='concatenate' (exact), 'svd' with rank=, or 'factors' (for "
            "neighbouring files of one run)"
        )
        raise ConfigError(message)
    tables = [pairs_in(one, needs_scale=how != "factors") for one in inputs]
    for one, table in zip(inputs, tables, strict=True):
        if lacking := tables[0].keys() ^ table.keys():
            message = f"{one.path.name!r} and {inputs[0].path.name!r} adapt different tensors, such as {min(lacking)!r}"
            raise MismatchError(message)
    return _all(inputs, shares, tables, how, None if rank is None else given_integer("rank", rank, 1), dtype)


def _all(
    inputs: Sequence[Checkpoint],
    shares: Sequence[float],
    tables: Sequence[Mapping[str, Pair]],
    how: Lora,
    rank: int | None,
    dtype: torch.dtype | None,
) -> Adapters:
    tensors: dict[str, Tensor] = {}
    names: set[str] = set()
    ranks: dict[str, int] = {}
    error = size = 0.0
    for module, first in tables[0].items():
        pairs = [table[module] for table in tables]
        factors = [_read(one, pair) for one, pair in zip(inputs, pairs, strict=True)]
        made = _factors(module, pairs, factors, shares) if how == "factors" else _product(pairs, factors, shares, rank)
        error, size = error + made.error, size + made.size
        kind = dtype or widest([one.dtype(pair.down) for one, pair in zip(inputs, pairs, strict=True)])
        ranks[module] = made.down.shape[0]
        shapes = [*factors[0][0].shape[1:]], [*factors[0][1].shape[2:]]
        tensors |= first.named(made.down.reshape(-1, *shapes[0]), made.up.reshape(*made.up.shape, *shapes[1]), kind)
        if first.alpha:
            tensors[first.alpha] = _alpha(inputs[-1], first, made, how)
        names |= {name for pair in pairs for name in (pair.down, pair.up, pair.alpha) if name}
    edits = {} if how == "factors" else {"adapter_config.json": _config(ranks)}
    relative = math.sqrt(error / size) if size else 0.0
    words = {"concatenate": "exact but for rounding", "svd": f"rank {rank}"}.get(how, "the mean of the factors")
    return Adapters(tensors, frozenset(names), edits, (f"adapter: {words}; relative error {relative:.2e}",))


def _read(checkpoint: Checkpoint, pair: Pair) -> tuple[Tensor, Tensor]:
    down, up = (checkpoint.read(name).to(torch.float64) for name in (pair.down, pair.up))
    for name, tensor in ((pair.down, down), (pair.up, up)):
        if not bool(torch.isfinite(tensor).all()):
            message = f"{shown(name)} in {str(checkpoint.path)!r} has a NaN or an infinity; leave that file out"
            raise NonFiniteError(message)
    return down, up


def _product(
    pairs: Sequence[Pair], factors: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], rank: int | None
) -> _Made:
    down = torch.cat([down.reshape(down.shape[0], -1) for down, _ in factors])
    scaled = [
        share * pair.scale * up.reshape(up.shape[0], -1)
        for pair, (_, up), share in zip(pairs, factors, shares, strict=True)
    ]
    up = torch.cat(scaled, 1)
    if rank is None:
        return _Made(down, up, 0.0, 1.0)
    left, small_left = torch.linalg.qr(up)
    right, small_right = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(small_left @ small_right.T)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    size, error = values.square().sum().item(), values[kept:].square().sum().item()
    return _Made((root[:, None] * v[:kept]) @ right.T, left @ (u[:, :kept] * root), error, size)


def _factors(
    module: str, pairs: Sequence[Pair], factors: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]
) -> _Made:
    if len({(down.shape, up.shape, pair.scale) for pair, (down, up) in zip(pairs, factors, strict=True)}) > 1:
        message = f"the adapters of {module!r} differ in rank, scale or shape; lora='concatenate' takes them"
        raise MismatchError(message)
    down = torch.stack([share * down for share, (down, _) in zip(shares, factors, strict=True)]).sum(0)
    up = torch.stack([share * up for share, (_, up) in zip(shares, factors, strict=True)]).sum(0)
    flat_down, flat_up = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
    exact = _product([pair._replace(scale=1.0) for pair in pairs], factors, shares, None)
    # |[B, -B'] [A; A']| by the small products of the factors, never as large as the weights.
    joined = torch.cat([exact.down, flat_down]), torch.cat([exact.up, -flat_up], 1)
    return _Made(flat_down, flat_up, _square(*joined), _square(exact.down, exact.up))


def _square(down: Tensor, up: Tensor) -> float:
    return max(0.0, ((up.T @ up) * (down @ down.T)).sum().item())


def _alpha(last: Checkpoint, pair: Pair, made: _Made, how: Lora) -> Tensor:
    alpha = last.read(pair.alpha)
    return alpha if how == "factors" else torch.full_like(alpha, float(made.down.shape[0]))


def _config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the settings of PEFT by which every scale is 1."""
    usual = max(ranks.values(), key=[*ranks.values()].count)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    same = {"r": usual, "lora_alpha": usual, "use_rslora": False, "init_lora_weights": True}
    return {**same, "rank_pattern": others, "alpha_pattern": {**others}}
