"""Placements: balanced, as the papers describe them, and no worse than they must be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.errors import InvalidConfig, InvalidValue, UnknownName
from simulator.experts.load import device_loads, judge
from simulator.experts.optimal import objective_value, optimal_placement
from simulator.experts.placement import (
    PLACEMENT_METHODS,
    Placement,
    anti_correlation_placement,
    batch_shares,
    correlations,
    even_placement,
    greedy_placement,
    least_loaded,
    place,
)
from simulator.experts.refinement import swap_refine
from simulator.experts.replication import replicate, replicated_placement, replicated_slots
from simulator.experts.trace import RoutingTrace

HEURISTICS = ["even", "greedy", "anti-correlation", "refined"]


def skewed_trace(*, experts: int, batches: int, tokens: int, layers: int = 1, zipf: float = 1.0, seed: int = 0):  # type: ignore[no-untyped-def]
    """Independent choices from a Zipf distribution over experts in random order, `tokens` choices to a batch."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, experts + 1.0) ** -zipf
    chosen = np.stack(
        [rng.choice(rng.permutation(experts), size=batches * tokens, p=weights / weights.sum()) for _ in range(layers)],
        axis=1,
    )
    starts = np.arange(batches) * tokens
    return RoutingTrace(experts=chosen[:, :, None], num_experts=experts, batch_starts=starts, name="zipf")


def bursty_trace(*, experts: int, groups: int, batches: int, tokens: int, seed: int = 0) -> RoutingTrace:
    """Groups of experts that are busy in the same batches, by turns, so that all are as popular over time."""
    rng = np.random.default_rng(seed)
    member = rng.permutation(experts) % groups
    rows = []
    for batch in range(batches):
        hot = (batch + np.array([0, groups // 2])) % groups
        weights = np.where(np.isin(member, hot), 8.0, 1.0)
        rows.append(rng.choice(experts, size=tokens, p=weights / weights.sum()))
    chosen = np.concatenate(rows)[:, None, None]
    return RoutingTrace(experts=chosen, num_experts=experts, batch_starts=np.arange(batches) * tokens, name="bursts")


# -- the object ----------------------------------------------------------------------------------------


def test_devices_and_slots_are_two_views_of_a_placement() -> None:
    """Slots follow from devices, and devices from slots."""
    placement = Placement.of_devices([[1, 0, 1, 0], [0, 0, 1, 1]])
    assert placement.slots.tolist() == [[[1, 3], [0, 2]], [[0, 1], [2, 3]]]
    assert placement.device_of.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert placement.experts_of(layer=0, device=1).tolist() == [0, 2]
    assert not placement.replicated
    assert (placement.replicas == 1).all()


def test_replicas_share_the_tokens_of_their_expert() -> None:
    """An expert in three slots has a third of its tokens in each; it has no single device."""
    placement = Placement(slots=[[[0, 1], [0, 2], [0, 3]]], num_experts=4)
    assert placement.replicated
    assert placement.shares()[0, 0].tolist() == [1 / 3] * 3
    assert placement.replicas.tolist() == [[3, 1, 1, 1]]
    with pytest.raises(InvalidValue, match="no single device"):
        _ = placement.device_of


@pytest.mark.parametrize("method", [*HEURISTICS, "greedy-replicated"])
def test_a_placement_survives_its_file(method: str, tmp_path: Path) -> None:
    """What is saved is what is loaded, numbers of layers and method included."""
    trace = skewed_trace(experts=12, batches=4, tokens=30, layers=2)
    trace = RoutingTrace(experts=trace.experts, num_experts=12, batch_starts=trace.batch_starts, layers=(3, 7))
    placement = place(trace, 4, method)
    again = Placement.load(placement.save(tmp_path / "placement.json"))
    assert np.array_equal(again.slots, placement.slots)
    assert (again.num_experts, again.layers, again.method) == (12, (3, 7), method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "'format'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"layers": None}, "placement"),
        ({"layers": [0, 1]}, "names 2 layers"),
        ({"slots": [[[0, 1], [2, 9]]]}, "expert 9"),
        ({"slots": [[[0, 1], [2, 2]]]}, "expert 3 is nowhere"),
        ({"slots": [[[0, 1], [2]]]}, "slots|inhomogeneous"),
        ({"slots": [[[0, 1], [2, 3.5]]]}, "integers"),
        ({"slots": "none"}, "integers"),
        ({"num_experts": "4"}, "'num_experts'"),
    ],
)
def test_a_file_that_is_no_placement_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    """Every damaged file is one line that says what is wrong."""
    good = {"format": "hrm-placement-1", "num_experts": 4, "layers": [0], "method": "x", "slots": [[[0, 1], [2, 3]]]}
    path = tmp_path / "p.json"
    path.write_text(json.dumps(good | change))
    with pytest.raises(InvalidConfig, match=message) as caught:
        Placement.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_json_or_not_there_is_refused(tmp_path: Path) -> None:
    """Missing and cut files are named."""
    with pytest.raises(InvalidConfig, match="cannot read"):
        Placement.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"format": "hrm-pl')
    with pytest.raises(InvalidConfig, match="not JSON"):
        Placement.load(tmp_path / "cut.json")
    (tmp_path / "less.json").write_text('{"format": "hrm-placement-1"}')
    with pytest.raises(InvalidConfig, match="lacks key 'layers'"):
        Placement.load(tmp_path / "less.json")


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (3, "divide the 8 experts evenly: 3; the nearest that do are 2 and 4"),
        (16, "at most"),
        (0, ">= 1"),
        (-2, ">= 1"),
    ],
)
@pytest.mark.parametrize("method", [*HEURISTICS, "optimal"])
def test_devices_that_cannot_share_the_experts_are_refused(method: str, devices: int, message: str) -> None:
    """E/D must be a whole number of experts."""
    with pytest.raises(InvalidValue, match=message):
        place(skewed_trace(experts=8, batches=2, tokens=10), devices, method)


