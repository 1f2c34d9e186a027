"""Configs of every strategy and option."""

from __future__ import annotations

from typing import Literal

import pytest

import polyak

SUFFIXES = ["toml", "yaml", "yml", "json"]


# Beside the defaults: something else in every setting and option that there is.
OTHER = {
    "ema": {"decay": 0.5},
    "ema_debiased": {"decay": 1e-7},
    "ema_v1": {"decay": 0.0},
    "ema_v2": {"decay": 0.9999999},
    "ema_v3": {
        "decay": 0.9, "min_decay": 0.1, "update_after_step": 7, "use_warmup": True, "warmup_gamma": 2.5,
        "warmup_power": 0.75, "foreach": False, "exclude_buffers": True,
    },
    "swa": {},
    "ema_halflife": {"halflife": 1.5, "unit": "samples", "batch_size": 3},
    "ema_tf": {"decay": 0.9, "follow": 1},
    "polynomial": {"eta": 1e-9},
    "power": {"gamma": 3.25},
    "tail": {"fraction": 0.1, "total_steps": 1000},
    "lawa": {"window": 3},
    "dema": {"decay": 1e-7},
    "block_mean": {"length": 7},
    "byol": {"decay": 0.99, "steps": 3},
    "lr_weighted": {"power": 1.5},
}  # fmt: skip


NEEDED = {"ema_halflife": {"halflife": 300}, "block_mean": {"length": 5}}  # settings without a default


OPTIONS = {
    "start": 100,
    "every": 10,
    "origin": "first",
    "buffers": {"*.running_*": "copy", "norm.*": "skip"},
    "include": ["*"],
    "exclude": ["head.*", "émbedding.*"],
    "match": "order",
    "device": "cpu",
    "dtype": "float64",
    "nonfinite": "raise",
    "kernel": "loop",
}


CONFIGS = [
    pytest.param({"strategy": {"name": name, **settings}, **options}, id=f"{name}-{len(settings)}-{len(options)}")
    for name in polyak.strategies()
    for settings, options in ((NEEDED.get(name, {}), {}), (OTHER.get(name, {}), OPTIONS))
]


REFUSED = [
    ({"strategy": {"name": "ema", "decay": 1.0}}, r"strategy\.decay: Input should be less than 1 \(got 1\.0\)"),
    ({"strategy": {"name": "ema", "decay": -0.1}}, r"strategy\.decay: .* greater than or equal to 0 \(got -0\.1\)"),
    (
        {"strategy": {"name": "ema", "decay": "much"}},
        r"strategy\.decay: Input should be a valid number.* \(got 'm",
    ),
    (
        {"strategy": {"name": "ema", "decya": 0.5}},
        r"strategy\.decya: there is no such setting \(got 0\.5\)\. Did you mean 'decay'\? Known: decay, name\.",
    ),
    ({"strategy": {"name": "ema", "evry": 5}}, r"strategy\.evry: there is no .* Did you mean 'every'\?"),
    (
        {"evry": 5},
        r"evry: there is no such setting \(got 5\)\. Did you mean 'every'\? Known: buffers, capturable, device, ",
    ),
    (
        {"strategy": "ema", "decay": 0.5},
        r"decay: there is no such setting \(got 0\.5\)\. It is a setting of the strategy: .* inside 'strategy'",
    ),
    ({"strategy": {"decay": 0.5}}, r"strategy: a strategy is a name, a mapping .* got \{'decay': 0\.5\}"),
    ({"strategy": {"name": 3}}, r"strategy: a strategy is a name, .* got \{'name': 3\}"),
    ({"strategy": 3}, r"strategy: a strategy is a name, .* got 3"),
    ({"every": 0}, r"every: Input should be greater than 0 \(got 0\)"),
    ({"start": -1}, r"start: .* greater than or equal to 0 \(got -1\)"),
    ({"origin": "inital"}, r"origin: Input should be 'initial' or 'first' \(got 'inital'\)\. Did you mean 'initial'\?"),
    ({"kernel": "faster"}, r"kernel: Input should be 'auto', 'loop', 'foreach' or 'fused' \(got 'faster'\)"),
    ({"buffers": {"*": "avrage"}}, r"buffers\.\*: .* \(got 'avrage'\)\. Did you mean 'average'\?"),
    ({"dtype": "float3"}, r"dtype: got 'float3'; expected .*'float32'"),
    ({"device": "gpu"}, r"device: got 'gpu'; expected .* 'cuda:0'"),
    ({"exclude": ["a", 3]}, r"exclude\.1: Input should be a valid string \(got 3\)"),
    ({"strategy": "emma"}, r"strategy: no strategy is called 'emma'\. Did you mean 'ema'\? Known: ema, "),
]


class Limited(polyak.Strategy):
    name: Literal["limited"] = "limited"
    limit: float = 10.0

    def rate(self, clock):
        return 1 / min(clock.n, self.limit)
