"""Schedules by system: one file per schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hrm.errors import InvalidValue
from hrm.pipeline import expert_pieces
from hrm.policy import Policy
from hrm.systems import SYSTEMS, check_system
from simulator.schedules.cgopipe import cgopipe
from simulator.schedules.cpu_experts import cpu_experts
from simulator.schedules.expert_cache import expert_cache
from simulator.schedules.flexgen import flexgen
from simulator.schedules.gpu_attention import gpu_attention
from simulator.schedules.zero_inference import zero_inference
from simulator.task import Schedule

__all__ = [
    "SYSTEMS",
    "ScheduleFamily",
    "build_schedule",
    "cgopipe",
    "check_buildable",
    "cpu_experts",
    "expert_cache",
    "flexgen",
    "gpu_attention",
    "schedule_builder",
    "zero_inference",
]


def check_buildable(system: str, policy: Policy | None = None) -> None:
    """Refuse, with one line, what cannot be scheduled or contradicts the system."""
    found = check_system(system)
    if policy is None:
        return
    if policy.expert_slots is not None and system != "moe-lightning":
        raise InvalidValue(f"{system!r} has no expert cache; leave --expert-slots out or use --system moe-lightning.")
    if not policy.ffn_on_gpu and system != "moe-lightning":
        raise InvalidValue(f"{system!r} computes all experts on the GPU; use --ffn-on-gpu 1 or --system moe-lightning.")
    if found.attention_on_gpu is not None and policy.attention_on_gpu != found.attention_on_gpu:
        place = "GPU" if found.attention_on_gpu else "CPU"
        raise InvalidValue(
            f"{system!r} computes decode attention on the {place}; "
            f"use --attention-on-gpu {int(found.attention_on_gpu)} or another --system."
        )
    if policy.kv_on_gpu > 0 and not policy.attention_on_gpu:
        raise InvalidValue(f"'kv_on_gpu' must be 0 where attention runs on the CPU: {policy.kv_on_gpu}")
    if found.single_batch and policy.num_micro_batches > 1:
        raise InvalidValue(
            f"{system!r} has one batch and no micro-batches; leave --micro-batch-size out: {policy.num_micro_batches}"
        )


@dataclass(frozen=True, slots=True)
class ScheduleFamily:
    """Schedules that differ in their steps only; two that are equal build the same."""

    builder: Callable[..., Schedule]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, decode_steps: int, *, prefill: bool = True, first_step: int = 1) -> Schedule:
        """The schedule of so many decode steps."""
        return self.builder(decode_steps=decode_steps, prefill=prefill, first_step=first_step, **dict(self.options))


def schedule_builder(
    num_layers: int,
    policy: Policy,
    *,
    num_micro_batches: int | None = None,
    system: str = "moe-lightning",
    num_gpus: int = 1,
    weight_pieces: int = 8,
    stages_weights: bool = True,
) -> ScheduleFamily:
    """A system's schedule under a policy, for any number of decode steps.

    Parameters
    ----------
    num_layers : int
    policy : Policy
    num_micro_batches : int, optional
        Micro-batches of the actual batch, if fewer than the policy's (a last, partial batch).
    system : str
        One of `SYSTEMS`.
    num_gpus : int
        GPUs: pipeline stages with FlexGen, tensor parallelism (which leaves the schedule as it is) otherwise.
    weight_pieces : int
        Tensors that FlexGen moves per layer: the experts of a layer, which an expert cache cuts into pieces.
    stages_weights : bool
        False where all weights lie in pinned memory (MoE-Lightning and FastDecode only; FlexGen always copies).

    Raises
    ------
    InvalidValue
        For a policy that the system does not have.
    """
    check_buildable(system, policy)
    options: dict[str, Any] = {"num_layers": num_layers, "stream_weights": policy.weights_on_gpu < 1}
    builder: Callable[..., Schedule]
    if system == "deepspeed-zero":
        builder = zero_inference
    else:
        options["num_micro_batches"] = num_micro_batches or policy.num_micro_batches
        if system in ("flexgen", "flexgen-c"):
            builder = flexgen
            options |= {"attention_on_gpu": policy.attention_on_gpu, "stream_kv": policy.kv_on_gpu < 1}
            options |= {"num_stages": min(num_gpus, num_layers), "weight_pieces": weight_pieces}
        elif not policy.ffn_on_gpu and policy.weights_on_gpu < 1:
            # With all experts on the GPU (r_w = 1) none is left for the CPU, whatever F_g says.
            builder = cpu_experts
            del options["stream_weights"]
            options |= {"attention_on_gpu": policy.attention_on_gpu, "stream_kv": policy.kv_on_gpu < 1}
            options |= {"resident": policy.weights_on_gpu > 0, "staged": stages_weights}
            # A pass of all weights serves every prompt token at once: in prefill the GPU computes all experts.
            options["stream_prefill"] = True
        elif policy.expert_slots is not None:
            builder = expert_cache
            del options["stream_weights"]
            options |= {"attention_on_gpu": policy.attention_on_gpu, "stream_kv": policy.kv_on_gpu < 1}
            options |= {"pieces": expert_pieces(weight_pieces)[0]}
        elif policy.attention_on_gpu:
            builder = gpu_attention
            options |= {"stream_kv": policy.kv_on_gpu < 1, "staged": stages_weights}
        else:
            builder = cgopipe
            options |= {"paged": system != "fastdecode", "staged": stages_weights}

    return ScheduleFamily(builder, tuple(options.items()))


def build_schedule(
    num_layers: int,
    policy: Policy,
    *,
    gen_len: int,
    num_micro_batches: int | None = None,
    system: str = "moe-lightning",
    **options: Any,
) -> Schedule:
    """The schedule of a run: prefill and ``gen_len - 1`` decode steps.

    Parameters
    ----------
    num_layers, policy, num_micro_batches, system, **options
        As in `schedule_builder`.
    gen_len : int
        Tokens per request.

    Examples
    --------
    >>> policy = Policy(batch_size=4, micro_batch_size=2, attention_on_gpu=True)
    >>> build_schedule(2, policy, gen_len=2, system="flexgen")
    <Schedule flexgen: 116 tasks, 2 layers, 2 micro-batches, 2 steps>
    """
    build = schedule_builder(num_layers, policy, num_micro_batches=num_micro_batches, system=system, **options)
    return build(gen_len - 1)
