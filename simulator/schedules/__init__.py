"""Schedules by system: one file per schedule."""

from __future__ import annotations

from typing import Any

from hrm.errors import NotBuiltYet, UnknownName
from hrm.policy import Policy
from simulator.schedules.cgopipe import cgopipe
from simulator.task import Schedule

__all__ = ["RUNNABLE", "SYSTEMS", "build_schedule", "cgopipe", "check_buildable"]

RUNNABLE: dict[str, Any] = {"attention_on_gpu": False, "ffn_on_gpu": True}
"""The placement that this version can schedule, as options of `hrm.plan`."""
SYSTEMS = ("moe-lightning", "flexgen", "flexgen-c", "fastdecode", "deepspeed-zero")


def check_buildable(system: str, policy: Policy | None = None) -> None:
    """Refuse, with one line, what this version cannot schedule."""
    if system not in SYSTEMS:
        raise UnknownName.of("system", system, SYSTEMS)
    if system != "moe-lightning":
        raise NotBuiltYet(f"the schedule of {system!r} is not built yet; this version has 'moe-lightning'.")
    if policy is not None and (policy.attention_on_gpu or not policy.ffn_on_gpu or policy.kv_on_gpu > 0):
        raise NotBuiltYet(
            "attention or KV cache on the GPU, and experts on the CPU, are not built yet; "
            "this version runs --attention-on-gpu 0 --ffn-on-gpu 1 --kv-on-gpu 0."
        )


def build_schedule(
    num_layers: int,
    policy: Policy,
    *,
    gen_len: int,
    num_micro_batches: int | None = None,
    system: str = "moe-lightning",
) -> Schedule:
    """The schedule of a run: prefill and ``gen_len - 1`` decode steps.

    Parameters
    ----------
    num_layers : int
    policy : Policy
    gen_len : int
        Tokens per request.
    num_micro_batches : int, optional
        Micro-batches of the actual batch, if fewer than the policy's (a last, partial batch).
    system : str
        One of `SYSTEMS`.

    Raises
    ------
    NotBuiltYet
        For a system or placement that this version does not have.
    """
    check_buildable(system, policy)
    return cgopipe(
        num_layers=num_layers,
        num_micro_batches=num_micro_batches or policy.num_micro_batches,
        decode_steps=gen_len - 1,
        stream_weights=policy.weights_on_gpu < 1,
    )
