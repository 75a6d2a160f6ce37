"""Whether experts stream, or are cached: few requests touch few experts, and then only those need to travel.

A schedule that streams a layer's weights brings all of them, whether any token chose them or not. An expert cache
("Towards MoE Deployment", section V) waits until tokens are routed and brings what it lacks: E(1 - (1 - k/E)^N) experts
at most, under uniform routing. Which of the two is sooner done is for the simulator to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from hrm.batching import batch_of
from hrm.bound import physical_bound
from hrm.errors import DoesNotFit, PolicyInfeasible
from hrm.hardware import Hardware
from hrm.latency import Estimate, placement_of
from hrm.memory import Footprint, check_fits, usable_bytes
from hrm.model import MoEModel
from hrm.operators import active_experts
from hrm.plan import Plan
from hrm.policy import Policy
from hrm.problem import prompt_tokens, workload_footprint
from hrm.units import format_bytes
from hrm.workload import Workload
from simulator.cache_costs import ExpertCaching
from simulator.experts.cache import DEFAULT_POLICY
from simulator.experts.expected import uniform_miss_rate
from simulator.simulate import Prediction, simulate
from simulator.task import Lane

__all__ = [
    "MissRate",
    "better_residency",
    "cached_instead",
    "evaluate_cached",
    "plan_cached",
    "simulated_estimate",
]

MissRate = Callable[[int, int], float]
"""Misses per active expert, of a batch of so many tokens with so many slots."""

_SIZES = (1, 2, 4, 8, 16, 32, 64)
_NEARLY_ALL = 0.9
"""Share of the experts that a batch may touch for a cache to be worth a look."""
RESOURCES = {
    Lane.GPU.value: "GPU",
    Lane.CPU.value: "CPU attention",
    Lane.H2D.value: "link (CPU to GPU)",
    Lane.D2H.value: "link (GPU to CPU)",
    Lane.PIN.value: "staging copy",
}


def simulated_estimate(model: MoEModel, workload: Workload, prediction: Prediction) -> Estimate:
    """A simulator's prediction in the form of the closed form's: lanes in the place of resources."""
    steps = max(1, workload.gen_len - 1)
    whole = prediction.prefill_s + prediction.decode_s
    busy = {RESOURCES[lane]: share * whole for lane, share in prediction.utilization.items()}
    share = prediction.decode_s / whole / steps / model.num_layers
    return Estimate(
        throughput=prediction.throughput_tok_s,
        prefill_s=prediction.prefill_s,
        decode_s=prediction.decode_s,
        layer_s=prediction.decode_s / steps / model.num_layers,
        terms={name: seconds * share for name, seconds in busy.items()},
        binding=busy,
        needs=busy,
        bottleneck=max(busy, key=lambda name: busy[name]),
    )


def evaluate_cached(
    model: MoEModel,
    hardware: Hardware,
    workload: Workload,
    policy: Policy,
    *,
    efficiency: str | None = None,
    cache_policy: str = DEFAULT_POLICY,
    miss_rate: float | None = None,
) -> Plan:
    """Predict a policy with expert slots, by simulation.

    Parameters
    ----------
    cache_policy : str
        Which expert makes room for another, see `simulator.experts.cache`.
    miss_rate : float, optional
        Misses per active expert in decode, as a trace shows them; by default those of the policy if tokens choose
        independently.

    Raises
    ------
    DoesNotFit
        If it needs more memory than the machine has.
    """
    started = time.perf_counter()
    need = _memory(model, hardware, workload, policy)
    check_fits(need, hardware)
    rates = hardware.rates(efficiency)
    batch = batch_of(workload, policy)
    cache = ExpertCaching(slots=policy.expert_slots or 1, policy=cache_policy, miss_rate=miss_rate)
    prediction = simulate(
        model, rates, policy, batch, num_gpus=hardware.num_gpus, cache_policy=cache_policy, miss_rate=miss_rate
    )
    ffn = model.main_layer.ffn
    # No bound may lie below what is predicted: popular experts, or foresight, beat uniform routing's 1 - K/E.
    fewest = min(cache.decode_rate(ffn, policy.micro_batch_size), uniform_miss_rate(ffn.num_experts, cache.slots))
    return Plan(
        model=model,
        hardware=hardware,
        workload=workload,
        policy=policy,
        estimate=simulated_estimate(model, workload, prediction),
        memory=need,
        room=usable_bytes(hardware),
        bound=physical_bound(
            model,
            rates,
            policy,
            prompt_len=float(prompt_tokens(workload, policy.batch_size)) / policy.batch_size,
            gen_len=workload.gen_len,
            num_gpus=hardware.num_gpus,
            miss_rate=fewest if miss_rate is None else miss_rate,
        ),
        rate_set=rates.provenance,
        evaluated=1,
        solver="simulation",
        seconds=time.perf_counter() - started,
    )


def plan_cached(
    model: MoEModel,
    hardware: Hardware,
    workload: Workload,
    *,
    max_batch_size: int,
    attention_on_gpu: bool | None = None,
    efficiency: str | None = None,
    cache_policy: str = DEFAULT_POLICY,
    miss_rate: MissRate | None = None,
) -> Plan:
    """The best policy with an expert cache among a few sizes, each with as many slots as fit.

    Parameters
    ----------
    max_batch_size : int
        Largest N.
    attention_on_gpu : bool, optional
        Only policies with attention there; by default either.
    cache_policy : str
        As that of `evaluate_cached`.
    miss_rate : callable, optional
        Of (tokens of a batch, slots), from a trace; by default as `evaluate_cached` has it.

    Raises
    ------
    PolicyInfeasible
        If none fits.
    """
    started = time.perf_counter()
    best: Plan | None = None
    looked = 0
    places = (False, True) if attention_on_gpu is None else (attention_on_gpu,)
    for policy in _candidates(model, hardware, workload, max_batch_size, places):
        looked += 1
        rate = None if miss_rate is None else miss_rate(policy.micro_batch_size, policy.expert_slots or 0)
        found = evaluate_cached(
            model, hardware, workload, policy, efficiency=efficiency, cache_policy=cache_policy, miss_rate=rate
        )
        if best is None or found.estimate.throughput > best.estimate.throughput:
            best = found
    if best is None:
        room = format_bytes(usable_bytes(hardware)[0])
        raise PolicyInfeasible(f"no expert cache for {model.name} fits the {room} of GPU memory of {hardware.name}.")
    return replace(best, evaluated=looked, seconds=time.perf_counter() - started)


def better_residency(streaming: Plan, *, max_batch_size: int | None, **options: Any) -> Plan:
    """The plan itself, or one with an expert cache if the simulator finds that faster.

    Parameters
    ----------
    streaming : Plan
        Of `hrm.plan`.
    max_batch_size : int or None
        Requests that there are; None for no end of them.
    **options
        As those of `plan_cached`.
    """
    model, policy = streaming.model, streaming.policy
    size = policy.batch_size if max_batch_size is None else min(max_batch_size, policy.batch_size)
    # Schedules know decoders only.
    if model.encoder_order or not _is_sparse(model, size):
        return streaming
    rates = streaming.hardware.rates(options.get("efficiency"))
    batch = batch_of(streaming.workload, policy)
    played = simulate(model, rates, policy, batch, num_gpus=streaming.hardware.num_gpus)
    try:
        cached = plan_cached(model, streaming.hardware, streaming.workload, max_batch_size=size, **options)
    except DoesNotFit:
        return streaming
    return cached if cached.estimate.throughput > played.throughput_tok_s else streaming


def cached_instead(error: DoesNotFit, model: MoEModel, hardware: Hardware, workload: Workload, **options: Any) -> Plan:
    """A plan with an expert cache where none that streams fits: a cache needs no room for two layers of weights.

    Parameters
    ----------
    error : DoesNotFit
        What the search for a streaming policy said; raised again if no cache fits either.
    **options
        As those of `plan_cached`.
    """
    if model.encoder_order:
        raise error
    try:
        return plan_cached(model, hardware, workload, **options)
    except DoesNotFit:
        raise error from None


def _is_sparse(model: MoEModel, tokens: int) -> bool:
    """Whether so many tokens leave a good part of a layer's experts alone."""
    ffn = model.main_layer.ffn
    return ffn.routed and float(active_experts(ffn, tokens)) < _NEARLY_ALL * ffn.num_experts


