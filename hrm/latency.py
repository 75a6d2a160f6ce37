"""From work to seconds: task times, Eq. 12-14, prefill, and the throughput of a whole run.

`TaskTimes` is the only place where FLOPs and bytes become seconds; the planner adds its answers up in
closed form and the simulator plays them task by task. Arguments may be numbers or numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.hardware import Rates
from hrm.model import MoEModel
from hrm.operators import (
    Operator,
    attention_core,
    post_attention,
    pre_attention,
    prefill_layer,
    sampling,
)
from hrm.pipeline import LOOKAHEAD

__all__ = ["Estimate", "TaskTimes", "estimate", "operator_seconds"]


def operator_seconds(op: Operator, rates: Rates) -> Any:
    """Eq. 14: T_x = max(communication, computation), plus what launching its kernels costs.

    Parameters
    ----------
    op : Operator
    rates : Rates
        What the machine attains.

    Returns
    -------
    float or array
        Seconds on the processor that runs it, alone.
    """
    if op.kind == "attention":
        memory = op.kv_bytes / rates.cpu_attention.at(op.rows)
        if rates.cpu_attention_flops is None:
            return memory
        return np.maximum(op.flops / rates.cpu_attention_flops, memory)
    launch = op.launches * rates.gpu_launch_s
    memory = op.bytes / rates.gpu_bandwidth
    if op.kind == "elementwise":
        return launch + memory
    curve = {
        "gemm": rates.gpu_gemm,
        "experts": rates.gpu_experts,
        "causal_attention": rates.gpu_attention,
    }[op.kind]
    compute = op.flops / curve.at(op.rows)
    if op.kind == "experts" and len(curve.points) > 1:
        # A measured curve was taken on the whole expert kernel: launches and memory are in it.
        return np.maximum(compute, op.weight_bytes / rates.gpu_bandwidth)
    return launch + np.maximum(compute, memory)


@dataclass(frozen=True, slots=True)
class TaskTimes:
    """Seconds of every task class on a machine, each alone."""

    model: MoEModel
    rates: Rates

    def _gpu(self, operators: Iterable[Operator]) -> Any:
        return self.rates.task_s + sum(operator_seconds(op, self.rates) for op in operators)

    def pre_attention(self, tokens: Any) -> Any:
        """PreAttn of a micro-batch of `tokens` sequences."""
        return self._gpu(pre_attention(self.model, tokens))

    def post_attention(self, tokens: Any) -> Any:
        """PostAttn of a micro-batch of `tokens` sequences."""
        return self._gpu(post_attention(self.model, tokens))

    def sample(self, tokens: Any) -> Any:
        """Final norm, LM head and choice of the next token."""
        return self._gpu(sampling(self.model, tokens))

    def prefill(self, tokens: Any, pairs: Any, longest: Any) -> Any:
        """One layer of prefill of a micro-batch."""
        return self._gpu(prefill_layer(self.model, tokens, pairs, longest))

    def cpu_attention(self, sequences: Any, cached_tokens: Any, calls: Any = 1) -> Any:
        """Decode attention of a micro-batch whose KV caches hold `cached_tokens` in all."""
        op = attention_core(self.model, sequences, cached_tokens / sequences)
        return self.rates.task_s + calls * self.rates.cpu_task_s + operator_seconds(op, self.rates)

    def h2d(self, size: Any) -> Any:
        """A transfer of `size` bytes to the GPU."""
        return self.rates.task_s + self.rates.transfer_s + size / self.rates.h2d_bandwidth

    def d2h(self, size: Any) -> Any:
        """A transfer of `size` bytes to the host."""
        return self.rates.task_s + self.rates.transfer_s + size / self.rates.d2h_bandwidth

    def offload_kv(self, hidden: Any, kv: Any) -> Any:
        """Prompt hidden states and KV to the host, where a copy scatters the KV into the cache."""
        transfers = np.where(np.asarray(hidden) > 0, 2, 1) * self.rates.transfer_s
        link = (hidden + kv) / self.rates.d2h_bandwidth
        return self.rates.task_s + transfers + link + kv / self.rates.staging_bandwidth

    def staging(self, size: Any) -> Any:
        """A copy of `size` bytes from pageable to pinned memory."""
        return self.rates.task_s + size / self.rates.staging_bandwidth

    def qkv_bytes(self, tokens: Any) -> Any:
        """What OffloadQKV moves for `tokens` sequences."""
        return tokens * (self.model.q_size + 2 * self.model.kv_size) * self.model.dtype_bytes

    def attended_bytes(self, tokens: Any) -> Any:
        """What LoadH moves for `tokens` sequences."""
        return tokens * self.model.q_size * self.model.dtype_bytes

    def copy_core_seconds(self, size: Any) -> Any:
        """Core time of a copy of `size` bytes where copies are made by a core, else 0."""
        return 0.0 * size if self.rates.copy_bandwidth is None else size / self.rates.copy_bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Closed-form prediction of a run; numbers, or arrays over a planner's grid."""

    throughput: Any
    """Generated tokens per second, prefill included."""
    prefill_s: Any
    decode_s: Any
    layer_s: Any
    """T_layer of Eq. 12 at the middle of generation."""
    terms: dict[str, Any]
    """Seconds that each resource needs for one layer of decode; the largest binds."""

    def at(self, index: Any) -> Estimate:
        """The estimate of one point of a grid."""
        return Estimate(
            throughput=float(self.throughput[index]),
            prefill_s=float(self.prefill_s[index]),
            decode_s=float(self.decode_s[index]),
            layer_s=float(self.layer_s[index]),
            terms={key: float(np.broadcast_to(v, self.throughput.shape)[index]) for key, v in self.terms.items()},
        )

    @property
    def bottleneck(self) -> str:
        """Name of the resource that binds decode."""
        return max(self.terms, key=lambda key: float(self.terms[key]))


