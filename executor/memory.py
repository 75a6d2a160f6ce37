"""Memory: a budgeted device heap, and host tensors that a GPU can copy from."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable
from functools import partial

import torch

from hrm.errors import DoesNotFit
from hrm.units import format_bytes

__all__ = ["DeviceMemory", "host_tensor"]


class DeviceMemory:
    """Allocates on the device within a budget and remembers the peak.

    On a machine without a GPU the device is a heap of its own in RAM; the budget is kept all the same.
    Room for the temporaries of kernels is reserved here, though kernels allocate them themselves.
    """

    def __init__(self, budget: int, device: torch.device) -> None:
        self.budget = budget
        self.device = device
        self.items: dict[str, int] = {}
        self.peak = 0

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(self.items.values())

    def reserve(self, name: str, size: int) -> None:
        """Account for `size` bytes; raises `DoesNotFit` when the budget would be passed."""
        if self.used + size > self.budget:
            raise DoesNotFit(
                f"device memory: {name} needs {format_bytes(size)}, {format_bytes(self.used)} of the "
                f"{format_bytes(self.budget)} budget are taken. Raise --device-memory, or lower "
                "--weights-on-gpu or --micro-batch-size."
            )
        self.items[name] = self.items.get(name, 0) + size
        self.peak = max(self.peak, self.used)

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the device, counted under `name`."""
        self.reserve(name, math.prod(shape) * dtype.itemsize)
        # Touched now, not inside a timed task; and rows that are masked away must not hold what is not a number.
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` on the device."""
        copy = self.empty(name, tuple(tensor.shape), tensor.dtype)
        return copy.copy_(tensor)

    def release(self, names: Iterable[str]) -> None:
        """Give back what was counted under `names`."""
        for name in names:
            self.items.pop(name, None)


_LOCK_BY_OURSELVES = 2**20
"""Bytes from which host memory is locked as it is: torch's own pinned memory comes in powers of two."""


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """A touched host tensor, page-locked if a GPU will copy from or to it.

    Raises
    ------
    DoesNotFit
        If so much memory cannot be locked.
    """
    if not pinned:
        return torch.zeros(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    try:
        if size < _LOCK_BY_OURSELVES:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        pages, tensor = mapped_tensor(shape, dtype)
        address = tensor.data_ptr()
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, size, 0)))
        pages.unlock = partial(torch.cuda.cudart().cudaHostUnregister, address)
    except (RuntimeError, OSError) as error:
        raise DoesNotFit(
            f"{format_bytes(size)} of host memory cannot be page-locked ({str(error).splitlines()[0]}); "
            "try --staged-weights, a smaller --batch-size, or a higher limit (ulimit -l)."
        ) from None
    return tensor


class Pages(mmap.mmap):
    """Memory in pages of its own, which lives as long as the last view of a tensor in it."""

    unlock: Callable[[], object] | None = None
    """Called before the pages go."""

    def __del__(self) -> None:
        if self.unlock is not None:
            self.unlock()


def mapped_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Pages, torch.Tensor]:
    """A tensor of zeros in whole pages of its own, all of them touched, and the mapping that holds it."""
    pages = Pages(-1, max(1, math.prod(shape) * dtype.itemsize))
    if not math.prod(shape):
        return pages, torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)
    return pages, tensor.zero_()
