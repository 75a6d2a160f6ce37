"""Seconds that each resource needs: the terms of Eq. 12 and 13, for every placement of attention and experts.

Every term is affine in r_w and r_c for given sizes, so that a planner can choose the shares in closed form.
While layer a computes, the weights of the layer after it travel: a term belongs to a pair of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hrm.affine import KV_STREAMED, WEIGHTS_ON_GPU, WEIGHTS_STREAMED, Affine
from hrm.hardware import Rates
from hrm.layers import Layer
from hrm.operators import causal_pairs, kv_shards, seen_tokens
from hrm.pipeline import LOOKAHEAD
from hrm.task_times import TaskTimes

__all__ = ["Phase", "Placement", "Sizes", "decode_phase", "prefill_phase"]

Terms = dict[str, Affine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where decode attention and experts run, and whether anything streams at all."""

    attention_on_gpu: bool = False
    """A_g."""
    ffn_on_gpu: bool = True
    """F_g."""
    streams_weights: bool = True
    """False where r_w = 1: no weight page travels, not even an empty one."""
    streams_kv: bool = True
    """False where r_c = 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a batch; numbers or arrays over a planner's grid."""

    micro_batch: Any
    """μ: sequences per kernel (a mean, where the last micro-batch is smaller)."""
    micro_batches: Any
    """G."""
    prompt_len: Any
    """Mean prompt length, tokens."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A span of a run: so many layers of each kind of pair, each as long as its busiest resource."""

    pairs: tuple[tuple[int, Terms], ...]
    """(how often, terms) of each pair of consecutive layers."""
    floor: Affine | None = None
    """A time that the whole phase takes at least: the GPU's work, choosing tokens included."""
    extras: Mapping[str, Affine] = field(default_factory=dict)
    """Times that come on top, by the resource that works meanwhile: what nothing overlaps with."""

    @property
    def extra(self) -> Affine | None:
        """All of `extras`."""
        return sum(self.extras.values(), Affine(0.0)) if self.extras else None

    def seconds(self, weights_on_gpu: Any = 0.0, kv_on_gpu: Any = 0.0) -> Any:
        """Length of the phase."""
        total: Any = 0.0
        for count, terms in self.pairs:
            total = total + count * _largest(term.at(weights_on_gpu, kv_on_gpu) for term in terms.values())
        if self.floor is not None:
            total = np.maximum(total, self.floor.at(weights_on_gpu, kv_on_gpu))
        if self.extra is not None:
            total = total + self.extra.at(weights_on_gpu, kv_on_gpu)
        return total

    def needs(self, weights_on_gpu: float = 0.0, kv_on_gpu: float = 0.0) -> dict[str, Any]:
        """Seconds that each resource is needed for in all layers of the phase."""
        total: dict[str, Any] = {}
        for count, terms in self.pairs:
            for name, term in terms.items():
                total[name] = total.get(name, 0.0) + count * term.at(weights_on_gpu, kv_on_gpu)
        if self.floor is not None:
            total["GPU"] = self.floor.at(weights_on_gpu, kv_on_gpu)
        for name, extra in self.extras.items():
            total[name] = total.get(name, 0.0) + extra.at(weights_on_gpu, kv_on_gpu)
        return total

    def binding(self, weights_on_gpu: float = 0.0, kv_on_gpu: float = 0.0) -> dict[str, float]:
        """Seconds of the phase in which each resource is the one that all others wait for."""
        total: dict[str, float] = {}
        for count, terms in self.pairs:
            values = {name: float(term.at(weights_on_gpu, kv_on_gpu)) for name, term in terms.items()}
            name = max(values, key=lambda key: values[key])
            total[name] = total.get(name, 0.0) + count * values[name]
        if self.floor is not None:
            more = float(self.floor.at(weights_on_gpu, kv_on_gpu)) - sum(total.values())
            if more > 0:
                total["GPU"] = total.get("GPU", 0.0) + more
        for name, extra in self.extras.items():
            total[name] = total.get(name, 0.0) + float(extra.at(weights_on_gpu, kv_on_gpu))
        return total


