"""The queue: nobody is forgotten or answered twice, nothing is shared, and no buffer is asked for more than it has."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from executor.buffers import Sizes
from executor.jobs import Queue, batches, job_sizes
from executor.kv_cache import KVCache, Request, Slabs
from executor.segment import Segment
from hrm import MoEModel, Policy
from simulator.schedules import schedule_builder
from tests.executor.family_configs import CONFIGS

END = 99
_MODELS = {
    "one window": MoEModel.from_config(CONFIGS["mixtral"], name="mixtral"),
    "window on every other layer": MoEModel.from_config(CONFIGS["gpt_oss"], name="gpt-oss"),
    "no window": MoEModel.from_config(CONFIGS["qwen3_moe"], name="qwen3"),
}


def told(index: int, number: int, odds: int) -> int:
    """The token that a request gets next: it depends on nothing but the request, and ends it one time in `odds`."""
    mixed = (index * 7919 + number * 104729 + 13) % 1009
    return END if odds and mixed % odds == 0 else mixed % 90


@dataclass
class Watch:
    """Stands for the executor: gives tokens, and checks what a segment asks of memory."""

    model: MoEModel
    sizes: Sizes
    odds: int
    on_gpu: bool
    answered: list[int] = field(default_factory=list)
    live: dict[int, Request] = field(default_factory=dict)
    part_of: dict[int, int] = field(default_factory=dict)
    refills: int = 0

    def __call__(self, segment: Segment) -> list[list[list[int]]]:
        assert len(segment.parts) == self.sizes.parts
        busy = bool(self.live)
        for number, part in enumerate(segment.parts):
            for request in part.requests:
                assert segment.prefill == (request.index not in self.live), "every request has one prefill"
                assert request.remaining > 0
                self.live[request.index] = request
                self.part_of[request.index] = number
        self.refills += segment.prefill and busy
        self._check_places()
        self._check_rows()
        if segment.prefill:
            tokens = [part.tokens for part in segment.parts]
            assert max(tokens) <= self.sizes.prompt_tokens and sum(tokens) <= self.sizes.batch_tokens
        for part in segment.parts:
            if part.size:
                rooms = torch.tensor([request.room for request in part.requests])
                assert (part.positions(segment.steps) < rooms).all()
        return [
            [
                [told(request.index, len(request.output) + k, self.odds) for k in range(segment.steps)]
                for request in part.requests
            ]
            for part in segment.parts
        ]

    def done(self, requests: list[Request]) -> None:
        """Take note of what the queue says is finished."""
        for request in requests:
            self.answered.append(request.index)
            del self.live[request.index]

    def _check_places(self) -> None:
        assert len(self.live) <= self.sizes.places
        for number in range(self.sizes.parts):
            here = [request for request in self.live.values() if self.part_of[request.index] == number]
            assert len(here) <= self.sizes.micro_batch
            if self.on_gpu:
                assert sum(request.room for request in here if not request.on_device) <= self.sizes.kv_buffer_rows

    def _check_rows(self) -> None:
        for on_device, batch in ((False, self.sizes.host_rooms), (True, self.sizes.device_rooms)):
            for window in {layer.attention.window for layer in self.model.layers}:
                runs = sorted(
                    (request.starts[window], request.room if window is None else min(request.room, window))
                    for request in self.live.values()
                    if request.on_device == on_device
                )
                stop = 0
                for start, length in runs:
                    assert start >= stop, "no two requests share rows"
                    stop = start + length
                most = max(sum(n if window is None else min(n, window) for n in rooms) for rooms in batch)
                assert stop <= most


def answer(
    model: MoEModel, lengths: list[tuple[int, int]], policy: Policy, system: str, odds: int
) -> tuple[Watch, list[Request]]:
    """Work through requests of (prompt length, gen_len) under `Watch`."""
    prompts = [n for n, _ in lengths]
    sizes = job_sizes(model, prompts, [n for _, n in lengths], policy, system=system)
    requests = [Request(i, [0] * n, gen_len) for i, (n, gen_len) in enumerate(lengths)]
    build = schedule_builder(model.num_layers, policy, num_micro_batches=sizes.parts, system=system)
    caches = [KVCache(model, rooms, torch.empty) for rooms in (sizes.host_rooms, sizes.device_rooms)]
    queue = Queue(deque(requests), sizes, build, *caches, frozenset([END] if odds else []))
    watch = Watch(model, sizes, odds, policy.attention_on_gpu)
    for finished in queue.run(watch):
        watch.done(finished)
    for cache in caches:
        free = {window: slabs.take(slabs.capacity) for window, slabs in cache._slabs.items() if slabs.capacity}
        assert set(free.values()) <= {0}, "all rows were given back"
    return watch, requests


def _policies() -> st.SearchStrategy[tuple[str, Policy]]:
    @st.composite
    def draw(drawn: Any) -> tuple[str, Policy]:
        system = drawn(st.sampled_from(["moe-lightning", "moe-lightning", "flexgen", "flexgen-c", "deepspeed-zero"]))
        batch = drawn(st.integers(1, 9))
        if system == "deepspeed-zero":
            return system, Policy(batch_size=batch, micro_batch_size=batch, attention_on_gpu=True, kv_on_gpu=1)
        on_gpu = {"flexgen": True, "flexgen-c": False}.get(system)
        on_gpu = drawn(st.booleans()) if on_gpu is None else on_gpu
        share = drawn(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])) if on_gpu else 0.0
        size = drawn(st.integers(1, batch))
        return system, Policy(batch_size=batch, micro_batch_size=size, attention_on_gpu=on_gpu, kv_on_gpu=share)

    return draw()


_LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=40)
# Two long prompts that come together only because a place was given to the one before them.
_PAIRS = [(1, 40), (1, 20), (1, 21), (30, 30), (30, 30), (1, 1)]

# The last request is long, and alone where the first of a micro-batch has its KV cache on the host.
_LATE = [(10, 20), (5, 40), (10, 1), (5, 40)]
_MOST = Policy(batch_size=2, micro_batch_size=2, attention_on_gpu=True, kv_on_gpu=0.9)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(_MODELS)), _LENGTHS, _policies(), st.sampled_from([0, 3, 20]))
@example("no window", _PAIRS, ("moe-lightning", Policy(batch_size=2, micro_batch_size=1)), 0)
@example("no window", _LATE, ("moe-lightning", _MOST), 0)
def test_everybody_is_answered_once_and_nothing_is_shared(
    name: str, lengths: list[tuple[int, int]], chosen: tuple[str, Policy], odds: int
) -> None:
    """Whatever the queue: one answer each, its own tokens up to its end, within places, rows and buffers."""
    system, policy = chosen
    watch, requests = answer(_MODELS[name], lengths, policy, system, odds)
    assert sorted(watch.answered) == list(range(len(lengths)))
    for request in requests:
        full = [told(request.index, k, odds) for k in range(request.gen_len)]
        assert request.output == (full[: full.index(END) + 1] if END in full else full)


def test_freed_places_are_refilled() -> None:
    """With end tokens and a long queue, most requests come to others that are decoding."""
    lengths = [(1 + i % 17, 30) for i in range(60)]
    watch, requests = answer(
        _MODELS["no window"], lengths, Policy(batch_size=8, micro_batch_size=3), "moe-lightning", 9
    )
    assert watch.refills > 3
    assert {len(request.output) for request in requests} > {1, 30}


def test_equal_answers_need_no_refill() -> None:
    """Without end tokens and with one length, a batch is one segment."""
    watch, _ = answer(
        _MODELS["no window"], [(5, 12)] * 20, Policy(batch_size=8, micro_batch_size=4), "moe-lightning", 0
    )
    assert watch.refills == 0
    assert [sorted(watch.answered[first : first + 8]) for first in (0, 8, 16)] == [
        list(range(0, 8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 12))
def test_batches_are_in_order_and_full(lengths: list[int], batch: int, size: int) -> None:
    """N requests in each batch but the last, in order of arrival; no micro-batch is larger than its size."""
    policy = Policy(batch_size=batch, micro_batch_size=min(size, batch))
    found = batches(lengths, policy)
    for number, groups in enumerate(found):
        first = number * batch
        assert sorted(i for group in groups for i in group) == list(range(first, min(first + batch, len(lengths))))
        assert max(map(len, groups)) <= policy.micro_batch_size and len(groups) <= policy.num_micro_batches


@given(st.integers(0, 40), st.lists(st.tuples(st.booleans(), st.integers(1, 15)), max_size=60))
def test_slabs_are_runs_of_their_own(capacity: int, steps: list[tuple[bool, int]]) -> None:
    """Runs never overlap, first fit finds any run that there is, and all comes back as one."""
    slabs = Slabs(capacity)
    taken: list[tuple[int, int]] = []
    free = set(range(capacity))
    for gives, size in steps:
        if gives and taken:
            start, length = taken.pop(size % len(taken))
            slabs.give(start, length)
            free |= set(range(start, start + length))
            continue
        fitting = [at for at in range(capacity) if set(range(at, at + size)) <= free]
        start_or_none = slabs.take(size)
        assert start_or_none == (min(fitting) if fitting else None)
        if start_or_none is not None:
            taken.append((start_or_none, size))
            free -= set(range(start_or_none, start_or_none + size))
    for start, length in taken:
        slabs.give(start, length)
    assert slabs.take(capacity) == (0 if capacity else None) or capacity == 0


def test_a_cache_that_is_full_for_one_window_takes_nothing() -> None:
    """A request is admitted for all layers or for none; what it had taken is given back."""
    model = _MODELS["window on every other layer"]
    cache = KVCache(model, [[10, 10]], torch.empty)
    small, large = Request(0, [0] * 4, 6), Request(1, [0] * 30, 6)
    assert cache.admit(small) and not cache.admit(large) and large.starts == {}
    cache.leave([small])
    assert small.starts == {}
    assert cache.admit(Request(2, [0] * 10, 10)), "both runs are free again"


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.8])
def test_the_share_of_kv_on_the_device_is_the_policys(share: float) -> None:
    """Rows on the device are the share that was asked for, up to one request; and never more bytes than planned."""
    model = _MODELS["no window"]
    policy = Policy(batch_size=40, micro_batch_size=8, attention_on_gpu=True, kv_on_gpu=share)
    sizes = job_sizes(model, [20] * 40, [12] * 40, policy, system="moe-lightning")
    kept = sum(sizes.device_rooms[0])
    assert share * 40 * 32 - 2 * 32 <= kept
    planned = model.num_layers * share * 40 * 32 + 2 * (1 - share) * 8 * 32
    assert model.num_layers * kept + 2 * sizes.kv_buffer_rows <= planned
