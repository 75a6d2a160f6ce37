"""What a job gives back: answers, and sums over the timelines of its segments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hrm.policy import Policy
from simulator.task import Op
from simulator.timeline import Timeline

__all__ = ["Answer", "GenerationResult", "Measured"]

_KEPT_TIMELINES = 16


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
    expert_cache: dict[str, Any] | None = None
    """With expert slots: accesses, hits, misses, bytes, and seconds that the device waited for experts. Under tensor
    parallelism bytes of all ranks together, and ``bytes_per_rank``."""
    gating: dict[str, Any] | None = None
    """With a gate of the caller's: choices, dropped ones, rows computed and padded."""
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
            "expert_cache": self.expert_cache,
            "gating": self.gating,
        }


class Measured:
    """Sums over the timelines of a job, and the first of them."""

    def __init__(self) -> None:
        self.prefill_s = self.decode_s = self.expert_stall_s = 0.0
        self.segments = self.batches = 0
        self.busy_s: dict[str, float] = {}
        self.timelines: list[Timeline] = []

    def add(self, timeline: Timeline) -> None:
        self.segments += 1
        self.batches += timeline.prefill_s > 0
        self.prefill_s += timeline.prefill_s
        self.decode_s += timeline.decode_s
        if timeline.schedule.mask(Op.LOAD_E).any():
            self.expert_stall_s += timeline.waits().get(Op.LOAD_E.value, 0.0)
        for lane, share in timeline.utilization().items():
            self.busy_s[lane] = self.busy_s.get(lane, 0.0) + share * timeline.makespan
        if len(self.timelines) < _KEPT_TIMELINES:
            self.timelines.append(timeline)