def test_unbalanced_devices_are_refused() -> None:
    """A placement that gives one device more experts than another is none."""
    with pytest.raises(InvalidValue, match="puts 3 experts of layer 0 on device 0"):
        Placement.of_devices([[0, 0, 0, 1]])


def test_an_unknown_method_suggests_one() -> None:
    """The nearest method is named."""
    with pytest.raises(UnknownName, match="Did you mean 'greedy'"):
        place(skewed_trace(experts=4, batches=2, tokens=10), 2, "gredy")


def test_a_placement_of_another_shape_does_not_judge_a_trace() -> None:
    """Layers and experts must agree."""
    with pytest.raises(InvalidValue, match="does not fit a trace of 1 layers x 8 experts"):
        judge(skewed_trace(experts=8, batches=2, tokens=10), Placement.of_devices([[0, 1]]))


# -- heuristics ----------------------------------------------------------------------------------------


def test_greedy_by_hand() -> None:
    """Loads 5, 4, 3, 2, 1, 1 on two devices: 5+2+1 and 4+3+1."""
    chosen = np.repeat([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 1])
    trace = RoutingTrace(experts=chosen[:, None, None], num_experts=6)
    assert greedy_placement(trace, 2).slots.tolist() == [[[0, 3, 4], [1, 2, 5]]]


