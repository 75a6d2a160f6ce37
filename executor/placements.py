"""Which policies the executor can run, and which one it takes when it is asked to choose."""

from __future__ import annotations

from dataclasses import replace

from hrm.errors import DoesNotFit, InvalidValue
from hrm.hardware import Hardware
from hrm.memory import Footprint, check_fits, footprint
from hrm.model import MoEModel
from hrm.policy import Policy
from hrm.search import plan
from hrm.system_policies import system_policy
from hrm.systems import check_system
from hrm.workload import Workload
from simulator.schedules import check_buildable

__all__ = ["check_runnable", "choose_policy"]


def check_runnable(system: str, policy: Policy | None = None) -> None:
    """Refuse, with one line, a policy that the system does not have."""
    traits = check_system(system)
    check_buildable(system, policy)
    if policy is not None and traits.single_batch and policy.kv_on_gpu != 1:
        raise InvalidValue(f"{system!r} keeps the whole KV cache on the GPU: 'kv_on_gpu' must be 1: {policy.kv_on_gpu}")


def choose_policy(system: str, model: MoEModel, machine: Hardware, workload: Workload, num_requests: int) -> Policy:
    """The policy that answers `num_requests` requests soonest by prediction; for other systems, their own rule.

    MoE-Lightning's planner chooses sizes, shares and places. The other systems' rules count memory in their own
    way; micro-batches are halved until what this executor allocates fits.

    Raises
    ------
    DoesNotFit
        If nothing fits.
    """
    if system == "moe-lightning":
        return plan(model, machine, workload, num_requests=num_requests).policy
    if system == "fastdecode":
        found = plan(model, machine, workload, num_requests=num_requests, attention_on_gpu=False, ffn_on_gpu=True)
        return found.policy
    policy = system_policy(system, model, machine, workload, max_batch_size=num_requests)
    while True:
        try:
            check_fits(_need(system, model, workload, policy), machine)
            return policy
        except DoesNotFit:
            single = check_system(system).single_batch
            if policy.micro_batch_size == 1:
                raise
            half = policy.micro_batch_size // 2
            policy = replace(policy, micro_batch_size=half, batch_size=half if single else policy.batch_size)


def _need(system: str, model: MoEModel, workload: Workload, policy: Policy) -> Footprint:
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
    ).at(policy.weights_on_gpu, policy.kv_on_gpu)
