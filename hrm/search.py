"""The planner: an exhaustive, vectorised search for the policy with the highest predicted throughput."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.errors import InvalidValue, PolicyInfeasible
from hrm.hardware import Hardware, Rates
from hrm.latency import Estimate, estimate
from hrm.memory import Footprint, check_fits, footprint, usable_bytes
from hrm.model import MoEModel
from hrm.pipeline import length_blocks
from hrm.policy import Policy
from hrm.roofline import physical_bound
from hrm.units import format_bytes, format_seconds
from hrm.workload import Workload

__all__ = ["Plan", "evaluate", "plan"]

_SIMPLE_MICRO_BATCHES = 128
_MAX_MICRO_BATCH = 1024
_MAX_MICRO_BATCHES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A policy with what the closed-form model says of it."""

    model: MoEModel
    hardware: Hardware
    workload: Workload
    policy: Policy
    estimate: Estimate
    memory: Footprint
    bound_tok_s: float
    """Ceiling on tokens/s for this policy, see `hrm.roofline.physical_bound`."""
    rate_set: str
    evaluated: int
    """Policies looked at."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``hrm plan``: SI numbers under stable keys."""
        return {
            "model": self.model.name,
            "hardware": self.hardware.name,
            "workload": self.workload.name,
            "efficiency": self.rate_set,
            "policy": self.policy.to_dict(),
            "predicted": {
                "throughput_tok_s": float(self.estimate.throughput),
                "prefill_s": float(self.estimate.prefill_s),
                "decode_s": float(self.estimate.decode_s),
                "layer_s": float(self.estimate.layer_s),
                "bottleneck": self.estimate.bottleneck,
                "layer_terms_s": {key: float(value) for key, value in self.estimate.terms.items()},
            },
            "memory": self.memory.to_dict(),
            "bound_tok_s": self.bound_tok_s,
            "search": {"evaluated": self.evaluated, "seconds": self.seconds},
        }

    def to_frame(self) -> Any:
        """One row per resource: seconds per decode layer and share of the binding one."""
        import pandas as pd

        terms = {key: float(value) for key, value in self.estimate.terms.items()}
        frame = pd.DataFrame({"seconds_per_layer": terms})
        frame["share_of_bottleneck"] = frame["seconds_per_layer"] / frame["seconds_per_layer"].max()
        return frame.sort_values("seconds_per_layer", ascending=False)

    def __str__(self) -> str:
        e = self.estimate
        lines = [
            f"{self.model.name} on {self.hardware.name}, {self.workload} (efficiency: {self.rate_set})",
            f"  policy      {self.policy}",
            f"  predicted   {e.throughput:.4g} tok/s  (prefill {format_seconds(float(e.prefill_s))}, "
            f"decode {format_seconds(float(e.decode_s))}, layer {format_seconds(float(e.layer_s))})",
            f"  bound       {self.bound_tok_s:.4g} tok/s; decode is bound by the {e.bottleneck}",
            f"  memory      GPU {format_bytes(self.memory.gpu_bytes)}, CPU {format_bytes(self.memory.cpu_bytes)}",
            f"  search      {self.evaluated:,} policies in {format_seconds(self.seconds)}",
        ]
        if self.rate_set == "spec":
            lines.append("  note        data-sheet rates: an upper bound, no kernel attains it")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>" + self.to_frame().to_html(float_format=lambda x: f"{x:.4g}")


def _prompt_tokens(workload: Workload, batch_size: Any) -> Any:
    """Prompt tokens of the first `batch_size` requests."""
    if workload.padded or not workload.prompt_lens:
        return batch_size * workload.effective_prompt
    lens = np.array(workload.prompt_lens)
    sums = np.concatenate(([0], np.cumsum(lens)))
    rounds, rest = np.divmod(np.asarray(batch_size, dtype=int), len(lens))
    return (rounds * sums[-1] + sums[rest]).astype(float)


def _footprint(model: MoEModel, workload: Workload, mu: Any, g: Any, r_w: Any, batch_size: Any = None) -> Footprint:
    """Memory of a policy on a workload; with known lengths, for the heaviest micro-batch of Algorithm 2."""
    n = mu * g if batch_size is None else batch_size
    tokens = _prompt_tokens(workload, n)
    cached, heaviest = tokens, np.maximum(np.ceil(tokens / n * mu), workload.prompt_max)
    if workload.prompt_lens and not workload.padded:
        lens = sorted(workload.prompt_lens, reverse=True)
        stored = sum((stop - start) * longest for start, stop, longest in length_blocks(lens))
        cached = tokens * stored / sum(lens)
        heaviest = np.minimum(tokens / n * mu + workload.prompt_max, mu * workload.prompt_max)
    return footprint(
        model,
        batch_size=n,
        micro_batch_size=mu,
        num_micro_batches=g,
        weights_on_gpu=r_w,
        micro_batch_tokens=heaviest,
        batch_tokens=cached,
        longest_prompt=workload.prompt_max,
        gen_len=workload.gen_len,
    )


