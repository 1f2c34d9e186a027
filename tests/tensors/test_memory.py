"""Where averages lie: small ones side by side in one tensor, large ones in storages of their own."""

from __future__ import annotations

import io

import pytest
import torch

from polyak.tensors import memory
from polyak.tensors.memory import clones

CPU = torch.device("cpu")
LARGE = memory._SMALL // 4 + 1  # elements


def laid_out():
    torch.manual_seed(0)
    image = torch.randn(2, 64, 64, 65).to(memory_format=torch.channels_last)
    return [torch.randn(LARGE), torch.randn(5), image, torch.randn(300, 1000).t(), torch.randn(7, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_copies_have_the_values_and_the_layout_of_the_tensors(dtype):
    tensors = laid_out()
    copies = clones(tensors, [(CPU, dtype)] * len(tensors))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == dtype
        assert copy.stride() == tensor.stride()
        assert torch.equal(copy, tensor.to(dtype))


def test_a_large_copy_is_no_view_and_its_file_holds_nothing_else():
    tensors = laid_out()
    copies = clones(tensors, [(CPU, torch.float32)] * len(tensors))
    for large in (0, 2, 3):
        assert not copies[large]._is_view()
        assert copies[large].untyped_storage().nbytes() == copies[large].nbytes
        file = io.BytesIO()
        torch.save(copies[large], file)
        assert len(file.getvalue()) < copies[large].nbytes + 4096
    assert len({copies[i].untyped_storage().data_ptr() for i in (0, 2, 3)}) == 3
    before = [copy.clone() for copy in copies]
    copies[0].fill_(7)
    assert all(torch.equal(copy, old) for copy, old in zip(copies[1:], before[1:], strict=True))


@pytest.mark.parametrize("number", range(5))
def test_autograd_lets_copies_be_written_to_that_were_made_without_it(number):
    with torch.no_grad():
        copies = clones(laid_out(), [(CPU, torch.float32)] * 5)
    copies[number].add_(torch.ones((), requires_grad=True))
    assert copies[number].grad_fn is not None


def test_small_copies_are_views_of_one_tensor_each_at_the_beginning_of_a_line():
    tensors = [torch.full((i,), float(i)) for i in range(1, 200)]
    copies = clones(tensors, [(CPU, torch.float32)] * len(tensors))
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert copies[0]._base is copies[-1]._base
    assert all(copy.storage_offset() % 16 == 0 for copy in copies)
    assert all(map(torch.equal, copies, tensors))
