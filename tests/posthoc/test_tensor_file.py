"""Reading safetensors files by plain reads: every dtype and shape, and a clear error for every damage."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import _TYPES, load_file, save_file

from models import bits
from polyak import StateError
from polyak.io.tensor_file import TensorFile

DTYPES = sorted(_TYPES.values(), key=str)


def values(dtype, *shape):
    """Return a tensor of that dtype with bytes of every sort."""
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = torch.arange(size).remainder(2 if dtype == torch.bool else 251).to(torch.uint8)
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_what_safetensors_writes_is_read_bit_for_bit(tmp_path, dtype, shape):
    tensors = {"first": torch.arange(3), "it": values(dtype, *shape), "last": torch.ones(2)}
    save_file(tensors, tmp_path / "x", metadata={"who": "me"})
    file = TensorFile(tmp_path / "x")
    assert sorted(file.names) == ["first", "it", "last"]
    assert file.metadata == {"who": "me"}
    assert (file.shape("it"), file.dtype("it")) == (shape, dtype)
    theirs = load_file(tmp_path / "x")
    for name, tensor in tensors.items():
        assert bits(file.read(name)) == bits(tensor) == bits(theirs[name])


def test_what_is_read_is_memory_of_its_own(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    file.read("a").fill_(7)
    assert file.read("a").tolist() == [0, 0, 0, 0]


def test_a_file_without_tensors_or_metadata_is_read(tmp_path):
    save_file({}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert (file.names, dict(file.metadata)) == ([], {})


def whole(folder):
    save_file({"a": torch.arange(5.0), "b": torch.zeros(2, 2, dtype=torch.bool)}, folder / "x", metadata={"k": "v"})
    return (folder / "x").read_bytes()


def test_a_file_cut_off_at_any_byte_is_refused(tmp_path):
    data = whole(tmp_path)
    for length in range(len(data)):
        (tmp_path / "x").write_bytes(data[:length])
        with pytest.raises(StateError, match=r"cut off|damaged"):
            TensorFile(tmp_path / "x")


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(tmp_path):
    data = whole(tmp_path)
    file = TensorFile(tmp_path / "x")
    (tmp_path / "x").write_bytes(data[:-3])
    with pytest.raises(StateError, match="was cut off while it was read"):
        [file.read(name) for name in file.names]


@pytest.mark.property
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(garbage=st.binary(max_size=200))
def test_garbage_is_refused(tmp_path, garbage):
    (tmp_path / "x").write_bytes(garbage)
    with pytest.raises(StateError, match=r"damaged|cut off"):
        TensorFile(tmp_path / "x")


@pytest.mark.property
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_any_changed_bytes_of_a_header_are_refused_or_make_no_difference_to_the_shape_of_things(tmp_path, data):
    raw = bytearray(whole(tmp_path))
    length = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(raw)
    try:
        file = TensorFile(tmp_path / "x")
        read = {name: file.read(name) for name in file.names}
    except StateError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in read.values())


def headed(folder, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    return folder / "x"


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "a list": [1, 2],
    "a number": 3,
    "nothing": None,
    "nested too deeply": b"[" * 100_000,
    "metadata of another type": {"__metadata__": 5},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "an unknown dtype": {"a": {**TENSOR, "dtype": "F31"}},
    "a tensor that is a text": {"a": "F32"},
    "offsets that are texts": {"a": {**TENSOR, "data_offsets": ["0", "8"]}},
    "one offset": {"a": {**TENSOR, "data_offsets": [0]}},
    "offsets that do not fit the shape": {"a": {**TENSOR, "data_offsets": [0, 12]}},
    "offsets that run backwards": {"a": {**TENSOR, "data_offsets": [8, 0]}},
    "a negative offset": {"a": {**TENSOR, "data_offsets": [-8, 0]}},
    "a negative shape": {"a": {**TENSOR, "shape": [-1, -2]}},
    "a fraction of a shape": {"a": {**TENSOR, "shape": [2.0]}},
    "a tensor beyond the end": {"a": {**TENSOR, "data_offsets": [100, 108]}},
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    with pytest.raises(StateError, match=r"damaged|cut off"):
        TensorFile(headed(tmp_path, header))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(StateError, match="there is no file"):
        TensorFile(tmp_path / "missing")
    with pytest.raises(StateError, match="it is a folder"):
        TensorFile(tmp_path)
