"""The user's call: prompts in, tokens and measured timelines out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from executor.buffers import JOB_ITEMS
from executor.checkpoint import Checkpoint
from executor.jobs import Queue, batches, job_sizes
from executor.kv_cache import Request
from executor.machine import ram_bytes
from executor.memory import DeviceMemory
from executor.placements import check_runnable, choose_policy
from executor.runtime import Runtime
from executor.sampling import Sampling
from executor.segment import Segment
from executor.weights import WeightStore
from hrm.errors import DoesNotFit, HrmError, InvalidValue, PolicyInfeasible
from hrm.hardware import Hardware
from hrm.memory import batch_footprint
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from hrm.policy import Policy
from hrm.systems import check_system
from hrm.units import format_bytes
from hrm.workload import Workload
from simulator.schedules import schedule_builder
from simulator.task import Op
from simulator.timeline import Timeline

__all__ = [
    "DEFAULT_LINK_BANDWIDTH",
    "Answer",
    "Executor",
    "GenerationResult",
    "auto_policy",
    "generate",
    "pick_device",
]

DEFAULT_LINK_BANDWIDTH = 2e9
"""Bytes/s of the paced link where there is no GPU."""

PINNED_SHARE = 0.7
"""Most of the host's memory that weights may lock, so that they need no staging copy."""

_KEPT_TIMELINES = 16

OnDone = Callable[[Op, int, float], None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A request that is done."""

    index: int
    """Its place among the prompts."""
    output: list[int]
    """Generated ids, the end token included."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """All outputs in the order of the prompts, and the measurements."""

    outputs: list[list[int]]
    policy: Policy
    system: str
    prefill_s: float
    decode_s: float
    setup_s: float
    """Loading weights and making buffers; not part of the throughput."""
    peak_memory: dict[str, int]
    segments: int
    """Schedules that were run: batches, or spans of them between two admissions."""
    batches: int
    """Segments that began with prompts."""
    busy_s: dict[str, float]
    """Seconds that each lane was at work."""
    timelines: list[Timeline] = field(repr=False)
    """Of the first segments; a long job does not keep all of them."""

    @property
    def generated_tokens(self) -> int:
        """Tokens in the outputs."""
        return sum(map(len, self.outputs))

    @property
    def throughput_tok_s(self) -> float:
        """Generated tokens per second of prefill and decode."""
        return self.generated_tokens / (self.prefill_s + self.decode_s)

    def utilization(self) -> dict[str, float]:
        """Busy share of each lane."""
        whole = self.prefill_s + self.decode_s
        return {lane: seconds / whole for lane, seconds in self.busy_s.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``hrm run``."""
        return {
            "throughput_tok_s": self.throughput_tok_s,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "setup_s": self.setup_s,
            "generated_tokens": self.generated_tokens,
            "requests": len(self.outputs),
            "batches": self.batches,
            "segments": self.segments,
            "system": self.system,
            "peak_memory": self.peak_memory,
            "utilization": self.utilization(),
            "policy": self.policy.to_dict(),
        }


class _Measured:
    """Sums over the timelines of a job, and the first of them."""

    def __init__(self) -> None:
        self.prefill_s = self.decode_s = 0.0
        self.segments = self.batches = 0
        self.busy_s: dict[str, float] = {}
        self.timelines: list[Timeline] = []

    def add(self, timeline: Timeline) -> None:
        self.segments += 1
        self.batches += timeline.prefill_s > 0
        self.prefill_s += timeline.prefill_s
        self.decode_s += timeline.decode_s
        for lane, share in timeline.utilization().items():
            self.busy_s[lane] = self.busy_s.get(lane, 0.0) + share * timeline.makespan
        if len(self.timelines) < _KEPT_TIMELINES:
            self.timelines.append(timeline)


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; by default CUDA where there is one, else the CPU's second heap."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise InvalidValue(f"'device' must be 'cuda' or 'cpu': {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidValue("device 'cuda' is not available here; use --device cpu.")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


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
    ) -> None:
        check_runnable(system, policy)
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
        streamed = (1 - policy.weights_on_gpu) * checkpoint.local.streamed_bytes
        always_staged = system in ("flexgen", "flexgen-c")
        if always_staged and pinned_weights:
            raise InvalidValue(f"{system!r} always copies weights to pinned memory; leave --pinned-weights out.")
        if pinned_weights is None:
            pinned_weights = not always_staged and device.type == "cuda" and streamed < PINNED_SHARE * ram_bytes()
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
    ) -> tuple[list[list[int]], _Measured]:
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
            measured = _Measured()
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
    pinned_weights, sampling, reduce
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
        )
    check_runnable(system, policy)
    _check_memory(checkpoint.local, list(map(len, prompts)), gen_lens, policy, system, target, device_memory)
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
        timelines=measured.timelines,
    )


def _check_memory(
    model: MoEModel,
    prompt_lens: Sequence[int],
    gen_lens: Sequence[int],
    policy: Policy,
    system: str,
    device: torch.device,
    device_memory: int | None,
) -> None:
    """Raise `DoesNotFit` if any batch needs more than the budget or this machine has."""
    if device_memory is not None and device_memory < 1:
        raise InvalidValue(f"'device_memory' must be >= 1: {device_memory}")
    found = batches(prompt_lens, policy)
    for number, groups in enumerate(found, start=1):
        gen_len = max(gen_lens[i] for group in groups for i in group)
        shape = BatchShape(tuple(tuple(prompt_lens[i] for i in group) for group in groups), gen_len)
        need = batch_footprint(model, shape, policy, system=system)
        which = f"batch {number} of {len(found)}" if len(found) > 1 else "the batch"
        if device_memory is not None and need.gpu_bytes > device_memory:
            raise DoesNotFit(
                f"{which} needs {format_bytes(need.gpu_bytes)} of device memory, the budget is "
                f"{format_bytes(device_memory)}. Raise --device-memory, or lower --weights-on-gpu or "
                "--micro-batch-size."
            )
        host = need.cpu_bytes + (need.gpu_bytes if device.type == "cpu" else 0)
        if host > ram_bytes():
            raise DoesNotFit(
                f"{which} needs {format_bytes(host)} of this machine's memory, which is "
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
) -> Policy:
    """Ask the planner for a policy for these requests on this machine."""
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
        return choose_policy(system, checkpoint.model, machine, workload, len(prompt_lens))
    except HrmError as error:
        raise type(error)(f"no policy found: {error}") from None
