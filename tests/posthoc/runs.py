"""What the tests of synthesis share: recorded runs of small models, real trajectories, and distances in float64."""

from __future__ import annotations

import json
import warnings
from functools import lru_cache

import numpy as np
import torch
from torch import nn

import polyak
from polyak.posthoc import Recorder, synthesize


def flat(tensors):
    """Return all floating values of named tensors in one float64 vector, by name."""
    picked = [
        tensors[name].detach().double().flatten() for name in sorted(tensors) if tensors[name].is_floating_point()
    ]
    return torch.cat(picked)


def killed(recorder):
    """Return a recorder of a process that is killed: nobody closes it, and nothing warns of that."""
    recorder._unclosed.detach()
    return recorder


def net():
    """A small net in float64, so that what differs is the average and not its rounding."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()


@lru_cache
def trained(steps):
    """Return the parameters of the net after each step 0 … ``steps`` of SGD on scikit-learn's digits, as rows."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    rows = [nn.utils.parameters_to_vector(model.parameters()).detach().clone()]
    for _ in range(steps):
        batch = torch.randint(0, len(y), (32,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
        rows.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return torch.stack(rows)


def replayed(model, rows, *averages, given=False):
    """Give a model one row of parameters after the other, and update the averages after each."""
    for step, row in enumerate(rows, start=1):
        with torch.no_grad():
            nn.utils.vector_to_parameters(row.to(next(model.parameters()).dtype), model.parameters())
        for one in averages:
            one.update(step=step if given else None)


def by_parameter(state):
    """Return an average of the net as one row, in the order of its parameters."""
    return torch.cat([state[name].double().flatten() for name, _ in net().named_parameters()])


def summed(profile, rows):
    """Return ``start * first row + sum(share * row of its step)``."""
    weights = np.zeros(len(rows))
    weights[0] = profile.start
    np.add.at(weights, profile.steps, profile.shares)
    return torch.from_numpy(weights) @ rows


def relative(one, other):
    """Return the distance of two vectors, relative to the second."""
    return float((one - other).norm() / other.norm())


def quietly(*args, **settings):
    """Synthesise; that a target is ill-conditioned is tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", polyak.PolyakWarning)
        return synthesize(*args, **settings)


def counted(folder, steps=100, *, averager="ema", every=10, values=None, nonfinite="hold", **settings):
    """Record a run whose single weight is the number of the step, and return its averager; values: of each step."""
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    make = polyak.bank if isinstance(averager, dict) else polyak.average
    made = make(model, averager, nonfinite=nonfinite)
    with Recorder(made, folder, every=every, **settings):
        for step in range(1, steps + 1):
            model["w"].fill_(step if values is None else values[step - 1])
            made.update()
    return made


def without_checksums(data):
    """Return the bytes of a safetensors file as earlier versions wrote it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]["polyak_crc32"]
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
