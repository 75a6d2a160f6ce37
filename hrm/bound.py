"""Ceilings on tokens/s that no schedule can pass: every byte and FLOP that a run cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hrm.hardware import Hardware, Rates
from hrm.latency import contexts, decode_steps
from hrm.layers import Attention
from hrm.memory import kv_cache_bytes, usable_bytes
from hrm.model import MoEModel
from hrm.operators import active_experts, causal_pairs
from hrm.policy import Policy
from hrm.problem import placements, prompt_tokens
from hrm.workload import Workload

__all__ = ["Bound", "machine_bound", "physical_bound"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A ceiling on throughput, and what it comes from."""

    tok_s: float
    """Generated tokens per second."""
    policy: Policy
    """Sizes and shares that it holds for; where attention and experts are computed."""
    seconds: dict[str, float]
    """Seconds that each resource is needed for, however well everything overlaps."""

    @property
    def resource(self) -> str:
        """The resource that bounds."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "tok_s": self.tok_s,
            "resource": self.resource,
            "attention_on_gpu": self.policy.attention_on_gpu,
            "ffn_on_gpu": self.policy.ffn_on_gpu,
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        attention = "GPU" if self.policy.attention_on_gpu else "CPU"
        experts = "GPU" if self.policy.ffn_on_gpu else "CPU"
        return f"{self.tok_s:.4g} tok/s ({self.resource}; attention on the {attention}, experts on the {experts})"


def physical_bound(
    model: MoEModel,
    rates: Rates,
    policy: Policy,
    *,
    prompt_len: float,
    gen_len: int,
    num_gpus: int = 1,
) -> Bound:
    """Tokens/s that no schedule with these sizes, shares and places can pass.

    Each resource must do its whole work, however well phases, steps and micro-batches overlap; the busiest
    one bounds. Experts that no token chooses need not travel, nothing is staged, every kernel runs at the
    best rate of its curve, and weights of a batch are read once per step.

    Parameters
    ----------
    prompt_len : float
        Mean prompt length, tokens.

    Returns
    -------
    Bound
    """
    n, r_w, r_c = policy.batch_size, policy.weights_on_gpu, policy.kv_on_gpu
    steps = decode_steps(model, gen_len)
    first, last = contexts(model, prompt_len, gen_len)
    prompt = n * prompt_len
    encodes = bool(model.encoder_order)

    link_up = link_down = gpu_weights = gpu_kv = cpu_kv = 0.0
    dense = experts = attention = cpu_experts = cpu_attention = cpu_weights = 0.0  # FLOPs, and bytes of weights
    prefill_kinds = model.encoder_order or model.order
    for kind in prefill_kinds:
        layer = model.kinds[kind]
        ffn = layer.ffn
        per_token = 2 * (ffn.shared_parameters + layer.attention.projection_parameters)
        dense += prompt * per_token
        experts += prompt * 2 * ffn.top_k * ffn.expert_matrix_parameters
        pairs = prompt_len * prompt_len if encodes else causal_pairs(prompt_len, layer.attention.window)
        attention += n * float(pairs) * layer.attention.prefill_pair_flops
        active = float(active_experts(ffn, prompt)) * ffn.expert_parameters * model.expert_element_bytes
        if policy.ffn_on_gpu:
            link_up += (1 - r_w) * active
        if not encodes:
            link_down += (1 - r_c) * prompt * model.kind_kv_token_bytes(kind)
    for kind in model.order:
        layer = model.kinds[kind]
        ffn, own, cross = layer.ffn, layer.attention, layer.cross_attention
        active = float(active_experts(ffn, n)) * ffn.expert_parameters * model.expert_element_bytes
        flops = steps * n * 2 * ffn.top_k * ffn.expert_matrix_parameters
        on_gpu = 1.0 if policy.ffn_on_gpu else r_w
        experts += on_gpu * flops
        gpu_weights += steps * on_gpu * active
        cpu_experts += (1 - on_gpu) * flops
        cpu_weights += steps * (1 - on_gpu) * active
        if policy.ffn_on_gpu:
            link_up += steps * (1 - r_w) * active
        dense += steps * n * 2 * (ffn.shared_parameters + own.projection_parameters)
        gpu_weights += steps * layer.dense_parameters * model.dense_element_bytes
        seen = _mean_seen(own, first, last)
        kv = steps * n * seen * model.kind_kv_token_bytes(kind)
        pair_flops = steps * n * seen * own.pair_flops
        queries, attended = own.query_size + own.kv_elements, own.attended_size
        if cross is not None:
            cross_bytes = cross.kv_elements * model.kv_dtype_bytes
            kv += steps * prompt * cross_bytes
            pair_flops += steps * prompt * cross.pair_flops
            queries, attended = queries + cross.query_size, attended + cross.attended_size
            moved = sum(p.weights for p in (*cross.query_projections, *cross.output_projections))
            dense += steps * n * 2 * moved + prompt * 2 * sum(p.weights for p in cross.kv_projections)
            link_down += (1 - r_c) * prompt * cross_bytes
        if policy.attention_on_gpu:
            attention += pair_flops
            gpu_kv += kv
            link_up += (1 - r_c) * kv
            link_down += steps * (1 - r_c) * n * model.kind_kv_token_bytes(kind)
        else:
            cpu_attention += pair_flops
            cpu_kv += kv
            link_up += steps * n * attended * model.dtype_bytes
            link_down += steps * n * queries * model.dtype_bytes
    head = 2 * n * gen_len * model.hidden_size * model.vocab_size
    gpu = ((dense + head) / rates.gpu_gemm.peak + experts / rates.gpu_experts.peak) / num_gpus
    gpu += attention / rates.gpu_attention.peak / num_gpus
    gpu_memory = gpu_weights / rates.gpu_bandwidth + gpu_kv / rates.gpu_decode_attention.peak
    cpu_peak = max(rates.cpu_attention.peak, rates.dram_bandwidth, rates.cpu_weight_bandwidth)
    seconds = {
        "link (CPU to GPU)": link_up / rates.h2d_bandwidth,
        "link (GPU to CPU)": link_down / rates.d2h_bandwidth,
        "GPU": gpu,
        "GPU memory": gpu_memory / num_gpus,
        "CPU memory": (cpu_kv + cpu_weights + link_up) / cpu_peak,
        "CPU": cpu_experts / rates.cpu_experts.peak,
    }
    if rates.cpu_attention_flops is not None:
        seconds["CPU"] += cpu_attention / rates.cpu_attention_flops
    if rates.cores is not None:
        busy = gpu + cpu_kv / rates.cpu_attention.peak + cpu_experts / rates.cpu_experts.peak
        seconds["CPU cores"] = busy / rates.cores.peak
    return Bound(tok_s=n * gen_len / max(seconds.values()), policy=policy, seconds=seconds)


def _mean_seen(attention: Attention, first: float, last: float) -> float:
    """Mean number of tokens seen over contexts first, first + 1, .., last."""
    if last < first:
        return 0.0
    if attention.window is None:
        return 0.5 * (first + last)
    each = np.linspace(first, last, round(last - first) + 1)
    return float(np.minimum(each, attention.window).mean())


def machine_bound(model: MoEModel, hardware: Hardware, workload: Workload, *, efficiency: str | None = None) -> Bound:
    """Tokens/s that no policy at all can pass on a machine, its memories included.

    For each place of attention and experts: the largest batch whose weights and KV the memories hold
    together, and the largest shares that fit the GPU, each as if the other asked for nothing.
    """
    rates = hardware.rates(efficiency)
    gpu_room, cpu_room = usable_bytes(hardware)
    gpu_room *= hardware.num_gpus
    prompt = workload.effective_prompt
    per_sequence = float(kv_cache_bytes(model, 1.0, prompt, workload.gen_len))
    most = int(max(1.0, (gpu_room + cpu_room - model.weight_bytes) / per_sequence))
    left = max(0.0, gpu_room - model.dense_bytes)
    sizes, n = [], 1
    while n < most:
        sizes.append(n)
        n *= 2
    best: Bound | None = None
    for size in [*sizes, most]:
        if workload.prompt_lens and not workload.padded:
            prompt = float(prompt_tokens(workload, size)) / size
        kv = float(kv_cache_bytes(model, size, size * prompt, workload.gen_len))
        for place in placements():
            if not (place.streams_weights and place.streams_kv):
                continue
            policy = Policy(
                batch_size=size,
                micro_batch_size=size,
                attention_on_gpu=place.attention_on_gpu,
                ffn_on_gpu=place.ffn_on_gpu,
                weights_on_gpu=min(1.0, left / model.streamed_bytes),
                kv_on_gpu=min(1.0, left / kv) if place.attention_on_gpu else 0.0,
            )
            options = {"prompt_len": prompt, "gen_len": workload.gen_len, "num_gpus": hardware.num_gpus}
            tries = [policy]
            if not place.ffn_on_gpu:  # any split between the processors
                tries = [replace(policy, weights_on_gpu=policy.weights_on_gpu * x / 16) for x in range(17)]
            for one in tries:
                found = physical_bound(model, rates, one, **options)  # type: ignore[arg-type]
                if best is None or found.tok_s > best.tok_s:
                    best = found
    assert best is not None
    return best
