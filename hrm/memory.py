"""What a policy needs on each memory tier, and by how much it misses.

The same sums are what the executor allocates, so that "it fits" means that it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.affine import KV_ON_GPU, KV_STREAMED, WEIGHTS_ON_GPU, WEIGHTS_STREAMED, Affine
from hrm.errors import DoesNotFit, InvalidValue
from hrm.gating import Gate
from hrm.hardware import Hardware
from hrm.model import MoEModel
from hrm.operators import kv_shards
from hrm.pipeline import (
    ACTIVATION_SLOTS,
    PIECES_IN_FLIGHT,
    PINNED_PAGES,
    BatchShape,
    activation_bytes,
    expert_pieces,
    prefill_slot_bytes,
    workspace_bytes,
)
from hrm.policy import Policy
from hrm.systems import System, check_system
from hrm.units import format_bytes

__all__ = ["GPU_USABLE", "Footprint", "batch_footprint", "check_fits", "footprint", "kv_cache_bytes", "usable_bytes"]

GPU_USABLE = 0.92
"""Share of a GPU's memory that a run may use: driver, context and allocator take some of it."""
# The operating system takes some of the host's.
_CPU_USABLE, _SHARED_USABLE = 0.90, 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes per tier, item by item; affine in r_w and r_c until `at` fixes them."""

    gpu: dict[str, Any]
    """On each GPU."""
    cpu: dict[str, Any]

    @property
    def gpu_bytes(self) -> Any:
        """All bytes on one GPU."""
        return sum(self.gpu.values())

    @property
    def cpu_bytes(self) -> Any:
        """All bytes on the host."""
        return sum(self.cpu.values())

    def at(self, weights_on_gpu: float, kv_on_gpu: float = 0.0) -> Footprint:
        """The footprint for given shares, in plain numbers."""

        def fixed(item: Any) -> Any:
            return item.at(weights_on_gpu, kv_on_gpu) if isinstance(item, Affine) else item

        return Footprint(
            gpu={name: fixed(item) for name, item in self.gpu.items()},
            cpu={name: fixed(item) for name, item in self.cpu.items()},
        )

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
    micro_batch_tokens: Any,
    batch_tokens: Any,
    longest_prompt: Any,
    gen_len: Any,
    attention_on_gpu: bool = False,
    ffn_on_gpu: bool = True,
    num_gpus: int = 1,
    system: str = "moe-lightning",
    expert_slots: int | None = None,
    gate: Gate | None = None,
) -> Footprint:
    """Memory of a run, affine in r_w and r_c.

    Parameters
    ----------
    micro_batch_tokens : int or array
        Most prompt tokens in one micro-batch.
    batch_tokens : int or array
        Prompt tokens of the whole batch.
    longest_prompt : int
        Tokens of the longest prompt.
    num_gpus : int
        GPUs that share weights and KV; each keeps all hidden states.
    system : str
        Whose buffers, see `hrm.systems`.
    expert_slots : int, optional
        K of an expert cache: every routed layer keeps K experts on the GPU, and all of them on the host; pieces of
        experts on their way or in use take the place of the weight buffers.
    gate : Gate, optional
        Brings tokens to experts instead of the executor's own gate, whose temporaries are in the workspace.

    Returns
    -------
    Footprint
        Items in bytes.

    References
    ----------
    MoE-Lightning, section 4.2 (memory constraints); with attention on the CPU, experts on one GPU, every
    item is one that the executor allocates.
    """
    b, t = model.dtype_bytes, num_gpus
    traits = check_system(system)
    every = (*model.order, *model.encoder_order)
    travels = {kind: model.kind_travelling_bytes(kind, dense=traits.streams_dense) for kind in set(every)}
    whole = sum(travels[kind] for kind in every)
    vectors = sum(model.kind_vector_bytes(kind) for kind in every) if traits.streams_dense else 0.0
    streamed = max(travels.values()) * WEIGHTS_STREAMED
    kv = kv_cache_bytes(model, batch_size, batch_tokens, gen_len)
    kv_each = kv_cache_bytes(model, batch_size, batch_tokens, gen_len, num_gpus=t)
    gpu: dict[str, Any] = {
        # Biases and norms stay there even where matrices travel; the buffers have room for them, too.
        "dense_weights": (model.weight_bytes - whole + vectors) / t,
        "resident_experts": (whole / t) * WEIGHTS_ON_GPU,
        "weight_buffers": (2 / t) * streamed,
        "hidden_states": batch_size * (model.hidden_bytes + 8.0),
        # Prompt ids and positions, lengths, generated ids; and the rotary table.
        "token_ids": 16.0 * batch_tokens + batch_size * (16.0 + 8.0 * gen_len),
        "rotary_table": 2 * (longest_prompt + gen_len) * model.head_dim * b,
        "decode_slots": ACTIVATION_SLOTS * activation_bytes(model, micro_batch_size) / t,
        "prefill_slots": ACTIVATION_SLOTS * prefill_slot_bytes(model, micro_batch_tokens),
        "workspace": workspace_bytes(
            model, micro_batch_tokens, micro_batch_size, longest_prompt + gen_len if attention_on_gpu else 0
        ),
    }
    cpu: dict[str, Any] = {
        "streamed_experts": whole * WEIGHTS_STREAMED,
        "kv_cache": kv * KV_STREAMED if attention_on_gpu else kv,
        "prompt_hidden_states": batch_tokens * model.hidden_bytes,
        "pinned_pages": _pinned_layers(traits, num_micro_batches) * streamed,
        "pinned_activations": ACTIVATION_SLOTS * activation_bytes(model, micro_batch_size)
        + micro_batch_tokens * model.kv_token_bytes,
    }
    if attention_on_gpu:
        gpu["kv_cache"] = kv_each * KV_ON_GPU
        # The next micro-batch's KV of one layer arrives while the current one's is read.
        per_layer = max(
            model.kind_kv_token_bytes(kind) / kv_shards(model.kinds[kind].attention, t) for kind in set(model.order)
        )
        gpu["kv_buffers"] = (2 * (micro_batch_tokens + micro_batch_size * gen_len) * per_layer) * KV_STREAMED
        if traits.stages_kv:
            cpu["pinned_kv"] = gpu["kv_buffers"]
    if expert_slots is not None:
        _add_cache(model, expert_slots, np.maximum(micro_batch_tokens, micro_batch_size), t, gpu, cpu)
    if gate is not None:
        gpu["gating"] = gate.bytes(model, np.maximum(micro_batch_tokens, micro_batch_size))
    if not ffn_on_gpu:
        widths = model.hidden_size + 2 * model.top_k * (model.hidden_size + 2 * model.intermediate_size)
        cpu["expert_workspace"] = micro_batch_size * widths * b
        if gate is not None:
            cpu["gating"] = gate.bytes(model, micro_batch_size)
        # States on their way to the CPU's experts with the choice of experts, and what the experts made of them.
        choice = 12.0 * model.top_k
        gpu["ffn_slots"] = ACTIVATION_SLOTS * micro_batch_size * (3 * model.hidden_bytes + choice)
        cpu["ffn_slots"] = ACTIVATION_SLOTS * micro_batch_size * (2 * model.hidden_bytes + choice)
    return Footprint(gpu=gpu, cpu=cpu)


def _add_cache(model: MoEModel, slots: int, rows: Any, num_gpus: int, gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    """Replace what streams as pages by what a cache of whole experts takes, in place."""
    if not any(layer.ffn.routed for layer in model.kinds):
        raise InvalidValue(f"{model.name} has no routed experts; leave --expert-slots out.")
    kept = host = largest = 0.0
    for kind in model.order:
        ffn = model.kinds[kind].ffn
        size = ffn.expert_parameters * model.expert_element_bytes
        if not ffn.routed:
            kept += size
            continue
        kept += min(slots, ffn.num_experts) * size
        host += ffn.num_experts * size
        largest = max(largest, PIECES_IN_FLIGHT * expert_pieces(ffn.num_experts)[1] * size)
    gpu["resident_experts"], gpu["weight_buffers"] = kept / num_gpus, largest / num_gpus
    cpu["streamed_experts"], cpu["pinned_pages"] = host, 0.0
    choice = 12.0 * model.top_k
    gpu["ffn_slots"] = ACTIVATION_SLOTS * rows * (2 * model.hidden_bytes + choice)
    cpu["ffn_slots"] = ACTIVATION_SLOTS * rows * 8.0 * model.top_k


def kv_cache_bytes(model: MoEModel, batch_size: Any, batch_tokens: Any, gen_len: Any, *, num_gpus: int = 1) -> Any:
    """KV cache of a whole batch at the end of generation, all layers; windows keep no more than they see.

    With `num_gpus`, what each of them holds of it under tensor parallelism.
    """
    total: Any = 0.0
    encodes = bool(model.encoder_order)
    for kind, count in model.layer_counts.items():
        layer = model.kinds[kind]
        tokens = batch_size * gen_len + (0 if encodes else batch_tokens)
        if layer.attention.window is not None:
            tokens = np.minimum(tokens, batch_size * layer.attention.window)
        parts = kv_shards(layer.attention, num_gpus)
        total = total + count * tokens * model.kind_kv_token_bytes(kind) / parts
        if layer.cross_attention is not None:
            per_token = layer.cross_attention.kv_elements * model.kv_dtype_bytes
            total = total + count * batch_tokens * per_token / kv_shards(layer.cross_attention, num_gpus)
    return total


def _pinned_layers(traits: System, num_micro_batches: Any) -> Any:
    """Pinned memory for weights on their way, in layers' streamed parts."""
    if traits.pinned_layers is not None:
        return traits.pinned_layers
    return PINNED_PAGES / num_micro_batches


