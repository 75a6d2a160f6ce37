"""Where everything lies: a budgeted device heap, weight pages and their buffer, the KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from executor.checkpoint import Checkpoint
from executor.kernels import ExpertWeights
from hrm.errors import DoesNotFit
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from hrm.units import format_bytes

__all__ = ["DeviceMemory", "KVCache", "LayerPages", "WeightStore", "host_tensor"]


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
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if self.device.type == "cpu":
            tensor.zero_()  # touch the pages now, not inside a timed task
        return tensor

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


@dataclass(frozen=True, slots=True)
class LayerPages:
    """How one layer's experts are cut: what stays on the device, and the pages of what travels.

    Offsets count elements of the layer's flat weights (see `Checkpoint.read_experts`).
    """

    model: MoEModel
    resident: int
    """Elements that stay on the device: the first ones, cut at a row of a matrix."""
    pages: int

    @classmethod
    def cut(cls, model: MoEModel, weights_on_gpu: float, pages: int) -> LayerPages:
        """Cut at the last matrix row that `weights_on_gpu` covers; nothing is rounded to experts."""
        total = model.num_experts * model.expert_parameters
        wanted = math.floor(weights_on_gpu * total + 1e-6)
        expert, inside = divmod(wanted, model.expert_parameters)
        h, i = model.hidden_size, model.intermediate_size
        gate_up = 2 * i * h
        row = h if inside < gate_up else i
        base = 0 if inside < gate_up else gate_up
        inside = base + (inside - base) // row * row
        return cls(model, expert * model.expert_parameters + inside, pages)

    @property
    def streamed(self) -> int:
        """Elements that travel."""
        return self.model.num_experts * self.model.expert_parameters - self.resident

    def bounds(self, page: int) -> tuple[int, int]:
        """Where a page lies in the streamed part."""
        return self.streamed * page // self.pages, self.streamed * (page + 1) // self.pages

    @property
    def longest_page(self) -> int:
        """Elements of the longest page."""
        return max((stop - start for start, stop in map(self.bounds, range(self.pages))), default=0)

    def pages_of(self, expert: int) -> range:
        """Pages that carry some of an expert's weights."""
        size = self.model.expert_parameters
        first = max(0, expert * size - self.resident)
        last = max(0, (expert + 1) * size - self.resident)
        hit = [p for p in range(self.pages) if self.bounds(p)[0] < last and self.bounds(p)[1] > first]
        return range(hit[0], hit[-1] + 1) if hit else range(0)

    def experts(self, resident: torch.Tensor, buffer: torch.Tensor) -> list[ExpertWeights]:
        """Views of every expert's matrices in the resident part and the buffer slot."""
        m = self.model
        h, i = m.hidden_size, m.intermediate_size

        def blocks(start: int, rows: int, width: int) -> list[torch.Tensor]:
            stop = start + rows * width
            border = min(max(self.resident, start), stop)
            parts = []
            if border > start:
                parts.append(resident[start:border].view(-1, width))
            if stop > border:
                parts.append(buffer[border - self.resident : stop - self.resident].view(-1, width))
            return parts

        return [
            ExpertWeights(
                blocks(e * m.expert_parameters, 2 * i, h),
                blocks(e * m.expert_parameters + 2 * i * h, h, i),
            )
            for e in range(m.num_experts)
        ]


class WeightStore:
    """Expert weights: the resident part on the device, the rest in host memory, and a double buffer."""

    SLOTS = 2

    def __init__(self, checkpoint: Checkpoint, memory: DeviceMemory, weights_on_gpu: float) -> None:
        model, dtype = checkpoint.model, checkpoint.dtype
        self.model = model
        self.whole = LayerPages.cut(model, weights_on_gpu, 1)
        keep, streamed = self.whole.resident, self.whole.streamed
        self.resident = [memory.empty("resident_experts", (keep,), dtype) for _ in range(model.num_layers)]
        self.slots = [memory.empty("weight_buffers", (streamed,), dtype) for _ in range(self.SLOTS)]
        self.host: list[torch.Tensor] = []
        scratch = torch.empty(keep + streamed, dtype=dtype)
        for layer in range(model.num_layers):
            checkpoint.read_experts(layer, scratch)
            self.resident[layer].copy_(scratch[:keep])
            self.host.append(scratch[keep:].clone())
        self.host_bytes = sum(t.nbytes for t in self.host)
        self._views: dict[tuple[int, int], list[ExpertWeights]] = {}

    def experts(self, layer: int, visit: int) -> list[ExpertWeights]:
        """The experts of `layer` as layer visit number `visit` finds them."""
        key = (layer, visit % self.SLOTS)
        if key not in self._views:
            self._views[key] = self.whole.experts(self.resident[layer], self.slots[key[1]])
        return self._views[key]


class KVCache:
    """Keys and values of one batch in host memory, one tensor per layer and run of similar lengths."""

    def __init__(self, model: MoEModel, batch: BatchShape, dtype: torch.dtype) -> None:
        self.batch = batch
        self._blocks: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.nbytes = 0
        for part, blocks in enumerate(batch.blocks):
            for layer in range(model.num_layers):
                tensors = []
                for start, stop, longest in blocks:
                    shape = (stop - start, model.num_kv_heads, longest + batch.gen_len, model.head_dim)
                    tensors.append((torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)))
                    self.nbytes += 2 * math.prod(shape) * dtype.itemsize
                self._blocks[layer, part] = tensors

    def blocks(self, layer: int, part: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of each block, ``[n, n_kv, room, d]``."""
        return self._blocks[layer, part]

    def put_prompt(self, layer: int, part: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the packed prompt keys and values, ``[tokens, n_kv, d]``, of a micro-batch."""
        lengths = self.batch.micro_batches[part]
        token = 0
        for (start, stop, _), (k, v) in zip(self.batch.blocks[part], self.blocks(layer, part), strict=True):
            for row, length in enumerate(lengths[start:stop]):
                k[row, :, :length].copy_(keys[token : token + length].transpose(0, 1))
                v[row, :, :length].copy_(values[token : token + length].transpose(0, 1))
                token += length
