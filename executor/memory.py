"""Memory: a budgeted device heap, and host tensors that a GPU can copy from."""

from __future__ import annotations

import math
from collections.abc import Iterable

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


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """A touched host tensor, page-locked if a GPU will copy from or to it."""
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.zeros(shape, dtype=dtype)
