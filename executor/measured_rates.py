"""From seconds per call to rates, and to the machine as a hardware file describes it."""

from __future__ import annotations

import statistics

import torch

from executor.bench import GEMM_ROWS, HOST_EXPERT_ROWS, HOST_ROWS, SINGLE_ROWS, Bench, Key
from executor.contention import Crowd
from executor.machine import machine_facts, ram_bytes
from hrm.hardware import Curve, Hardware, Link, MemoryLevel, Quantity, Rates
from hrm.operators import pre_attention

__all__ = ["hardware_of", "rates_of"]


def rates_of(bench: Bench, spent: dict[Key, float], crowd: Crowd) -> tuple[Rates, float]:
    """Rates from seconds per call, and the bandwidth at which the device reads its memory."""
    m = bench.model

    def curve(name: str, work: dict[float, float], minus: float = 0.0) -> Curve:
        points = []
        for size, amount in sorted(work.items()):
            t = spent[name, size]
            points.append((float(size), amount / max(t - minus, t / 2)))
        return Curve(tuple(points))

    launch = spent["dispatch", 0] / sum(op.launches for op in pre_attention(m, 1))
    per_call = spent["attention call", 0]
    gemm = curve("gemm", {rows: 2.0 * rows * m.hidden_size * m.q_size for rows in GEMM_ROWS})
    experts = curve("experts", bench.expert_flops)
    attention = curve("attention", bench.attention_bytes, minus=per_call)
    copy = bench.piece_bytes / spent["staging", 0]
    read = bench.pool.nbytes / spent["read", 0]
    host_flops = 2.0 * HOST_ROWS * m.hidden_size * m.q_size / spent["host gemm", 0]
    bandwidth = max(read, gemm.points[0][1] * m.dtype_bytes / 2)
    work = 12.0 * m.hidden_size * m.intermediate_size
    host_experts = curve("host experts", {n: n * work for n in HOST_EXPERT_ROWS}) if bench.cuda else None
    rates = Rates(
        provenance="measured",
        source=f"hrm probe, shapes of {m.name} in {m.dtype}",
        gpu_gemm=gemm,
        gpu_experts=experts,
        single_expert_s=_single_expert_s(bench, spent, experts),
        gpu_attention=curve("causal", bench.causal_flops),
        gpu_bandwidth=bandwidth,
        # Without a GPU both processors are the same cores with the same kernels.
        gpu_decode_attention=curve("device attention", bench.attention_bytes) if bench.cuda else attention,
        cpu_experts=host_experts or experts,
        cpu_weight_bandwidth=_host_weight_bandwidth(bench, spent) if bench.cuda else bandwidth,
        gpu_launch_s=launch,
        # On a GPU the calls were timed with all that they launch.
        gpu_attention_s=0.0 if bench.cuda else per_call,
        cpu_attention=attention,
        cpu_attention_flops=host_flops,
        cpu_task_s=per_call,
        h2d_bandwidth=bench.piece_bytes / spent["h2d", 0] if bench.cuda else copy,
        d2h_bandwidth=bench.piece_bytes / spent["d2h", 0] if bench.cuda else copy,
        transfer_s=spent["transfer", 0],
        staging_bandwidth=copy,
        dram_bandwidth=max(crowd.memory_traffic, attention.peak),
        copy_bandwidth=None if bench.cuda else copy,
        task_s=crowd.task_s,
        cores=None if bench.cuda else crowd.cores,
        gpu_on_own_cores=bench.apart,
        processors=crowd.processors,
    )
    return rates, read


def _single_expert_s(bench: Bench, spent: dict[Key, float], experts: Curve) -> float:
    """Seconds on top of an expert that is computed by calls of its own."""
    m, extra = bench.model, []
    for wanted in SINGLE_ROWS:
        tokens = bench.tokens_for(wanted)
        active, flops = bench.expected_active(tokens), 6.0 * tokens * m.top_k * m.hidden_size * m.intermediate_size
        together = flops / experts.at(tokens * m.top_k / active)
        extra.append((spent["single experts", wanted] - together) / active)
    return max(0.0, statistics.fmean(extra))


def _host_weight_bandwidth(bench: Bench, spent: dict[Key, float]) -> float:
    """Bytes/s at which an expert on the host reads its weights for one token."""
    m = bench.model
    return 2 * 3 * m.hidden_size * m.intermediate_size * bench.dtype.itemsize / spent["host experts", 1]


def hardware_of(bench: Bench, spent: dict[Key, float], crowd: Crowd, share: float) -> Hardware:
    """The machine as a hardware file describes it."""
    rates, read = rates_of(bench, spent, crowd)
    facts = machine_facts() | {"cpu_taken_by_others": round(share, 4)}
    source = f"hrm probe, {facts['date']}"

    def measured(value: float) -> Quantity:
        return Quantity(float(value), "measured", source)

    if bench.cuda:
        name = facts["gpu"]
        gpu_bytes = torch.cuda.get_device_properties(bench.device).total_memory
    else:
        name, gpu_bytes = f"{facts['cpu']} (a heap in RAM, half the cores)", ram_bytes() // 4
    peak = max(rates.gpu_gemm.peak, rates.gpu_experts.peak)
    return Hardware(
        name="this-machine",
        title=f"{facts['cores']} cores, at the shapes of {bench.model.name} in {bench.model.dtype}",
        levels=(
            MemoryLevel(
                name="gpu",
                processor=name,
                capacity=measured(gpu_bytes),
                bandwidth=measured(read),
                peak_flops=measured(peak),
            ),
            MemoryLevel(
                name="cpu",
                processor=facts["cpu"],
                capacity=measured(ram_bytes()),
                bandwidth=measured(rates.cpu_attention.peak),
                peak_flops=measured(peak),
            ),
        ),
        links=(
            Link(source="cpu", target="gpu", bandwidth=measured(rates.h2d_bandwidth)),
            Link(source="gpu", target="cpu", bandwidth=measured(rates.d2h_bandwidth)),
        ),
        rate_sets={"measured": rates},
        facts=facts,
        shared_memory=not bench.cuda,
    )
