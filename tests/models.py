"""A zoo of small models: one for each way in which a model's tensors can be awkward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """One architecture of the zoo: how to build it, and one input of its ``forward``."""

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], Tensor]

    def __str__(self) -> str:
        return self.name


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.emb(ids))))


class Conv(nn.Module):
    """Convolution, batch normalisation and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM, whose module keeps its own list of weight references."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Buffers(nn.Module):
    """Buffers of every sort: floating, integer, boolean, non-persistent, with infinities, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("transient", torch.linspace(0, 1, 3), persistent=False)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("expanded", torch.ones(3, 1).expand(3, 4))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.running + self.transient + self.mask.softmax(-1)[0] + self.expanded[0, 0]


class MixedDtypes(nn.Module):
    """Parameters of five floating dtypes."""

    def __init__(self) -> None:
        super().__init__()
        short = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        self.layers = nn.ModuleList(nn.Linear(3, 3).to(dtype) for dtype in short)
        self.register_buffer("eighth", torch.ones(3).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x.float() * self.eighth.float()


class Fourier(nn.Module):
    """A complex parameter, as in learned filters."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x) @ self.filter * self.phase.to(torch.complex64)).real


class Shapes(nn.Module):
    """0-d, empty, non-contiguous and overlapping tensors; a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(3, 4).t())
        base = torch.randn(12)
        self.left = nn.Parameter(base[:8])
        self.right = nn.Parameter(base[4:])
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.scale + self.turned[:3].sum() + self.left.sum() - self.right.sum()


def _quietly(build: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates the old norms; models still have them
        return build()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


def old_spectral() -> nn.Module:
    return _quietly(lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2)))


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


def old_weight_norm() -> nn.Module:
    return _quietly(lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)))


def _rows() -> Tensor:
    return torch.randn(4, 3)


def _images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


ZOO = {
    kind.name: kind
    for kind in (
        Kind("mlp", mlp, _rows),
        Kind("conv", Conv, _images),
        Kind("channels_last", lambda: Conv().to(memory_format=torch.channels_last), _images),
        Kind("tied", Tied, lambda: torch.randint(0, 11, (4, 5))),
        Kind("lstm", Recurrent, lambda: torch.randn(4, 5, 3)),
        Kind("buffers", Buffers, _rows),
        Kind("mixed_dtypes", MixedDtypes, _rows),
        Kind("bfloat16", lambda: mlp().bfloat16(), lambda: _rows().bfloat16()),
        Kind("complex", Fourier, _rows),
        Kind("shapes", Shapes, _rows),
        Kind("spectral", spectral, _rows),
        Kind("old_spectral", old_spectral, _rows),
        Kind("weight_norm", weight_norm, _rows),
        Kind("old_weight_norm", old_weight_norm, _rows),
    )
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of an unwrapped model under every name, by torch's own listing."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def bits(tensor: Tensor) -> bytes:
    """Return a tensor's layout and values, byte for byte."""
    plain = tensor.detach().resolve_conj().contiguous().flatten()
    raw = plain.view(torch.uint8).cpu().numpy().tobytes() if plain.numel() else b""
    return repr((tensor.dtype, tuple(tensor.shape))).encode() + raw


def model_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in tensors_of(model).items()}


def average_bits(averager: object) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in averager.averages.items()}


def step(model: nn.Module, generator: torch.Generator) -> None:
    """Change every tensor of a model as training would, in place; each piece of memory once."""
    seen: set[tuple[int, torch.Size]] = set()
    for tensor in tensors_of(model).values():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        _change(_once(tensor), generator)


def _once(tensor: Tensor) -> Tensor:
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _change(tensor: Tensor, generator: torch.Generator) -> None:
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    elif tensor.is_complex():
        tensor.add_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator).to(tensor.device), alpha=0.1)
    elif tensor.is_floating_point():
        noise = (torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.device)
        tensor.copy_((tensor.float() if tensor.itemsize < 4 else tensor) + noise)
    else:
        tensor.add_(1)


def drifting(model: nn.Module, steps: int, seed: int = 0) -> Iterator[int]:
    """Change a model's tensors ``steps`` times, and yield the 1-based step after each."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, steps + 1):
        step(model, generator)
        yield number
