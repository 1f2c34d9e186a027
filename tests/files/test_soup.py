"""`polyak.files.soup`: the greedy and the uniform soup, and a journal that survives an interruption."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch

from polyak import files
from polyak.errors import ConfigError

VALUES = (3.0, 1.0, -2.0, 9.0, -1.0)


@pytest.fixture
def five(tmp_path):
    paths = [tmp_path / f"{i}.pt" for i in range(len(VALUES))]
    for value, path in zip(VALUES, paths, strict=True):
        torch.save({"w": torch.tensor([value]), "n": torch.tensor(7)}, path)
    return paths


def distance(state):
    return abs(state["w"].item() - 0.2)


def by_hand(values, score, rule="strict"):
    """Return the numbers that a greedy soup keeps, smaller scores being better."""
    order = sorted(range(len(values)), key=lambda i: score([values[i]]))
    kept = order[:1]
    for i in order[1:]:
        new, old = (score([values[j] for j in some]) for some in ([*kept, i], kept))
        if new < old or (rule == "not_worse" and new == old):
            kept.append(i)
    return kept


@pytest.mark.parametrize("rule", ["strict", "not_worse"])
def test_the_greedy_soup_is_that_of_the_paper(rule, five, tmp_path):
    made = files.soup(five, distance, mode="min", rule=rule, work=tmp_path / "work", out=tmp_path / "o.pt")
    kept = by_hand(VALUES, lambda values: abs(sum(values) / len(values) - 0.2), rule)
    assert [file.name for file in made.kept] == [f"{i}.pt" for i in kept]
    assert made.evaluations == 2 * len(VALUES) - 1
    assert torch.load(made.out)["w"].item() == pytest.approx(sum(VALUES[i] for i in kept) / len(kept))
    assert made.score == distance(torch.load(made.out))
    assert made.gain >= 0
    assert [one.score for one in made.ingredients] == sorted(abs(value - 0.2) for value in VALUES)


def test_what_leaves_the_score_is_kept_by_the_other_rule(tmp_path):
    for i in range(3):
        torch.save({"w": torch.tensor([float(i)])}, tmp_path / f"{i}.pt")
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for rule, count in (("strict", 1), ("not_worse", 3)):
        made = files.soup(paths, lambda _: 1.0, rule=rule, work=tmp_path / rule, out=tmp_path / f"{rule}.pt")
        assert len(made.kept) == count


def test_the_uniform_soup_keeps_all(five, tmp_path):
    made = files.soup(five, distance, how="uniform", mode="min", work=tmp_path / "work", out=tmp_path / "o.pt")
    assert len(made.kept) == len(VALUES)
    assert torch.load(made.out)["w"].item() == pytest.approx(2.0)
    assert made.score == pytest.approx(1.8)
    assert made.gain < 0


def test_a_file_whose_score_is_nan_is_left_out(five, tmp_path):
    def score(state):
        return math.nan if state["w"].item() == 9.0 else -distance(state)

    made = files.soup(five, score, work=tmp_path / "work", out=tmp_path / "o.pt")
    assert five[3] not in made.kept
    assert made.ingredients[-1].file == five[3]
    with pytest.raises(ConfigError, match="no finite number for any"):
        files.soup(five, lambda _: math.nan, work=tmp_path / "other", out=tmp_path / "o2.pt")


def test_nothing_is_evaluated_twice(five, tmp_path):
    seen = []

    def score(state):
        seen.append(state["w"].item())
        if len(seen) == 7:
            raise KeyboardInterrupt
        return -distance(state)

    options = {"work": tmp_path / "work", "out": tmp_path / "o.pt"}
    with pytest.raises(KeyboardInterrupt):
        files.soup(five, score, **options)
    assert not (tmp_path / "o.pt").exists()
    made = files.soup(five, score, **options)
    assert len(seen) == 1 + 2 * len(VALUES) - 1  # the one that was interrupted comes again
    assert made.evaluations == 3
    assert files.soup(five, score, **options).evaluations == 0
    # In another order, under other names: the contents count.
    for path in five:
        path.rename(path.with_stem(f"renamed{path.stem}"))
    again = [path.with_stem(f"renamed{path.stem}") for path in five[::-1]]
    assert files.soup(again, score, **options).evaluations == 0


def test_another_function_or_file_is_evaluated(five, tmp_path):
    options = {"mode": "min", "work": tmp_path / "work", "out": tmp_path / "o.pt"}
    files.soup(five, distance, **options)
    assert files.soup(five, lambda state: distance(state) * 2, **options).evaluations == 9
    torch.save({"w": torch.tensor([5.0]), "n": torch.tensor(7)}, five[3])
    assert 0 < files.soup(five, distance, **options).evaluations <= 5


def test_a_journal_that_was_cut_off_is_read_up_to_there(five, tmp_path):
    options = {"mode": "min", "work": tmp_path / "work", "out": tmp_path / "o.pt"}
    whole = files.soup(five, distance, **options)
    (journal,) = (tmp_path / "work").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    again = files.soup(five, distance, **options)
    assert again.evaluations == 5
    assert again.kept == whole.kept
    assert files.soup(five, distance, **options).evaluations == 0


SCRIPT = """
import sys, time
from pathlib import Path
from polyak import files

def score(state):
    with open("calls", "a") as calls:
        calls.write("x")
    time.sleep(0.15)
    return -abs(state["w"].item() - 0.2)

files.soup(sorted(Path(".").glob("?.pt")), score, work="work", out="o.pt")
"""


def test_a_run_that_is_killed_goes_on(five, tmp_path):
    (tmp_path / "cook.py").write_text(SCRIPT)
    started = subprocess.Popen([sys.executable, "cook.py"], cwd=tmp_path)
    journal = tmp_path / "work" / "evaluations.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (tmp_path / "o.pt").exists()
    subprocess.run([sys.executable, "cook.py"], cwd=tmp_path, check=True)
    calls = len((tmp_path / "calls").read_text())
    assert 2 * len(VALUES) - 1 <= calls <= 2 * len(VALUES)  # at most the one that was killed comes again
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(keys) == len({*keys}) == 2 * len(VALUES) - 1


def test_the_table_the_picture_and_the_metadata(five, tmp_path):
    pytest.importorskip("matplotlib")
    made = files.soup(five, distance, mode="min", work=tmp_path / "work", out=tmp_path / "o.safetensors")
    lines = made.table().splitlines()
    assert lines[0].split() == ["file", "alone", "soup", "kept"]
    assert len(lines) == 6
    ax = made.plot(label="distance")
    assert ax.get_ylabel() == "distance"
    with files.open(made.out) as checkpoint:
        kind, about = checkpoint.made
        assert checkpoint.read("n") == 7
    assert kind == "polyak_soup"
    assert len(about["tried"]) == 5
    assert len(about["inputs"]) == len(made.kept)


def test_mistakes(five, tmp_path):
    options = {"work": tmp_path / "work", "out": tmp_path / "o.pt"}
    for wrong in ({"how": "all"}, {"rule": "better"}, {"mode": "most"}, {"out": five[0]}):
        with pytest.raises(ConfigError):
            files.soup(five, distance, **{**options, **wrong})
    with pytest.raises(ConfigError, match="expected a function"):
        files.soup(five, "distance", **options)
    with pytest.raises(ConfigError, match="expected a finite number"):
        files.soup(five, lambda _: "good", **options)