def _candidates(
    model: MoEModel, hardware: Hardware, workload: Workload, most: int, places: tuple[bool, ...]
) -> Iterator[Policy]:
    """Sizes and places; with each, as many slots as GPU memory holds."""
    for size in sorted({*(n for n in _SIZES if n <= most), min(most, _SIZES[-1])}):
        if not _is_sparse(model, size):
            continue
        for parts in (1, 2) if size > 1 else (1,):
            for on_gpu in places:
                policy = Policy(
                    batch_size=size,
                    micro_batch_size=-(-size // parts),
                    attention_on_gpu=on_gpu,
                    kv_on_gpu=float(on_gpu),
                    expert_slots=1,
                )
                slots = _most_slots(model, hardware, workload, policy)
                if slots:
                    yield replace(policy, expert_slots=slots)


def _most_slots(model: MoEModel, hardware: Hardware, workload: Workload, policy: Policy) -> int:
    """The largest K that fits; 0 if none does."""
    one, two = (_memory(model, hardware, workload, replace(policy, expert_slots=k)) for k in (1, 2))
    gpu, cpu = usable_bytes(hardware)
    if one.gpu_bytes > gpu or one.cpu_bytes > cpu:
        return 0
    each = two.gpu_bytes - one.gpu_bytes
    most = model.num_experts
    return most if each <= 0 else min(most, 1 + int((gpu - one.gpu_bytes) / each))


def _memory(model: MoEModel, hardware: Hardware, workload: Workload, policy: Policy) -> Footprint:
    need: Footprint = workload_footprint(
        model,
        workload,
        placement_of(policy),
        micro_batch_size=policy.micro_batch_size,
        num_micro_batches=policy.num_micro_batches,
        batch_size=policy.batch_size,
        num_gpus=hardware.num_gpus,
        expert_slots=policy.expert_slots,
    )
    return need.at(policy.weights_on_gpu, policy.kv_on_gpu)
