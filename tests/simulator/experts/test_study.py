"""Miss rates of the decode steps of a recorded run."""

from __future__ import annotations

import pytest

from hrm.errors import InvalidValue
from simulator.experts.study import decode_miss_rate
from simulator.experts.trace import RoutingTrace


def test_prompts_fill_the_cache_and_are_not_counted() -> None:
    """A prompt of three tokens loads experts 0, 1, 2; of the two steps that follow one hits and one misses."""
    trace = RoutingTrace(experts=[[[0]], [[1]], [[2]], [[1]], [[3]]], num_experts=4, batch_starts=[0, 3, 4])
    assert decode_miss_rate(trace, 3, most_tokens=1) == 0.5
    assert decode_miss_rate(trace, 4, most_tokens=3) == 4 / 5
    with pytest.raises(InvalidValue, match="at most 0 tokens"):
        decode_miss_rate(trace, 3, most_tokens=0)