def _check_request(model: MoEModel, workload: Workload) -> None:
    longest = workload.prompt_max + workload.gen_len
    if longest > model.max_positions:
        raise PolicyInfeasible(
            f"prompt {workload.prompt_max} + gen_len {workload.gen_len} = {longest} tokens, and "
            f"{model.name} has {model.max_positions} positions; shorten one of them."
        )


def _bound(model: MoEModel, rates: Rates, workload: Workload, policy: Policy) -> float:
    n = policy.batch_size
    prompt = float(_prompt_tokens(workload, n)) / n
    return physical_bound(
        model,
        rates,
        batch_size=n,
        prompt_tokens=int(n * prompt),
        pairs=int(n * prompt * (prompt + 1) / 2),
        gen_len=workload.gen_len,
        weights_on_gpu=policy.weights_on_gpu,
    )


def evaluate(
    model: MoEModel,
    hardware: Hardware,
    workload: Workload,
    policy: Policy,
    *,
    efficiency: str | None = None,
) -> Plan:
    """Predict a given policy instead of searching for one.

    Raises
    ------
    DoesNotFit
        If it needs more memory than the machine has.
    """
    started = time.perf_counter()
    _check_request(model, workload)
    rates = hardware.rates(efficiency)
    mu, g = policy.micro_batch_size, policy.num_micro_batches
    memory = _footprint(model, workload, mu, g, policy.weights_on_gpu, policy.batch_size)
    check_fits(memory, hardware)
    result = estimate(
        model,
        rates,
        micro_batch_size=policy.batch_size / g,
        num_micro_batches=g,
        prompt_len=float(_prompt_tokens(workload, policy.batch_size)) / policy.batch_size,
        gen_len=workload.gen_len,
        weights_on_gpu=policy.weights_on_gpu,
    )
    return Plan(
        model=model,
        hardware=hardware,
        workload=workload,
        policy=policy,
        estimate=result,
        memory=memory,
        bound_tok_s=_bound(model, rates, workload, policy),
        rate_set=rates.provenance,
        evaluated=1,
        seconds=time.perf_counter() - started,
    )


