"""Algorithm 2: balanced micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import Workload, micro_batches
from hrm.errors import InvalidValue

lengths = st.lists(st.integers(1, 400), max_size=60)
small = st.integers(1, 8)


def test_story() -> None:
    """Longest first, each to the open micro-batch with the fewest prompt tokens."""
    assert micro_batches([5, 9, 1, 3], num_micro_batches=2, micro_batch_size=2) == ([[1, 2], [0, 3]], [])


def test_a_full_micro_batch_closes() -> None:
    """Once a micro-batch holds μ requests, the next goes to one that has room, however many tokens it has."""
    batches, deferred = micro_batches([10, 1, 1, 1], num_micro_batches=2, micro_batch_size=2)
    assert batches == [[0, 3], [1, 2]]
    assert deferred == []


def test_what_does_not_fit_the_cache_is_put_off() -> None:
    """A request whose prompt and generation exceed the KV room waits for the next batch; shorter ones do not."""
    batches, deferred = micro_batches(
        [50, 20, 90], num_micro_batches=1, micro_batch_size=3, gen_len=10, cache_tokens=95
    )
    assert batches == [[0, 1]]  # 50 + 20 + 2 * 10 = 90 tokens
    assert deferred == [2]  # 90 + 10 = 100 tokens


def test_surplus_is_put_off_in_order_of_arrival() -> None:
    """Requests beyond G·μ are the shortest ones, listed in order of arrival."""
    batches, deferred = micro_batches([1, 9, 2, 8, 3], num_micro_batches=1, micro_batch_size=2)
    assert (batches, deferred) == ([[1, 3]], [0, 2, 4])


def test_nothing_to_do() -> None:
    """No requests give no micro-batches."""
    assert micro_batches([], num_micro_batches=3, micro_batch_size=2) == ([], [])


@given(lengths, small, small, st.integers(0, 50), st.none() | st.integers(1, 2000))
@settings(deadline=None, max_examples=150)
def test_every_request_exactly_once(prompts, groups, size, gen_len, room) -> None:
    """Each request is in one micro-batch or put off, none twice, and no micro-batch is empty or above μ."""
    batches, deferred = micro_batches(
        prompts, num_micro_batches=groups, micro_batch_size=size, gen_len=gen_len, cache_tokens=room
    )
    assert sorted([i for batch in batches for i in batch] + deferred) == list(range(len(prompts)))
    assert len(batches) <= groups
    assert all(1 <= len(batch) <= size for batch in batches)
    assert deferred == sorted(deferred)


@given(lengths, small, small, st.integers(0, 50), st.integers(1, 2000))
@settings(deadline=None, max_examples=150)
def test_cache_room_is_respected(prompts, groups, size, gen_len, room) -> None:
    """Prompt and generated tokens of a micro-batch never exceed its KV room."""
    batches, _ = micro_batches(
        prompts, num_micro_batches=groups, micro_batch_size=size, gen_len=gen_len, cache_tokens=room
    )
    for batch in batches:
        assert sum(prompts[i] for i in batch) + len(batch) * gen_len <= room


@given(lengths, small, small)
def test_each_micro_batch_is_longest_first(prompts, groups, size) -> None:
    """Within a micro-batch prompts stand longest first, as the executor needs them."""
    batches, _ = micro_batches(prompts, num_micro_batches=groups, micro_batch_size=size)
    for batch in batches:
        assert [prompts[i] for i in batch] == sorted((prompts[i] for i in batch), reverse=True)


@given(lengths.filter(len), small)
def test_balanced_when_nothing_closes(prompts, groups) -> None:
    """With room for all, the heaviest and the lightest micro-batch differ by at most the longest prompt."""
    batches, deferred = micro_batches(prompts, num_micro_batches=groups, micro_batch_size=len(prompts))
    assert deferred == []
    tokens = [sum(prompts[i] for i in batch) for batch in batches] + [0] * (groups - len(batches))
    assert max(tokens) - min(tokens) <= max(prompts)


@given(lengths, small, small)
def test_without_a_cache_limit_only_the_shortest_wait(prompts, groups, size) -> None:
    """Requests wait only when all micro-batches are full, and none that waits is longer than one that runs."""
    batches, deferred = micro_batches(prompts, num_micro_batches=groups, micro_batch_size=size)
    assert len(deferred) == max(0, len(prompts) - groups * size)
    if deferred and batches:
        assert max(prompts[i] for i in deferred) <= min(prompts[i] for batch in batches for i in batch)


@given(lengths, small, small)
def test_deterministic(prompts, groups, size) -> None:
    """The same requests are always spread the same way, and the input is left alone."""
    before = list(prompts)
    first = micro_batches(prompts, num_micro_batches=groups, micro_batch_size=size)
    assert first == micro_batches(tuple(prompts), num_micro_batches=groups, micro_batch_size=size)
    assert prompts == before


def test_mtbench_is_balanced_within_a_few_percent() -> None:
    """On the paper's workload, micro-batches of 32 differ by under 2 % of their tokens."""
    prompts = Workload.parse("mtbench").lengths(320)
    batches, _ = micro_batches(prompts, num_micro_batches=10, micro_batch_size=32)
    tokens = [sum(prompts[i] for i in batch) for batch in batches]
    assert max(tokens) <= 1.02 * min(tokens)


@pytest.mark.parametrize(("groups", "size"), [(0, 4), (4, 0), (-1, 1)])
def test_sizes_are_checked(groups: int, size: int) -> None:
    """No micro-batches, or empty ones, are refused with the values."""
    with pytest.raises(InvalidValue, match=f"must be >= 1: {groups}, {size}"):
        micro_batches([1], num_micro_batches=groups, micro_batch_size=size)
