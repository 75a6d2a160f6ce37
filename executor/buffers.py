"""Buffers of a job on both sides of the link: every item of `hrm.memory.footprint` but the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from executor.kv_cache import KVCache
from executor.memory import DeviceMemory, host_tensor
from hrm.gating import Gate
from hrm.model import MoEModel
from hrm.pipeline import ACTIVATION_SLOTS, PINNED_PAGES, workspace_bytes
from hrm.policy import Policy
from hrm.systems import check_system

__all__ = ["JOB_ITEMS", "Buffers", "FfnSlot", "Sizes", "Slot"]

JOB_ITEMS = (
    "hidden_states", "token_ids", "decode_slots", "prefill_slots", "workspace", "gating", "kv_cache", "kv_buffers",
    "ffn_slots",
)  # fmt: skip
"""Names under which a job takes device memory; given back when it ends."""

_KV_BUFFERS = 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The most that any segment of a job needs."""

    places: int
    """N."""
    parts: int
    """G."""
    micro_batch: int
    """Requests of a micro-batch."""
    prompt_tokens: int
    """Prompt tokens of a micro-batch in prefill."""
    batch_tokens: int
    """Prompt tokens of all micro-batches in prefill."""
    host_rooms: tuple[tuple[int, ...], ...]
    """Rows of the KV cache of each request whose KV lies on the host, batch by batch."""
    device_rooms: tuple[tuple[int, ...], ...]
    kv_buffer_rows: int
    """Rows of one micro-batch that travel to the device for attention there."""
    kv_share: float
    """Share of the requests whose KV lies on the device."""

    @property
    def longest_room(self) -> int:
        """Rows of the KV cache of the longest request."""
        return max((room for batch in (*self.host_rooms, *self.device_rooms) for room in batch), default=0)


class Slot:
    """Buffers of one micro-batch in flight on one side of the link: queries, new cache rows, attention output."""

    def __init__(self, flat: torch.Tensor, attended: torch.Tensor) -> None:
        self.flat, self.attended = flat, attended

    def queries(self, n: int, width: int) -> torch.Tensor:
        """[n, query_size]"""
        return self.flat[: n * width].view(n, width)

    def cached(self, n: int, queries: int, width: int) -> torch.Tensor:
        """[n, kv_elements]"""
        return self.flat[n * queries : n * (queries + width)].view(n, width)

    def output(self, n: int, width: int) -> torch.Tensor:
        """[n, attended_size]"""
        return self.attended[: n * width].view(n, width)


@dataclass(frozen=True)
class FfnSlot:
    """Buffers of a micro-batch whose experts are tasks of their own, on one side of the link."""

    states: torch.Tensor
    """[μ, H], normed."""
    index: torch.Tensor
    """[μ, k]"""
    weight: torch.Tensor
    """[μ, k]"""
    sums: tuple[torch.Tensor, ...]
    """[μ, H]: what experts made. On the device: of its own experts, and of the CPU's."""


