"""Tensor parallelism: the executor as several ranks, each with its heads and its part of every expert's width.

Each rank reads its shard of the checkpoint, holds its share of the host's weights and of the KV cache, and walks the
same schedule; partial sums are added up after the O projection and after the experts. Embeddings, routers and norms
are whole on every rank.

Ranks must take the same decisions. All of them follow from hidden states and tokens: the sums of an all-reduce have
the same bits on every rank (each part is added up by one rank and then sent to the others), and the chosen tokens
are those of rank 0. Only the GPU's lane adds up, so that there is one collective at a time, in the schedule's order.

Links and host are those of the whole machine, as in `hrm.task_times.TaskTimes`: each rank has its share of the cores,
and its own paced link has its share of the bandwidth, so that the weights of a layer take as long as predicted for
``num_gpus`` ranks. Prompts' hidden states travel to every rank in full; the model of time has them travel once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from executor.checkpoint import Checkpoint
from executor.generate import check_requests, generate
from executor.lanes import DEFAULT_LINK_BANDWIDTH
from executor.machine import pick_device, ram_bytes
from executor.placements import PINNED_SHARE, auto_policy, check_memory, check_runnable
from executor.ranks import Member, Team
from executor.results import GenerationResult
from hrm.errors import InvalidValue
from hrm.hardware import Hardware
from hrm.policy import Policy

__all__ = ["generate_on", "policy_for", "share_of"]


def generate_on(
    team: Team,
    checkpoint: Checkpoint | str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    policy: Policy | str = "auto",
    system: str = "moe-lightning",
    hardware: Hardware | None = None,
    device_memory: int | None = None,
    link_bandwidth: float | None = DEFAULT_LINK_BANDWIDTH,
    pinned_weights: bool | None = None,
    **options: Any,
) -> GenerationResult:
    """Generate on all ranks; parameters as those of `executor.generate.generate`, with these differences.

    Parameters
    ----------
    checkpoint : Checkpoint or path
    hardware : Hardware, optional
        The whole machine, with as many GPUs as there are ranks.
    device_memory : int, optional
        Budget in bytes of each rank's device.
    link_bandwidth : float or None
        Bytes/s of the links of all ranks together where there is no GPU.
    **options
        The others. Callbacks are called on rank 0 only.

    Returns
    -------
    GenerationResult
        Outputs and times of rank 0; ``peak_memory`` has the largest device and the sum over all ranks' host
        buffers. Of an expert cache, accesses and misses count whole experts, which all ranks bring together, each its
        part: ``bytes`` is their sum, ``bytes_per_rank`` has each rank's.

    Raises
    ------
    RankLost
        If a process ends; answers that ``on_answers`` has been given are complete.
    """
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    mine = Checkpoint.open(path, shard=team.member.shard)
    gen_lens = [gen_len] * len(prompts) if isinstance(gen_len, int) else list(gen_len)
    # Before the other ranks are told, so that they can still be asked something else.
    check_requests(prompts, gen_lens, mine.model)
    lengths = [len(prompt) for prompt in prompts]
    gate = None if options.get("gating") is None else options["gating"].planned
    if not isinstance(policy, Policy):
        policy = policy_for(
            team,
            mine,
            lengths,
            max(gen_lens),
            system=system,
            hardware=hardware,
            device_memory=device_memory,
            link_bandwidth=link_bandwidth,
            # Neither another gate nor an order by popularity goes with a cache.
            may_cache=options.get("gating") is None and options.get("popularity") is None,
            gate=gate,
            **({"cache_policy": options["cache_policy"]} if "cache_policy" in options else {}),
        )
    check_runnable(system, policy)
    check_memory(
        mine.local,
        lengths,
        gen_lens,
        policy,
        system=system,
        on_gpu=team.member.device != "cpu",
        device_memory=device_memory,
        ranks=team.world,
        gate=gate,
    )
    if pinned_weights is None:
        # Each rank sees only its own; where all together lock too much, none does.
        streamed = team.world * (1 - policy.weights_on_gpu) * mine.local.streamed_bytes
        pinned_weights = None if streamed < PINNED_SHARE * ram_bytes() else False
    callbacks = {name: options.pop(name) for name in list(options) if name.startswith("on_") or name == "recorder"}
    job = options | {
        "gen_len": gen_lens,
        "policy": policy,
        "system": system,
        "device_memory": device_memory,
        "link_bandwidth": _share(team, link_bandwidth),
        "pinned_weights": pinned_weights,
    }
    result, *others = team.call(_generate, str(path.resolve()), [list(p) for p in prompts], job, **callbacks)
    assert isinstance(result, GenerationResult)
    ranks = [_facts(result), *others]
    cache = result.expert_cache
    if cache is not None:
        # All ranks miss the same experts, and each brings its part of them.
        brought = [rank["expert_bytes"] for rank in ranks]
        cache = cache | {"bytes": sum(brought), "bytes_per_rank": brought}
    return replace(
        result,
        peak_memory={
            "device_bytes": max(rank["device_bytes"] for rank in ranks),
            "host_bytes": sum(rank["host_bytes"] for rank in ranks),
        },
        expert_cache=cache,
    )


def policy_for(
    team: Team,
    checkpoint: Checkpoint,
    prompt_lens: Sequence[int],
    gen_len: int,
    *,
    system: str = "moe-lightning",
    hardware: Hardware | None = None,
    part: Hardware | None = None,
    device_memory: int | None = None,
    link_bandwidth: float | None = DEFAULT_LINK_BANDWIDTH,
    **options: Any,
) -> Policy:
    """Ask the planner: one rank's part of the model on one rank's part of the machine.

    Parameters
    ----------
    checkpoint : Checkpoint
        Rank 0's shard.
    hardware : Hardware, optional
        The whole machine.
    part : Hardware, optional
        Without `hardware`, what rank 0 has measured with its share of the cores while the others rested; by default
        it does so now.
    **options
        As those of `executor.placements.choose_policy`.
    """
    if hardware is None:
        from executor.probe import probe

        part = part or probe(checkpoint.local, device=pick_device(team.member.device))
        part = part.with_capacity(cpu_bytes=int(float(part.cpu.capacity) / team.world))
    else:
        part = share_of(hardware, team.world)
    return auto_policy(
        replace(checkpoint, model=checkpoint.local),
        prompt_lens,
        gen_len,
        system=system,
        hardware=part,
        device=pick_device(team.member.device),
        device_memory=device_memory,
        link_bandwidth=_share(team, link_bandwidth),
        **options,
    )


def _share(team: Team, bandwidth: float | None) -> float | None:
    return None if bandwidth is None else bandwidth / team.world


def _generate(
    member: Member, path: str, prompts: list[list[int]], job: dict[str, Any], **callbacks: Any
) -> GenerationResult | dict[str, int]:
    """One rank's part of `generate_on`: the result on rank 0, on the others what is added up over ranks."""
    checkpoint = Checkpoint.open(path, shard=member.shard)
    result = generate(checkpoint, prompts, device=member.device, reduce=member.reduce, **job, **callbacks)
    return result if member.rank == 0 else _facts(result)