def batch_footprint(
    model: MoEModel, batch: BatchShape, policy: Policy, *, system: str = "moe-lightning", gate: Gate | None = None
) -> Footprint:
    """Memory of one batch with known prompt lengths: what the executor will allocate."""
    return footprint(
        model,
        batch_size=batch.batch_size,
        micro_batch_size=max(batch.sequences),
        num_micro_batches=batch.num_micro_batches,
        micro_batch_tokens=max(batch.prompt_tokens),
        batch_tokens=sum(batch.prompt_tokens),
        longest_prompt=max(batch.longest),
        gen_len=batch.gen_len,
        attention_on_gpu=policy.attention_on_gpu,
        ffn_on_gpu=policy.ffn_on_gpu,
        system=system,
        expert_slots=policy.expert_slots,
        gate=gate,
    ).at(policy.weights_on_gpu, policy.kv_on_gpu)


def usable_bytes(hardware: Hardware) -> tuple[float, float]:
    """Bytes that a run may take on each GPU and on the host of `hardware`."""
    if hardware.shared_memory:
        # Both heaps lie in the same RAM: the GPU's share is a budget, exact, and the host gets the rest.
        gpu = float(hardware.gpu.capacity)
        return gpu, max(0.0, _SHARED_USABLE * float(hardware.cpu.capacity) - gpu)
    return GPU_USABLE * float(hardware.gpu.capacity), _CPU_USABLE * float(hardware.cpu.capacity)


def check_fits(need: Footprint, hardware: Hardware) -> None:
    """Raise `DoesNotFit` saying which tier lacks how much for what."""
    for tier, total, items, room in zip(
        ("GPU", "CPU"),
        (need.gpu_bytes, need.cpu_bytes),
        (need.gpu, need.cpu),
        usable_bytes(hardware),
        strict=True,
    ):
        # Up to rounding: a policy that fills a memory fits it.
        if total > room * (1 + 1e-9):
            largest = max(items, key=lambda key: float(np.max(items[key])))
            raise DoesNotFit(
                f"the policy needs {format_bytes(total)} of {tier} memory and {hardware.name} has "
                f"{format_bytes(max(room, 0.0))} to use: {format_bytes(total - room)} too much "
                f"(largest: {largest}, {format_bytes(items[largest])}). "
                + (
                    "Lower --micro-batch-size, --weights-on-gpu or --expert-slots, or raise --device-memory."
                    if tier == "GPU"
                    else "Lower --batch-size, or raise --weights-on-gpu."
                )
            )
