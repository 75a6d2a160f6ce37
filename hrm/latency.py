"""Throughput of a whole run in closed form: prefill, then every decode step with its own context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.hardware import Rates
from hrm.model import MoEModel
from hrm.policy import Policy
from hrm.task_times import TaskTimes
from hrm.terms import Phase, Placement, Sizes, decode_phase, prefill_phase

__all__ = ["Estimate", "contexts", "estimate", "placement_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Closed-form prediction of a run."""

    throughput: float
    """Generated tokens per second, prefill included."""
    prefill_s: float
    decode_s: float
    layer_s: float
    """Mean time of a decode layer at the middle of generation (T_layer of Eq. 12)."""
    terms: dict[str, float]
    """Seconds that each resource needs for one such layer (mean over layers); the largest binds."""
    binding: dict[str, float]
    """Seconds of the run in which each resource is the one that the others wait for; prefill included."""
    needs: dict[str, float]
    """Seconds of the run for which each resource is needed."""
    bottleneck: str
    """Name of the resource that binds most of decode."""

    @property
    def slack(self) -> dict[str, float]:
        """Share of the run in which each resource is idle, if the others kept to their closed form."""
        whole = self.prefill_s + self.decode_s
        return {name: 1.0 - min(1.0, need / whole) for name, need in self.needs.items()}


def placement_of(policy: Policy) -> Placement:
    """Where a policy computes, and what it streams."""
    return Placement(
        attention_on_gpu=policy.attention_on_gpu,
        ffn_on_gpu=policy.ffn_on_gpu,
        streams_weights=policy.weights_on_gpu < 1,
        streams_kv=policy.kv_on_gpu < 1,
    )


def contexts(model: MoEModel, prompt_len: Any, gen_len: int) -> tuple[Any, Any]:
    """Context of the first and of the last decode step.

    A decoder-only model gets its first token from prefill; a decoder that looks at an encoder's output starts
    from nothing and makes every token in a step of its own.
    """
    if model.encoder_order:
        return 1.0, float(gen_len)
    return prompt_len + 1.0, prompt_len + gen_len - 1.0


def decode_steps(model: MoEModel, gen_len: int) -> int:
    """Decode steps of a run."""
    return gen_len if model.encoder_order else gen_len - 1


def estimate(
    model: MoEModel,
    rates: Rates,
    policy: Policy,
    *,
    prompt_len: float,
    gen_len: int,
    num_gpus: int = 1,
) -> Estimate:
    """Predict a run of one batch: prefill, and each decode step at its own context.

    Parameters
    ----------
    prompt_len : float
        Mean prompt length, tokens.
    gen_len : int
        Tokens generated per sequence.
    num_gpus : int
        GPUs that share every layer (tensor parallelism).

    References
    ----------
    MoE-Lightning, Eq. 12-14.
    """
    times, place = TaskTimes(model, rates, num_gpus), placement_of(policy)
    g = policy.num_micro_batches
    sizes = Sizes(micro_batch=policy.batch_size / g, micro_batches=g, prompt_len=prompt_len)
    shares = (policy.weights_on_gpu, policy.kv_on_gpu)
    prefill = prefill_phase(times, sizes, place)
    prefill_s = float(prefill.seconds(*shares))
    steps = decode_steps(model, gen_len)
    first, last = contexts(model, prompt_len, gen_len)
    each = np.linspace(first, last, steps) if steps else np.empty(0)
    decode = decode_phase(times, sizes, place, context=each)
    decode_s = float(np.broadcast_to(decode.seconds(*shares), each.shape).sum())
    middle = decode_phase(times, sizes, place, context=0.5 * (first + max(first, last)))
    terms = {name: float(value) / model.num_layers for name, value in middle.needs(*shares).items()}
    middle_binding = middle.binding(*shares)
    bottleneck = max(middle_binding, key=lambda name: middle_binding[name])
    if middle.floor is not None and float(middle.floor.at(*shares)) > sum(middle_binding.values()):
        bottleneck = "GPU"
    needs, binding = dict(prefill.needs(*shares)), prefill.binding(*shares)
    for name, value in middle.needs(*shares).items():
        needs[name] = float(needs.get(name, 0.0)) + steps * float(value)
    for name, seconds in middle_binding.items():
        binding[name] = binding.get(name, 0.0) + steps * seconds
    return Estimate(
        throughput=policy.batch_size * gen_len / (prefill_s + decode_s),
        prefill_s=prefill_s,
        decode_s=decode_s,
        layer_s=_layers_only(middle, shares) / model.num_layers,
        terms=terms,
        binding=binding,
        needs={name: float(value) for name, value in needs.items()},
        bottleneck=bottleneck,
    )


def _layers_only(phase: Phase, shares: tuple[float, float]) -> float:
    return float(Phase(phase.pairs).seconds(*shares))
