"""What is a failure of the ranks' talk, and what is none."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn

import polyak
from polyak.ranks.unresponsive import answered


@pytest.fixture
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class WrongError(RuntimeError):
    """A user's own."""


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the metric needs the nccl backend, not gloo"),
        WrongError("[/third_party/gloo/transport/tcp/pair.cc:1] Connection closed by peer"),
        ValueError("gloo"),
    ],
    ids=str,
)
def test_an_error_of_a_users_own_is_raised_as_it_is(error):
    with pytest.raises(type(error)) as caught, answered("do this"):
        raise error
    assert caught.value is error


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(
    "told",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41",
        "Application timeout caused pair closure",
    ],
)
def test_what_gloo_says_is_told_with_who_answered(told):
    message = r"rank 0 could not do this: all ranks answered: one did not take part.* Try\.\n\(torch: "
    with pytest.raises(polyak.DistributedError, match=message), answered("do this", "Try."):
        raise RuntimeError(told)


@pytest.mark.parametrize(
    "act",
    [
        polyak.distributed.verify_in_sync,
        polyak.distributed.broadcast,
        lambda averager: polyak.distributed.save(averager, "average"),
        lambda averager: polyak.distributed.load(averager, "average"),
    ],
)
def test_processes_without_a_group_are_refused(act, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    averager = polyak.average(nn.Linear(2, 1), "ema")
    with pytest.raises(polyak.DistributedError, match=r"2 processes were started.*init_process_group\(\) first"):
        act(averager)
    assert not [*tmp_path.iterdir()]
