"""The Hierarchical Roofline Model: roofs, turning points, balance point, and the ceiling of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.hardware import Hardware, Rates
from hrm.model import MoEModel
from hrm.operators import Operator, distinct_experts

__all__ = ["RooflinePoint", "attainable", "physical_bound", "roofline_point", "turning_points"]


def attainable(peak_flops: Any, bandwidth: Any, intensity: Any) -> Any:
    """Eq. 8: min(P, B·I), the roof of a processor whose data is local."""
    return np.minimum(peak_flops, bandwidth * intensity)


def turning_points(
    hardware: Hardware, *, gpu_intensity: Any, cpu_intensity: Any, link_bandwidth: float | None = None
) -> tuple[Any, Any]:
    """P1 and P2 of an operator whose data lies in CPU memory.

    Below P1 it never pays to move the data to the GPU; below P2 the link binds the operator on the GPU.

    Parameters
    ----------
    gpu_intensity, cpu_intensity : float
        I_x^i and I_x^j: FLOPs per byte that the operator touches in each level.

    Returns
    -------
    (p1, p2) : FLOP per byte

    References
    ----------
    MoE-Lightning, Eq. 9 and 10.
    """
    link = float(hardware.h2d.bandwidth) if link_bandwidth is None else link_bandwidth
    cpu, gpu = hardware.cpu, hardware.gpu
    p1 = attainable(float(cpu.peak_flops), float(cpu.bandwidth), cpu_intensity) / link
    p2 = attainable(float(gpu.peak_flops), float(gpu.bandwidth), gpu_intensity) / link
    return p1, p2


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflinePoint:
    """An operator on the hierarchical roofline."""

    name: str
    batch: int
    intensity: dict[str, float]
    """FLOP/B by level: "gpu" for one kernel's traffic, "cpu" for what crosses the link per batch."""
    attainable_flops: float
    """Best of computing on the GPU (Eq. 7) and on the CPU (Eq. 8)."""
    p1: float
    p2: float
    bound_by: str


def roofline_point(hardware: Hardware, op: Operator, *, batch: int, kernel_op: Operator | None = None) -> RooflinePoint:
    """Place an operator.

    Parameters
    ----------
    op : Operator
        The operator on the whole batch: its bytes lie in CPU memory and may cross the link once.
    kernel_op : Operator, optional
        The same operator on one micro-batch, which decides the GPU-side intensity.
    """
    kernel = kernel_op or op
    cpu_i, gpu_i = float(op.intensity), float(kernel.intensity)
    p1, p2 = turning_points(hardware, gpu_intensity=gpu_i, cpu_intensity=cpu_i)
    gpu, cpu = hardware.gpu, hardware.cpu
    roofs = {
        "GPU compute": float(gpu.peak_flops),
        "GPU memory": float(gpu.bandwidth) * gpu_i,
        "link": float(hardware.h2d.bandwidth) * cpu_i,
    }
    on_gpu = min(roofs.values())
    on_cpu = float(attainable(float(cpu.peak_flops), float(cpu.bandwidth), cpu_i))
    if on_cpu > on_gpu:
        bound = "CPU compute" if on_cpu >= float(cpu.peak_flops) else "CPU memory"
    else:
        bound = min(roofs, key=lambda key: roofs[key])
    return RooflinePoint(
        name=op.name,
        batch=batch,
        intensity={"gpu": gpu_i, "cpu": cpu_i},
        attainable_flops=max(on_gpu, on_cpu),
        p1=float(p1),
        p2=float(p2),
        bound_by=bound,
    )


def physical_bound(
    model: MoEModel,
    rates: Rates,
    *,
    batch_size: int,
    prompt_tokens: int,
    pairs: int,
    gen_len: int,
    weights_on_gpu: float,
) -> float:
    """Tokens/s that no schedule of this policy can pass, attention on the CPU and experts on the GPU.

    Each resource must do its whole work, however well phases and steps overlap; the busiest one bounds.

    Parameters
    ----------
    prompt_tokens, pairs : int
        Prompt tokens and causal query-key pairs of the batch.

    Returns
    -------
    float
        Generated tokens per second, at the highest rate of every curve.
    """
    layers, steps = model.num_layers, gen_len - 1
    streamed = (1 - weights_on_gpu) * model.layer_expert_bytes
    active = float(distinct_experts(model, batch_size)) * model.expert_bytes
    dense_flops = 2 * model.attention_parameters
    expert_flops = 6 * model.top_k * model.hidden_size * model.intermediate_size
    head_flops = 2 * model.hidden_size * model.vocab_size
    tokens = prompt_tokens + batch_size * steps
    gpu_flops = (
        layers * (tokens * (dense_flops + expert_flops) + 4 * pairs * model.q_size) + batch_size * gen_len * head_flops
    )
    kv_read = layers * model.kv_token_bytes * (prompt_tokens * steps + batch_size * steps * (steps + 1) / 2)
    peak = max(rates.gpu_gemm.peak, rates.gpu_experts.peak, rates.gpu_attention.peak)
    qkv = (model.q_size + 2 * model.kv_size) * model.dtype_bytes
    seconds = [
        layers * (steps + 1) * streamed / rates.h2d_bandwidth,
        layers * steps * batch_size * qkv / rates.d2h_bandwidth,
        gpu_flops / peak,
        layers * steps * active / max(rates.gpu_bandwidth, peak / 2),
        kv_read / max(rates.cpu_attention.peak, rates.dram_bandwidth),
    ]
    if rates.cpu_attention_flops is not None:
        per_byte = 2 * model.num_heads / model.num_kv_heads / model.dtype_bytes
        seconds.append(kv_read * per_byte / rates.cpu_attention_flops)
    if rates.cores is not None:
        seconds.append((gpu_flops / peak + kv_read / rates.cpu_attention.peak) / rates.cores.peak)
    return batch_size * gen_len / max(seconds)
