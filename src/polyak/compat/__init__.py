"""Classes of other libraries over polyak's engine: change one import line of a script.

``polyak.compat.torch``, ``timm``, ``torch_ema``, ``diffusers``, ``ema_pytorch``, ``ignite`` and ``lightning`` have the
classes of these libraries under their names, with their arguments, attributes and state dicts.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["STAND_INS", "StandIn"]


class StandIn(NamedTuple):
    """What stands in for what.

    Attributes:
        module: The module below ``polyak.compat``.
        names: The names that it has.
        library: The distribution whose they are.
        version: The release that it was compared with.
        differs: What differs on purpose.
    """

    module: str
    names: tuple[str, ...]
    library: str
    version: str
    differs: str


_HOLD = "NaN is held, not let in"

STAND_INS = (
    StandIn(
        "torch", ("AveragedModel",), "torch", "2.15.0",
        f"{_HOLD}; another model is refused; tied weights move once; avg_fn must be affine; bf16 is rounded at random",
    ),
    StandIn(
        "timm", ("ModelEmaV3", "ModelEmaV2", "ModelEma"), "timm", "1.0.31",
        f"{_HOLD}; tied weights move once; V1 and V2 copy integers; float16 is rounded at random, too",
    ),
    StandIn(
        "torch_ema", ("ExponentialMovingAverage",), "torch-ema", "0.3",
        f"{_HOLD}; shapes are checked; integers are copied",
    ),
    StandIn("diffusers", ("EMAModel",), "diffusers", "0.42.1", f"{_HOLD}; shapes are checked"),
    StandIn(
        "ema_pytorch", ("EMA",), "ema-pytorch", "0.8.3",
        f"{_HOLD}; a model that cannot be copied raises a ModelError and does not end the process",
    ),
    StandIn(
        "ignite", ("EMAHandler",), "pytorch-ignite", "0.5.5",
        f"{_HOLD}; copied buffers are copies; a warm-up writes the momentum under its own name",
    ),
    StandIn(
        "lightning", ("WeightAveraging", "EMAWeightAveraging"), "lightning", "2.6.5",
        f"{_HOLD}; another model is refused; tied weights move once",
    ),
)  # fmt: skip
"""Every class that stands in for another, as ``polyak compat`` lists them."""