def _facts(result: GenerationResult) -> dict[str, int]:
    """What a rank's run took of its memory, and brought to its expert cache."""
    cache = result.expert_cache
    return result.peak_memory | {"expert_bytes": 0 if cache is None else cache["bytes"]}


def share_of(machine: Hardware, world: int) -> Hardware:
    """What one rank has of a machine: one GPU (without any, its share of the cores), and a share of host and link.

    Raises
    ------
    InvalidValue
        If the machine has GPUs, but not one per rank.
    """
    part = 1 / world
    if machine.shared_memory:
        shares = {"gpu_memory": part, "gpu_speed": part, "gpu_bandwidth": part}
    elif machine.num_gpus == world:
        shares = {}
    else:
        raise InvalidValue(f"hardware {machine.name!r} has {machine.num_gpus} GPUs, --tp {world} needs {world}.")
    scaled = machine.scaled(cpu_memory=part, cpu_speed=part, cpu_bandwidth=part, link=part, **shares)
    sets, cores = scaled.rate_sets, machine.facts.get("cores")
    if machine.shared_memory and isinstance(cores, int) and cores < 2 * world:
        # One core cannot be shared out between the GPU's lane and the host's.
        sets = {name: replace(rates, gpu_on_own_cores=False, processors=None) for name, rates in sets.items()}
    return replace(scaled, num_gpus=1, rate_sets=sets)
