"""What an average must be: the recursion in float64 over the weights that were recorded behind each optimiser step."""

from __future__ import annotations

import torch


def bits(state):
    """Return a copy of the tensors in a mapping, or of a module's state dict."""
    state = state.state_dict() if isinstance(state, torch.nn.Module) else state
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def equal(one, other):
    """Return whether two mappings hold the same bits."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


class Record:
    """The parameters at the start and behind each real step of an optimiser."""

    def __init__(self, model):
        self.model, self.steps, self.handle = model, [], None
        self.start = self.now()

    def now(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def follow(self, optimizer):
        self.handle = optimizer.register_step_post_hook(lambda *_: self.steps.append(self.now()))
        return self

    def ema(self, decay, start=None, steps=None):
        """Return the average of all steps, or of some, in float64."""
        average = {name: tensor.double() for name, tensor in (start or self.start).items()}
        for weights in self.steps if steps is None else steps:
            for name, tensor in average.items():
                tensor.add_((1 - decay) * (weights[name].double() - tensor))
        return average

    def swa(self):
        """Return the mean of all steps in float64."""
        return {name: torch.stack([w[name].double() for w in self.steps]).mean(0) for name in self.start}


def near(averages, expected, tolerance=1e-6):
    """Return whether averages are the expected ones within a tolerance."""
    return all(
        torch.allclose(averages[name].double(), tensor, atol=tolerance, rtol=0) for name, tensor in expected.items()
    )
