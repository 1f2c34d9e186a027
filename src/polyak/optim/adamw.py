"""AdamW that moves an average on its way."""

from __future__ import annotations

import inspect
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from polyak.engine import Engine
from polyak.errors import ArgumentError, ConfigError
from polyak.errors.attributes import AttributeHints
from polyak.errors.formatting import type_name
from polyak.optim.attach import Update, attached
from polyak.optim.eligibility import alike, is_open, of_averager, of_optimizer
from polyak.optim.fused import AdamWCPU, Hyper
from polyak.optim.one_pass import OnePass
from polyak.optim.stepping import makes_state
from polyak.tensors.modes import Untracked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.optimizer import ParamsT

    from polyak.engine.averager import Averager
    from polyak.engine.bank import Bank

__all__ = ["AdamW"]

_LISTS = ("params_with_grad", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose ``step()`` updates an averager, too: in one pass over memory where that can be.

    ``m += (1 - beta1) * (g - m)``, ``v = beta2 * v + (1 - beta2) * g**2``,
    ``w = w * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)``, and at once
    ``average += rate * (w - average)``.

    What it does is what ``torch.optim.AdamW(..., fused=True)`` does with the averager attached (``polyak.attach``):
    the same numbers, hooks, schedulers, closures and state dicts. One pass is made of float32 parameters on the CPU
    with Numba, unless the averager was built with ``nonfinite="skip"`` or ``"raise"``, which look at the new weights
    before they move an average. Whatever does not fit makes the step slower, and no other: ``describe()`` says what it
    was.

    Args:
        params: As in torch; so are all arguments that are not listed here.
        averager: What ``polyak.average`` or ``polyak.bank`` returned for the model. Without one this is torch's AdamW.
            Do not attach it, nor update it in the loop: that call is skipped, with a warning. It stays the
            optimiser's: to resume, load its state, or build both anew. Copied optimisers have none. The update is
            part of the step: where step hooks change weights, ``polyak.attach`` it to torch's AdamW.
        fused: None: as True where parameters, gradients and moments are dense float32 or float64 tensors of the CPU, in
            the same order; elsewhere as in torch. (True where they are not in the same order mixes their elements up.)

    Attributes:
        one_pass: Whether the last step was made in one pass.

    Raises:
        ConfigError: If ``averager`` is not an averager, or is given in the place of another argument.
        MismatchError: If the optimiser changes no tensor of the averager's model.
        UnboundError: If the averager has no model (it was unpickled).

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (arXiv 1711.05101); numbers and
    state as in torch 2.15, ``fused=True`` on CPUs.

    Often confused with: an optimiser that trains with the average (Lookahead, schedule-free AdamW). The weights here
    are those of AdamW, whatever the average does.

    Examples:
        >>> import polyak, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> averager = polyak.average(model, "ema", decay=0.9)
        >>> optimizer = polyak.optim.AdamW(model.parameters(), lr=3e-4, averager=averager)
        >>> for _ in range(3):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> averager.n
        3
    """

    one_pass = False
    _why = "no step was made yet"
    _averager: Averager | Bank | None = None
    _pass: OnePass | None = None
    _hook: Update | None = None
    _kernel: AdamWCPU | None = None
    _counts: Sequence[int] = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,  # noqa: FBT001, FBT002 - torch's signature
        *,
        averager: Averager | Bank | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if isinstance(params, AttributeHints):
            message = (
                f"polyak.optim.AdamW() got the {type_name(params)} first; the parameters come first: "
                "polyak.optim.AdamW(model.parameters(), averager=averager)"
            )
            raise ArgumentError(message)
        if hasattr(lr, "applied"):
            message = f"lr: got {lr!r}; expected a number. Give an averager by its name: averager=..."
            raise ConfigError(message)
        more: dict[str, Any] = {"foreach": foreach, "capturable": capturable, "differentiable": differentiable}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, fused=fused, **more)
        self._averager = averager
        if averager is not None:
            self._hook = _Otherwise(averager)
            attached(self, self._hook)
            self._pass = OnePass(averager) if isinstance(averager, Engine) else None

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step, then the update that is due; in one pass both or neither.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The loss that the closure returned, if any.
        """
        self.one_pass = False
        if torch.compiler.is_compiling():
            self._why = "the step is compiled"
            return _torchs(self, closure)  # without more ado: it is for the compiler to fuse
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._why = of_averager(self._averager) or of_optimizer(self) or self._together()
        self.one_pass = not self._why
        if not self.one_pass:
            self._apart()
        return loss

    def describe(self) -> str:
        """Return in words how the last step was made."""
        if self.one_pass:
            return "AdamW and the average in one pass"
        return f"torch's AdamW{', then averager.update()' if self._averager is not None else ''}: {self._why}"

    @property
    def averager(self) -> Averager | Bank | None:
        """The averager that it updates; another one needs another optimiser."""
        return self._averager

    def _apart(self) -> None:
        # Torch's fused kernel takes gradients for laid out as their parameters are, which is not checked here.
        opened = [group for group in self.param_groups if is_open(group) and alike(group["params"], self.state)]
        try:
            for group in opened:
                group["fused"] = True
            _torchs(self)
        finally:
            for group in opened:
                group["fused"] = None

    def _together(self) -> str:
        one = self._pass
        if one is None or makes_state(self):
            return "it only makes the state"
        if self._hook is not None and not self._hook.alone:
            return "other optimisers make the update together with it"
        with Untracked():
            kernel, grads = self._bound()
        hypers = [_hyper(group, count) for group, count in zip(self.param_groups, self._counts, strict=True)]
        return one.make(kernel, grads, hypers, float(self.param_groups[0]["lr"]))

    def _bound(self) -> tuple[AdamWCPU, list[Tensor]]:
        """Return the kernel for the parameters that have gradients; the last step's where nothing changed."""
        members = [[param for param in group["params"] if param.grad is not None] for group in self.param_groups]
        params = [param for group in members for param in group]
        self._counts = [*map(len, members)]
        if self._kernel is None or not (self._knows(self._kernel, params) and self._kernel.current()):
            self._kernel = AdamWCPU(*self._states())
        return self._kernel, [param.grad for param in params]

    def _knows(self, kernel: AdamWCPU, params: list[Tensor]) -> bool:
        if len(params) != len(kernel.params) or not all(map(is_, params, kernel.params)):
            return False
        states = [*map(self.state.__getitem__, params)]
        parts = {"exp_avg": kernel.firsts, "exp_avg_sq": kernel.seconds, "step": kernel.steps}
        try:
            return all(all(map(is_, map(itemgetter(name), states), part)) for name, part in parts.items())
        except KeyError:  # the states were emptied
            return False

    def _states(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Return parameters, both moments and counters of all that have gradients, made where there are none yet."""
        lists: dict[str, Any] = {name: [] for name in _LISTS}
        if "amsgrad" in inspect.signature(self._init_group).parameters:  # until torch 2.6
            lists["amsgrad"] = False
        held = {id(param) for param, state in self.state.items() if state}
        try:
            for group in self.param_groups:
                self._init_group(group, **lists)  # type: ignore[no-untyped-call]  # torch's own, which makes the states
        except BaseException:
            # Ctrl-C between the parts of a state would leave it without the rest.
            for param in [p for p, state in self.state.items() if "exp_avg_sq" not in state and id(p) not in held]:
                del self.state[param]
            raise
        return lists["params_with_grad"], lists["exp_avgs"], lists["exp_avg_sqs"], lists["state_steps"]


class _Otherwise(Update):
    """The hook behind a step: updates the averager where the step did not."""

    @override
    def order(self, optimizer: Optimizer) -> None:
        """Leave the hooks in their order: one pass is before all of them."""

    @override
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(optimizer, AdamW) and optimizer.one_pass:
            self.note()
        else:
            super().__call__(optimizer, args, kwargs)


def _hyper(group: dict[str, Any], parameters: int) -> Hyper:
    betas = float(group["betas"][0]), float(group["betas"][1])
    return Hyper(parameters, float(group["lr"]), betas, group["eps"], group["weight_decay"], group["maximize"])


def _torchs(optimizer: AdamW, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - what the closure returns
    """Make a step as torch does, without the hooks that torch puts around it once an optimiser of its own was made."""
    step = inspect.unwrap(torch.optim.AdamW.step, stop=lambda function: not getattr(function, "hooked", False))
    return step(optimizer, closure)
