"""What each task of a schedule asks for: seconds alone, and shares of what lanes have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.errors import NotBuiltYet
from hrm.hardware import Curve, Rates
from hrm.layers import Layer
from hrm.model import MoEModel
from hrm.operators import Operator, active_experts, post_attention, pre_attention, prefill_layer, sampling
from hrm.pipeline import BatchShape
from hrm.task_times import TaskTimes
from simulator.task import Op, Schedule

__all__ = ["Costs", "schedule_costs", "task_work"]


@dataclass(frozen=True)
class Costs:
    """Work of every task of a schedule (arrays of length `len(schedule)`)."""

    seconds: np.ndarray
    """Duration when nothing else runs."""
    bytes: np.ndarray
    """Bytes moved: over the link, staged, or read from the KV cache."""
    flops: np.ndarray
    demands: dict[str, np.ndarray]
    """For each shared resource, units per second that the task uses while it runs at full speed."""
    capacities: dict[str, float | Curve]
    """For each shared resource, units per second that it has, or that it gives by how many are wanted."""

    def without_contention(self) -> Costs:
        """The same tasks with every lane on resources of its own."""
        return Costs(self.seconds, self.bytes, self.flops, {}, {})


def task_work(
    schedule: Schedule, model: MoEModel, batch: BatchShape, *, streamed: float | dict[int, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that each task moves and FLOPs that it computes.

    Bytes are what crosses the link, is staged, or is read of weights or KV cache by a kernel; experts
    count as far as uniform routing is expected to touch them.

    Parameters
    ----------
    streamed : float or dict
        Bytes of a layer's experts that travel; by kind of layer, where kinds differ.

    Returns
    -------
    bytes, flops : ndarray, length ``len(schedule)``
    """
    moved, flops = np.zeros(len(schedule)), np.zeros(len(schedule))
    sequences, tokens = _column(batch.sequences), _column(batch.prompt_tokens)
    pairs, longest = _column(batch.pairs), _column(batch.longest)
    head = np.full_like(sequences, model.vocab_size * model.hidden_bytes)
    kinds = np.array(model.order)[schedule.layer]
    for kind in sorted(set(model.order)):
        layer = model.kinds[kind]
        of_kind = kinds == kind

        def fill(op: Op, size: np.ndarray, operators: list[Operator] | None = None, of_kind: Any = of_kind) -> None:
            where = schedule.mask(op) & of_kind
            part = schedule.part[where]
            moved[where] = size[part]
            if operators is not None:
                flops[where] = np.asarray(sum(x.flops for x in operators))[part]

        attention, ffn = layer.attention, layer.ffn
        kv = model.kind_kv_token_bytes(kind)
        expert = ffn.expert_parameters * model.expert_element_bytes
        dense = np.full_like(sequences, attention.projection_parameters * model.dense_element_bytes)
        fill(Op.PRE_ATTN, dense, pre_attention(model, sequences, layer))
        fill(Op.POST_ATTN, active_experts(ffn, sequences) * expert, post_attention(model, sequences, layer))
        fill(Op.SAMPLE, head, sampling(model, sequences))
        fill(Op.PREFILL, active_experts(ffn, tokens) * expert, prefill_layer(model, tokens, pairs, longest, layer))
        fill(Op.OFFLOAD_QKV, sequences * (attention.query_size + attention.kv_elements) * model.dtype_bytes)
        fill(Op.LOAD_H, sequences * attention.attended_size * model.dtype_bytes)
        fill(Op.LOAD_X, tokens * model.hidden_bytes)
        kept = _kept_tokens(batch, layer)
        fill(Op.OFFLOAD_KV, kept * kv + tokens * model.hidden_bytes)
        # Nobody reads the last layer's prompt states.
        tail = schedule.mask(Op.OFFLOAD_KV) & of_kind & (schedule.layer == model.num_layers - 1)
        moved[tail] = kept[schedule.part[tail]] * kv
        travels = streamed[kind] if isinstance(streamed, dict) else streamed
        page = np.full(schedule.num_micro_batches, travels / schedule.num_micro_batches)
        fill(Op.LOAD_W, page)
        fill(Op.STAGE_W, page)
        where = schedule.mask(Op.CPU_ATTN) & of_kind
        seen = _seen_tokens(schedule, batch, layer)[where]
        moved[where] = seen * kv
        flops[where] = attention.pair_flops * seen
    return moved, flops


def _column(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=float)


def _cached_tokens(schedule: Schedule, batch: BatchShape) -> np.ndarray:
    """Tokens in the KV cache that a task's micro-batch attends to, per task."""
    sequences, cached = _column(batch.sequences), _column(batch.cached_tokens)
    part = np.minimum(schedule.part, batch.num_micro_batches - 1)
    return cached[part] + sequences[part] * schedule.step


