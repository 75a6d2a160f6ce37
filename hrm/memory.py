"""What a policy needs on each memory tier, and by how much it misses.

The same sums are what the executor allocates, so that "it fits" means that it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.errors import DoesNotFit
from hrm.hardware import Hardware
from hrm.model import MoEModel
from hrm.pipeline import (
    ACTIVATION_SLOTS,
    PINNED_PAGES,
    BatchShape,
    activation_bytes,
    page_bytes,
    prefill_slot_bytes,
    workspace_bytes,
)
from hrm.units import format_bytes

__all__ = ["Footprint", "batch_footprint", "check_fits", "footprint", "usable_bytes"]

# A GPU's driver, context and allocator take some of it; the operating system some of the host.
_GPU_USABLE, _CPU_USABLE, _SHARED_USABLE = 0.92, 0.90, 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes per tier, item by item (numbers or arrays over a planner's grid)."""

    gpu: dict[str, Any]
    cpu: dict[str, Any]

    @property
    def gpu_bytes(self) -> Any:
        """All bytes on the GPU."""
        return sum(self.gpu.values())

    @property
    def cpu_bytes(self) -> Any:
        """All bytes on the host."""
        return sum(self.cpu.values())

    def to_dict(self) -> dict[str, Any]:
        """Totals and items, as plain numbers."""
        return {
            "gpu_bytes": float(self.gpu_bytes),
            "cpu_bytes": float(self.cpu_bytes),
            "gpu": {key: float(value) for key, value in self.gpu.items()},
            "cpu": {key: float(value) for key, value in self.cpu.items()},
        }


def footprint(
    model: MoEModel,
    *,
    batch_size: Any,
    micro_batch_size: Any,
    num_micro_batches: Any,
    weights_on_gpu: Any,
    micro_batch_tokens: Any,
    batch_tokens: Any,
    longest_prompt: Any,
    gen_len: Any,
) -> Footprint:
    """Memory of a CGOPipe run with attention on the CPU.

    Parameters
    ----------
    micro_batch_tokens : int or array
        Most prompt tokens in one micro-batch.
    batch_tokens : int or array
        Prompt tokens of the whole batch.
    longest_prompt : int
        Tokens of the longest prompt.

    Returns
    -------
    Footprint
        Items in bytes.

    References
    ----------
    MoE-Lightning, section 4.2 (memory constraints); every item here is one that the executor allocates.
    """
    w = model.layer_expert_bytes
    streamed = (1 - weights_on_gpu) * w
    b = model.dtype_bytes
    gpu = {
        "dense_weights": model.dense_bytes,
        "resident_experts": model.num_layers * weights_on_gpu * w,
        "weight_buffers": 2 * streamed,
        "hidden_states": batch_size * (model.hidden_bytes + 8.0),
        # Prompt ids and positions, lengths, generated ids; and the rotary table.
        "token_ids": 16.0 * batch_tokens + batch_size * (16.0 + 8.0 * gen_len),
        "rotary_table": 2 * (longest_prompt + gen_len) * model.head_dim * b,
        "decode_slots": ACTIVATION_SLOTS * activation_bytes(model, micro_batch_size),
        "prefill_slots": ACTIVATION_SLOTS * prefill_slot_bytes(model, micro_batch_tokens),
        "workspace": workspace_bytes(model, micro_batch_tokens, micro_batch_size),
    }
    cpu = {
        "streamed_experts": model.num_layers * streamed,
        "kv_cache": (batch_tokens + batch_size * gen_len) * model.kv_token_bytes * model.num_layers,
        "prompt_hidden_states": batch_tokens * model.hidden_bytes,
        "pinned_pages": PINNED_PAGES * page_bytes(streamed, num_micro_batches),
        "pinned_activations": ACTIVATION_SLOTS * micro_batch_size * (2 * model.q_size + 2 * model.kv_size) * b
        + micro_batch_tokens * model.kv_token_bytes,
    }
    return Footprint(gpu=gpu, cpu=cpu)


def batch_footprint(model: MoEModel, batch: BatchShape, weights_on_gpu: float) -> Footprint:
    """Memory of one batch with known prompt lengths: what the executor will allocate."""
    return footprint(
        model,
        batch_size=batch.batch_size,
        micro_batch_size=max(batch.sequences),
        num_micro_batches=batch.num_micro_batches,
        weights_on_gpu=weights_on_gpu,
        micro_batch_tokens=max(batch.prompt_tokens),
        batch_tokens=sum(batch.cached_tokens),
        longest_prompt=max(batch.longest),
        gen_len=batch.gen_len,
    )


def usable_bytes(hardware: Hardware) -> tuple[float, float]:
    """Bytes that a run may take on the GPU and on the host of `hardware`."""
    if hardware.shared_memory:
        # Both heaps lie in the same RAM: the GPU's share is a budget, exact, and the host gets the rest.
        gpu = float(hardware.gpu.capacity)
        return gpu, _SHARED_USABLE * float(hardware.cpu.capacity) - gpu
    return _GPU_USABLE * float(hardware.gpu.capacity), _CPU_USABLE * float(hardware.cpu.capacity)


def check_fits(need: Footprint, hardware: Hardware) -> None:
    """Raise `DoesNotFit` saying which tier lacks how much for what."""
    for tier, total, items, room in zip(
        ("GPU", "CPU"),
        (need.gpu_bytes, need.cpu_bytes),
        (need.gpu, need.cpu),
        usable_bytes(hardware),
        strict=True,
    ):
        if total > room:
            largest = max(items, key=lambda key: float(np.max(items[key])))
            raise DoesNotFit(
                f"the policy needs {format_bytes(total)} of {tier} memory and {hardware.name} has "
                f"{format_bytes(max(room, 0.0))} to use: {format_bytes(total - room)} too much "
                f"(largest: {largest}, {format_bytes(items[largest])}). "
                + (
                    "Lower --micro-batch-size or --weights-on-gpu, or raise --device-memory."
                    if tier == "GPU"
                    else "Lower --batch-size, or raise --weights-on-gpu."
                )
            )
