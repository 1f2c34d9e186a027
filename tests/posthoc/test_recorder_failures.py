"""What a recorder refuses, and what it survives: damaged states, full disks, dead processes."""

from __future__ import annotations

import pytest
import torch

import polyak
from models import mlp
from polyak import ConfigError, SnapshotError, StateError
from polyak.posthoc import Recorder, Store
from posthoc.runs import counted
from recording import assert_exact, files, fresh, run_of, series, steps_of

REFUSED = [
    ({"every": 0}, "every: got 0"),
    ({"every": 2.5}, "every: got 2.5"),
    ({"every": 5, "keep": 0}, "keep: got 0"),
    ({"every": 5, "blocks": 3}, "blocks: got 3"),
    ({"every": 5, "dtype": "int8"}, "int8"),
    ({"every": 5, "dtype": "float3"}, "float3"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_settings_are_refused_before_anything_is_made(tmp_path, settings, message):
    _, averager = fresh()
    with pytest.raises(ConfigError, match=message):
        Recorder(averager, tmp_path / "never", **settings)
    assert not (tmp_path / "never").exists()
    assert not averager.updater.listeners


def test_what_cannot_be_followed_is_refused_before_anything_is_made(tmp_path):
    model = mlp()
    never = tmp_path / "never"
    with pytest.raises(ConfigError, match="got <Sequential>"):
        Recorder(model, never, every=5)
    captured = polyak.average(model, capturable=True, nonfinite="propagate")
    with pytest.raises(ConfigError, match="captured graph"):
        Recorder(captured, never, every=5)
    bank = polyak.bank(model, {"all": "ema", "some": {"name": "ema", "exclude": "0.*"}})
    with pytest.raises(ConfigError, match="'some' averages other tensors than 'all'"):
        Recorder(bank, never, every=5)
    import pickle

    with pytest.raises(polyak.UnboundError, match="no model"):
        Recorder(pickle.loads(pickle.dumps(polyak.average(model))), never, every=5)
    for name in ("blocks", "start"):
        with pytest.raises(ConfigError, match=f"the names \\['{name}'\\]"):
            Recorder(polyak.bank(model, {name: "ema"}), never, every=5)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="cannot be made"):
        Recorder(polyak.average(model), tmp_path / "file", every=5)
    assert not never.exists()


def test_a_state_of_something_else_is_refused(tmp_path):
    _, averager = fresh()
    with_blocks, without = (Recorder(averager, tmp_path, every=5, blocks=blocks) for blocks in (True, False))
    for wrong in ({}, None, averager.state_dict()):
        with pytest.raises(StateError, match=r"Recorder\.state_dict\(\) returned; got (the keys|NoneType)"):
            with_blocks.load_state_dict(wrong)
    with pytest.raises(StateError, match="another setting of blocks="):
        with_blocks.load_state_dict(without.state_dict())


@pytest.mark.parametrize("steps", [None, [1], {"average": "x"}, {5: 1}, {"average": True}], ids=str)
@pytest.mark.parametrize("part", ["seen", "written"])
def test_a_damaged_state_of_a_recorder_is_refused_whole(tmp_path, part, steps):
    model, averager = fresh(decay=0.9)
    with Recorder(averager, tmp_path / "run", every=5) as recorder:
        run_of(model, averager, range(1, 4))
        state, other = recorder.state_dict(), polyak.average(model, "ema", decay=0.9)
        with Recorder(other, tmp_path / "other", every=5) as later:
            before = later.state_dict()
            with pytest.raises(StateError, match="expected what Recorder"):
                later.load_state_dict({**state, part: steps})
            assert later.state_dict()["blocks"]["n"] == before["blocks"]["n"] == 0


def test_a_state_is_tensors_and_plain_types(tmp_path):
    import io

    model, averager = fresh()
    recorder = Recorder(averager, tmp_path, every=5)
    run_of(model, averager, range(1, 8))
    file = io.BytesIO()
    torch.save(recorder.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    recorder.load_state_dict(state)
    run_of(model, averager, range(8, 11))
    recorder.close()
    assert_exact(tmp_path)
    assert steps_of(tmp_path, "blocks") == [5, 10]


def test_halves_that_a_dead_process_left_are_cleared_away_and_other_files_are_not(tmp_path):
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / ".average-000000000010.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / ".unfinished" / ".tmpAbCdEf").write_bytes(b"half")
    (tmp_path / ".tmpAbCdEf").write_text("another process's")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden.tmp").write_text("mine")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "someone.safetensors")
    counted(tmp_path, 10)
    assert {"notes.txt", ".hidden.tmp", "someone.safetensors", ".tmpAbCdEf"} < {*files(tmp_path)}
    assert not (tmp_path / ".unfinished").exists()
    assert len(Store(tmp_path).snapshots) == 3


def test_a_snapshot_that_cannot_be_written_stops_neither_the_average_nor_the_next_ones(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    model, averager = fresh(decay=0.9)
    alone = polyak.average(model, "ema", decay=0.9)
    failed = {}
    with Recorder(averager, folder, every=5):
        for step in range(1, 31):
            if step == 8:
                folder.rename(away)
            if step == 17:
                away.rename(folder)
            model["w"].fill_(step)
            alone.update()
            try:
                averager.update()
            except SnapshotError as error:
                failed[step] = error
    assert all(isinstance(error, OSError) for error in failed.values())
    assert all("The average is whole and training can continue" in str(error) for error in failed.values())
    assert {step for step in failed if step % 5 == 0} == {10, 15}
    assert torch.equal(averager.averages["w"], alone.averages["w"])
    assert averager.n == 30
    assert {5, 20, 25, 30} <= {*steps_of(folder, "average")}
    assert_exact(folder)
    taken = [step for snapshot in series(folder, "blocks") for step in snapshot.profile.steps.tolist()]
    assert taken == list(range(1, 31))


def test_the_start_that_could_not_be_written_at_first_comes_later(tmp_path):
    folder = tmp_path / "run"
    model, averager = fresh(decay=0.9)
    with Recorder(averager, folder, every=5):
        folder.rmdir()
        with pytest.raises(SnapshotError, match="cannot be written to: No such file"):
            run_of(model, averager, [1])
        folder.mkdir()
        run_of(model, averager, range(2, 11))
    assert steps_of(folder, "start") == [0]
    assert_exact(folder)


def test_at_the_end_one_series_that_cannot_be_written_does_not_keep_the_others_from_it(tmp_path):
    model, bank = {"w": torch.zeros(1)}, None
    bank = polyak.bank(model, {"a": "swa", "b": "ema", "c": "ema"})
    recorder = Recorder(bank, tmp_path, every=10)
    for _ in range(15):
        bank.update()
    (tmp_path / "b-000000000015.safetensors").mkdir()
    with pytest.raises(SnapshotError, match="b-0"):
        recorder.close()
    (tmp_path / "b-000000000015.safetensors").rmdir()
    assert {snapshot.average for snapshot in Store(tmp_path).snapshots if snapshot.step == 15} == {"a", "c", "blocks"}
    recorder.close()
    assert {s.average for s in Store(tmp_path).snapshots if s.step == 15} == {"a", "b", "c", "blocks"}
