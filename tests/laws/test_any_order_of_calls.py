"""All laws at once: whatever a user calls, in whatever order, average and model are what the reference says."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import polyak
from models import Tied, model_bits, step

STRATEGIES = st.sampled_from(
    [polyak.EMA(decay=0.7), polyak.SWA(), polyak.EMAV3(decay=0.9, use_warmup=True), polyak.DebiasedEMA(decay=0.8)]
)


class Calls(RuleBasedStateMachine):
    """One model, its averager, and what both must be."""

    @initialize(strategy=STRATEGIES, dtype=st.sampled_from(["float64", "auto"]), every=st.integers(1, 3))
    def build(self, strategy, dtype, every):
        torch.manual_seed(0)
        self.model = Tied()
        self.options = {"dtype": dtype, "every": every, "nonfinite": "skip"}
        self.strategy, self.every = strategy, every
        self.averager = polyak.average(self.model, strategy, **self.options)
        self.other = polyak.average(self.model, "ema", decay=0.5)
        self.generator = torch.Generator().manual_seed(0)
        self.contexts, self.saved = ExitStack(), []
        self.depth = 0
        self.weights = self._exact()
        self.expected, self.calls, self.n, self.elapsed, self.last, self.skipped = self._exact(), 0, 0, 0, None, 0

    def _exact(self):
        return {name: tensor.detach().double() for name, tensor in self.model.named_parameters()}

    def teardown(self):
        if hasattr(self, "contexts"):
            self.contexts.close()
            assert all(torch.equal(tensor, self.weights[name]) for name, tensor in self._exact().items())

    @precondition(lambda self: not self.depth)
    @rule()
    def train(self):
        step(self.model, self.generator)
        self.weights = self._exact()

    @precondition(lambda self: not self.depth)
    @rule(broken=st.booleans())
    def update(self, broken):
        weight = self.model.mix.weight
        kept = weight.detach().clone()
        if broken:
            weight.data[0, 0] = torch.nan
        self.averager.update()
        weight.data.copy_(kept)
        self.calls += 1
        if self.calls % self.every:
            return
        if broken:
            self.skipped += 1
            return
        stride = self.every if self.last is None else self.calls - self.last
        self.n, self.last, self.elapsed = self.n + 1, self.calls, self.elapsed + stride
        clock = polyak.Clock(n=self.n, step=self.calls, stride=stride, elapsed=self.elapsed)
        first = self.n == 1 and self.strategy.engine().get("origin") == "first"
        rate = 1.0 if first else self.strategy.rate(clock)
        for name, average in self.expected.items():
            self.expected[name] = average + rate * (self.weights[name] - average)

    @rule()
    def enter(self):
        self.contexts.enter_context(self.averager.applied())
        self.depth += 1

    @precondition(lambda self: self.depth)
    @rule()
    def leave_all(self):
        self.contexts.close()
        self.depth = 0

    @precondition(lambda self: self.depth)
    @rule()
    def update_inside(self):
        with pytest.raises(polyak.AppliedError):
            self.averager.update()

    @rule()
    def evaluate(self):
        ids = torch.tensor([[1, 2, 3]])
        result = self.averager(ids)
        assert torch.equal(self.averager.module(ids), result)
        if self.depth:
            with torch.no_grad():
                assert torch.equal(self.model.eval()(ids), result)

    @rule()
    def read(self):
        if self.n or self.strategy.engine().get("origin") != "first":
            averaged = self.averager.averaged_state_dict()
            assert all(
                torch.allclose(averaged[name].double(), self.expected[name], atol=1e-5) for name in self.expected
            )
        assert torch.equal(self.averager.averaged_state_dict()["head.weight"], self.averager.module.emb.weight)

    @rule()
    def save(self):
        known = copy.deepcopy((self.expected, self.calls, self.n, self.elapsed, self.last, self.skipped))
        self.saved.append((self.averager.state_dict(), known))

    @precondition(lambda self: not self.depth and self.saved)
    @rule(data=st.data())
    def load(self, data):
        state, known = data.draw(st.sampled_from(self.saved))
        self.averager.load_state_dict(state)
        self.expected, self.calls, self.n, self.elapsed, self.last, self.skipped = copy.deepcopy(known)

    @precondition(lambda self: not self.depth)
    @rule(way=st.sampled_from(["deepcopy", "pickle", "state"]))
    def replace_the_averager(self, way):
        if way == "deepcopy":
            self.averager = copy.deepcopy(self.averager)
        elif way == "pickle":
            kept, self.averager = self.averager, pickle.loads(pickle.dumps(self.averager))
            self.averager.core.binding.model = kept.core.binding.model
        else:
            state = self.averager.state_dict()
            self.averager = polyak.average(self.model, self.strategy, **self.options)
            self.averager.load_state_dict(state)

    @precondition(lambda self: not self.depth)
    @rule()
    def replace_a_parameter(self):
        self.model.mix.weight = torch.nn.Parameter(self.model.mix.weight.detach().clone())

    @rule()
    def another_averager_comes_and_goes(self):
        before = model_bits(self.model)
        with self.other.applied():
            self.the_average_is_what_the_reference_says()
        assert model_bits(self.model) == before

    @precondition(lambda self: self.depth)
    @rule()
    def build_inside(self):
        with pytest.raises(polyak.AppliedError):
            polyak.average(self.model)

    @invariant()
    def the_average_is_what_the_reference_says(self):
        if not hasattr(self, "averager"):
            return
        assert (self.averager.n, self.averager.skipped, self.averager.is_applied) == (
            self.n,
            self.skipped,
            self.depth > 0,
        )
        assert len(self.averager.profile()) == self.n
        tolerance = 1e-12 if self.options["dtype"] == "float64" else 1e-5
        if self.n or self.strategy.engine().get("origin") != "first":
            for name, average in self.averager.averages.items():
                assert torch.allclose(average.double(), self.expected[name], rtol=0, atol=tolerance), name

    @invariant()
    def the_model_is_its_own_unless_applied(self):
        if hasattr(self, "averager") and not self.depth:
            assert all(torch.equal(tensor, self.weights[name]) for name, tensor in self._exact().items())


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True, database=None)
pytestmark = [pytest.mark.property, pytest.mark.filterwarnings("ignore::polyak.PolyakWarning")]