def _largest(values: Any) -> Any:
    result: Any = None
    for value in values:
        result = value if result is None else np.maximum(result, value)
    return result


def _copy_passes(rates: Rates) -> int:
    """Times that a byte over the link passes CPU memory: a copy by a core reads and writes it there."""
    return 1 if rates.copy_bandwidth is None else 2


def _staged_passes(rates: Rates) -> int:
    """Times that a streamed byte passes CPU memory: read and written for staging, then the link's."""
    return 2 * rates.stages_weights + _copy_passes(rates)


def _staging_seconds(rates: Rates, streamed: Affine) -> Affine:
    """Seconds of the copy to pinned memory; none where the weights lie there."""
    return streamed / rates.staging_bandwidth if rates.stages_weights else 0.0 * streamed


def _layers(times: TaskTimes, pairs: Mapping[tuple[int, int], int]) -> list[tuple[int, Layer, int, int]]:
    kinds = times.model.kinds
    return [(count, kinds[a], a, b) for (a, b), count in pairs.items()]


def decode_phase(times: TaskTimes, sizes: Sizes, place: Placement, *, context: Any) -> Phase:
    """One decode step of a batch whose sequences have `context` tokens (the new one included).

    Beside the paper's three terms (link, GPU, CPU) come those that it leaves out: the other direction of
    the link, the staging copy, memory bandwidth and cores that several lanes share, GPUs that add up their
    results, and the latency of the chain PreAttn..PostAttn, of which Algorithm 1 keeps only two in flight.

    With experts on the CPU their resident share r_w is computed on the GPU, the rest where it lies.

    References
    ----------
    MoE-Lightning, Eq. 12-14.
    """
    mu, g = sizes.micro_batch, sizes.micro_batches
    model = times.model
    pairs, gpu_work = [], Affine(0.0)
    for count, layer, _, b in _layers(times, model.layer_pairs):
        terms, gpu = _decode_terms(times, sizes, place, layer, model.kind_expert_bytes(b), context)
        gpu_work = gpu_work + count * gpu
        pairs.append((count, terms))
    # The head of one step overlaps with weights of the next only as far as the GPU has time to spare.
    return Phase(tuple(pairs), floor=gpu_work + g * times.sample(mu))


