"""From work to seconds: the only place where FLOPs and bytes become time.

The planner adds these up in closed form and the simulator plays them task by task. Arguments may be
numbers or numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.hardware import Rates
from hrm.layers import Layer
from hrm.model import MoEModel
from hrm.operators import (
    Operator,
    active_experts,
    after_attention,
    attention_core,
    cross_attention_keys,
    cross_attention_queries,
    encoder_layer,
    expert_ffn,
    post_attention,
    pre_attention,
    prefill_layer,
    sampling,
    sharded,
)

__all__ = ["TaskTimes", "operator_seconds"]


def operator_seconds(op: Operator, rates: Rates) -> Any:
    """Eq. 14: T_x = max(communication, computation), plus what launching its kernels costs.

    Decode attention (kind ``attention``) runs on the CPU here, everything else on the GPU.

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
    """Seconds of every task class on a machine, each alone.

    With `num_gpus` the GPUs work in lockstep (tensor parallelism, MoE-Lightning section 4.3): each has its
    share of every matrix, and after the O projection and after the FFN they add up their results. Hidden states
    travel over the link once, in parts that the GPUs exchange.
    """

    model: MoEModel
    rates: Rates
    num_gpus: int = 1

    def _gpu(self, operators: Iterable[Operator]) -> Any:
        whole = sum(operator_seconds(sharded(op, self.num_gpus), self.rates) for op in operators)
        return whole if self.num_gpus == 1 else whole / self.rates.parallel_efficiency

    def pre_attention(self, tokens: Any, layer: Layer | None = None) -> Any:
        """PreAttn of a micro-batch of `tokens` sequences."""
        return self.rates.task_s + self._gpu(pre_attention(self.model, tokens, layer))

    def post_attention(self, tokens: Any, layer: Layer | None = None) -> Any:
        """PostAttn of a micro-batch of `tokens` sequences."""
        operators = post_attention(self.model, tokens, layer)
        return self.rates.task_s + self._gpu(operators) + self.all_reduce(tokens)

    def after_attention(self, tokens: Any, layer: Layer | None = None) -> Any:
        """PostAttn without the routed experts."""
        operators = after_attention(self.model, tokens, layer)
        return self.rates.task_s + self._gpu(operators) + self.all_reduce(tokens)

    def gpu_experts(self, tokens: Any, layer: Layer | None = None) -> Any:
        """The routed experts of a micro-batch, on the GPU, all of them."""
        return self.on_gpu(expert_ffn(self.model, tokens, layer))

    def on_gpu(self, op: Operator) -> Any:
        """One operator on the GPU."""
        return self._gpu([op])

    def cpu_experts(self, tokens: Any, layer: Layer | None = None) -> Any:
        """The routed experts of a micro-batch, on the CPU, all of them."""
        return self.experts_on_cpu(expert_ffn(self.model, tokens, layer))

    def experts_on_cpu(self, op: Operator) -> Any:
        """Routed experts on the CPU."""
        compute = op.flops / self.rates.cpu_experts.at(op.rows)
        return np.maximum(compute, op.weight_bytes / self.rates.cpu_weight_bandwidth)

    def cross_attention(self, tokens: Any, layer: Layer) -> Any:
        """The GPU's part of attention over the encoder's output."""
        return self._gpu(cross_attention_queries(self.model, tokens, layer)) + self.all_reduce(tokens) / 2

    def cross_keys(self, tokens: Any, layer: Layer) -> Any:
        """Keys and values of `tokens` encoder outputs."""
        return self._gpu(cross_attention_keys(self.model, tokens, layer))

    def sample(self, tokens: Any) -> Any:
        """Final norm, LM head and choice of the next token."""
        return self.rates.task_s + self._gpu(sampling(self.model, tokens))

    def prefill(self, tokens: Any, pairs: Any, longest: Any, layer: Layer | None = None, *, requests: Any = 0) -> Any:
        """One layer of prefill of a micro-batch of `requests` prompts."""
        operators = prefill_layer(self.model, tokens, pairs, longest, layer)
        each = requests * self.rates.request_s
        return self.rates.task_s + self._gpu(operators) + each + self.all_reduce(tokens)

    def encode(self, tokens: Any, pairs: Any, longest: Any, layer: Layer) -> Any:
        """One encoder layer on a micro-batch of prompts."""
        operators = encoder_layer(self.model, tokens, pairs, longest, layer)
        return self.rates.task_s + self._gpu(operators) + self.all_reduce(tokens)

    def all_reduce(self, tokens: Any) -> Any:
        """Two all-reduces of `tokens` hidden states: each GPU sends 2(n-1)/n of them to its peers."""
        if self.num_gpus == 1 or self.rates.peer_bandwidth is None:
            return 0.0
        share = 2 * (self.num_gpus - 1) / self.num_gpus
        return 2 * (self.rates.peer_s + share * tokens * self.model.hidden_bytes / self.rates.peer_bandwidth)

    def cpu_attention(self, sequences: Any, cached_tokens: Any, layer: Layer | None = None, cross: bool = False) -> Any:
        """Decode attention of a micro-batch whose KV caches hold `cached_tokens` in all."""
        op = attention_core(self.model, sequences, cached_tokens / sequences, layer=layer, cross=cross)
        return self.rates.task_s + self.rates.cpu_task_s + operator_seconds(op, self.rates)

    def gpu_attention(self, sequences: Any, cached_tokens: Any, layer: Layer | None = None, cross: bool = False) -> Any:
        """Decode attention of a micro-batch on the GPU, with its KV there."""
        op = attention_core(self.model, sequences, cached_tokens / sequences, layer=layer, cross=cross)
        chosen = layer or self.model.main_layer
        attention = chosen.cross_attention if cross and chosen.cross_attention else chosen.attention
        part = sharded(op, self.num_gpus, attention)
        memory = part.kv_bytes / self.rates.gpu_decode_attention.at(op.rows)
        compute = part.flops / self.rates.gpu_attention.peak
        overhead = self.rates.task_s + self.rates.gpu_attention_s + op.launches * self.rates.gpu_launch_s
        return overhead + np.maximum(memory, compute)

    def h2d(self, size: Any) -> Any:
        """A transfer of `size` bytes to the GPU."""
        return self.rates.task_s + self.rates.transfer_s + size / self.rates.h2d_bandwidth

    def d2h(self, size: Any) -> Any:
        """A transfer of `size` bytes to the host."""
        return self.rates.task_s + self.rates.transfer_s + size / self.rates.d2h_bandwidth

    def offload_routed(self, hidden: Any) -> Any:
        """Hidden states to the host, and with them every token's experts and their weights, in copies of their own."""
        return self.d2h(hidden) + 2 * self.rates.transfer_s

    def offload_kv(self, hidden: Any, kv: Any) -> Any:
        """Prompt hidden states and KV to the host, where a copy scatters the KV into the cache."""
        transfers = np.where(np.asarray(hidden) > 0, 2, 1) * self.rates.transfer_s
        link = (hidden + kv) / self.rates.d2h_bandwidth
        return self.rates.task_s + transfers + link + kv / self.rates.staging_bandwidth

    def staging(self, size: Any) -> Any:
        """A copy of `size` bytes from pageable to pinned memory."""
        return self.rates.task_s + size / self.rates.staging_bandwidth

    def kv_staging(self, size: Any) -> Any:
        """A copy of `size` bytes of the KV cache from pageable to pinned memory."""
        return self.rates.task_s + size / (self.rates.kv_staging_bandwidth or self.rates.staging_bandwidth)

    def qkv_bytes(self, tokens: Any, layer: Layer | None = None) -> Any:
        """What OffloadQKV moves for `tokens` sequences."""
        attention = (layer or self.model.main_layer).attention
        return tokens * (attention.query_size + attention.kv_elements) * self.model.dtype_bytes

    def attended_bytes(self, tokens: Any, layer: Layer | None = None) -> Any:
        """What LoadH moves for `tokens` sequences."""
        return tokens * (layer or self.model.main_layer).attention.attended_size * self.model.dtype_bytes

    def active_expert_bytes(self, tokens: Any, layer: Layer | None = None) -> Any:
        """Weights of the experts that `tokens` tokens activate."""
        ffn = (layer or self.model.main_layer).ffn
        return active_experts(ffn, tokens) * ffn.expert_parameters * self.model.expert_element_bytes
