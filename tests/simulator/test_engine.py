"""The engine: exact little stories, the recurrence, and sharing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.errors import InvalidSchedule
from hrm.hardware import Curve
from simulator.engine import fair_speeds, play
from simulator.task import LANES, Schedule
from tests.simulator.support import costs, random_seconds, schedules, story

TWO_LANES = "PreAttn(1,0,0) @gpu\nCPUAttn(1,0,0) @cpu"

speeds_input = st.integers(1, 3).flatmap(
    lambda resources: st.tuples(
        st.lists(st.tuples(*[st.floats(0, 10)] * resources), min_size=1, max_size=5),
        st.tuples(*[st.floats(0.1, 20)] * resources),
    )
)
one_resource = st.tuples(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.floats(0.1, 20))


def log(schedule: Schedule, seconds, **shared) -> list[tuple[str, float, float]]:
    """What happened: (task, start, end)."""
    start, end = play(schedule, costs(seconds, **shared))
    return list(zip(schedule.labels(), start.tolist(), end.tolist(), strict=True))


# -- stories ------------------------------------------------------------------------------------------


def test_a_chain() -> None:
    """Tasks that wait for each other run one after the other on their lanes."""
    schedule = story(
        "PreAttn(1,0,0) @gpu\nOffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)\nCPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0)"
    )
    assert log(schedule, [2, 1, 4]) == [
        ("PreAttn(1,0,0)", 0, 2),
        ("OffloadQKV(1,0,0)", 2, 3),
        ("CPUAttn(1,0,0)", 3, 7),
    ]


def test_lanes_overlap_and_keep_their_order() -> None:
    """A task that is ready still waits for its predecessor on the lane; other lanes go on."""
    schedule = story(
        "PreAttn(1,0,0) @gpu\n"
        "WCtoPin(1,0,0) @pin\n"
        "LoadH(1,0,0) @h2d < PreAttn(1,0,0)\n"
        "WPinToG(1,0,0) @h2d < WCtoPin(1,0,0)\n"
        "PostAttn(1,0,0) @gpu < LoadH(1,0,0) WPinToG(1,0,0)"
    )
    assert log(schedule, [5, 1, 2, 3, 1]) == [
        ("PreAttn(1,0,0)", 0, 5),
        ("WCtoPin(1,0,0)", 0, 1),
        ("LoadH(1,0,0)", 5, 7),
        ("WPinToG(1,0,0)", 7, 10),  # ready at 1, but behind LoadH
        ("PostAttn(1,0,0)", 10, 11),
    ]


def test_tasks_without_duration() -> None:
    """Tasks of no length take no time, shared or not, and still keep the order."""
    schedule = story("PreAttn(1,0,0) @gpu\nSample(1,0,0) @gpu\nCPUAttn(1,0,0) @cpu < Sample(1,0,0)")
    expected = [("PreAttn(1,0,0)", 0, 0), ("Sample(1,0,0)", 0, 1), ("CPUAttn(1,0,0)", 1, 1)]
    assert log(schedule, [0, 1, 0]) == expected
    assert log(schedule, [0, 1, 0], demands={"x": [1, 1, 1]}, capacities={"x": 1.0}) == expected


def test_an_empty_schedule() -> None:
    """No tasks take no time."""
    start, end = play(story(""), costs([]))
    assert len(start) == len(end) == 0


def test_two_equal_tasks_halve_their_speed() -> None:
    """Two tasks that each want all of a resource take twice as long together."""
    shared = {"demands": {"dram": [10, 10]}, "capacities": {"dram": 10.0}}
    assert log(story(TWO_LANES), [1, 1], **shared) == [("PreAttn(1,0,0)", 0, 2), ("CPUAttn(1,0,0)", 0, 2)]


def test_the_shorter_task_frees_the_resource() -> None:
    """After the shorter of two equal users has ended, the longer one runs at full speed."""
    shared = {"demands": {"dram": [10, 10]}, "capacities": {"dram": 10.0}}
    assert log(story(TWO_LANES), [1, 2], **shared) == [("PreAttn(1,0,0)", 0, 2), ("CPUAttn(1,0,0)", 0, 3)]


def test_a_modest_user_keeps_its_speed() -> None:
    """Max-min: a task that wants less than a fair share is not slowed; the other gets the rest."""
    shared = {"demands": {"dram": [2, 10]}, "capacities": {"dram": 10.0}}
    (_, _, small), (_, _, large) = log(story(TWO_LANES), [4, 4], **shared)
    assert small == 4
    # Until 4 s the large one ran at 8/10, so 0.8 of its 4 s remain.
    assert large == pytest.approx(4.8)


def test_unequal_users_get_equal_shares() -> None:
    """Two tasks above a fair share get the same units per second, and so different speeds."""
    shared = {"demands": {"dram": [6, 8]}, "capacities": {"dram": 10.0}}
    (_, _, first), (_, _, second) = log(story(TWO_LANES), [1, 2], **shared)
    assert first == pytest.approx(6 / 5)
    # The second has done 1.2 s at speed 5/8 of its 2 s.
    assert second == pytest.approx(1.2 + (2 - 1.2 * 5 / 8))


def test_a_task_that_joins_slows_the_one_that_runs() -> None:
    """Shares are dealt anew whenever a task starts."""
    schedule = story("PreAttn(1,0,0) @gpu\nSample(1,0,0) @gpu\nCPUAttn(1,0,0) @cpu")
    shared = {"demands": {"dram": [0, 10, 10]}, "capacities": {"dram": 10.0}}
    # CPUAttn is alone until 1 s, then shares with Sample: 1 s of it left, 1 s of Sample.
    assert log(schedule, [1, 1, 2], **shared) == [
        ("PreAttn(1,0,0)", 0, 1),
        ("Sample(1,0,0)", 1, 3),
        ("CPUAttn(1,0,0)", 0, 3),
    ]


def test_the_scarcer_resource_decides() -> None:
    """A task that uses two resources is as slow as the more crowded one makes it."""
    shared = {"demands": {"dram": [4, 4], "cores": [1, 1]}, "capacities": {"dram": 10.0, "cores": 1.0}}
    assert log(story(TWO_LANES), [1, 1], **shared) == [("PreAttn(1,0,0)", 0, 2), ("CPUAttn(1,0,0)", 0, 2)]


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_a_bad_duration_is_refused(seconds: float) -> None:
    """A negative or undefined duration is refused by the task's name."""
    with pytest.raises(InvalidSchedule, match=rf"CPUAttn\(1,0,0\) has duration {seconds}, must be >= 0"):
        play(story(TWO_LANES), costs([1.0, seconds]))