def _decode_terms(
    times: TaskTimes, sizes: Sizes, place: Placement, layer: Layer, next_weights: float, context: Any
) -> tuple[Terms, Affine]:
    mu, g, rates, model = sizes.micro_batch, sizes.micro_batches, times.rates, times.model
    kv_bytes = model.kv_dtype_bytes
    per_transfer = rates.task_s + rates.transfer_s
    cross = layer.cross_attention
    # Attention over an encoder's output reads the prompt, attention over the tokens so far only those.
    read = mu * seen_tokens(layer.attention, context) * layer.attention.kv_elements * kv_bytes
    copies_of_kv = times.num_gpus / kv_shards(layer.attention, times.num_gpus)
    queries, attended = times.qkv_bytes(mu, layer), times.attended_bytes(mu, layer)
    pre, rest = times.pre_attention(mu, layer), times.after_attention(mu, layer)
    if cross is not None:
        read = read + mu * sizes.prompt_len * cross.kv_elements * kv_bytes
        queries = queries + mu * cross.query_size * model.dtype_bytes
        attended = attended + mu * cross.attended_size * model.dtype_bytes
        rest = rest + times.cross_attention(mu, layer)
    experts = times.gpu_experts(mu, layer)
    hidden = mu * model.hidden_bytes

    up, down = Affine(0.0), Affine(0.0)  # seconds of the link for all micro-batches
    up_bytes, down_bytes = Affine(0.0), Affine(0.0)
    gpu, cpu = Affine(pre + rest), Affine(0.0)  # seconds of one micro-batch
    chain = Affine(pre + rest)
    cpu_reads = Affine(0.0)
    streamed = Affine(0.0)
    if place.ffn_on_gpu:
        gpu, chain = gpu + experts, chain + experts
        if place.streams_weights:
            streamed = next_weights * WEIGHTS_STREAMED
            up = up + streamed / rates.h2d_bandwidth + np.where(next_weights > 0, g, 0) * per_transfer
    else:
        on_cpu = WEIGHTS_STREAMED * times.cpu_experts(mu, layer) + rates.task_s + rates.cpu_task_s
        on_gpu = WEIGHTS_ON_GPU * experts
        gpu, cpu = gpu + on_gpu, cpu + on_cpu
        routed = times.offload_routed(hidden)
        chain = chain + on_cpu + routed + times.h2d(hidden)
        up, down = up + g * times.h2d(hidden), down + g * routed
        up_bytes, down_bytes = up_bytes + g * hidden, down_bytes + g * hidden
        cpu_reads = cpu_reads + WEIGHTS_STREAMED * (g * times.active_expert_bytes(mu, layer))
    if place.attention_on_gpu:
        attention = times.gpu_attention(mu, mu * context, layer)
        if cross is not None:
            attention = attention + times.gpu_attention(mu, mu * sizes.prompt_len, layer, cross=True)
        gpu, chain = gpu + attention, chain + attention
        if place.streams_kv:
            new = mu * layer.attention.kv_elements * kv_bytes
            sent = copies_of_kv * g * read
            up = up + (sent / rates.h2d_bandwidth) * KV_STREAMED + g * per_transfer
            down = down + (g * new / rates.d2h_bandwidth) * KV_STREAMED + g * per_transfer
            up_bytes, down_bytes = up_bytes + sent * KV_STREAMED, down_bytes + (g * new) * KV_STREAMED
    else:
        attention = times.cpu_attention(mu, mu * context, layer=layer)
        if cross is not None:
            attention = attention + times.cpu_attention(mu, mu * sizes.prompt_len, layer=layer, cross=True)
        cpu, chain = cpu + attention, chain + (times.d2h(queries) + attention + times.h2d(attended))
        up, down = up + g * times.h2d(attended), down + g * times.d2h(queries)
        up_bytes, down_bytes = up_bytes + g * attended, down_bytes + g * queries
        cpu_reads = cpu_reads + g * read

    terms: Terms = {"link (CPU to GPU)": up, "link (GPU to CPU)": down, "GPU": g * gpu}
    if not (place.attention_on_gpu and place.ffn_on_gpu):
        terms[_cpu_name(place)] = g * cpu
        # Where the CPU takes part, Algorithm 1 keeps two micro-batches between PreAttn and PostAttn.
        terms["pipeline latency"] = (g / np.minimum(LOOKAHEAD, g)) * chain
    if place.ffn_on_gpu and place.streams_weights and rates.stages_weights:
        terms["staging copy"] = _staging_seconds(rates, streamed)
    traffic = _staged_passes(rates) * streamed + _copy_passes(rates) * (up_bytes + down_bytes) + cpu_reads
    terms["CPU memory"] = traffic / rates.dram_bandwidth
    if rates.cores is not None:
        copied = streamed + up_bytes + down_bytes
        copies = 0.0 * copied if rates.copy_bandwidth is None else copied / rates.copy_bandwidth
        work = g * cpu + copies + _staging_seconds(rates, streamed)
        terms |= _core_terms(rates, work, g * gpu)
    return terms, g * gpu


def _cpu_name(place: Placement) -> str:
    if place.attention_on_gpu:
        return "CPU experts"
    return "CPU attention" if place.ffn_on_gpu else "CPU attention and experts"