def _copy_passes(rates: Rates) -> int:
    """Times that a byte over the link passes CPU memory: a copy by a core reads and writes it there."""
    return 1 if rates.copy_bandwidth is None else 2


def _staged_passes(rates: Rates) -> int:
    """Times that a streamed byte passes CPU memory: read and written for staging, then the link's."""
    return 2 + _copy_passes(rates)


def layer_terms(
    times: TaskTimes, *, micro_batch_size: Any, num_micro_batches: Any, context: Any, weights_on_gpu: Any
) -> dict[str, Any]:
    """Seconds that each resource needs for one layer of one decode step (terms of Eq. 12 and 13).

    Beside the paper's three terms (link, GPU, CPU) come those that it leaves out: the other direction of
    the link, the staging copy, memory bandwidth and cores that several lanes share, and the latency of
    the chain PreAttn..PostAttn of which Algorithm 1 keeps only two in flight.
    """
    mu, g = micro_batch_size, num_micro_batches
    model, rates = times.model, times.rates
    streamed = (1 - weights_on_gpu) * model.layer_expert_bytes
    pages = np.where(np.asarray(streamed) > 0, g, 0)
    pre, post = times.pre_attention(mu), times.post_attention(mu)
    attention = times.cpu_attention(mu, mu * context)
    qkv, attended = times.qkv_bytes(mu), times.attended_bytes(mu)
    up, down = times.h2d(attended), times.d2h(qkv)
    per_transfer = rates.task_s + rates.transfer_s
    terms = {
        "link (CPU to GPU)": streamed / rates.h2d_bandwidth + pages * per_transfer + g * up,
        "link (GPU to CPU)": g * down,
        "GPU": g * (pre + post),
        "CPU attention": g * attention,
        "staging copy": streamed / rates.staging_bandwidth,
        "pipeline latency": g * (pre + down + attention + up + post) / np.minimum(LOOKAHEAD, g),
        "CPU memory": (
            _staged_passes(rates) * streamed
            + _copy_passes(rates) * g * (qkv + attended)
            + g * mu * context * model.kv_token_bytes
        )
        / rates.dram_bandwidth,
    }
    if rates.cores is not None:
        copies = times.copy_core_seconds(streamed + g * (qkv + attended))
        work = g * (pre + post) + g * attention + copies + streamed / rates.staging_bandwidth
        terms["CPU cores"] = work / rates.cores.peak
    return terms