def test_an_infinite_duration_is_refused() -> None:
    """A task that would never end, as on a link of no bandwidth, is refused by name."""
    with pytest.raises(InvalidSchedule, match=r"CPUAttn\(1,0,0\) has duration inf"):
        play(story(TWO_LANES), costs([1.0, float("inf")]))


def test_a_deadlock_is_refused_with_and_without_sharing() -> None:
    """A schedule that cannot progress is refused before anything runs."""
    schedule = story("PreAttn(1,0,0) @gpu < CPUAttn(1,0,0)\nCPUAttn(1,0,0) @cpu < PreAttn(1,0,0)")
    with pytest.raises(InvalidSchedule, match="not progressing"):
        play(schedule, costs([1, 1]))
    with pytest.raises(InvalidSchedule, match="not progressing"):
        play(schedule, costs([1, 1], {"x": [1, 1]}, {"x": 1.0}))


# -- the recurrence -----------------------------------------------------------------------------------


def reference(schedule: Schedule, seconds: np.ndarray) -> np.ndarray:
    """Starts by brute force: apply start = max(ends waited for) until nothing moves."""
    tasks = list(schedule)
    previous: dict = {}
    needs = []
    for task in tasks:
        needs.append([*task.deps, *([previous[task.lane]] if task.lane in previous else [])])
        previous[task.lane] = task.id
    start = [0.0] * len(tasks)
    while True:
        moved = [max((start[n] + seconds[n] for n in needs[i]), default=0.0) for i in range(len(tasks))]
        if moved == start:
            return np.array(start)
        start = moved