def plan(
    model: MoEModel,
    hardware: Hardware,
    workload: Workload,
    *,
    efficiency: str | None = None,
    max_batch_size: int | None = None,
    num_requests: int | None = None,
) -> Plan:
    """Search a grid of (μ, G) for the policy with the highest predicted throughput.

    Sizes to 128 are all tried, larger ones (μ to 1024, G to 256) in steps of less than 4 %.

    For each point the largest r_w that both memories allow is taken: more resident weights never make
    a layer slower, so the optimum lies on that edge. Attention runs on the CPU and experts on the GPU.

    Parameters
    ----------
    efficiency : {"fitted", "measured", "paper", "spec"}, optional
        Which rates of the machine to use; by default the best it has.
    max_batch_size : int, optional
        Largest N.
    num_requests : int, optional
        Requests that wait. The policy is then the one that answers all of them soonest, the last, partial
        batch included; N is at most this. By default requests never end.

    Returns
    -------
    Plan

    Raises
    ------
    PolicyInfeasible
        If not even one sequence fits; the message says what is missing.

    Examples
    --------
    >>> best = plan(MoEModel.from_catalog("mixtral-8x7b"), Hardware.from_catalog("gcp-l4-1x"),
    ...             Workload.parse("77,32"))
    >>> best.policy.batch_size > 100
    True
    """
    started = time.perf_counter()
    _check_request(model, workload)
    if max_batch_size is not None and max_batch_size < 1:
        raise InvalidValue(f"'max_batch_size' must be >= 1: {max_batch_size}")
    if num_requests is not None:
        if num_requests < 1:
            raise InvalidValue(f"'num_requests' must be >= 1: {num_requests}")
        max_batch_size = min(num_requests, max_batch_size or num_requests)
    rates = hardware.rates(efficiency)
    sizes = _sizes(_MAX_MICRO_BATCH)
    counts = _sizes(_MAX_MICRO_BATCHES)
    if max_batch_size is not None:
        sizes = sizes[sizes <= max_batch_size]
    mu, g = (axis.ravel().astype(float) for axis in np.meshgrid(sizes, counts, indexing="ij"))
    if max_batch_size is not None:
        keep = mu * g <= max_batch_size
        mu, g = mu[keep], g[keep]
    gpu_room, cpu_room = usable_bytes(hardware)
    none, full = _footprint(model, workload, mu, g, 0.0), _footprint(model, workload, mu, g, 1.0)
    # Both totals are linear in r_w: the largest r_w the GPU allows, the smallest the CPU needs.
    slope_gpu, slope_cpu = full.gpu_bytes - none.gpu_bytes, none.cpu_bytes - full.cpu_bytes
    with np.errstate(divide="ignore", invalid="ignore"):
        most = (gpu_room - none.gpu_bytes) / slope_gpu
    if slope_gpu.min() <= 0:  # fewer than three layers: buffers cost more than they save
        most = np.where(slope_gpu <= 0, np.where(full.gpu_bytes <= gpu_room, 1.0, -1.0), most)
    least = (none.cpu_bytes - cpu_room) / slope_cpu
    r_w = np.clip(most, 0.0, 1.0)
    feasible = (most >= 0) & (r_w >= least - 1e-12)
    if not feasible.any():
        _explain_infeasible(model, hardware, workload)
    mu, g, r_w, least = mu[feasible], g[feasible], r_w[feasible], least[feasible]
    result = estimate(
        model,
        rates,
        micro_batch_size=mu,
        num_micro_batches=g,
        prompt_len=_prompt_tokens(workload, mu * g) / (mu * g),
        gen_len=workload.gen_len,
        weights_on_gpu=r_w,
    )
    score = result.throughput
    if num_requests is not None:
        whole_batches, rest = np.divmod(num_requests, mu * g)
        last = estimate(
            model,
            rates,
            micro_batch_size=np.minimum(mu, np.maximum(rest, 1)),
            num_micro_batches=np.maximum(1, np.ceil(rest / mu)),
            prompt_len=_prompt_tokens(workload, mu * g) / (mu * g),
            gen_len=workload.gen_len,
            weights_on_gpu=r_w,
        )
        seconds = whole_batches * (result.prefill_s + result.decode_s)
        seconds = seconds + (rest > 0) * (last.prefill_s + last.decode_s)
        score = num_requests * workload.gen_len / seconds
    # Ties go to the smaller batch, then to fewer micro-batches: less memory for the same speed.
    order = np.lexsort((g, mu * g, -np.round(score, 9)))
    best = int(order[0])
    share = float(np.floor(r_w[best] * 1e6) / 1e6)
    policy = Policy(
        batch_size=int(mu[best] * g[best]),
        micro_batch_size=int(mu[best]),
        weights_on_gpu=share if share >= least[best] else float(r_w[best]),
    )
    return Plan(
        model=model,
        hardware=hardware,
        workload=workload,
        policy=policy,
        estimate=result.at(best),
        memory=_footprint(model, workload, policy.micro_batch_size, policy.num_micro_batches, policy.weights_on_gpu),
        bound_tok_s=_bound(model, rates, workload, policy),
        rate_set=rates.provenance,
        evaluated=len(feasible),
        seconds=time.perf_counter() - started,
    )


def _sizes(largest: int) -> np.ndarray:
    """Every size to 128, then every 4th, 8th, ..: steps stay under 4 % of the value."""
    sizes = list(range(1, min(largest, _SIMPLE_MICRO_BATCHES) + 1))
    step = 4
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + step)
        if sizes[-1] >= 2 * _SIMPLE_MICRO_BATCHES * step // 4:
            step *= 2
    return np.array([s for s in sizes if s <= largest])


def _explain_infeasible(model: MoEModel, hardware: Hardware, workload: Workload) -> None:
    gpu_room, cpu_room = usable_bytes(hardware)
    one = _footprint(model, workload, 1, 1, 0.0)
    lacks = []
    if one.gpu_bytes > gpu_room:
        lacks.append(
            f"GPU memory: {format_bytes(one.gpu_bytes)} needed with no resident expert (two layers of "
            f"weights buffered take {format_bytes(one.gpu['weight_buffers'])}), "
            f"{format_bytes(max(gpu_room, 0.0))} usable"
        )
    if one.cpu_bytes > cpu_room:
        lacks.append(
            f"CPU memory: {format_bytes(one.cpu_bytes)} needed for weights and one sequence, "
            f"{format_bytes(max(cpu_room, 0.0))} usable"
        )
    if not lacks:
        lacks.append("GPU and CPU memory together are too small for the weights")
    raise PolicyInfeasible(f"{model.name} does not fit on {hardware.name}: {'; '.join(lacks)}.")