class Buffers:
    """Allocates what a job needs besides weights, once.

    Parameters
    ----------
    model : MoEModel
        Shapes of this process' part.
    dtype : torch.dtype
    memory : DeviceMemory
    policy, system
        What runs.
    sizes : Sizes
    gate : Gate, optional
        What brings tokens to experts, if it is not the executor's own gate.
    """

    def __init__(
        self,
        model: MoEModel,
        dtype: torch.dtype,
        memory: DeviceMemory,
        *,
        policy: Policy,
        system: str,
        sizes: Sizes,
        gate: Gate | None = None,
    ) -> None:
        self.model, self.sizes = model, sizes
        self._dtype, self._memory, self._traits = dtype, memory, check_system(system)
        self._cuda = memory.device.type == "cuda"
        self.host_bytes = 0
        attentions = [layer.attention for layer in model.layers]
        most, most_tokens, h = sizes.micro_batch, sizes.prompt_tokens, model.hidden_size
        wide = max(a.query_size + a.kv_elements for a in attentions)
        attended = max(a.attended_size for a in attentions)
        rows = max(a.kv_elements for a in attentions)
        ring = range(ACTIVATION_SLOTS)
        self.hidden = self._device("hidden_states", sizes.places, h)
        self.next_ids = self._device("hidden_states", sizes.places, dtype=torch.int64)
        self.device_slots = [
            Slot(self._device("decode_slots", most * wide), self._device("decode_slots", most * attended)) for _ in ring
        ]
        self.prompt_slots = [self._device("prefill_slots", most_tokens * h) for _ in ring]
        self.kv_slots = [self._device("prefill_slots", most_tokens * rows) for _ in ring]
        longest = sizes.longest_room if policy.attention_on_gpu else 0
        memory.reserve("workspace", int(workspace_bytes(model, most_tokens, most, longest)))
        if gate is not None:
            memory.reserve("gating", int(gate.bytes(model, max(most_tokens, most))))
        self.host_slots = [Slot(self._host(most * wide), self._host(most * attended)) for _ in ring]
        self.host_hidden = self._host(max(sizes.batch_tokens, sizes.places) * h)
        self.prompt_kv = self._host(most_tokens * rows)
        self._make_caches(policy, rows)
        self._make_ffn_slots(policy)
        self.pages = 0
        """Pages that the pinned ring is made for."""
        self.pinned: list[torch.Tensor] = []

    def _device(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._memory.empty(name, shape, dtype or self._dtype)

    def _host(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = host_tensor(shape, dtype or self._dtype, pinned=self._cuda)
        self.host_bytes += tensor.nbytes
        return tensor

    def _make_caches(self, policy: Policy, width: int) -> None:
        sizes, traits = self.sizes, self._traits
        # Copied to the device from where it lies, unless it is staged.
        pinned = self._cuda and policy.attention_on_gpu and not traits.stages_kv
        self.host_cache = KVCache(
            self.model, sizes.host_rooms, lambda shape: host_tensor(shape, self._dtype, pinned=pinned)
        )
        self.device_cache = KVCache(self.model, sizes.device_rooms, lambda shape: self._device("kv_cache", *shape))
        self.host_bytes += self.host_cache.nbytes
        longest = sizes.kv_buffer_rows
        self.kv_buffers = [self._device("kv_buffers", longest * width) for _ in range(_KV_BUFFERS if longest else 0)]
        self.pinned_kv = [self._host(longest * width) for _ in self.kv_buffers] if traits.stages_kv else []

    def _make_ffn_slots(self, policy: Policy) -> None:
        # With all experts on the device there are none on the CPU.
        split = not policy.ffn_on_gpu and policy.weights_on_gpu < 1
        n, h, k = self.sizes.micro_batch, self.model.hidden_size, self.model.top_k
        name = "ffn_slots"
        if policy.expert_slots is not None:
            rows = max(n, self.sizes.prompt_tokens)
            self.device_ffn = [
                FfnSlot(
                    self._device(name, rows, h),
                    self._device(name, rows, k, dtype=torch.int64),
                    self._device(name, rows, k, dtype=torch.float32),
                    (self._device(name, rows, h),),
                )
                for _ in range(ACTIVATION_SLOTS)
            ]
            none = torch.empty(0)
            self.host_ffn = [
                FfnSlot(none, self._host(rows, k, dtype=torch.int64), none, ()) for _ in range(ACTIVATION_SLOTS)
            ]
            return
        ring = range(ACTIVATION_SLOTS if split else 0)
        self.device_ffn = [
            FfnSlot(
                self._device(name, n, h),
                self._device(name, n, k, dtype=torch.int64),
                self._device(name, n, k, dtype=torch.float32),
                (self._device(name, n, h), self._device(name, n, h)),
            )
            for _ in ring
        ]
        self.host_ffn = [
            FfnSlot(
                self._host(n, h),
                self._host(n, k, dtype=torch.int64),
                self._host(n, k, dtype=torch.float32),
                (self._host(n, h),),
            )
            for _ in ring
        ]

    def make_ring(self, pages: int, longest_page: int) -> None:
        """Pinned memory for pages of weights on their way, if it is not there."""
        if self.pages == pages:
            return
        layers = self._traits.pinned_layers
        count = PINNED_PAGES if layers is None else round(layers * pages)
        self.pages = pages
        self.pinned = [self._host(longest_page) for _ in range(count)]
