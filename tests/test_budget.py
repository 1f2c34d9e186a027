"""What an average will cost, on paper: against figures worked out by hand."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from typer.testing import CliRunner

import polyak
from polyak.cli import app
from polyak.planning.budget import Hardware, Job, budget

SEVENTY = Job(70e9, ranks=64)
SHARD = 70e9 / 64
PAGE = Path(__file__).resolve().parents[1] / "docs" / "at-scale.md"
SHOWN = re.findall(r"^\$ polyak (plan .*)\n([^`]*)```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_a_float32_average_of_seventy_billion_on_64_ranks():
    cost = budget(SEVENTY, checked=False)
    assert cost.averages == 4 * SHARD  # 4.07 GiB
    assert cost.moved == 3 * 4 * SHARD  # read the weights, read and write the average: 12.2 GiB
    assert cost.seconds == pytest.approx(13.125e9 / 3.35e12)  # 3.9 ms on an H100
    assert (cost.sent, cost.staging, cost.on_node, cost.on_host) == (0, 0, 0, 0)
    assert cost.exchange == 26.25e9
    assert cost.aside == 0
    assert cost.saved == 280e9
    assert cost.gathered == 280e9


def test_the_check_for_nan_reads_the_weights_once_more():
    assert budget(SEVENTY, checked=True).moved == 4 * 4 * SHARD
    assert budget(SEVENTY).moved == 3 * 4 * SHARD


def test_short_averages_are_shorter():
    cost = budget(SEVENTY, dtype="bfloat16", checked=False)
    assert cost.averages == 2 * SHARD
    assert cost.moved == (4 + 2 * 2) * SHARD  # 8.8 GB
    assert cost.exchange == (8 + 2 + 4) * SHARD  # the weights are cloned and overwritten by the average
    assert cost.aside == 4 * SHARD  # which cannot hold them meanwhile
    assert cost.saved == 140e9


def test_an_average_on_the_host_costs_the_link_and_the_hosts_memory():
    cost = budget(SEVENTY, device="cpu", checked=False)
    assert cost.sent == cost.moved == cost.staging == 4 * SHARD
    assert cost.on_host == (4 + 12) * SHARD  # staged, then read, and the average read and written
    assert cost.on_node == 8 * 8 * SHARD
    assert cost.seconds == pytest.approx(4.375e9 / 25e9 + 8 * 17.5e9 / 300e9)


def test_a_bank_reads_the_weights_once():
    one, eight = budget(SEVENTY, checked=False), budget(SEVENTY, averages=8, checked=False)
    assert eight.averages == 8 * one.averages
    assert eight.moved == (1 + 2 * 8) * 4 * SHARD


def test_ddp_keeps_all_on_each_rank_and_hsdp_a_shard_of_each_replica():
    assert budget(Job(7e9, ranks=8, replicas=8)).elements == 7e9
    assert budget(Job(7e9, ranks=8, replicas=2)).elements == 7e9 / 4


def test_the_share_of_a_step_that_is_sent_depends_on_the_tokens_alone():
    # 4 F / (6 T B): bytes over the link against operations, whatever the size and the ranks.
    fast_host = Hardware(host=1e30)
    for params, ranks in ((7e9, 8), (70e9, 64), (1e12, 2048)):
        cost = budget(Job(params, ranks=ranks, tokens=262144), fast_host, device="cpu", checked=False)
        assert cost.seconds / cost.step == pytest.approx(4 * 400e12 / (6 * 262144 * 25e9))  # 4.1 %


@given(st.floats(1e6, 1e13), st.integers(1, 4096), st.floats(1e-3, 100), st.floats(1e-4, 0.5))
def test_every_keeps_an_update_under_its_share_and_no_longer_than_it_must(params, ranks, step, share):
    cost = budget(Job(params, ranks=ranks, step=step))
    every = cost.every(share)
    assert cost.seconds / every <= share * step * (1 + 1e-12)
    assert every == 1 or cost.seconds / (every - 1) > share * step * (1 - 1e-12)


def test_without_a_step_there_is_no_share_of_it():
    assert budget(SEVENTY).every(0.01) is None


@pytest.mark.parametrize(
    ("job", "options", "says"),
    [
        (Job(0), {}, "params: got 0; expected a positive number"),
        (Job(math.nan), {}, "params: got nan"),
        (Job(1e9, ranks=-1), {}, "ranks: got -1"),
        (Job(1e9, ranks=8, replicas=3), {}, "replicas: got 3 for 8 ranks; expected a divisor"),
        (Job(1e9, weights="int8"), {}, "weights: got 'int8'; expected float64, float32, bfloat16, float16"),
        (Job(1e9), {"dtype": "half"}, "dtype: got 'half'"),
        (Job(1e9), {"device": "tpu"}, "device: got 'tpu'; expected 'cuda'"),
        (Job(1e9), {"averages": 0}, "averages: got 0"),
        (Job(1e9, step=-1.0), {}, "step: got -1.0"),
        (Job(np.float32(-1)), {}, "params: got np.float32(-1.0)"),
        (Job(torch.tensor(math.inf)), {}, "params: got <Tensor>"),
        (Job("7B"), {}, "params: got '7B'; expected a positive number"),
        (Job(None), {}, "params: got None"),
        (Job(True), {}, "params: got True"),
        (Job(1e300), {}, "params: got 1e+300; expected a positive number, from 1e-30 to 1e+30"),
        (Job(7e9, step=1e-320), {}, "step: got 1e-320; expected a positive number"),
        (Job(1e9, ranks=2.5), {}, "ranks: got 2.5; expected an integer from 1"),
        (Job(1e9, ranks="8"), {}, "ranks: got '8'; expected an integer from 1"),
        (Job(1e9, weights=["float32"]), {}, "weights: got ['float32']"),
        (Job(1e9), {"averages": np.array(True)}, "averages: got <ndarray>"),
        (Job(1e9), {"device": ["cpu"]}, "device: got ['cpu']"),
        (Job(1e9), {"hardware": Hardware(node=0)}, "node: got 0; expected an integer from 1"),
        (Job(1e9), {"hardware": Hardware(memory="fast")}, "memory: got 'fast'"),
        (
            Job(1e9),
            {"hardware": 3e12},
            "got 3000000000000.0 as the hardware; expected polyak.planning.budget.Hardware(memory=...)",
        ),
        (70e9, {}, "got 70000000000.0 as the job; expected polyak.planning.budget.Job(params=...)"),
    ],
)
def test_wrong_numbers_are_refused(job, options, says):
    with pytest.raises(polyak.ConfigError, match=re.escape(says)):
        budget(job, **options)


def test_the_smallest_and_largest_numbers_give_finite_ones():
    numbers = {"memory": 1e-30, "link": 1e-30, "host": 1e-30, "flops": 1e30}
    for device in ("cpu", "cuda"):
        cost = budget(Job(1e30, tokens=1e-30), Hardware(**numbers), device=device, averages=2**63 - 1)
        assert all(math.isfinite(value) for value in vars(cost).values())
        assert cost.every(1e-30) > 1


@pytest.mark.parametrize("share", [0, -0.1, 1e-320, math.nan, "1%", None])
def test_a_share_of_the_time_that_is_none_is_refused(share):
    with pytest.raises(polyak.ConfigError, match=r"share: got .*; expected a positive number"):
        budget(Job(1e9, step=1.0)).every(share)


def test_numbers_of_numpy_and_torch_give_what_plain_ones_do():
    plain = budget(Job(1e9, ranks=8, step=0.5), Hardware(node=4), averages=2)
    other = budget(
        Job(torch.tensor(1e9), ranks=np.int32(8), weights=torch.float32, step=np.array(0.5)),
        Hardware(node=np.uint8(4)),
        averages=torch.tensor(2),
        dtype=torch.float32,
    )
    assert other == plain
    assert {type(value) for value in vars(other).values()} == {float}


def test_the_command_prints_the_figures_and_the_cadence():
    result = CliRunner().invoke(app, ["plan", "--params", "70e9", "--ranks", "64", "--tokens", "262144"])
    assert result.exit_code == 0
    lines = {line.split("  ")[0]: line for line in result.output.splitlines()}
    assert "4.1 GiB" in lines["averages"]
    assert "12.2 GiB" in lines["accelerator traffic"]
    assert "3.92 ms" in lines["update"]
    assert "every=1 keeps it under 0.1%." in result.output


@pytest.mark.parametrize(("short", "long"), [("70B", "70e9"), ("124m", "124e6"), ("1.5T", "1.5e12"), ("8k", "8000")])
def test_numbers_may_be_written_short(short, long):
    said = [CliRunner().invoke(app, ["plan", "--params", params, "--tokens", "1M"]).output for params in (short, long)]
    assert said[0] == said[1]
    assert "checkpoint" in said[0]


def test_a_number_that_is_none_is_refused_with_what_is_one():
    result = CliRunner().invoke(app, ["plan", "--params", "7X"])
    assert result.exit_code == 2
    assert "got '7X'; expected a number, such as 70e9 or" in result.stderr


def test_the_command_answers_a_wrong_number_in_one_line():
    result = CliRunner().invoke(app, ["plan", "--params", "7e9", "--ranks", "8", "--replicas", "3"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["polyak: replicas: got 3 for 8 ranks; expected a divisor (1: all sharded)"]


def test_the_page_goes_through_three_sizes():
    sizes = {re.search(r"--params (\S+) --ranks (\S+)", command).groups() for command, _ in SHOWN}
    assert sizes == {("7e9", "8"), ("70e9", "64"), ("1e12", "2048")}


@pytest.mark.parametrize(("command", "printed"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_commands_of_the_page_print_what_it_shows(command, printed):
    assert CliRunner().invoke(app, shlex.split(command)).output == printed