def prefill_phase(times: TaskTimes, sizes: Sizes, place: Placement, *, pairs: Any = None, longest: Any = None) -> Phase:
    """Prefill of a batch: on the GPU, with weights streamed, hidden states and KV offloaded.

    An encoder-decoder model encodes the prompts and makes the keys and values that every decoder layer
    will look at.

    Parameters
    ----------
    pairs : optional
        Causal query-key pairs of one micro-batch; by default of prompts of the mean length.
    longest : optional
        Longest prompt; by default the mean.
    """
    model = times.model
    s = sizes.prompt_len
    longest = s if longest is None else longest
    pairs = sizes.micro_batch * causal_pairs(s) if pairs is None else pairs
    encodes = bool(model.encoder_order)
    parts = []
    for count, layer, a, b in _layers(times, model.encoder_pairs if encodes else model.layer_pairs):
        compute = (
            times.encode(sizes.micro_batch * s, 2 * pairs - sizes.micro_batch * s, longest, layer)
            if encodes
            else times.prefill(sizes.micro_batch * s, pairs, longest, layer, requests=sizes.micro_batch)
        )
        kept = seen_tokens(layer.attention, s)
        kv = 0.0 if encodes else sizes.micro_batch * kept * model.kind_kv_token_bytes(a)
        weights = model.kind_expert_bytes(b)
        parts.append((count, _prefill_terms(times, sizes, place, compute, kv, weights)))
    if encodes:
        for kind, count in model.layer_counts.items():
            layer = model.kinds[kind]
            if layer.cross_attention is not None:
                tokens = sizes.micro_batch * s
                kv = tokens * layer.cross_attention.kv_elements * model.kv_dtype_bytes
                terms = _prefill_terms(times, sizes, place, times.cross_keys(tokens, layer), kv, 0.0)
                parts.append((count, terms))
    first = model.kind_expert_bytes((model.encoder_order or model.order)[0])
    rates = times.rates
    extras: Terms = {}
    if not encodes:
        extras["GPU"] = Affine(sizes.micro_batches * times.sample(sizes.micro_batch))
    if place.streams_weights:
        slowest = min(rates.h2d_bandwidth, rates.staging_bandwidth) if rates.stages_weights else rates.h2d_bandwidth
        load = first / slowest
        extras["link (CPU to GPU)"] = load * WEIGHTS_STREAMED
    return Phase(tuple(parts), extras=extras)


def _prefill_terms(
    times: TaskTimes, sizes: Sizes, place: Placement, compute: Any, kv_bytes: Any, next_weights: float
) -> Terms:
    """One layer of prefill: `compute` seconds per micro-batch, `kv_bytes` of KV made by each."""
    mu, g, rates = sizes.micro_batch, sizes.micro_batches, times.rates
    hidden = mu * sizes.prompt_len * times.model.hidden_bytes
    streamed = next_weights * WEIGHTS_STREAMED if place.streams_weights else Affine(0.0)
    offloaded = Affine(kv_bytes)
    if place.attention_on_gpu:
        offloaded = kv_bytes * KV_STREAMED if place.streams_kv else Affine(0.0)
    scatter = offloaded / rates.staging_bandwidth
    per_transfer = rates.task_s + 2 * rates.transfer_s
    traffic = _staged_passes(rates) * streamed + g * (Affine(2 * hidden) + 3.0 * offloaded)
    terms: Terms = {
        "link (CPU to GPU)": streamed / rates.h2d_bandwidth + g * times.h2d(hidden),
        "link (GPU to CPU)": g * ((offloaded + hidden) / rates.d2h_bandwidth + scatter + per_transfer),
        "GPU": Affine(g * compute),
        "CPU memory": traffic / rates.dram_bandwidth,
    }
    if place.streams_weights and rates.stages_weights:
        terms["staging copy"] = _staging_seconds(rates, streamed)
    if rates.cores is not None:
        copied = streamed + g * (offloaded + 2 * hidden)
        copies = 0.0 * copied if rates.copy_bandwidth is None else copied / rates.copy_bandwidth
        terms |= _core_terms(rates, copies + _staging_seconds(rates, streamed), g * compute)
    return terms


def _core_terms(rates: Rates, host: Any, gpu: Any) -> Terms:
    """Where cores do everything: what the host's lanes ask of theirs, and all lanes of all."""
    assert rates.cores is not None
    if not rates.gpu_on_own_cores:
        return {"CPU cores": (host + gpu) / rates.cores.peak}
    terms: Terms = {"CPU cores": host / rates.cores.peak}
    if rates.processors is not None:
        terms["all cores"] = (host + gpu) / rates.processors.peak
    return terms
