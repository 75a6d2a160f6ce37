"""The user's call: prompts in, tokens and measured timelines out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from executor.checkpoint import Checkpoint
from executor.engine import Executor, OnDone
from executor.gating.base import Gating
from executor.gating.meter import GatingMeter
from executor.host_weights import HostWeights
from executor.lanes import DEFAULT_LINK_BANDWIDTH
from executor.machine import pick_device
from executor.placements import auto_policy, check_memory, check_runnable
from executor.recording import RouteRecorder
from executor.results import Answer, GenerationResult
from executor.sampling import Sampling
from hrm.errors import InvalidValue
from hrm.hardware import Hardware
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from hrm.policy import Policy
from simulator.experts.cache import DEFAULT_POLICY
from simulator.timeline import Timeline

__all__ = ["check_requests", "generate"]


def check_requests(prompts: Sequence[Sequence[int]], gen_lens: Sequence[int], model: MoEModel) -> int:
    """Longest prompt plus generation; raises on an empty prompt, an id out of range, too long a prompt."""
    if not prompts:
        raise InvalidValue("there are no prompts.")
    if len(gen_lens) != len(prompts):
        raise InvalidValue(f"there are {len(prompts)} prompts and {len(gen_lens)} values of 'gen_len'.")
    if min(gen_lens) < 1:
        raise InvalidValue(f"'gen_len' must be >= 1: {min(gen_lens)}")
    for number, (prompt, gen_len) in enumerate(zip(prompts, gen_lens, strict=True)):
        if not prompt:
            raise InvalidValue(f"prompt {number} is empty.")
        if min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise InvalidValue(f"prompt {number} has token ids outside 0..{model.vocab_size - 1}.")
        if len(prompt) + gen_len > model.max_positions:
            raise InvalidValue(
                f"prompt {number} has {len(prompt)} tokens; with gen_len {gen_len} it passes the "
                f"{model.max_positions} positions of {model.name}."
            )
    return max(len(prompt) + gen_len for prompt, gen_len in zip(prompts, gen_lens, strict=True))


def generate(
    checkpoint: Checkpoint | str,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    policy: Policy | Literal["auto"] = "auto",
    system: str = "moe-lightning",
    hardware: Hardware | None = None,
    device: str | None = None,
    device_memory: int | None = None,
    link_bandwidth: float | None = DEFAULT_LINK_BANDWIDTH,
    pinned_weights: bool | None = None,
    eos_token_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    names: Sequence[str | int] | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    cache_policy: str = DEFAULT_POLICY,
    popularity: np.ndarray | None = None,
    recorder: RouteRecorder | None = None,
    gating: Gating | None = None,
    host_weights: HostWeights | None = None,
    on_answers: Callable[[list[Answer]], None] | None = None,
    on_segment: Callable[[Timeline, BatchShape], None] | None = None,
    on_tokens: Callable[[int], None] | None = None,
    on_done: OnDone | None = None,
) -> GenerationResult:
    """Generate from a checkpoint with weights streamed to the device.

    Parameters
    ----------
    checkpoint : Checkpoint or path
    prompts : sequence of sequence of int
        Token ids; any lengths.
    gen_len : int or sequence of int
        Tokens per request, or of each request.
    policy : Policy or "auto"
        "auto" asks the planner, with `hardware` or, without it, a probe of this machine.
    system : str
        Whose schedule runs, see `hrm.systems.SYSTEMS`.
    device : {"cuda", "cpu"}, optional
    device_memory : int, optional
        Budget of the device in bytes.
    link_bandwidth : float or None
        Bytes/s of the link where there is no GPU; None for as fast as copies go.
    gating : Gating, optional
        Brings tokens to experts by another gate (`executor.gating.make_gating`) than the executor's own dynamic one.
    pinned_weights, sampling, reduce, cache_policy, popularity, recorder, host_weights
        As those of `Executor`.
    eos_token_ids : sequence of int
        Outputs end with the first of these; the freed place goes to a request that waits.
    names, on_answers, on_segment, on_tokens, on_done
        As those of `Executor.run`.

    Returns
    -------
    GenerationResult

    Raises
    ------
    InvalidValue, CheckpointError, DoesNotFit
        One line each, before anything is computed.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    target = pick_device(device)
    gen_lens = [gen_len] * len(prompts) if isinstance(gen_len, int) else list(gen_len)
    max_tokens = check_requests(prompts, gen_lens, checkpoint.model)
    gate = None if gating is None else gating.planned
    if policy == "auto":
        policy = auto_policy(
            checkpoint,
            [len(p) for p in prompts],
            max(gen_lens),
            system=system,
            hardware=hardware,
            device=target,
            device_memory=device_memory,
            link_bandwidth=link_bandwidth,
            # Neither another gate nor an order by popularity goes with one.
            may_cache=gating is None and popularity is None,
            cache_policy=cache_policy,
            gate=gate,
        )
    check_runnable(system, policy)
    check_memory(
        checkpoint.local,
        list(map(len, prompts)),
        gen_lens,
        policy,
        system=system,
        on_gpu=target.type == "cuda",
        device_memory=device_memory,
        gate=gate,
    )
    meter = None if gating is None else GatingMeter(gating)
    executor = Executor(
        checkpoint,
        policy,
        max_tokens=max_tokens,
        device=target,
        system=system,
        device_memory=device_memory,
        link_bandwidth=link_bandwidth,
        pinned_weights=pinned_weights,
        sampling=sampling,
        reduce=reduce,
        cache_policy=cache_policy,
        popularity=popularity,
        recorder=recorder,
        gating=meter,
        host_weights=host_weights,
    )
    outputs, measured = executor.run(
        prompts,
        gen_lens,
        names=names,
        end_tokens=eos_token_ids,
        on_answers=on_answers,
        on_segment=on_segment,
        on_tokens=on_tokens,
        on_done=on_done,
    )
    return GenerationResult(
        outputs=outputs,
        policy=policy,
        system=system,
        prefill_s=measured.prefill_s,
        decode_s=measured.decode_s,
        setup_s=executor.setup_s,
        peak_memory=executor.peak_memory,
        segments=measured.segments,
        batches=measured.batches,
        busy_s=measured.busy_s,
        expert_cache=executor.expert_cache(measured),
        gating=None if meter is None else meter.to_dict(),
        timelines=measured.timelines,
    )
