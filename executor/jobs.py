"""A queue of requests: which of them run together, when a place is given to the next, and when an answer is done."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from executor.buffers import Sizes
from executor.kv_cache import KVCache, Request
from executor.segment import Part, Segment
from hrm.batching import micro_batches
from hrm.model import MoEModel
from hrm.policy import Policy
from hrm.systems import check_system
from simulator.schedules import ScheduleFamily

__all__ = ["Queue", "batches", "job_sizes"]

_CHUNK = 16
"""Decode steps between two looks at which requests have ended, where they may end by themselves."""


def batches(lengths: Sequence[int], policy: Policy) -> list[list[list[int]]]:
    """Requests by batch and micro-batch, in order of arrival, each batch spread by Algorithm 2."""
    found = []
    for first in range(0, len(lengths), policy.batch_size):
        taken = lengths[first : first + policy.batch_size]
        groups, deferred = micro_batches(
            taken, num_micro_batches=policy.num_micro_batches, micro_batch_size=policy.micro_batch_size
        )
        assert not deferred, "a batch holds no more than N requests"
        found.append([[first + i for i in group] for group in groups])
    return found


def job_sizes(
    model: MoEModel, prompt_lens: Sequence[int], gen_lens: Sequence[int], policy: Policy, *, system: str
) -> Sizes:
    """What a queue of requests needs at most: places, tokens of a prefill, and rows of the KV cache."""
    groups = batches(prompt_lens, policy)
    rooms = [[[prompt_lens[i] + gen_lens[i] for i in group] for group in batch] for batch in groups]
    share = policy.kv_on_gpu if policy.attention_on_gpu else 0.0
    if check_system(system).single_batch:
        share = 1.0
    step = 1 / max(sum(map(len, batch)) for batch in groups)
    layers = model.num_layers
    allowed = max(layers * share * sum(map(sum, batch)) + 2 * (1 - share) * max(map(sum, batch)) for batch in rooms)
    while True:
        kept, travel, buffer = [], [], 0
        for batch in rooms:
            stays = [[_stays(k, part, share) for k in range(len(group))] for part, group in enumerate(batch)]
            kept.append(
                [n for group, here in zip(batch, stays, strict=True) for n, x in zip(group, here, strict=True) if x]
            )
            moving = [
                [n for n, x in zip(group, here, strict=True) if not x] for group, here in zip(batch, stays, strict=True)
            ]
            travel.append([n for group in moving for n in group])
            buffer = max(buffer, *map(sum, moving))
        if share in (0.0, 1.0) or layers * max(map(sum, kept)) + 2 * buffer <= allowed:
            break
        share = max(0.0, share - step)
    return Sizes(
        places=max(sum(map(len, batch)) for batch in groups),
        parts=len(groups[0]),
        micro_batch=max(len(group) for batch in groups for group in batch),
        prompt_tokens=max(sum(prompt_lens[i] for i in group) for batch in groups for group in batch),
        batch_tokens=max(sum(prompt_lens[i] for group in batch for i in group) for batch in groups),
        host_rooms=tuple(map(tuple, travel)),
        device_rooms=tuple(map(tuple, kept)),
        kv_buffer_rows=buffer if policy.attention_on_gpu else 0,
        kv_share=share,
    )


def _stays(number: int, part: int, share: float) -> bool:
    """Whether the `number`-th request of a micro-batch keeps its KV on the device.

    So many of any number stay as `share` says, rounded down in some micro-batches and up in others.
    """
    if not 0 < share < 1:
        return share == 1
    phase = (part * _GOLDEN) % 1
    return math.floor(share * (number + 1) + phase) > math.floor(share * number + phase)


_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Queue:
    """Requests that wait and requests that run, as segments of work.

    A segment is a schedule on the requests that run. With no end tokens and one length of output, a batch is one
    segment. Otherwise decoding stops every so often; answers that have ended leave, and their places are given to
    waiting requests as soon as the places that stood empty have cost as many tokens as the pass of all weights that
    an admission costs: one per place.
    """

    waiting: deque[Request]
    sizes: Sizes
    build: ScheduleFamily
    host_cache: KVCache
    device_cache: KVCache
    end_tokens: frozenset[int] = frozenset()
    generated: int = 0
    """Tokens that all requests have so far."""
    _running: list[list[Request]] = field(default_factory=list)
    _idle: int = 0

    def __post_init__(self) -> None:
        self._running = [[] for _ in range(self.sizes.parts)]

    @property
    def _in_work(self) -> list[Request]:
        return [request for part in self._running for request in part]

    def run(self, execute: Callable[[Segment], list[list[list[int]]]]) -> Iterator[list[Request]]:
        """Work through the queue; yields the requests that each segment has finished.

        Parameters
        ----------
        execute : callable
            Runs a segment and returns the tokens that every request got.
        """
        while self.waiting or self._in_work:
            busy = bool(self._in_work)
            if self.waiting and (not busy or self._idle >= self.sizes.places):
                newcomers = self._admit()
                if busy and any(newcomers):
                    self._running = [old + new for old, new in zip(self._running, newcomers, strict=True)]
                    self._take(self._segment(newcomers, prefill=True, steps=0), execute)
                    yield self._leave()
                    continue
                if not busy:
                    self._running = newcomers
                    steps = self._steps(first=True)
                    self._take(self._segment(newcomers, prefill=True, steps=steps), execute)
                    yield self._leave()
                    continue
                # Nobody fits beside those who run.
                self._idle = 0
            self._take(self._segment(self._running, prefill=False, steps=self._steps(first=False)), execute)
            yield self._leave()

    def _steps(self, *, first: bool) -> int:
        """Decode steps until the next look."""
        left = [request.remaining - (1 if first else 0) for request in self._in_work]
        if self.end_tokens:
            return min(max(left), _CHUNK)
        # Without end tokens it is known when the next request is done; a segment costs too much for a few steps.
        return max(min(n for n in left if n > 0), min(_CHUNK, max(left))) if max(left) else 0

    def _admit(self) -> list[list[Request]]:
        """Give places to waiting requests: those that came first, longest first to the emptiest micro-batch.

        Algorithm 2 of MoE-Lightning, with micro-batches that may be part full.
        """
        room = min(self.sizes.places - len(self._in_work), len(self.waiting))
        taken = [self.waiting.popleft() for _ in range(room)]
        groups: list[list[Request]] = [[] for _ in self._running]
        heap = [
            (sum(r.room for r in part), g) for g, part in enumerate(self._running) if len(part) < self.sizes.micro_batch
        ]
        heapq.heapify(heap)
        back: list[Request] = []
        tokens = 0
        for request in sorted(taken, key=lambda r: (-len(r.prompt), r.index)):
            size = len(request.prompt)
            if tokens + size <= self.sizes.batch_tokens and self._place(request, heap, groups):
                tokens += size
            else:
                back.append(request)
        self.waiting.extendleft(sorted(back, key=lambda r: -r.index))
        self._idle = 0
        return groups

    def _place(self, request: Request, heap: list[tuple[int, int]], groups: list[list[Request]]) -> bool:
        """Put a request into the emptiest micro-batch with a place, and room in prefill buffers and KV cache."""
        passed: list[tuple[int, int]] = []
        placed = False
        while heap and not placed:
            tokens, g = heapq.heappop(heap)
            prompts = sum(len(r.prompt) for r in groups[g]) + len(request.prompt)
            placed = prompts <= self.sizes.prompt_tokens and self._cache(request, g, groups[g])
            if placed:
                groups[g].append(request)
                tokens += len(request.prompt)
            if len(self._running[g]) + len(groups[g]) < self.sizes.micro_batch:
                passed.append((tokens, g))
        for entry in passed:
            heapq.heappush(heap, entry)
        return placed

    def _cache(self, request: Request, part: int, newcomers: list[Request]) -> bool:
        """Give a request its KV rows: on the side that its number in the micro-batch says, or where there is room."""
        together = [*self._running[part], *newcomers]
        travelling = request.room + sum(r.room for r in together if not r.on_device)
        buffered = not self.sizes.kv_buffer_rows or travelling <= self.sizes.kv_buffer_rows
        wanted = _stays(len(together), part, self.sizes.kv_share)
        for on_device in (wanted, not wanted):
            request.on_device = on_device
            if self.device_cache.admit(request) if on_device else buffered and self.host_cache.admit(request):
                return True
        return False

    def _segment(self, parts: list[list[Request]], *, prefill: bool, steps: int) -> Segment:
        schedule = self.build(steps, prefill=prefill, first_step=1)
        states = [Part(part, prefill=prefill) for part in parts]
        return Segment(schedule, states, prefill, steps + (1 if prefill else 0))

    def _take(self, segment: Segment, execute: Callable[[Segment], list[list[list[int]]]]) -> None:
        for part, outputs in zip(segment.parts, execute(segment), strict=True):
            for request, tokens in zip(part.requests, outputs, strict=True):
                self._extend(request, tokens)
        self._idle += (self.sizes.places - len([r for r in self._in_work if r.remaining])) * max(1, segment.steps)

    def _extend(self, request: Request, tokens: list[int]) -> None:
        """Add what a segment made, up to the request's end."""
        for token in tokens[: request.remaining]:
            request.output.append(token)
            self.generated += 1
            if token in self.end_tokens:
                request.ended = True
                break

    def _leave(self) -> list[Request]:
        done = [request for request in self._in_work if not request.remaining]
        self.host_cache.leave([r for r in done if not r.on_device])
        self.device_cache.leave([r for r in done if r.on_device])
        self._running = [[r for r in part if r.remaining] for part in self._running]
        return done
