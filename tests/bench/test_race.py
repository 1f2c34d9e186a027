"""How samples are taken and compared: every round has everybody, and ratios are made within a round."""

from __future__ import annotations

import pytest
import torch

from polyak.bench.race import LEAST, MOST, Samples, orders, race

CPU = torch.device("cpu")


def samples(**times: list[float]) -> Samples:
    made = Samples(times)
    for name, each in times.items():
        for time in each:
            made.add(name, time)
    return made


def test_every_round_has_every_name_once_in_an_order_of_its_own():
    names = list("abcdefgh")

    rounds = orders(names, 20)

    assert all(sorted(order) == names for order in rounds)
    assert len({tuple(order) for order in rounds}) > 15
    assert rounds == orders(names, 20)
    assert rounds != orders(names, 20, seed=1)


def test_a_race_calls_everybody_equally_often_and_something_before_each_round():
    calls: dict[str, int] = {"a": 0, "b": 0, "before": 0}

    def counting(name):
        def call():
            calls[name] += 1

        return call

    found = race({name: counting(name) for name in "ab"}, 0.0, CPU, "", counting("before"))

    assert calls["a"] == calls["b"] == calls["before"] == LEAST + 1
    assert [len(times) for times in found.times.values()] == [LEAST, LEAST]
    assert all(time >= 0 for time in found.times["a"])


def test_a_race_ends_after_so_many_rounds_however_much_time_there_is():
    assert len(race({"a": lambda: None}, 1e9, CPU, "").times["a"]) == MOST


def test_ratios_are_made_within_rounds():
    slow_rounds = samples(a=[1.0, 100.0, 1.0, 10.0, 1.0], b=[2.0, 200.0, 2.0, 20.0, 2.0])

    assert slow_rounds.ratios("a", "b") == [0.5] * 5


def test_disturbed_rounds_are_left_out_where_the_others_are_enough():
    made = Samples("ab")
    for number in range(2 * LEAST):
        made.add("a", 9.0 if number % 2 else 1.0, waited=8.0 if number % 2 else 0.0)
        made.add("b", 1.0)

    assert made.ratios("a", "b") == [1.0] * LEAST
    assert made.of("a") == [1.0] * LEAST
    assert made.disturbed("a") == 0.5


def test_disturbed_rounds_count_where_there_are_no_others():
    made = Samples("a")
    for _ in range(LEAST):
        made.add("a", 9.0, waited=8.0)

    assert made.of("a") == [9.0] * LEAST


def test_the_fastest_is_the_one_with_the_smallest_median():
    assert samples(a=[1.0, 9.0, 9.0], b=[2.0, 2.0, 2.0]).fastest(["a", "b"]) == "b"


def test_the_garbage_collector_is_on_again_after_a_call_that_raises():
    import gc

    with pytest.raises(ZeroDivisionError):
        race({"a": lambda: 1 / 0}, 0.0, CPU, "")
    assert gc.isenabled()
