"""Host memory in pages of its own, and a device heap with a budget."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from executor.memory import DeviceMemory, host_tensor, mapped_tensor
from hrm.errors import DoesNotFit


def test_a_mapping_lives_as_long_as_any_view() -> None:
    """Pages go with the last tensor that lies in them, not with the first."""
    pages, tensor = mapped_tensor((4, 3), torch.bfloat16)
    gone: list[bool] = []
    first = f"{tensor.data_ptr():x}-"
    pages.unlock = lambda: gone.append(first in Path("/proc/self/maps").read_text())
    del pages
    view = tensor[1:].view(-1)[2:]
    del tensor
    gc.collect()
    assert not gone and (view == 0).all()
    view.fill_(2)
    assert view.sum() == 2 * view.numel()
    del view
    gc.collect()
    assert gone == [True], "the pages were still mapped when they were unlocked"


def test_nothing_is_mapped_for_nothing() -> None:
    """A shape without elements is a tensor without elements."""
    _, tensor = mapped_tensor((0, 7), torch.float32)
    assert tensor.shape == (0, 7)


def test_a_budget_is_kept() -> None:
    """What passes the budget is refused in one line, and what is given back can be used again."""
    memory = DeviceMemory(100, torch.device("cpu"))
    memory.empty("a", (10,), torch.float32)
    with pytest.raises(DoesNotFit, match="budget"):
        memory.empty("b", (20,), torch.float32)
    memory.release(["a"])
    assert memory.empty("b", (20,), torch.float32).shape == (20,) and memory.peak == 80


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [1000, 3 * 2**20])
def test_pinned_memory_is_what_a_gpu_copies_from(size: int) -> None:
    """Small and large host tensors are page-locked, take no more than asked for, and copy as they are."""
    tensor = host_tensor((size,), torch.float32, pinned=True)
    assert tensor.is_pinned()
    tensor.copy_(torch.arange(size))
    assert (tensor.to("cuda", non_blocking=True).cpu() == torch.arange(size)).all()
