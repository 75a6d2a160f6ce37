"""What a cache is expected to miss when only the popularity of experts is known."""

from __future__ import annotations

import numpy as np
import pytest

from hrm.errors import HrmError
from simulator.experts.cache import CACHE_POLICIES, DEFAULT_POLICY
from simulator.experts.expected import independent_accesses, independent_miss_rate
from simulator.experts.shares import typical_popularity
from simulator.experts.study import miss_rates, uniform_miss_rate
from simulator.experts.synthesis import Knobs, Routing, draw_choices, synthesize
from simulator.experts.trace import RoutingTrace

SHAPE = {"num_experts": 64, "top_k": 8}


@pytest.mark.parametrize("policy", list(CACHE_POLICIES))
@pytest.mark.parametrize(("tokens", "slots"), [(1, 16), (4, 16), (4, 40), (40, 24)])
def test_a_long_uniform_trace_misses_as_much(policy: str, tokens: int, slots: int) -> None:
    """The short replay behind a prediction is within a point and a half of a long one on other random numbers.

    But LFU's, whose counts take long to differ where nearly all experts are active: the longer, the fewer misses.
    """
    trace = synthesize(Routing(num_layers=4, batch_tokens=tokens, **SHAPE), batches=1500, seed=7, knobs=Knobs())
    [found] = miss_rates(trace, batches=[tokens], slots=[slots], policies=[policy])
    close = 0.12 if policy == "lfu" and tokens > 4 else 0.015
    assert independent_miss_rate(policy, slots, tokens, **SHAPE) == pytest.approx(found.miss_rate, abs=close)


def test_policies_that_evict_what_is_needed_miss_more() -> None:
    """With all experts active and fewer slots, the oldest first misses everything; foresight the least."""
    rates = {policy: independent_miss_rate(policy, 32, 64, **SHAPE) for policy in CACHE_POLICIES}
    assert min(rates, key=lambda name: rates[name]) == "min"
    assert rates["lru"] > 0.99 and rates["fifo"] > 0.99
    assert rates[DEFAULT_POLICY] == pytest.approx(0.5, abs=0.03)


def test_where_theory_knows_the_rate_it_is_exact() -> None:
    """Nothing leaves that is still needed: 1 - K/E; a slot for every expert: none."""
    assert independent_miss_rate(DEFAULT_POLICY, 16, 2, **SHAPE) == uniform_miss_rate(64, 16)
    assert independent_miss_rate("lru", 64, 2, **SHAPE) == 0.0


def test_popular_experts_are_missed_less() -> None:
    """A routing histogram that prefers some experts lowers the rate of a policy that counts, and of the paper's."""
    weights = 1 / np.arange(1, 65)
    routing = tuple(np.minimum(1.0, 8 * weights / weights.sum()))
    for policy in ("lfu", DEFAULT_POLICY, "next-use"):
        known = independent_miss_rate(policy, 16, 2, routing=routing, **SHAPE)
        assert known < independent_miss_rate(policy, 16, 2, **SHAPE) - 0.1


@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_active_experts_are_those_of_the_cost_model(tokens: int) -> None:
    """As many experts are active as the closed form counts, drawn token by token or not."""
    weights = 1 / np.sqrt(np.arange(1, 65))
    shares = np.minimum(1.0, 8 * weights / weights.sum())
    accesses = independent_accesses(tokens, routing=tuple(shares), **SHAPE)
    mean = len(accesses) / (len(accesses.offsets) - 1)
    assert mean == pytest.approx((1 - (1 - shares) ** tokens).sum(), rel=0.02)


def test_drawn_choices_have_the_shares_asked_for() -> None:
    """Every expert is chosen as often as its share says, by distinct choices of every token."""
    shares = np.array([0.9, 0.6, 0.3, 0.1, 0.1, 0.0])
    chosen = draw_choices(shares, 2, 40_000, np.random.default_rng(1))
    assert all(len(set(row)) == 2 for row in chosen[:500].tolist())
    assert np.bincount(chosen.ravel(), minlength=6) / 40_000 == pytest.approx(shares, abs=0.06)


def test_typical_popularity_is_as_uneven_as_the_layers() -> None:
    """Favourites that differ from layer to layer do not even out."""
    chosen = np.array([[[0], [2]], [[0], [2]], [[1], [2]], [[0], [1]]])
    found = typical_popularity(RoutingTrace(experts=chosen, num_experts=4))
    assert sorted(found) == [0.0, 0.0, 0.25, 0.75]


def test_large_micro_batches_share_answers() -> None:
    """Sizes within two per cent are one replay; the answer does not depend on what was asked before."""
    rates = {independent_miss_rate("lfu", 16, tokens, **SHAPE) for tokens in (1000, 1005, 1010)}
    assert len(rates) == 1


@pytest.mark.parametrize(("policy", "slots", "tokens"), [("lruu", 4, 1), ("lru", 0, 1), ("lru", 4, 0)])
def test_what_cannot_be_is_refused(policy: str, slots: int, tokens: int) -> None:
    """One line for unknown policies and sizes below one."""
    with pytest.raises(HrmError):
        independent_miss_rate(policy, slots, tokens, **SHAPE)