def _kept_tokens(batch: BatchShape, layer: Layer) -> np.ndarray:
    """Prompt tokens of each micro-batch whose keys and values the layer's window will see again."""
    window = layer.attention.window
    if window is None:
        return _column(batch.prompt_tokens)
    return _column([sum(min(length, window) for length in lengths) for lengths in batch.micro_batches])


def _seen_tokens(schedule: Schedule, batch: BatchShape, layer: Layer) -> np.ndarray:
    """As `_cached_tokens`, cut by the layer's window."""
    cached = _cached_tokens(schedule, batch)
    if layer.attention.window is None:
        return cached
    sequences = _column(batch.sequences)[np.minimum(schedule.part, batch.num_micro_batches - 1)]
    return np.minimum(cached, sequences * layer.attention.window)


def schedule_costs(
    schedule: Schedule,
    model: MoEModel,
    rates: Rates,
    batch: BatchShape,
    *,
    weights_on_gpu: float,
    num_gpus: int = 1,
) -> Costs:
    """Turn every task into work.

    Parameters
    ----------
    schedule : Schedule
    model : MoEModel
    rates : Rates
        What the machine attains.
    batch : BatchShape
        Prompt lengths of each micro-batch; ``batch.gen_len`` is not used, the schedule's steps are.
    weights_on_gpu : float
        r_w.
    num_gpus : int
        GPUs that share every layer; the GPU lane is all of them in lockstep.

    Returns
    -------
    Costs

    Raises
    ------
    NotBuiltYet
        For encoder-decoder models.
    """
    if model.encoder_order:
        raise NotBuiltYet(f"schedules of encoder-decoder models such as {model.name!r} are not built yet.")
    times = TaskTimes(model, rates, num_gpus)
    streamed = {kind: (1 - weights_on_gpu) * model.kind_expert_bytes(kind) for kind in set(model.order)}
    moved, flops = task_work(schedule, model, batch, streamed=streamed)
    seconds = np.zeros(len(schedule))
    sequences, tokens = _column(batch.sequences), _column(batch.prompt_tokens)
    calls = np.array([len(blocks) for blocks in batch.blocks], dtype=float)
    kinds = np.array(model.order)[schedule.layer]
    attention = schedule.mask(Op.CPU_ATTN)
    for kind in sorted(set(model.order)):
        layer = model.kinds[kind]
        of_kind = kinds == kind
        per_part = {
            Op.PRE_ATTN: times.pre_attention(sequences, layer),
            Op.POST_ATTN: times.post_attention(sequences, layer),
            Op.SAMPLE: times.sample(sequences),
            Op.PREFILL: times.prefill(tokens, _column(batch.pairs), _column(batch.longest), layer),
        }
        for op, values in per_part.items():
            where = schedule.mask(op) & of_kind
            seconds[where] = values[schedule.part[where]]
        where = schedule.mask(Op.OFFLOAD_KV) & of_kind
        kv = (_kept_tokens(batch, layer) * model.kind_kv_token_bytes(kind))[schedule.part[where]]
        seconds[where] = times.offload_kv(moved[where] - kv, kv)
        where = attention & of_kind
        part = schedule.part[where]
        context = _cached_tokens(schedule, batch)[where]
        seconds[where] = times.cpu_attention(sequences[part], context, calls[part], layer=layer)
    up, down, staging = _any(schedule, _UP), _any(schedule, _DOWN), schedule.mask(Op.STAGE_W)
    plain_down = down & ~schedule.mask(Op.OFFLOAD_KV)
    seconds[up], seconds[plain_down] = times.h2d(moved[up]), times.d2h(moved[plain_down])
    seconds[staging] = times.staging(moved[staging])

    copies = up | down
    compute = ~(copies | staging | attention)
    safe = np.where(seconds > 0, seconds, 1.0)
    dram = moved / safe
    # A copy by a core reads and writes CPU memory; a transfer by a GPU's copy engine only reads it.
    copies_by_core = rates.copy_bandwidth is not None
    dram[copies] *= 2 if copies_by_core else 1
    dram[staging] *= 2
    if not copies_by_core:
        dram[compute] = 0.0
    # One task alone never runs slower than alone, whatever the capacity says.
    demands = {"dram": np.minimum(dram, rates.dram_bandwidth)}
    capacities: dict[str, float | Curve] = {"dram": rates.dram_bandwidth}
    if rates.cores is not None:
        cores = np.ones(len(schedule))
        cores[copies] = np.minimum(1.0, times.copy_core_seconds(moved[copies]) / safe[copies])
        demands["cores"], capacities["cores"] = cores, rates.cores
    return Costs(seconds, moved, flops, demands, capacities)


_UP = (Op.LOAD_W, Op.LOAD_H, Op.LOAD_X)
_DOWN = (Op.OFFLOAD_QKV, Op.OFFLOAD_KV)


def _any(schedule: Schedule, ops: tuple[Op, ...]) -> np.ndarray:
    return np.logical_or.reduce([schedule.mask(op) for op in ops])
