"""Which policies the executor can run, and which one it takes when it is asked to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from executor.checkpoint import Checkpoint
from executor.jobs import batches
from executor.machine import ram_bytes
from hrm.errors import DoesNotFit, HrmError, InvalidValue
from hrm.gating import Gate
from hrm.hardware import Hardware
from hrm.memory import GPU_USABLE, Footprint, batch_footprint, check_fits, footprint
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from hrm.policy import Policy
from hrm.search import plan
from hrm.system_policies import system_policy
from hrm.systems import check_system
from hrm.units import format_bytes
from hrm.workload import Workload
from simulator.experts.cache import DEFAULT_POLICY
from simulator.experts.residency import better_residency, cached_instead
from simulator.schedules import check_buildable

__all__ = ["PINNED_SHARE", "auto_policy", "check_memory", "check_runnable", "choose_policy"]

PINNED_SHARE = 0.7
"""Most of the host's memory that weights may lock, so that they need no staging copy."""


def check_runnable(system: str, policy: Policy | None = None) -> None:
    """Refuse, with one line, a policy that the system does not have."""
    traits = check_system(system)
    check_buildable(system, policy)
    if policy is not None and traits.single_batch and policy.kv_on_gpu != 1:
        raise InvalidValue(f"{system!r} keeps the whole KV cache on the GPU: 'kv_on_gpu' must be 1: {policy.kv_on_gpu}")


def choose_policy(
    system: str,
    model: MoEModel,
    machine: Hardware,
    workload: Workload,
    num_requests: int,
    *,
    may_cache: bool = True,
    cache_policy: str = DEFAULT_POLICY,
    gate: Gate | None = None,
) -> Policy:
    """The policy that answers `num_requests` requests soonest by prediction; for other systems, their own rule.

    MoE-Lightning's planner chooses sizes, shares and places, and for few requests whether experts are cached instead
    of streamed. The other systems' rules count memory in their own
    way; micro-batches are halved until what this executor allocates fits.

    Parameters
    ----------
    may_cache : bool
        Whether an expert cache is looked at.
    cache_policy : str
        Which expert makes room for another in it.
    gate : Gate, optional
        What brings tokens to experts, if it is not the executor's own gate: its masks and buffers need room.

    Raises
    ------
    DoesNotFit
        If nothing fits.
    """
    if system == "moe-lightning":
        cache: dict[str, Any] = {"max_batch_size": num_requests, "cache_policy": cache_policy}
        try:
            found = plan(model, machine, workload, num_requests=num_requests, gate=gate)
        except DoesNotFit as error:
            if not may_cache:
                raise
            return cached_instead(error, model, machine, workload, **cache).policy
        return better_residency(found, **cache).policy if may_cache else found.policy
    if system == "fastdecode":
        found = plan(
            model, machine, workload, num_requests=num_requests, attention_on_gpu=False, ffn_on_gpu=True, gate=gate
        )
        return found.policy
    policy = system_policy(system, model, machine, workload, max_batch_size=num_requests)
    while True:
        try:
            check_fits(_need(system, model, workload, policy, gate), machine)
            return policy
        except DoesNotFit:
            single = check_system(system).single_batch
            if policy.micro_batch_size == 1:
                raise
            half = policy.micro_batch_size // 2
            policy = replace(policy, micro_batch_size=half, batch_size=half if single else policy.batch_size)


def _need(system: str, model: MoEModel, workload: Workload, policy: Policy, gate: Gate | None) -> Footprint:
    longest = workload.prompt_max
    return footprint(
        model,
        batch_size=policy.batch_size,
        micro_batch_size=policy.micro_batch_size,
        num_micro_batches=policy.num_micro_batches,
        micro_batch_tokens=policy.micro_batch_size * longest,
        batch_tokens=policy.batch_size * longest,
        longest_prompt=longest,
        gen_len=workload.gen_len,
        attention_on_gpu=policy.attention_on_gpu,
        system=system,
        gate=gate,
    ).at(policy.weights_on_gpu, policy.kv_on_gpu)