def prefill_seconds(
    times: TaskTimes, *, micro_batch_size: Any, num_micro_batches: Any, prompt_len: Any, weights_on_gpu: Any
) -> Any:
    """Prefill on the GPU with weights streamed, hidden states and KV offloaded."""
    mu, g, s = micro_batch_size, num_micro_batches, prompt_len
    model, rates = times.model, times.rates
    tokens = mu * s
    streamed = (1 - weights_on_gpu) * model.layer_expert_bytes
    compute = times.prefill(tokens, mu * s * (s + 1) / 2, s)
    hidden, kv = tokens * model.hidden_bytes, tokens * model.kv_token_bytes
    up = streamed / rates.h2d_bandwidth + g * times.h2d(hidden)
    down = g * times.offload_kv(hidden, kv)
    # Staged bytes are read, written and read again; prompt states and KV are written and read.
    traffic = _staged_passes(rates) * streamed + g * (2 * hidden + 3 * kv)
    layer = np.maximum.reduce(
        np.broadcast_arrays(up, down, g * compute, streamed / rates.staging_bandwidth, traffic / rates.dram_bandwidth)
    )
    if rates.cores is not None:
        copies = times.copy_core_seconds(streamed + g * (2 * hidden + kv)) + streamed / rates.staging_bandwidth
        layer = np.maximum(layer, (g * compute + copies) / rates.cores.peak)
    first_load = streamed / np.minimum(rates.h2d_bandwidth, rates.staging_bandwidth)
    return first_load + model.num_layers * layer + g * times.sample(mu)


def estimate(
    model: MoEModel,
    rates: Rates,
    *,
    micro_batch_size: Any,
    num_micro_batches: Any,
    prompt_len: Any,
    gen_len: int,
    weights_on_gpu: Any,
) -> Estimate:
    """Predict a whole run in closed form.

    The first token comes from prefill, the others from ``gen_len - 1`` decode steps whose context grows
    by one; T_layer is integrated over the context by Simpson's rule.

    Parameters
    ----------
    micro_batch_size, num_micro_batches, prompt_len, weights_on_gpu : number or array
        μ, G, s and r_w; arrays broadcast.
    gen_len : int
        n, tokens generated per request.

    References
    ----------
    MoE-Lightning, Eq. 12-14.
    """
    times = TaskTimes(model, rates)

    def step(context: Any) -> tuple[Any, Any, dict[str, Any]]:
        terms = layer_terms(
            times,
            micro_batch_size=micro_batch_size,
            num_micro_batches=num_micro_batches,
            context=context,
            weights_on_gpu=weights_on_gpu,
        )
        layer = np.maximum.reduce(np.broadcast_arrays(*terms.values()))
        tail = num_micro_batches * times.sample(micro_batch_size)
        # The head of one step overlaps with weights of the next only as far as the GPU has time to spare.
        whole = np.maximum(model.num_layers * layer, model.num_layers * terms["GPU"] + tail)
        return whole, layer, terms

    first, _, _ = step(prompt_len + 1)
    middle, layer, terms = step(prompt_len + 0.5 * gen_len)
    last, _, _ = step(prompt_len + gen_len - 1)
    decode = (gen_len - 1) * (first + 4 * middle + last) / 6
    prefill = prefill_seconds(
        times,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        prompt_len=prompt_len,
        weights_on_gpu=weights_on_gpu,
    )
    tokens = np.asarray(micro_batch_size * num_micro_batches * gen_len, dtype=float)
    return Estimate(
        throughput=tokens / (prefill + decode),
        prefill_s=prefill,
        decode_s=decode,
        layer_s=layer,
        terms=terms,
    )
