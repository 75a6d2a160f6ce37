"""A checkpoint laid out in memory under a policy, and the requests that it answers there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from executor.buffers import JOB_ITEMS
from executor.checkpoint import Checkpoint
from executor.gating.meter import GatingMeter
from executor.host_weights import HostWeights
from executor.jobs import Queue, job_sizes
from executor.kv_cache import Request
from executor.lanes import DEFAULT_LINK_BANDWIDTH
from executor.machine import ram_bytes
from executor.memory import DeviceMemory
from executor.placements import PINNED_SHARE, check_runnable
from executor.recording import RouteRecorder
from executor.results import Answer, Measured
from executor.runtime import Runtime
from executor.sampling import Sampling
from executor.segment import Segment
from executor.weights import WeightStore
from hrm.errors import InvalidValue, PolicyInfeasible
from hrm.pipeline import BatchShape
from hrm.policy import Policy
from hrm.systems import check_system
from simulator.experts.cache import DEFAULT_POLICY
from simulator.schedules import schedule_builder
from simulator.task import Op
from simulator.timeline import Timeline

__all__ = ["Executor", "OnDone"]

OnDone = Callable[[Op, int, float], None]
"""Called with (class, step, seconds) after each task."""


class Executor:
    """A checkpoint laid out in memory under a policy, ready to answer requests.

    Parameters
    ----------
    checkpoint : Checkpoint
    policy : Policy
    max_tokens : int
        Longest prompt plus generation that will be asked for.
    device : torch.device
    system : str
        Whose schedule runs, see `hrm.systems.SYSTEMS`.
    device_memory : int, optional
        Budget in bytes; by default all of a GPU's memory, or what the policy needs on a CPU.
    link_bandwidth : float or None
        Bytes/s of the paced link on a machine without a GPU; None for no pacing.
    pinned_weights : bool, optional
        Keep weights in page-locked memory, so that they need no staging copy. By default with a GPU, where they fit.
    sampling : Sampling, optional
        Greedy by default.
    reduce : callable, optional
        Adds up partial sums of tensor parallelism.
    cache_policy : str
        With ``policy.expert_slots``: which expert makes room for another, see `simulator.experts.cache`.
    popularity : ndarray, [MoE layers, E], optional
        How often each expert is chosen (`RoutingTrace.popularity`): of experts that are computed where they lie, the
        most popular lie on the device.
    recorder : RouteRecorder, optional
        Keeps every token's choice of experts.
    gating : GatingMeter, optional
        Brings tokens to experts by another gate than the executor's own dynamic one.
    host_weights : HostWeights, optional
        The checkpoint's weights where they lie in host memory already, for one run after the other. They count as
        pinned if they are page-locked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: Policy,
        *,
        max_tokens: int,
        device: torch.device,
        system: str = "moe-lightning",
        device_memory: int | None = None,
        link_bandwidth: float | None = DEFAULT_LINK_BANDWIDTH,
        pinned_weights: bool | None = None,
        sampling: Sampling | None = None,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        cache_policy: str = DEFAULT_POLICY,
        popularity: np.ndarray | None = None,
        recorder: RouteRecorder | None = None,
        gating: GatingMeter | None = None,
        host_weights: HostWeights | None = None,
    ) -> None:
        check_runnable(system, policy)
        if gating is not None and policy.expert_slots is not None:
            raise InvalidValue("an expert cache computes expert by expert, dynamically; leave --gating out.")
        if popularity is not None and policy.expert_slots is not None:
            raise InvalidValue("an expert cache chooses by itself which experts stay; leave --popularity out.")
        if max_tokens > checkpoint.model.max_positions:
            raise InvalidValue(
                f"the longest prompt plus gen_len is {max_tokens} tokens, and {checkpoint.model.name} has "
                f"{checkpoint.model.max_positions} positions; shorten one of them."
            )
        started = time.perf_counter()
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            device_memory = total if device_memory is None else min(device_memory, total)
            torch.cuda.set_per_process_memory_fraction(device_memory / total, device)
            torch.cuda.reset_peak_memory_stats(device)
        self.checkpoint, self.policy, self.system = checkpoint, policy, system
        self.link_bandwidth, self.sampling = link_bandwidth, sampling or Sampling()
        self._reduce = {} if reduce is None else {"reduce": reduce}
        self._recorder, self._gating = recorder, gating
        streamed = (1 - policy.weights_on_gpu) * checkpoint.local.streamed_bytes
        always_staged = system in ("flexgen", "flexgen-c")
        if always_staged and pinned_weights:
            raise InvalidValue(f"{system!r} always copies weights to pinned memory; leave --pinned-weights out.")
        if pinned_weights is None:
            locked = streamed < PINNED_SHARE * ram_bytes() if host_weights is None else host_weights.pinned
            pinned_weights = not always_staged and device.type == "cuda" and locked
        self.pinned_weights = pinned_weights
        self.memory = DeviceMemory(2**62 if device_memory is None else device_memory, device)
        try:
            self.weights = WeightStore(
                checkpoint,
                self.memory,
                policy,
                system=system,
                pinned=device.type == "cuda" and (pinned_weights or system == "deepspeed-zero"),
                positions=max_tokens,
                cache_policy=cache_policy,
                popularity=popularity,
                host_weights=host_weights,
            )
        except torch.cuda.OutOfMemoryError:
            raise PolicyInfeasible(
                f"the device ran out of memory for the weights of {checkpoint.model.name}; try --weights-on-gpu "
                f"{policy.weights_on_gpu / 2:.2g}, or more --device-memory."
            ) from None
        self.setup_s = time.perf_counter() - started
        self.peak_host_bytes = self.weights.host_bytes

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        gen_lens: Sequence[int],
        *,
        names: Sequence[str | int] | None = None,
        end_tokens: Sequence[int] = (),
        on_answers: Callable[[list[Answer]], None] | None = None,
        on_segment: Callable[[Timeline, BatchShape], None] | None = None,
        on_tokens: Callable[[int], None] | None = None,
        on_done: OnDone | None = None,
    ) -> tuple[list[list[int]], Measured]:
        """Answer requests, as many at a time as the policy's batch; their outputs, and what was measured.

        Parameters
        ----------
        prompts, gen_lens : sequence
            Token ids of each request, and how many tokens it may generate.
        names : sequence of str or int, optional
            What sampling knows requests by; by default their numbers.
        end_tokens : sequence of int
            An answer ends with the first of these.
        on_answers : callable, optional
            Called with the requests that a segment has finished, before the next one starts.
        on_segment : callable, optional
            Called with each segment's timeline, and its shape as the simulator takes it.
        on_tokens : callable, optional
            Called after each segment with the tokens that all requests have so far.
        on_done : callable, optional
            Called with (class, step, seconds) after each task.
        """
        started = time.perf_counter()
        names = range(len(prompts)) if names is None else names
        requests = [
            Request(i, prompt, gen_len, self.sampling.numbers(name, gen_len))
            for i, (prompt, gen_len, name) in enumerate(zip(prompts, gen_lens, names, strict=True))
        ]
        model = self.checkpoint.local
        sizes = job_sizes(model, list(map(len, prompts)), gen_lens, self.policy, system=self.system)
        try:
            runtime = Runtime(
                self.checkpoint,
                self.weights,
                self.memory,
                policy=self.policy,
                system=self.system,
                sizes=sizes,
                pinned=self.pinned_weights,
                link_bandwidth=self.link_bandwidth,
                sampling=self.sampling,
                recorder=self._recorder,
                gating=self._gating,
                **self._reduce,
            )
            build = schedule_builder(
                model.num_layers,
                self.policy,
                num_micro_batches=sizes.parts,
                system=self.system,
                weight_pieces=model.num_experts,
                stages_weights=not self.pinned_weights,
            )
            queue = Queue(
                deque(requests),
                sizes,
                build,
                runtime.buffers.host_cache,
                runtime.buffers.device_cache,
                frozenset(end_tokens),
            )
            self.setup_s += time.perf_counter() - started
            measured = Measured()
            facts = {"policy": self.policy.to_dict(), "system": self.system}

            def work(segment: Segment) -> list[list[list[int]]]:
                tokens, timeline = runtime.run(segment, on_done=on_done, facts=facts)
                measured.add(timeline)
                if on_segment:
                    on_segment(timeline, segment.shape)
                return tokens

            for done in queue.run(work):
                if done and on_answers:
                    on_answers([Answer(index=request.index, output=request.output) for request in done])
                if on_tokens:
                    on_tokens(queue.generated)
            self.peak_host_bytes = max(self.peak_host_bytes, self.weights.host_bytes + runtime.buffers.host_bytes)
            return [request.output for request in requests], measured
        except torch.cuda.OutOfMemoryError:
            raise _out_of_memory(sizes.micro_batch, self.system) from None
        finally:
            self.memory.release(JOB_ITEMS)

    def expert_cache(self, measured: Measured) -> dict[str, Any] | None:
        """What the expert cache did since this executor was made; None without one."""
        cache = self.weights.experts_cached
        if cache is None:
            return None
        about = {"slots": cache.slots, "policy": cache.policy}
        return about | cache.counts.to_dict() | {"stall_s": measured.expert_stall_s}

    @property
    def peak_memory(self) -> dict[str, int]:
        """Most bytes in use on the device (by the executor's own account) and in host buffers."""
        device = self.memory.peak
        if self.memory.device.type == "cuda":
            device = max(device, torch.cuda.max_memory_allocated(self.memory.device))
        return {"device_bytes": device, "host_bytes": self.peak_host_bytes}


def _out_of_memory(micro_batch: int, system: str) -> PolicyInfeasible:
    """What to say, and to try, when a device has less memory left than a policy was promised."""
    size, plural = ("batch", "batches") if check_system(system).single_batch else ("micro-batch", "micro-batches")
    hint = f"--{size}-size {micro_batch // 2}" if micro_batch > 1 else "a smaller --weights-on-gpu or --kv-on-gpu"
    return PolicyInfeasible(f"the device ran out of memory with {plural} of {micro_batch}; try {hint}.")
