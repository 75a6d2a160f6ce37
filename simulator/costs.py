"""What each task of a schedule asks for: seconds alone, and shares of what lanes have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hrm.hardware import Curve, Rates
from hrm.latency import TaskTimes
from hrm.model import MoEModel
from hrm.operators import Operator, distinct_experts, post_attention, pre_attention, prefill_layer, sampling
from hrm.pipeline import BatchShape
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
    schedule: Schedule, model: MoEModel, batch: BatchShape, *, streamed: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that each task moves and FLOPs that it computes.

    Bytes are what crosses the link, is staged, or is read of weights or KV cache by a kernel; experts
    count as far as uniform routing is expected to touch them.

    Parameters
    ----------
    streamed : float
        Bytes of one layer's experts that travel.

    Returns
    -------
    bytes, flops : ndarray, length ``len(schedule)``
    """
    moved, flops = np.zeros(len(schedule)), np.zeros(len(schedule))
    sequences, tokens = _column(batch.sequences), _column(batch.prompt_tokens)
    times_kv = model.kv_token_bytes

    def fill(op: Op, size: np.ndarray, operators: list[Operator] | None = None) -> None:
        where = schedule.mask(op)
        part = schedule.part[where]
        moved[where] = size[part]
        if operators is not None:
            flops[where] = np.asarray(sum(x.flops for x in operators))[part]

    pairs, longest = _column(batch.pairs), _column(batch.longest)
    qkv = sequences * (model.q_size + 2 * model.kv_size) * model.dtype_bytes
    dense = np.full_like(sequences, model.attention_parameters * model.dtype_bytes)
    head = np.full_like(sequences, model.vocab_size * model.hidden_bytes)
    fill(Op.PRE_ATTN, dense, pre_attention(model, sequences))
    fill(Op.POST_ATTN, distinct_experts(model, sequences) * model.expert_bytes, post_attention(model, sequences))
    fill(Op.SAMPLE, head, sampling(model, sequences))
    fill(
        Op.PREFILL,
        distinct_experts(model, tokens) * model.expert_bytes,
        prefill_layer(model, tokens, pairs, longest),
    )
    fill(Op.OFFLOAD_QKV, qkv)
    fill(Op.LOAD_H, sequences * model.q_size * model.dtype_bytes)
    fill(Op.LOAD_X, tokens * model.hidden_bytes)
    fill(Op.OFFLOAD_KV, tokens * (times_kv + model.hidden_bytes))
    # Nobody reads the last layer's prompt states.
    tail = schedule.mask(Op.OFFLOAD_KV) & (schedule.layer == model.num_layers - 1)
    moved[tail] = tokens[schedule.part[tail]] * times_kv
    page = np.full(schedule.num_micro_batches, streamed / schedule.num_micro_batches)
    fill(Op.LOAD_W, page)
    fill(Op.STAGE_W, page)
    where = schedule.mask(Op.CPU_ATTN)
    context = _cached_tokens(schedule, batch)[where]
    moved[where] = context * times_kv
    flops[where] = 4 * context * model.q_size
    return moved, flops


def _column(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=float)


def _cached_tokens(schedule: Schedule, batch: BatchShape) -> np.ndarray:
    """Tokens in the KV cache that a task's micro-batch attends to, per task."""
    sequences, cached = _column(batch.sequences), _column(batch.cached_tokens)
    part = np.minimum(schedule.part, batch.num_micro_batches - 1)
    return cached[part] + sequences[part] * schedule.step


def schedule_costs(
    schedule: Schedule, model: MoEModel, rates: Rates, batch: BatchShape, *, weights_on_gpu: float
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

    Returns
    -------
    Costs
    """
    times = TaskTimes(model, rates)
    streamed = (1 - weights_on_gpu) * model.layer_expert_bytes
    moved, flops = task_work(schedule, model, batch, streamed=streamed)
    seconds = np.zeros(len(schedule))
    sequences, tokens = _column(batch.sequences), _column(batch.prompt_tokens)
    calls = np.array([len(blocks) for blocks in batch.blocks], dtype=float)

    per_part = {
        Op.PRE_ATTN: times.pre_attention(sequences),
        Op.POST_ATTN: times.post_attention(sequences),
        Op.SAMPLE: times.sample(sequences),
        Op.PREFILL: times.prefill(tokens, _column(batch.pairs), _column(batch.longest)),
    }
    for op, values in per_part.items():
        where = schedule.mask(op)
        seconds[where] = values[schedule.part[where]]
    up, down, staging = _any(schedule, _UP), _any(schedule, _DOWN), schedule.mask(Op.STAGE_W)
    seconds[up], seconds[down] = times.h2d(moved[up]), times.d2h(moved[down])
    seconds[staging] = times.staging(moved[staging])
    offload = schedule.mask(Op.OFFLOAD_KV)
    kv = (tokens * model.kv_token_bytes)[schedule.part[offload]]
    seconds[offload] = times.offload_kv(moved[offload] - kv, kv)
    attention = schedule.mask(Op.CPU_ATTN)
    part = schedule.part[attention]
    context = _cached_tokens(schedule, batch)[attention]
    seconds[attention] = times.cpu_attention(sequences[part], context, calls[part])

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
