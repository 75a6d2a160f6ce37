"""Ceilings on tokens/s that no schedule can pass: every byte and FLOP that a run cannot avoid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hrm.errors import InvalidValue
from hrm.hardware import Hardware, Rates
from hrm.latency import contexts, decode_steps
from hrm.layers import Attention
from hrm.memory import kv_cache_bytes, usable_bytes
from hrm.model import MoEModel
from hrm.operators import active_experts, causal_pairs, seen_tokens
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
        places = f"attention on the {attention}, experts on the {self.policy.experts_on}"
        return f"{self.tok_s:.4g} tok/s ({self.resource}; {places})"


def physical_bound(
    model: MoEModel,
    rates: Rates,
    policy: Policy,
    *,
    prompt_len: float,
    gen_len: int,
    num_gpus: int = 1,
    prefill: bool = True,
    miss_rate: float | None = None,
) -> Bound:
    """Tokens/s that no schedule with these sizes, shares and places can pass.

    Each resource must do its whole work, however well phases, steps and micro-batches overlap; the busiest
    one bounds. Experts that no token chooses need not travel, nothing is staged, every kernel runs at the
    best rate of its curve, and weights of a batch are read once per step. The resident share of the experts is
    an even one; a schedule that keeps popular experts is another policy.

    Parameters
    ----------
    prompt_len : float
        Mean prompt length, tokens.
    prefill : bool
        Count prefill; else decode alone.
    miss_rate : float, optional
        With an expert cache, misses per active expert in decode; by default the fewest that uniform routing allows,
        1 - K/E. Routing that prefers some experts, or those of the last step, can pass that bound.

    Returns
    -------
    Bound

    Raises
    ------
    InvalidValue
        If there is nothing to do: neither prefill nor a decode step.
    """
    n, r_w, r_c = policy.batch_size, policy.weights_on_gpu, policy.kv_on_gpu
    cached = 0.0
    if policy.expert_slots is not None:
        # Under uniform routing nobody who cannot see beyond the batch keeps more of its experts than K/E.
        cached = min(1.0, policy.expert_slots / model.num_experts)
        r_w, cached = cached, cached if miss_rate is None else 1.0 - miss_rate
    steps = decode_steps(model, gen_len)
    if not prefill and not steps:
        raise InvalidValue("one token needs no decode step, so that decode alone has no bound; count prefill.")
    first, last = contexts(model, prompt_len, gen_len)
    prompt = n * prompt_len
    encodes = bool(model.encoder_order)

    link_up = link_down = gpu_weights = gpu_kv = cpu_kv = 0.0  # bytes
    dense = experts = attention = cpu_experts = cpu_attention = 0.0  # FLOPs
    cpu_weights = 0.0
    for kind, count in Counter(model.encoder_order or model.order).items() if prefill else ():
        layer = model.kinds[kind]
        ffn = layer.ffn
        dense += count * prompt * 2 * (ffn.shared_parameters + layer.attention.projection_parameters)
        flops = count * prompt * 2 * ffn.top_k * ffn.expert_matrix_parameters
        # A dense FFN is a plain product, with that kernel's rate.
        experts, dense = (experts + flops, dense) if ffn.routed else (experts, dense + flops)
        pairs = prompt_len * prompt_len if encodes else float(causal_pairs(prompt_len, layer.attention.window))
        attention += count * n * pairs * layer.attention.prefill_pair_flops
        if policy.ffn_on_gpu:
            link_up += count * (1 - r_w) * _active_bytes(model, kind, prompt)
        if not encodes:
            kept = float(seen_tokens(layer.attention, prompt_len))
            link_down += count * (1 - r_c) * n * kept * model.kind_kv_token_bytes(kind)
    for kind, count in model.layer_counts.items():
        layer = model.kinds[kind]
        ffn, own, cross = layer.ffn, layer.attention, layer.cross_attention
        active = _active_bytes(model, kind, n)
        on_gpu = 1.0 if policy.ffn_on_gpu else r_w
        visits = count * steps
        flops = visits * n * 2 * ffn.top_k * ffn.expert_matrix_parameters
        experts, dense = (experts + on_gpu * flops, dense) if ffn.routed else (experts, dense + on_gpu * flops)
        cpu_experts += (1 - on_gpu) * flops
        once = sum(p.weights for p in cross.kv_projections) if cross is not None else 0  # the encoder's keys and values
        gpu_weights += visits * (on_gpu * active + (layer.dense_parameters - once) * model.dense_element_bytes)
        cpu_weights += visits * (1 - on_gpu) * active
        if policy.ffn_on_gpu:
            link_up += visits * (1 - (r_w if policy.expert_slots is None else cached)) * active
        dense += visits * n * 2 * (ffn.shared_parameters + own.projection_parameters)
        seen = _mean_seen(own, first, last)
        kv = n * seen * model.kind_kv_token_bytes(kind)
        pair_flops = n * seen * own.pair_flops
        queries = own.query_size * model.dtype_bytes + own.kv_elements * min(model.dtype_bytes, model.kv_dtype_bytes)
        attended = own.attended_size
        if cross is not None:
            cross_bytes = cross.kv_elements * model.kv_dtype_bytes
            kv += prompt * cross_bytes
            pair_flops += prompt * cross.pair_flops
            queries, attended = queries + cross.query_size * model.dtype_bytes, attended + cross.attended_size
            per_step = sum(p.weights for p in (*cross.query_projections, *cross.output_projections))
            dense += visits * n * 2 * per_step
            if prefill:
                dense += count * prompt * 2 * once
                link_down += count * (1 - r_c) * prompt * cross_bytes
        if policy.attention_on_gpu:
            attention += visits * pair_flops
            gpu_kv += visits * kv
            # The newest token's keys and values were just made on the GPU.
            link_up += visits * (1 - r_c) * max(0.0, kv - n * model.kind_kv_token_bytes(kind))
            link_down += visits * (1 - r_c) * n * model.kind_kv_token_bytes(kind)
        else:
            cpu_attention += visits * pair_flops
            cpu_kv += visits * kv
            link_up += visits * n * attended * model.dtype_bytes
            link_down += visits * n * queries
    head = 2 * n * (gen_len if prefill else steps) * model.hidden_size * model.vocab_size
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
        busy = cpu_kv / rates.cpu_attention.peak + cpu_experts / rates.cpu_experts.peak
        busy += 0.0 if rates.gpu_on_own_cores else gpu
        seconds["CPU cores"] = busy / rates.cores.peak
    return Bound(tok_s=n * gen_len / max(seconds.values()), policy=policy, seconds=seconds)


def _active_bytes(model: MoEModel, kind: int, tokens: float) -> float:
    """Weights of the experts of a layer that `tokens` tokens are expected to choose."""
    ffn = model.kinds[kind].ffn
    return float(active_experts(ffn, tokens)) * ffn.expert_parameters * model.expert_element_bytes


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

    For each place of attention and experts: batches up to the largest whose weights and KV the memories hold
    together, and the largest shares that fit the GPU, each as if the other asked for nothing. Between two
    batch sizes that are looked at, every quantity is taken at the end where it costs less.

    Returns
    -------
    Bound
        With the upper end of the range of batches as its policy's N.
    """
    rates = hardware.rates(efficiency)
    gpu_room, cpu_room = usable_bytes(hardware)
    gpu_room *= hardware.num_gpus
    left = max(0.0, gpu_room - model.dense_bytes)
    gen_len = workload.gen_len
    most = _largest_batch(model, workload, gpu_room + cpu_room - model.weight_bytes)
    best: Bound | None = None
    for low, high in _ranges(most):
        prompt = _shortest_mean(workload, low, high)
        kv = float(kv_cache_bytes(model, low, low * prompt, gen_len))
        for place in placements():
            if not (place.streams_weights and place.streams_kv):
                continue
            resident = min(1.0, left / model.streamed_bytes)
            policy = Policy(
                batch_size=high,
                micro_batch_size=high,
                attention_on_gpu=place.attention_on_gpu,
                ffn_on_gpu=place.ffn_on_gpu,
                weights_on_gpu=resident,
                kv_on_gpu=min(1.0, left / kv) if place.attention_on_gpu else 0.0,
            )
            # With experts on both processors the best split is unknown: each range of splits by itself. Every
            # resource's seconds are linear in the split.
            ends = [
                physical_bound(
                    model,
                    rates,
                    replace(policy, weights_on_gpu=share),
                    prompt_len=prompt,
                    gen_len=gen_len,
                    num_gpus=hardware.num_gpus,
                ).seconds
                for share in ([resident] if place.ffn_on_gpu else [0.0, resident])
            ]
            none, full = ends[0], ends[-1]
            cuts = 1 if place.ffn_on_gpu else 32
            for cut in range(cuts):
                at = (cut / cuts, (cut + 1) / cuts)
                seconds = {name: min(none[name] + x * (full[name] - none[name]) for x in at) for name in none}
                tok_s = high * gen_len / max(seconds.values())
                if best is None or tok_s > best.tok_s:
                    share = resident if place.ffn_on_gpu else resident * sum(at) / 2
                    best = Bound(tok_s=tok_s, policy=replace(policy, weights_on_gpu=share), seconds=seconds)
    assert best is not None
    return best


def _largest_batch(model: MoEModel, workload: Workload, free: float) -> int:
    """Most sequences whose KV caches fit `free` bytes, at least one."""

    def fits(n: int) -> bool:
        return float(kv_cache_bytes(model, n, float(prompt_tokens(workload, n)), workload.gen_len)) <= free

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(1, low)


def _ranges(most: int) -> list[tuple[int, int]]:
    """Ranges of batch sizes that cover 1 to `most`, each of about a tenth of its size."""
    ranges, low = [], 1
    while low <= most:
        high = min(most, max(low, int(low * 1.1)))
        ranges.append((low, high))
        low = high + 1
    return ranges


def _shortest_mean(workload: Workload, low: int, high: int) -> float:
    """Smallest mean prompt length of the first n requests, n from `low` to `high`."""
    if workload.padded or not workload.prompt_lens:
        return workload.effective_prompt
    # Far beyond the list, the mean hardly moves any more; the list's length on either side is enough.
    span = len(workload.prompt_lens)
    tried = np.arange(low, min(high, low + span) + 1)
    tried = np.append(tried, np.arange(max(low, high - span), high + 1))
    return float((prompt_tokens(workload, tried) / tried).min())