def test_anti_correlation_by_hand() -> None:
    """Experts 0 and 1 are busy together, 2 and 3 in the other batches: each device gets one of both kinds."""
    busy = [[0, 1, 0, 1, 0, 1, 2, 3], [2, 3, 2, 3, 2, 3, 0, 1]] * 3
    trace = RoutingTrace(experts=np.array(busy).reshape(-1, 1, 1), num_experts=4, batch_starts=np.arange(6) * 8)
    for layer in anti_correlation_placement(trace, 2).slots:
        assert [sorted(int(e) // 2 for e in device) for device in layer] == [[0, 1], [0, 1]]


def test_correlations_are_pearson() -> None:
    """As numpy's, with 0 in place of undefined ones."""
    shares = np.random.default_rng(3).random((20, 5))
    shares[:, 4] = 0.25
    found = correlations(shares)
    assert np.allclose(found[:4, :4], np.corrcoef(shares[:, :4].T))
    assert (found[4] == 0).all() and (found[:, 4] == 0).all()


def test_anti_correlation_needs_batches() -> None:
    """One batch says nothing about what is busy together."""
    with pytest.raises(InvalidValue, match="at least 2 batches"):
        anti_correlation_placement(skewed_trace(experts=4, batches=1, tokens=50), 2)


def test_anti_correlation_helps_where_experts_are_busy_together() -> None:
    """Where experts are equally popular but come in groups, greedy gains nothing and anti-correlation does."""
    gains = []
    for seed in range(4):
        history, later = bursty_trace(experts=64, groups=8, batches=200, tokens=512, seed=seed).split()
        even, greedy, anti = (
            judge(later, place(history, 8, method)).summary()["avg_max_load"]
            for method in ("even", "greedy", "anti-correlation")
        )
        gains.append((greedy / even - 1, anti / even - 1))
    greedy_gain, anti_gain = np.mean(gains, axis=0)
    assert anti_gain < -0.1
    assert abs(greedy_gain) < 0.05


def test_greedy_is_near_the_optimum_of_its_history() -> None:
    """64 experts on 8 devices: greedy's largest mean load is within 5 % of the least possible one."""
    for zipf in (0.0, 0.6, 0.8):
        history, _ = skewed_trace(experts=64, batches=40, tokens=512, zipf=zipf).split()
        best = optimal_placement(history, 8, time_limit=5.0)
        greedy = judge(history, greedy_placement(history, 8)).mean_load
        assert (best.bound <= best.value + 1e-12).all()
        assert (best.value <= greedy + 1e-12).all()
        assert (greedy / best.bound - 1 <= 0.05).all()


def test_swaps_mend_what_the_limit_on_experts_costs_greedy() -> None:
    """Between no skew and much, greedy runs out of places on devices with light experts; swaps get within 1 %."""
    weights = np.arange(1, 65.0) ** -0.4
    greedy = least_loaded(weights, 8)
    refined = swap_refine(weights, greedy)
    ideal = weights.sum() / 8
    assert weights[greedy].sum(axis=1).max() > 1.05 * ideal
    assert weights[refined].sum(axis=1).max() < 1.01 * ideal
    assert np.array_equal(np.sort(refined.ravel()), np.arange(64))


# -- properties ----------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> tuple[RoutingTrace, int]:
    """Small traces with batches of several sizes, and a number of devices that divides their experts."""
    experts = draw(st.sampled_from([2, 4, 6, 8]))
    devices = draw(st.sampled_from([d for d in range(1, experts + 1) if experts % d == 0]))
    tokens, layers = draw(st.integers(4, 30)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    weights = rng.random(experts) ** 3 + 1e-3
    chosen = rng.choice(experts, size=(tokens, layers, 1), p=weights / weights.sum())
    cuts = np.unique(rng.integers(1, tokens, size=3))
    return RoutingTrace(experts=chosen, num_experts=experts, batch_starts=np.concatenate([[0], cuts])), devices


@settings(max_examples=60, deadline=None)
@given(traces())
def test_every_method_gives_each_device_its_experts(case: tuple[RoutingTrace, int]) -> None:
    """E/D experts each, every expert once; loads add up to 1; no Max Load below the ideal or the mean."""
    trace, devices = case
    for method in HEURISTICS:
        placement = place(trace, devices, method)
        assert placement.slots.shape == (trace.num_layers, devices, trace.num_experts // devices)
        assert (np.sort(placement.slots.reshape(trace.num_layers, -1)) == np.arange(trace.num_experts)).all()
        assert np.allclose(device_loads(trace, placement).sum(axis=2), 1.0)
        report = judge(trace, placement)
        assert (report.max_load >= report.avg_max_load - 1e-12).all()
        assert (report.avg_max_load >= report.mean_load - 1e-12).all()
        assert (report.mean_load >= report.ideal - 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(traces(), st.sampled_from(["mean", "worst", "average"]))
def test_no_heuristic_beats_the_optimum(case: tuple[RoutingTrace, int], objective: str) -> None:
    """The MILP's value is at most every heuristic's on the same history, and at least its bound."""
    trace, devices = case
    best = optimal_placement(trace, devices, objective=objective, time_limit=20.0)  # type: ignore[arg-type]
    shares = batch_shares(trace)
    for layer in range(trace.num_layers):
        for method in HEURISTICS:
            found = place(trace, devices, method).device_of[layer]
            value = objective_value(shares[:, layer], found, devices, objective)  # type: ignore[arg-type]
            assert best.value[layer] <= value + 1e-7 + 1e-4 * value
    assert (best.bound <= best.value + 1e-12).all()
    assert best.proven.all()


@settings(max_examples=40, deadline=None)
@given(traces(), st.randoms(use_true_random=False))
def test_names_of_devices_do_not_matter(case: tuple[RoutingTrace, int], random) -> None:  # type: ignore[no-untyped-def]
    """Devices in another order carry the same loads in that order, and Max Load stays."""
    trace, devices = case
    placement = greedy_placement(trace, devices)
    order = list(range(devices))
    random.shuffle(order)
    renamed = Placement(slots=placement.slots[:, order], num_experts=trace.num_experts)
    assert np.allclose(device_loads(trace, renamed), device_loads(trace, placement)[:, :, order])
    assert np.allclose(judge(trace, renamed).max_load, judge(trace, placement).max_load)


@settings(max_examples=40, deadline=None)
@given(traces())
def test_the_per_device_metrics_agree_with_counting(case: tuple[RoutingTrace, int]) -> None:
    """Max Load and Avg Max Load, counted token by token."""
    trace, devices = case
    placement = even_placement(trace, devices)
    device = placement.device_of
    stops = [*trace.starts()[1:], trace.num_tokens]
    for layer in range(trace.num_layers):
        largest = []
        for start, stop in zip(trace.starts(), stops, strict=True):
            chosen = trace.experts[start:stop, layer].ravel()
            largest.append(np.bincount(device[layer][chosen], minlength=devices).max() / len(chosen))
        report = judge(trace, placement)
        assert report.max_load[layer] == pytest.approx(max(largest))
        assert report.avg_max_load[layer] == pytest.approx(np.mean(largest))


def test_the_optimum_of_a_small_case_is_the_best_of_all() -> None:
    """Eight experts on four devices, against every placement there is, for all three objectives."""
    trace = skewed_trace(experts=8, batches=6, tokens=40, zipf=0.7, seed=5)
    shares = batch_shares(trace)[:, 0]

    def pairings(left: list[int]) -> list[list[tuple[int, int]]]:
        if not left:
            return [[]]
        first, rest = left[0], left[1:]
        return [[(first, x), *more] for x in rest for more in pairings([y for y in rest if y != x])]

    every = []
    for pairs in pairings(list(range(8))):
        devices = np.empty(8, dtype=int)
        for device, pair in enumerate(pairs):
            devices[list(pair)] = device
        every.append(devices)
    assert len(every) == 105
    for objective in ("mean", "worst", "average"):
        best = optimal_placement(trace, 4, objective=objective)
        least = min(objective_value(shares, devices, 4, objective) for devices in every)
        assert best.value[0] == pytest.approx(least, rel=2e-4)
        assert best.proven.all()


# -- replication ---------------------------------------------------------------------------------------

# README and example of https://github.com/deepseek-ai/EPLB: loads of two layers of 12 experts, 16 physical
# experts, 4 groups, 2 nodes, 8 GPUs, and the packing that it prints.
EPLB_WEIGHTS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EPLB_PACKING = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_eplb_example() -> None:
    """The published example gets the published packing."""
    found = replicated_slots(np.array(EPLB_WEIGHTS), slots=16, devices=8, groups=4, nodes=2)
    assert found.reshape(2, 16).tolist() == EPLB_PACKING


def test_the_global_variant_ignores_groups() -> None:
    """Groups that nodes cannot share give the packing of one group on one node, with no more load on any GPU."""
    weights = np.array(EPLB_WEIGHTS)
    found = replicated_slots(weights, slots=16, devices=8, groups=3, nodes=2)
    assert np.array_equal(found, replicated_slots(weights, slots=16, devices=8))
    largest = []
    for slots in (found, replicated_slots(weights, slots=16, devices=8, groups=4, nodes=2)):
        loads = np.einsum("le,led->ld", weights, Placement(slots=slots, num_experts=12).shares())
        largest.append(loads.max(axis=1))
    assert (largest[0] <= largest[1]).all()


def test_replicas_go_to_the_highest_load_per_replica() -> None:
    """Loads 8, 3, 1: the first is shared by two, by three, and then the second has more per replica."""
    assert replicate(np.array([8.0, 3.0, 1.0]), 6).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 10, "devices": 8}, "at least the number of experts"),
        ({"slots": 18, "devices": 8}, "'devices' must divide the 18 slots"),
        ({"slots": 16, "devices": 8, "groups": 5}, "'groups' must divide the 12 experts"),
        ({"slots": 16, "devices": 8, "groups": 3, "nodes": 3}, "'nodes' must divide the 8 devices"),
        ({"slots": 16, "devices": 8, "nodes": 0}, "'nodes' must be an integer >= 1"),
        ({"slots": 32, "devices": 0}, "'devices' must be an integer >= 1"),
    ],
)
def test_slots_that_do_not_work_out_are_refused(options: dict[str, int], message: str) -> None:
    """Slots, groups, nodes and devices must divide one another."""
    with pytest.raises(InvalidValue, match=message):
        replicated_slots(np.array(EPLB_WEIGHTS), **options)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(12, 16, 4, 2, 8), (8, 12, 4, 2, 4), (16, 16, 4, 4, 8), (6, 9, 1, 1, 3)]),
)
def test_replicated_placements_hold_every_expert(seed: int, sizes: tuple[int, int, int, int, int]) -> None:
    """Every expert has a slot, and with groups each expert's replicas stay on one node."""
    experts, slots, groups, nodes, devices = sizes
    weights = np.random.default_rng(seed).random((2, experts)) ** 4
    found = replicated_slots(weights, slots=slots, devices=devices, groups=groups, nodes=nodes)
    placement = Placement(slots=found, num_experts=experts)
    assert (placement.replicas >= 1).all() and (placement.replicas.sum(axis=1) == slots).all()
    node = placement.shares().reshape(2, experts, nodes, -1).sum(axis=3)
    assert np.allclose(node.max(axis=2), 1.0)


def test_replication_beats_greedy_where_one_expert_is_hot() -> None:
    """One expert with half of all tokens bounds every placement without replicas from below."""
    rng = np.random.default_rng(0)
    chosen = np.where(rng.random(4000) < 0.5, 0, rng.integers(1, 16, 4000))
    trace = RoutingTrace(experts=chosen[:, None, None], num_experts=16, batch_starts=np.arange(0, 4000, 100))
    greedy = judge(trace, greedy_placement(trace, 8)).summary()["avg_max_load"]
    copied = judge(trace, replicated_placement(trace, 8)).summary()["avg_max_load"]
    assert greedy > 0.45
    assert copied < 0.3


def test_devices_may_be_any_number_with_replicas() -> None:
    """Twelve experts on five devices take fifteen slots."""
    placement = replicated_placement(skewed_trace(experts=12, batches=4, tokens=50), 5)
    assert placement.slots.shape == (1, 5, 3)


def test_every_method_is_offered() -> None:
    """The methods that the command lists."""
    assert set(PLACEMENT_METHODS) == {*HEURISTICS, "optimal", "greedy-replicated"}