@given(schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_recurrence_equals_brute_force(schedule: Schedule, seed: int) -> None:
    """With nothing shared, a task starts exactly when the last thing it waits for ends."""
    seconds = random_seconds(schedule, seed)
    start, end = play(schedule, costs(seconds))
    assert start.tolist() == reference(schedule, seconds).tolist()
    assert end.tolist() == (start + seconds).tolist()


@given(schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_sharing_without_scarcity_changes_nothing(schedule: Schedule, seed: int) -> None:
    """With demands that all lanes together cannot fill, sharing equals the recurrence."""
    seconds = random_seconds(schedule, seed)
    rng = np.random.default_rng(seed)
    demands = {"a": rng.uniform(0, 1 / len(LANES), len(schedule)), "b": np.zeros(len(schedule))}
    alone = play(schedule, costs(seconds))
    together = play(schedule, costs(seconds, demands, {"a": 1.0, "b": 1.0}))
    scale = max(1.0, float(alone[1].max()))
    assert np.allclose(together[0], alone[0], rtol=0, atol=1e-9 * scale)
    assert np.allclose(together[1], alone[1], rtol=0, atol=1e-9 * scale)


@given(schedules(), st.integers(0, 2**32 - 1), st.floats(0.3, 3))
@settings(deadline=None, max_examples=40)
def test_sharing_only_delays_and_conserves_work(schedule: Schedule, seed: int, capacity: float) -> None:
    """Sharing never makes a task start or end earlier, nor any resource yield more than it has."""
    seconds = random_seconds(schedule, seed)
    demand = np.minimum(np.random.default_rng(seed).uniform(0, 1, len(schedule)), capacity)
    start, end = play(schedule, costs(seconds, {"x": demand}, {"x": capacity}))
    first, last = play(schedule, costs(seconds))
    slack = 1e-9 * max(1.0, float(end.max()))
    assert (start >= first - slack).all()
    assert (end >= last - slack).all()
    assert (end - start >= seconds - slack).all()
    assert float((demand * seconds).sum()) <= capacity * float(end.max()) + slack
    # All the work of any stretch of time fits the resource as well: tasks wholly inside it.
    for low, high in ((0.2, 0.5), (0.4, 0.9)):
        a, b = low * float(end.max()), high * float(end.max())
        inside = (start >= a) & (end <= b)
        assert float((demand * seconds)[inside].sum()) <= capacity * (b - a) + slack
    for task in schedule:
        assert all(end[dep] <= start[task.id] + slack for dep in task.deps)


@given(st.integers(1, 5), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10))
@settings(deadline=None)
def test_a_saturated_resource_is_never_idle(users: int, seconds: float, demand: float, capacity: float) -> None:
    """Equal tasks on all lanes end together, after all their units at the capacity's rate."""
    demand = min(demand, capacity)
    lines = [f"CPUAttn(1,0,{i}) @{LANES[i].value}" for i in range(users)]
    _, end = play(story("\n".join(lines)), costs([seconds] * users, {"x": [demand] * users}, {"x": capacity}))
    assert end == pytest.approx(np.full(users, seconds * max(1.0, users * demand / capacity)))


@given(schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=15)
def test_two_plays_are_bit_identical(schedule: Schedule, seed: int) -> None:
    """The same schedule with the same costs gives the same timeline to the last bit."""
    rng = np.random.default_rng(seed)
    work = costs(
        random_seconds(schedule, seed),
        {"x": rng.uniform(0, 1, len(schedule)), "y": rng.uniform(0, 1, len(schedule))},
        {"x": 1.0, "y": 1.5},
    )
    (start, end), (again, end_again) = play(schedule, work), play(schedule, work)
    assert start.tobytes() == again.tobytes()
    assert end.tobytes() == end_again.tobytes()


# -- fair shares --------------------------------------------------------------------------------------


@given(speeds_input)
def test_speeds_are_speeds(given_work) -> None:
    """Speeds lie in (0, 1] and no resource gives more than it has."""
    demands, capacities = given_work
    speeds = fair_speeds(tuple(demands), capacities)
    assert all(0 < speed <= 1 for speed in speeds)
    for r, capacity in enumerate(capacities):
        assert sum(s * d[r] for s, d in zip(speeds, demands, strict=True)) <= capacity * (1 + 1e-9)


@given(speeds_input)
def test_a_lone_task_is_unaffected(given_work) -> None:
    """A task that runs alone within the capacities runs at full speed."""
    demands, capacities = given_work
    alone = tuple(min(d, c) for d, c in zip(demands[0], capacities, strict=True))
    assert fair_speeds([alone], capacities) == [1.0]


@given(one_resource)
def test_shares_of_one_resource_are_max_min(given_work) -> None:
    """A crowded resource is used up, and whoever is slowed gets no less than anybody else."""
    wants, capacity = given_work
    speeds = fair_speeds([(w,) for w in wants], (capacity,))
    shares = [s * w for s, w in zip(speeds, wants, strict=True)]
    assert sum(shares) == pytest.approx(min(capacity, sum(wants)))
    for speed, share in zip(speeds, shares, strict=True):
        if speed < 1 - 1e-9:
            assert share == pytest.approx(max(shares))


@given(one_resource, st.floats(1, 5))
def test_more_capacity_never_slows_anybody(given_work, factor: float) -> None:
    """With more of the one resource, every task is at least as fast."""
    wants, capacity = given_work
    before = fair_speeds([(w,) for w in wants], (capacity,))
    after = fair_speeds([(w,) for w in wants], (capacity * factor,))
    assert all(b <= a + 1e-9 for b, a in zip(before, after, strict=True))


@given(speeds_input, st.randoms(use_true_random=False))
def test_speeds_do_not_depend_on_the_order_of_tasks(given_work, random) -> None:
    """Listing the running tasks in another order gives each the same speed."""
    demands, capacities = given_work
    order = list(range(len(demands)))
    random.shuffle(order)
    speeds = fair_speeds(tuple(demands), capacities)
    shuffled = fair_speeds([demands[i] for i in order], capacities)
    assert shuffled == pytest.approx([speeds[i] for i in order])


def test_what_a_scarcer_resource_frees_is_dealt_out() -> None:
    """A task held back by one resource leaves its share of the other, in whatever order they are listed."""
    assert fair_speeds([(1.0, 1.0), (0.0, 1.0)], (0.2, 1.0)) == pytest.approx([0.2, 0.8])
    assert fair_speeds([(1.0, 1.0), (1.0, 0.0)], (1.0, 0.2)) == pytest.approx([0.2, 0.8])


def test_a_capacity_may_fall_with_the_crowd() -> None:
    """A resource given by a curve gives what the curve says for all that is wanted."""
    cores = Curve(((1.0, 1.0), (2.0, 1.8), (3.0, 1.5)))
    assert fair_speeds([(1.0,)], (cores,)) == [1.0]
    assert fair_speeds([(1.0,), (1.0,)], (cores,)) == pytest.approx([0.9, 0.9])
    assert fair_speeds([(1.0,), (1.0,), (1.0,)], (cores,)) == pytest.approx([0.5, 0.5, 0.5])
