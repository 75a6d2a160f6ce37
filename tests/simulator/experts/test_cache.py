"""Caches of experts: what each policy evicts, and compiled replay that agrees with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.errors import InvalidValue, UnknownName
from simulator.experts.cache import CACHE_POLICIES, DEFAULT_POLICY, ExpertCache, NextUse
from simulator.experts.replay import layer_accesses, replay
from simulator.experts.replay_kernels import next_use
from simulator.experts.study import expected_miss_rate, miss_rates, uniform_miss_rate
from simulator.experts.synthesis import Knobs, Routing, synthesize
from simulator.experts.trace import RoutingTrace

POLICIES = sorted(CACHE_POLICIES)
ONLINE = [name for name in POLICIES if not CACHE_POLICIES[name].looks_ahead]
STACK = ["lru", "lfu", "min"]


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    """A few tokens over a few experts, in batches of any size."""
    experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, experts))
    tokens = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))
    random = np.random.default_rng(seed)
    logits = random.gumbel(size=(tokens, 1, experts)) - skew * np.log(random.permutation(experts) + 1.0)
    starts = np.flatnonzero(random.random(tokens) < draw(st.sampled_from([0.1, 0.5, 1.0])))
    return RoutingTrace(
        experts=np.argsort(-logits, axis=2)[:, :, :k],
        num_experts=experts,
        batch_starts=np.union1d([0], starts),
    )


def play(policy: str, sets: list[list[int]], slots: int, num_experts: int) -> list[tuple[int, bool, int | None]]:
    """Every access of a new cache that is given these batches."""
    cache = ExpertCache(policy, slots, num_experts, future=sets)
    return [tuple(access) for active in sets for access in cache.batch(active)]


def misses(policy: str, trace: RoutingTrace, slots: int) -> int:
    """Misses of the compiled replay in the only layer."""
    return int(replay(policy, layer_accesses(trace, layer=0), slots).sum())


# -- stories -------------------------------------------------------------------------------------------


def test_the_example_of_the_paper() -> None:
    """Two slots, active {1, 2, 3}: 1 and 2 are loaded, and 3 takes the place of 2."""
    assert play("inactive-first-lifo", [[1, 2, 3]], 2, 4) == [(1, False, None), (2, False, None), (3, False, 2)]


@pytest.mark.parametrize(
    ("policy", "evicted"),
    [("inactive-first-lifo", 2), ("lifo", 3), ("fifo", 1), ("lru", 2), ("lfu", 2), ("min", 1)],
)
def test_who_leaves(policy: str, evicted: int) -> None:
    """1, 2, 3 came in this order, 1 was used twice, 4 comes in a batch that also uses 3, and 2 and 3 come back next."""
    *_, last = play(policy, [[1], [2], [1, 3], [3, 4], [2, 3]], 3, 5)[:6]
    assert last == (4, False, evicted)


def test_inactive_experts_leave_first_and_the_last_that_came_before_others() -> None:
    """Of two residents that the batch does not use the one that came later leaves."""
    assert play("inactive-first-lifo", [[0, 1, 2], [2, 3]], 3, 4)[-1] == (3, False, 1)


def test_next_use_spares_what_the_batch_still_needs() -> None:
    """LIFO throws out expert 3 just before the batch asks for it; next-use does not."""
    sets = [[0], [3], [0, 1, 3]]
    assert [hit for _, hit, _ in play("inactive-first-lifo", sets, 2, 4)[2:]] == [True, False, False]
    assert [hit for _, hit, _ in play("next-use", sets, 2, 4)[2:]] == [True, False, True]


def test_next_use_gives_up_what_is_needed_last() -> None:
    """Where the batch needs every resident, the one with the highest id leaves."""
    assert play("next-use", [[1, 2], [0, 1, 2]], 2, 3)[2:] == [(0, False, 2), (1, True, None), (2, False, 0)]


def test_next_use_keeps_what_batches_used_often() -> None:
    """Of two residents that the batch does not use, the one that fewer of the last batches used leaves."""
    assert play("next-use", [[1], [1], [0], [2]], 2, 3)[-1] == (2, False, 0)


def test_enough_slots_for_all() -> None:
    """With a slot for every expert, or more, nothing leaves and every expert misses once."""
    for policy in POLICIES:
        accesses = play(policy, [[0, 2], [1], [0, 1, 2]], 7, 3)
        assert [hit for _, hit, _ in accesses] == [False, False, False, True, True, True]
        assert all(evicted is None for _, _, evicted in accesses)


def test_resident_and_empty_batches() -> None:
    """The cache tells what it holds; a batch may need nothing."""
    cache = ExpertCache(DEFAULT_POLICY, 2, 4)
    assert cache.batch([]) == [] and not cache.resident
    cache.batch(np.array([1, 3]))
    assert sorted(cache.resident) == [1, 3]
    assert repr(cache) == "<ExpertCache 'inactive-first-lifo': 2 of 2 slots, 4 experts>"


# -- bad input -----------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    """One line each: an unknown policy, no slots, no experts, MIN without a future."""
    with pytest.raises(UnknownName, match=r"unknown cache policy 'lifoo'.*Did you mean"):
        ExpertCache("lifoo", 1, 1)
    with pytest.raises(InvalidValue, match="'slots' must be >= 1: 0"):
        ExpertCache("lru", 0, 1)
    with pytest.raises(InvalidValue, match="'num_experts' must be >= 1: 0"):
        ExpertCache("lru", 1, 0)
    with pytest.raises(InvalidValue, match="'min' looks ahead"):
        ExpertCache("min", 1, 1)
    with pytest.raises(InvalidValue, match="'future' has expert 3"):
        ExpertCache("min", 1, 3, future=[[3]])


@pytest.mark.parametrize("active", [[2, 1], [1, 1], [-1], [4]])
def test_bad_active_sets(active: list[int]) -> None:
    """Ids out of order, twice, or out of range are refused before anything changes."""
    cache = ExpertCache("lru", 2, 4)
    with pytest.raises(InvalidValue, match="'active'"):
        cache.batch(active)
    assert not cache.resident


def test_min_wants_the_batches_that_were_announced() -> None:
    """Another batch than the future said, or one too many, is an error."""
    cache = ExpertCache("min", 1, 3, future=[[0]])
    with pytest.raises(InvalidValue, match="batch 0 is not the one"):
        cache.batch([1])
    cache.batch([0])
    with pytest.raises(InvalidValue, match="batch 1 is not the one"):
        cache.batch([0])


def test_bad_replays() -> None:
    """The compiled replay refuses what the classes refuse."""
    trace = RoutingTrace(experts=[[[0]], [[1]]], num_experts=2)
    accesses = layer_accesses(trace, layer=0, batch=1)
    with pytest.raises(UnknownName, match="cache policy"):
        replay("mru", accesses, 1)
    with pytest.raises(InvalidValue, match="'slots' must be >= 1: 0"):
        replay("lru", accesses, 0)
    with pytest.raises(InvalidValue, match="'layer' must be between 0 and 0: 1"):
        layer_accesses(trace, layer=1, batch=1)
    for bad in ({"slots": []}, {"slots": [0]}, {"policies": []}, {"batches": []}):
        with pytest.raises(InvalidValue, match=next(iter(bad))):
            miss_rates(trace, **({"batches": [1], "slots": [1]} | bad))


# -- properties ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(trace=traces(), slots=st.integers(1, 10))
def test_replay_agrees_with_the_classes(trace: RoutingTrace, slots: int) -> None:
    """Access by access, for every policy."""
    accesses = layer_accesses(trace, layer=0)
    sets = accesses.batches()
    assert sets == [active.tolist() for active in trace.active(layer=0)]
    for policy in POLICIES:
        expected = [not hit for _, hit, _ in play(policy, sets, slots, trace.num_experts)]
        assert replay(policy, accesses, slots).tolist() == expected, policy


@settings(max_examples=60, deadline=None)
@given(trace=traces(), slots=st.integers(1, 10), policy=st.sampled_from([p for p in POLICIES if p != "min"]))
def test_who_leaves_ranks_highest(trace: RoutingTrace, slots: int, policy: str) -> None:
    """However a policy finds it, the expert that leaves is the one that `rank` says."""
    kind = CACHE_POLICIES[policy]
    ours, cache = kind(slots, trace.num_experts), ExpertCache(policy, slots, trace.num_experts)
    for active in layer_accesses(trace, layer=0).batches():
        there = set(cache.resident)
        ours.start(active)
        for expert, hit, evicted in cache.batch(active):
            if evicted is not None:
                assert evicted == max(there, key=lambda e: ours.rank(e, expert))
                there.remove(evicted)
            there.add(expert)
            (ours.hit if hit else ours.admit)(expert)


@settings(max_examples=100, deadline=None)
@given(trace=traces(), slots=st.integers(1, 9))
def test_min_is_a_lower_bound(trace: RoutingTrace, slots: int) -> None:
    """No policy misses less often than MIN."""
    least = misses("min", trace, slots)
    assert all(misses(policy, trace, slots) >= least for policy in POLICIES)


@settings(max_examples=60, deadline=None)
@given(trace=traces(), policy=st.sampled_from(STACK))
def test_stack_policies_gain_from_slots(trace: RoutingTrace, policy: str) -> None:
    """A stack policy never misses more often with more slots, and what it holds includes what it held with fewer."""
    counts = [misses(policy, trace, slots) for slots in range(1, 10)]
    assert counts == sorted(counts, reverse=True)
    sets = layer_accesses(trace, layer=0).batches()
    if policy != "min":
        caches = [ExpertCache(policy, slots, trace.num_experts) for slots in (2, 4)]
        for active in sets:
            for cache in caches:
                cache.batch(active)
            assert set(caches[0].resident) <= set(caches[1].resident)


@settings(max_examples=60, deadline=None)
@given(trace=traces(), slots=st.integers(1, 9), data=st.data())
def test_no_policy_but_min_sees_the_future(trace: RoutingTrace, slots: int, data: st.DataObject) -> None:
    """What happens up to a batch is the same whatever comes after it."""
    sets = layer_accesses(trace, layer=0).batches()
    cut = data.draw(st.integers(1, len(sets)))
    for policy in ONLINE:
        whole = play(policy, sets, slots, trace.num_experts)
        part = play(policy, sets[:cut], slots, trace.num_experts)
        assert whole[: len(part)] == part


def test_min_is_exhaustively_best() -> None:
    """On small cases MIN misses exactly as often as the best of all ways to evict."""
    random = np.random.default_rng(0)
    for _ in range(30):
        sequence = random.integers(0, 4, size=8).tolist()
        slots = int(random.integers(1, 4))
        held: dict[frozenset[int], int] = {frozenset(): 0}
        for expert in sequence:
            after: dict[frozenset[int], int] = {}
            for there, count in held.items():
                ways = [there] if expert in there else [there | {expert}]
                if len(ways[0]) > slots:
                    ways = [there - {gone} | {expert} for gone in there]
                for way in ways:
                    cost = count + (expert not in there)
                    after[way] = min(after.get(way, cost), cost)
            held = after
        trace = RoutingTrace(experts=np.array(sequence).reshape(-1, 1, 1), num_experts=4)
        assert int(replay("min", layer_accesses(trace, layer=0, batch=1), slots).sum()) == min(held.values())


# -- whole traces --------------------------------------------------------------------------------------


def test_active_sets_by_both_ways_of_sorting() -> None:
    """Small and large batches give the distinct ids in order."""
    random = np.random.default_rng(1)
    experts = random.permuted(np.tile(np.arange(300), (60, 2, 1)), axis=2)[:, :, :3]
    trace = RoutingTrace(experts=experts, num_experts=300)
    for batch in (1, 2, 7, 30, 60):
        for layer in range(2):
            found = layer_accesses(trace, layer=layer, batch=batch).batches()
            assert found == [active.tolist() for active in trace.active(layer=layer, batch=batch)][: 60 // batch]


def test_devices_are_caches_of_their_own() -> None:
    """Two devices with half of the experts each: every one as if it were alone."""
    from simulator.experts.placement import Placement

    trace = synthesize(Routing(num_layers=2, num_experts=8, top_k=2, batch_tokens=3), batches=30)
    owner = np.array([[0, 1] * 4, [1, 1, 0, 0, 1, 0, 1, 0]])
    [found] = miss_rates(trace, batches=[None], slots=[2], policies=["lru"], placement=Placement.of_devices(owner))
    for layer in range(2):
        for device in range(2):
            mine = set(np.flatnonzero(owner[layer] == device).tolist())
            sets = [[e for e in active.tolist() if e in mine] for active in trace.active(layer=layer)]
            accesses = play("lru", sets, 2, 8)
            assert found.accesses[layer, device] == len(accesses)
            assert found.misses[layer, device] == sum(not hit for _, hit, _ in accesses)
    assert found.miss_rate == pytest.approx(found.misses.sum() / found.accesses.sum())
    assert found.worst_layer_miss_rate >= found.layer_miss_rates.mean()
    assert found.worst_device_miss_rate >= found.worst_layer_miss_rate


def test_expected_miss_rate_is_that_of_the_replay() -> None:
    """The remembered answer is the replay's, and the default policy is the paper's."""
    trace = synthesize(Routing(num_layers=1, num_experts=8, top_k=2, batch_tokens=3), batches=30)
    [found] = miss_rates(trace, batches=[4], slots=[3])
    assert expected_miss_rate(trace, 4, 3) == expected_miss_rate(trace, 4, 3) == found.miss_rate
    assert found.policy == "inactive-first-lifo"


def test_uniform_routing_has_a_closed_form() -> None:
    """1 - K/E: met by policies that spare what the batch needs, and a lower bound for all but MIN."""
    trace = synthesize(Routing(num_layers=4, num_experts=32, top_k=4, batch_tokens=2), batches=4000, seed=3)
    for slots in (8, 16, 24):
        expected = uniform_miss_rate(32, slots)
        assert expected_miss_rate(trace, None, slots, "next-use") == pytest.approx(expected, abs=0.005)
        assert expected_miss_rate(trace, None, slots, "inactive-first-lifo") == pytest.approx(expected, abs=0.005)
        for policy in ONLINE:
            assert expected_miss_rate(trace, None, slots, policy) > expected - 0.005
        assert expected_miss_rate(trace, None, slots, "min") < expected - 0.05
    assert uniform_miss_rate(8, 20) == 0
    with pytest.raises(InvalidValue, match="must be >= 1"):
        uniform_miss_rate(8, 0)


def test_next_use_beats_the_paper_where_routing_remembers() -> None:
    """On a skewed and sticky synthetic trace it misses clearly less often, on average by a tenth."""
    sticky = Routing(num_layers=2, num_experts=64, top_k=8, batch_tokens=4, zipf=0.5, stickiness=0.2)
    trace = synthesize(sticky, batches=600)
    ratios = [expected_miss_rate(trace, None, k, "next-use") / expected_miss_rate(trace, None, k) for k in (8, 16, 32)]
    assert max(ratios) < 0.97 and np.mean(ratios) < 0.93


@pytest.mark.parametrize(("experts", "k", "batch", "batches"), [(70, 4, 3, 300), (8, 2, 1, 200), (140, 2, 40, 60)])
def test_replay_agrees_on_longer_traces(experts: int, k: int, batch: int, batches: int) -> None:
    """More batches than next-use looks back on, and more experts than one word has bits."""
    shape = Routing(num_layers=1, num_experts=experts, top_k=k, batch_tokens=batch)
    accesses = layer_accesses(synthesize(shape, batches=batches, knobs=Knobs(spread=1.5, memory=0.8)), layer=0)
    sets = accesses.batches()
    for policy in POLICIES:
        expected = [not hit for _, hit, _ in play(policy, sets, 5, experts)]
        assert replay(policy, accesses, 5).tolist() == expected, policy


def test_next_use_replays_alike_without_numba() -> None:
    """The same loop in plain Python, where numbers of fixed size do not grow."""
    shape = Routing(num_layers=1, num_experts=12, top_k=2, batch_tokens=1)
    accesses = layer_accesses(synthesize(shape, batches=150, knobs=Knobs(spread=1.5, memory=0.8)), layer=0)
    plain = getattr(next_use, "py_func", next_use)
    missed = np.zeros(len(accesses), np.uint8)
    constants = NextUse.window(12), NextUse.ONE, *NextUse.FORGET, NextUse.LATEST, NextUse.JUDGE
    with np.errstate(over="raise"):
        plain(accesses.experts, accesses.offsets, 12, 4, missed, *constants, np.array(NextUse.WEIGHTS))
    assert missed.tolist() == replay("next-use", accesses, 4).tolist()


def test_replay_agrees_where_few_and_many_experts_take_turns() -> None:
    """Single tokens are compared expert by expert and large batches all at once; a trace may have both."""
    routing = Routing(num_layers=1, num_experts=160, top_k=4, batch_tokens=1)
    trace = synthesize(routing, batches=1600, seed=3, knobs=Knobs(spread=1.0, skew=0.7, memory=0.6))
    single = np.arange(0, 500)
    large = np.arange(500, 1500, 50)
    mixed = np.random.default_rng(0).permutation(np.arange(1500, 1600))[:60]
    trace = replace(trace, batch_starts=np.unique(np.concatenate([single, large, mixed])))
    accesses = layer_accesses(trace, layer=0)
    for slots in (5, 60, 150):
        cache = ExpertCache("next-use", slots, 160)
        found = [not access.hit for active in accesses.batches() for access in cache.batch(active)]
        assert replay("next-use", accesses, slots).astype(bool).tolist() == found
