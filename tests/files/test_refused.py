"""Files that cannot be averaged are refused in words, and nothing is left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from files.conftest import weights
from polyak import files
from polyak.errors import ConfigError, MismatchError, MissingFileError, PolyakError, StateError, WriteError


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def refused(paths, out, left, kind, says, **options):
    before = left()
    with pytest.raises(kind, match=says):
        files.average(paths, out=out, **options)
    assert left() == before


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def archive(**records):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as opened:
        for name, data in records.items():
            opened.writestr(f"archive/{name.replace('_', '.')}", data)
    return made.getvalue()


def header(table, size=0):
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "empty.pt": (b"", "it is empty"),
    "empty.safetensors": (b"", "it is empty"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid 1\n", "Git LFS pointer.*git lfs pull"),
    "page.bin": (b"<!DOCTYPE html><html>not found</html>", "web page"),
    "model.gguf.pt": (b"GGUF" + bytes(60), "GGUF"),
    "noise.pt": (bytes(range(256)) * 9, "neither a safetensors file nor one of torch"),
    "text.pt": (b"hello world, this is no checkpoint at all", "neither a safetensors file nor one of torch"),
    "noise.safetensors": (bytes(range(256)) * 9, "damaged or no checkpoint"),
    "short.safetensors": (header({"w": {**F32}}, 4), "cut off: its last 4 bytes"),
    "long.safetensors": (header({"w": {**F32}}, 12), "4 bytes more than its tensors"),
    "hole.safetensors": (header({"w": {**F32, "data_offsets": [8, 16]}}, 16), "begins at byte 8"),
    "overlap.safetensors": (header({"w": F32, "v": F32}, 8), "begins at byte 0"),
    "size.safetensors": (header({"w": {**F32, "shape": [3]}}, 8), "are no tensor 'w'"),
    "negative.safetensors": (header({"w": {**F32, "shape": [-2]}}, 8), "shape"),
    "dtype.safetensors": (header({"w": {**F32, "dtype": "F4"}}, 8), "quantised or future"),
    "huge.safetensors": ((10**7).to_bytes(8, "little") + b"{", "cut off: its header"),
    "deep.safetensors": ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "damaged"),
    "other.pt": (archive(readme_txt=b"x"), "none of torch.save"),
    "script.pt": (archive(data_pkl=b"\x80\x02}.", constants_pkl=b"\x80\x02)."), "TorchScript"),
    "list.pt": (archive(data_pkl=pickle.dumps([1, 2], 2), version=b"3"), "expected a dictionary"),
    "nothing.pt": (archive(data_pkl=pickle.dumps({"a": 1}, 2), version=b"3"), "no dictionary of tensors"),
    "eval.pt": (archive(data_pkl=pickle.dumps({"a": Calls(eval, "1")}, 2), version=b"3"), r"__builtin__\.eval"),
    "system.pt": (archive(data_pkl=pickle.dumps({"a": Calls(os.system, "true")}, 2), version=b"3"), r"posix\.system"),
    "process.pt": (archive(data_pkl=pickle.dumps([Calls(subprocess.Popen, "true")], 4), version=b"3"), "subprocess"),
    "old.pt": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"cos\nsystem\n(S'true'\ntR.", r"os\.system"),
    "plain.pt": (pickle.dumps({"a": 1}), "torch.save did not write it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_checkpoint(name, run, tmp_path, left):
    data, match = BAD[name]
    (tmp_path / name).write_bytes(data)
    refused([run[0], tmp_path / name], tmp_path / "o.safetensors", left, StateError, match)
    with pytest.raises(StateError, match=match):
        files.open(tmp_path / name)


def test_compressed_and_big_endian_archives(tmp_path, left):
    torch.save(weights(0), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for record in source.infolist():
            made.writestr(record.filename, source.read(record))
    with zipfile.ZipFile(tmp_path / "a.pt") as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in records.items():
            made.writestr(name, data)
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as made:
        for name, data in records.items():
            made.writestr(name, b"big" if name.endswith("byteorder") else data)
    refused([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "o.pt", left, StateError, "compressed")
    refused([tmp_path / "a.pt", tmp_path / "c.pt"], tmp_path / "o.pt", left, StateError, "byte order")


@pytest.mark.parametrize("how", ["safetensors", "pt", "legacy"])
def test_truncated_files(how, tmp_path, left):
    suffix = "safetensors" if how == "safetensors" else "pt"
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for seed, path in enumerate(paths):
        if how == "safetensors":
            save_file(weights(seed), path)
        else:
            torch.save(weights(seed), path, _use_new_zipfile_serialization=how == "pt")
    truncated(paths[1])
    refused(paths, tmp_path / f"o.{suffix}", left, StateError, r"1\.(pt|safetensors)' is damaged")


def test_whole_modules_and_other_tensors(tmp_path, left):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "inside.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    torch.save({"w": torch.ones(2, 2).to_sparse(), "v": torch.ones(2)}, tmp_path / "sparse.pt")
    torch.save({"w": torch.ones(2, device="meta")}, tmp_path / "meta.pt")
    scripted = torch.jit.script(nn.Linear(2, 2))
    scripted.save(str(tmp_path / "script.pt"))
    for name, match in {
        "module": r"whole pickled object of the class torch\.nn\.modules\.linear\.Linear",
        "inside": r"whole pickled object",
        "tensor": "single tensor without a name",
        "sparse": "w is sparse",
        "meta": "meta",
        "script": "TorchScript",
    }.items():
        refused([tmp_path / f"{name}.pt", tmp_path / "tensor.pt"], tmp_path / "o.pt", left, StateError, match)


def test_shapes_and_dtypes_that_differ(run, states, tmp_path, left):
    out = tmp_path / "o.safetensors"
    save_file({**states[1], "layer.bias": torch.ones(31)}, run[1])
    refused(run, out, left, MismatchError, r"'layer\.bias' has shape \(30,\) in 'step-100.*\(31,\) in 'step-200")
    refused(run, out, left, MismatchError, "shape", match="common")
    save_file({**states[1], "layer.bias": torch.ones(30, dtype=torch.int64)}, run[1])
    refused(run, out, left, MismatchError, r"dtype torch\.float32 .* torch\.int64")
    renamed = {name.replace("layer", "layers"): tensor for name, tensor in states[1].items()}
    save_file(renamed, run[1])
    refused(run, out, left, MismatchError, r"there: 'layers\.(weight|bias)'")


def test_one_file_twice_and_too_few(run, tmp_path, left):
    out = tmp_path / "o.safetensors"
    refused([run[0], run[0]], out, left, ConfigError, "given twice")
    (tmp_path / "link.safetensors").symlink_to(run[0])
    refused([run[0], tmp_path / "link.safetensors"], out, left, ConfigError, "given twice")
    refused([run[0]], out, left, ConfigError, r"got 1 file \(step-100\.safetensors\)")
    refused([], out, left, ConfigError, "got 0 files")
    refused(str(run[0]), out, left, PolyakError, "expected a list of paths")


def test_an_output_that_is_an_input_or_cannot_be(run, tmp_path, left):
    refused(run, run[1], left, ConfigError, "is the input")
    (tmp_path / "link.safetensors").symlink_to(run[0])
    refused(run, tmp_path / "link.safetensors", left, ConfigError, "is the input")
    os.link(run[0], tmp_path / "hard.safetensors")
    refused(run, tmp_path / "hard.safetensors", left, ConfigError, "is the input")
    refused(run, tmp_path / "folder", left, ConfigError, r"the type '\(none\)'")
    refused(run, tmp_path / "o.onnx", left, ConfigError, r"the type '\.onnx'")
    refused(run, tmp_path / "nowhere" / "o.pt", left, WriteError, "no folder")


def test_quantised_weights(tmp_path, left):
    w = torch.ones(4, 4)
    cases = {
        "fp8": {"a.weight": w.to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1)},
        "bnb": {"a.weight": w.to(torch.uint8), "a.weight.absmax": torch.ones(1), "a.weight.quant_map": torch.ones(16)},
        "gptq": {"a.qweight": w.to(torch.int32), "a.qzeros": w.to(torch.int32), "a.scales": w.half()},
        "packed": {"a.weight": w.to(torch.uint8)},
        "int8": {"a.weight": w.to(torch.int8), "a.SCB": torch.ones(4)},
    }
    for name, state in cases.items():
        for i in range(2):
            save_file(state, tmp_path / f"{name}{i}.safetensors")
        paths = [tmp_path / f"{name}{i}.safetensors" for i in range(2)]
        refused(paths, tmp_path / "o.safetensors", left, ConfigError, "is quantised")


def test_raw_float8_and_scales_that_are_parameters_are_averaged(tmp_path):
    for i in range(2):
        state = {"a.weight": torch.full((2, 2), 2.0 * i).to(torch.float8_e4m3fn), "logit_scale": torch.tensor(1.0 + i)}
        save_file(state, tmp_path / f"{i}.safetensors")
    made = files.average([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], out=tmp_path / "o.safetensors")
    with files.open(made.out) as checkpoint:
        assert checkpoint.read("logit_scale") == 1.5
        assert checkpoint.read("a.weight").float().eq(1).all()
    assert any("float8" in note for note in made.notes)


def test_steps_that_no_strategy_can_use(states, tmp_path, left):
    for name, state in zip("abc", states, strict=True):
        torch.save(state, tmp_path / f"{name}.pt")
    paths = [tmp_path / f"{name}.pt" for name in "abc"]
    refused(paths, tmp_path / "o.pt", left, ConfigError, "steps unknown, unknown, unknown", weights="ema")
    refused(paths, tmp_path / "o.pt", left, ConfigError, "no strategy is called 'emma'", weights="emma")
    refused(paths, tmp_path / "o.pt", left, ConfigError, "dtype: got 'int8'", dtype="int8")
    refused(paths, tmp_path / "o.pt", left, ConfigError, "match: got 'all'", match="all")


def test_a_full_disk_leaves_nothing(run, tmp_path, left, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    refused(run, tmp_path / "o.safetensors", left, WriteError, "No space left")


def test_a_folder_that_is_there_or_missing_files(tmp_path, left):
    with pytest.raises(MissingFileError):
        files.average([tmp_path / "a.pt", tmp_path / "b.pt"], out=tmp_path / "o.pt")
    (tmp_path / "empty").mkdir()
    refused([tmp_path / "empty", tmp_path / "empty"], tmp_path / "o", left, MissingFileError, "holds no weights")
