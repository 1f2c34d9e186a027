"""Compilers and their cache: whatever they raise ends in a fresh compilation or in kernels of plain torch."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import polyak
from models import average_bits, drifting, mlp
from polyak.kernels import compiler, rounding
from polyak.kernels.cpu import fused as cpu
from polyak.kernels.select import compiles

numba = pytest.importorskip("numba")
if not compiles("auto"):
    pytest.skip("Numba compiles nothing here", allow_module_level=True)

from polyak.kernels.cpu import cache, loops  # noqa: E402 - after it is known that there is a compiler

DAMAGE = {
    "emptied": lambda content: b"",
    "cut in its head": lambda content: content[:40],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "of other sources, badly": lambda content: content[:33] + bytes([content[33] ^ 1]) + content[34:],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"<html>quota exceeded</html>",
}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Compile a function as another process would; its cache is in ``folder``."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "_WARNED", [])

    def compiled(factor=2):
        def multiplied(x):
            return factor * x

        return cache.jit()(multiplied)

    def files():
        return sorted(path for path in tmp_path.rglob("*") if path.is_file())

    return SimpleNamespace(compiled=compiled, files=files, folder=tmp_path)


def _hits(function):
    return sum(function.stats.cache_hits.values())


def test_what_one_process_compiled_the_next_one_loads(cached):
    first, second = cached.compiled(), cached.compiled()
    assert (first(4), first(0.5)) == (8, 1.0)
    assert (second(4), second(0.5)) == (8, 1.0)
    assert (_hits(first), _hits(second)) == (0, 2)
    assert len(cached.files()) == 2
    assert {path.suffix for path in cached.files()} == {".nbc"}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_compiled_anew_with_one_warning_and_mended(cached, damage):
    assert (cached.compiled()(4), cached.compiled()(0.5)) == (8, 1.0)
    for path in cached.files():
        path.write_bytes(damage(path.read_bytes()))
    second = cached.compiled()
    with pytest.warns(polyak.PolyakWarning, match=r"cache of polyak's kernels .* compiled anew") as caught:
        assert (second(4), second(0.5)) == (8, 1.0)
    assert len(caught) == 1
    third = cached.compiled()
    assert third(4) == 8
    assert _hits(third) == 1


def test_where_warnings_are_errors_a_damaged_file_is_gone_all_the_same(cached):
    assert cached.compiled()(4) == 8
    (path,) = cached.files()
    path.write_bytes(b"")
    with pytest.raises(polyak.PolyakWarning):
        cached.compiled()(4)
    assert cached.files() == []
    assert cached.compiled()(4) == 8


def test_a_whole_file_under_the_name_of_another_is_not_used(cached):
    function = cached.compiled()
    function(4), function(0.5)
    first, second = cached.files()
    shutil.copy(first, second)
    again = cached.compiled()
    with pytest.warns(polyak.PolyakWarning, match="is damaged"):
        assert (again(4), again(0.5)) == (8, 1.0)


@pytest.mark.parametrize("what", ["numba", "llvmlite", "torch's rounding"])
def test_versions_and_processors_do_not_see_each_others_files(cached, monkeypatch, what):
    assert cached.compiled()(4) == 8
    with monkeypatch.context() as other:
        if what == "torch's rounding":
            other.setattr(cache, "rounds_once", lambda: not rounding.rounds_once())
        else:
            other.setattr(getattr(cache, what), "__version__", "0.0")
        changed = cached.compiled()
        assert changed(4) == 8
        assert _hits(changed) == 0
    assert len(cached.files()) == 2
    again = cached.compiled()
    assert again(4) == 8
    assert _hits(again) == 1


def test_other_sources_are_compiled_anew_in_silence_over_the_old_file(cached, monkeypatch):
    assert cached.compiled()(4) == 8
    monkeypatch.setattr(cache, "_sources", lambda: b"2" * 32)
    changed = cached.compiled()
    assert changed(4) == 8
    assert _hits(changed) == 0
    assert len(cached.files()) == 1


@pytest.mark.parametrize("module", ["loops", "adamw_loops"])
def test_a_change_of_any_compiled_loop_makes_other_sources(module, tmp_path, monkeypatch):
    folder = shutil.copytree(Path(cache.__file__).parent, tmp_path / "cpu")
    monkeypatch.setattr(cache.resources, "files", lambda _: folder)
    digest = cache._sources.__wrapped__
    before = digest()
    assert digest() == before
    with (folder / f"{module}.py").open("a") as file:
        file.write("# changed")
    assert digest() != before


def test_what_numba_makes_of_a_whole_file_may_fail(cached, monkeypatch):
    assert cached.compiled()(4) == 8

    def fails(*_):
        message = "LLVM bitcode parsing error"
        raise RuntimeError(message)

    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "rebuild", fails)
    again = cached.compiled()
    with pytest.warns(polyak.PolyakWarning, match="LLVM bitcode parsing error"):
        assert again(4) == 8


def test_a_folder_that_cannot_be_written_costs_the_cache_and_one_warning(cached):
    function = cached.compiled()
    shutil.rmtree(cached.folder)
    cached.folder.write_text("no folder")
    with pytest.warns(polyak.PolyakWarning, match="set NUMBA_CACHE_DIR to a folder") as caught:
        assert (function(4), function(0.5), cached.compiled(3)(4)) == (8, 1.0, 12)
    assert len(caught) == 1


def test_a_full_disk_leaves_no_part_of_a_file(cached, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.Path, "write_bytes", full)
    with pytest.warns(polyak.PolyakWarning, match="No space left"):
        assert cached.compiled()(4) == 8
    assert cached.files() == []


def test_another_cache_inside_numba_costs_no_more_than_the_cache(cached, monkeypatch):
    monkeypatch.delattr(numba.core.caching.Cache, "_index_key")
    with pytest.warns(polyak.PolyakWarning, match="AttributeError"):
        assert cached.compiled()(4) == 8
    monkeypatch.setattr(cache, "_WARNED", [])
    monkeypatch.setattr(numba.core.caching.Cache, "__init__", lambda self: None)
    with pytest.warns(polyak.PolyakWarning, match="TypeError"):
        assert cached.compiled()(4) == 8


@pytest.mark.exhaustive
def test_an_averager_beside_a_damaged_cache_is_made_and_moves(tmp_path):
    code = "import torch, polyak; a = polyak.average(torch.nn.Linear(3, 2), kernel='fused'); a.update(); print(a.n)"

    def run():
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False,
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip

    first = run()
    assert (first.stdout, first.stderr) == ("1\n", "")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    second = run()
    assert second.stdout == "1\n"
    assert second.stderr.count("PolyakWarning") == 1


# At any call


@pytest.fixture
def breaking(monkeypatch):
    """Return what breaks the compiler; it works again after the test."""
    monkeypatch.setattr(compiler, "_BROKEN", set())

    def fails(*_):
        message = "LLVM ERROR: out of memory\nand much more"
        raise RuntimeError(message)

    def broken(kernel=cpu.FusedCPU, method="_move_pieces"):
        monkeypatch.setattr(kernel, method, fails)

    return broken


@pytest.mark.parametrize("kernel", ["auto", "fused"])
def test_a_compiler_that_breaks_leaves_new_averagers_to_torch_and_warns_once(breaking, kernel):
    before = polyak.average(mlp(), kernel=kernel)
    breaking()
    with pytest.warns(polyak.PolyakWarning, match=r"no kernel \(RuntimeError: LLVM ERROR: out of memory\)") as caught:
        averager, _ = (polyak.average(mlp(), kernel=each) for each in (kernel, "auto"))
    assert len(caught) == 1
    assert "fused" not in averager.describe()
    assert "fused" in before.describe()
    averager.update()
    assert averager.n == 1


def test_copies_are_left_to_torch_too(breaking):
    breaking(cpu.CopyCPU, "_copy_pieces")
    model = torch.nn.BatchNorm1d(3)
    with pytest.warns(polyak.PolyakWarning, match="compiles no kernel"):
        averager = polyak.average(model, "ema")
    model.num_batches_tracked.fill_(5)
    averager.update()
    assert averager.averages["num_batches_tracked"] == 5


def test_an_update_that_needs_another_kernel_is_made_by_torch_where_none_can_be_compiled(breaking):
    model = mlp()
    other = copy.deepcopy(model)
    averager, expected = (polyak.average(m, "ema", decay=0.5) for m in (model, other))
    averager.update()
    expected.update()
    for m in (model, other):
        m.double()
    expected.update()
    breaking()
    with pytest.warns(polyak.PolyakWarning, match="compiles no kernel"):
        averager.update()
    assert averager.n == 2
    assert average_bits(averager) == average_bits(expected)


def test_a_bank_whose_lanes_were_one_kernel_is_made_by_torch(breaking):
    breaking()
    model = mlp().bfloat16()
    with pytest.warns(polyak.PolyakWarning, match="compiles no kernel"):
        bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": "swa"})
    for _ in drifting(model, 2):
        bank.update()
    assert {averager.n for averager in bank.values()} == {2}


def test_a_compiler_whose_kernels_are_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(compiler, "_BROKEN", set())
    monkeypatch.setattr(loops, "move", lambda *arguments: None)
    compiler._tried.cache_clear()
    with pytest.warns(polyak.PolyakWarning, match="half of the way from 0 to 1 is 0.0"):
        averager = polyak.average(mlp(), "ema")
    compiler._tried.cache_clear()
    assert "foreach" in averager.describe()


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "float64"}, {"buffers": "copy"}], ids=str)
def test_no_update_compiles_anything(options, many_slices):
    model = torch.nn.Sequential(mlp(), torch.nn.BatchNorm1d(2), torch.nn.Linear(40, 30))
    bank = polyak.bank(model, {"a": {"name": "ema", "decay": 0.5}, "b": "swa", "c": "tail"}, **options)
    functions = [loops.move, loops.all_finite, loops.copy]
    before = [len(function.signatures) for function in functions]
    for _ in drifting(model, 3):
        bank.update()
    assert [len(function.signatures) for function in functions] == before


def test_no_compiler_is_heard_where_none_is_asked(breaking):
    breaking()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        polyak.average(mlp(), "ema", kernel="foreach").update()