def check_memory(
    model: MoEModel,
    prompt_lens: Sequence[int],
    gen_lens: Sequence[int],
    policy: Policy,
    *,
    system: str,
    on_gpu: bool,
    device_memory: int | None = None,
    ranks: int = 1,
    gate: Gate | None = None,
) -> None:
    """Raise `DoesNotFit` if any batch needs more than the budget or this machine has.

    Parameters
    ----------
    model : MoEModel
        Shapes of one process' part.
    on_gpu : bool
        Whether the device has memory of its own.
    device_memory : int, optional
        Budget of each device in bytes.
    ranks : int
        Processes that share this machine.
    gate : Gate, optional
        What brings tokens to experts, if it is not the executor's own gate.
    """
    if device_memory is not None and device_memory < 1:
        raise InvalidValue(f"'device_memory' must be >= 1: {device_memory}")
    if on_gpu:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        # Some of it goes to the context and to the workspaces of libraries, as the planner counts, too.
        device_memory = int(GPU_USABLE * min(total, device_memory or total))
    found = batches(prompt_lens, policy)
    for number, groups in enumerate(found, start=1):
        gen_len = max(gen_lens[i] for group in groups for i in group)
        shape = BatchShape(tuple(tuple(prompt_lens[i] for i in group) for group in groups), gen_len)
        need = batch_footprint(model, shape, policy, system=system, gate=gate)
        which = f"batch {number} of {len(found)}" if len(found) > 1 else "the batch"
        if device_memory is not None and need.gpu_bytes > device_memory:
            usable = f" ({GPU_USABLE:.0%} of the GPU's)" if on_gpu else ""
            smaller = "--weights-on-gpu" if policy.expert_slots is None else "--expert-slots"
            gating, other = "", ""
            if gate is not None and gate.name != "dynamic":
                gating = f" ({format_bytes(need.gpu['gating'])} of it for {gate})"
                other = ", take a lower --capacity-factor, or leave --gating out"
            raise DoesNotFit(
                f"{which} needs {format_bytes(need.gpu_bytes)} of device memory{gating}, the budget is "
                f"{format_bytes(device_memory)}{usable}. "
                f"Raise --device-memory, or lower {smaller} or --micro-batch-size{other}."
            )
        host = need.cpu_bytes + (0 if on_gpu else need.gpu_bytes)
        if ranks * host > ram_bytes():
            each = f" on each of {ranks} ranks" if ranks > 1 else ""
            raise DoesNotFit(
                f"{which} needs {format_bytes(host)} of this machine's memory{each}, which is "
                f"{format_bytes(ram_bytes())}. Lower --batch-size."
            )


def auto_policy(
    checkpoint: Checkpoint,
    prompt_lens: Sequence[int],
    gen_len: int,
    *,
    system: str = "moe-lightning",
    hardware: Hardware | None,
    device: torch.device,
    device_memory: int | None,
    link_bandwidth: float | None,
    **options: Any,
) -> Policy:
    """Ask the planner for a policy for these requests on this machine; `options` are those of `choose_policy`."""
    from executor.probe import probe

    machine = hardware or probe(checkpoint.model, device=device)
    if machine.shared_memory != (device.type == "cpu"):
        kind = "without" if machine.shared_memory else "with"
        raise InvalidValue(
            f"hardware {machine.name!r} describes a machine {kind} a GPU and the device is {device.type!r}; "
            "give a file that `hrm probe` wrote here, or none."
        )
    machine = machine.with_capacity(gpu_bytes=device_memory)
    if device.type == "cuda" and checkpoint.local.streamed_bytes < PINNED_SHARE * ram_bytes():
        machine = machine.with_pinned_weights()  # as the run will do by default
    if machine.shared_memory:
        machine = machine.with_link(link_bandwidth)
    workload = Workload(
        name="prompts",
        prompt_avg=sum(prompt_lens) / len(prompt_lens),
        prompt_max=max(prompt_lens),
        gen_len=gen_len,
        # Longest first: a policy that fits the heaviest N requests fits any N.
        prompt_lens=tuple(sorted(prompt_lens, reverse=True)),
    )
    try:
        return choose_policy(system, checkpoint.model, machine, workload, len(prompt_lens), **options)
    except HrmError as error:
        raise type(error)(f"no policy found: {error}") from None
