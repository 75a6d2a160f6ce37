"""The event-driven core: in-order lanes, dependencies, and resources that lanes share.

With nothing shared, a task starts at max(end of its dependencies, end of its predecessor on the lane).
With shared resources, tasks that run at once divide each resource max-min fairly and slow down
accordingly, as copies and CPU attention do that draw on the same memory. No randomness, no ties left
to chance: the same input gives the same timeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hrm.errors import InvalidSchedule
from hrm.hardware import Curve
from simulator.costs import Costs
from simulator.task import LANES, Schedule

__all__ = ["fair_speeds", "play"]


def play(schedule: Schedule, costs: Costs) -> tuple[np.ndarray, np.ndarray]:
    """Play a schedule.

    Parameters
    ----------
    schedule : Schedule
    costs : Costs
        Work of each task; without demands, lanes share nothing.

    Returns
    -------
    start, end : ndarray of float
        Seconds from the beginning, per task.

    Raises
    ------
    InvalidSchedule
        For a negative or undefined duration, or a schedule that cannot progress.
    """
    bad = np.flatnonzero(~(np.isfinite(costs.seconds) & (costs.seconds >= 0)))
    if len(bad):
        raise InvalidSchedule(f"{schedule[int(bad[0])]} has duration {costs.seconds[bad[0]]}, must be >= 0 and finite.")
    order = schedule.order()
    if not costs.demands:
        return _recurrence(schedule, costs.seconds, order)
    return _shared(schedule, costs)


def _recurrence(schedule: Schedule, seconds: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    start, end = [0.0] * len(schedule), [0.0] * len(schedule)
    free = [0.0] * len(LANES)
    lanes, durations = schedule.lane.tolist(), seconds.tolist()
    first, deps = schedule.dep_start.tolist(), schedule.deps.tolist()
    for task in order.tolist():
        lane = lanes[task]
        begin = free[lane]
        for dep in deps[first[task] : first[task + 1]]:
            if end[dep] > begin:
                begin = end[dep]
        start[task] = begin
        free[lane] = end[task] = begin + durations[task]
    return np.array(start), np.array(end)


def fair_speeds(demands: Sequence[tuple[float, ...]], capacities: tuple[float | Curve, ...]) -> list[float]:
    """Speed (0..1] of each running task when they share resources max-min fairly.

    On a resource with too little for all, nobody gets more than an equal share while another wants
    more; what one leaves, because it wants less or another resource holds it back, goes to the others.

    Parameters
    ----------
    demands : sequence of tuple
        Units per second of each resource that a task uses at full speed.
    capacities : tuple
        Units per second that each resource has; or a curve, of what it gives by what is wanted in all
        (cores do less when more threads than cores contend for them).

    Examples
    --------
    >>> fair_speeds([(1.0,), (1.0,), (0.2,)], (1.8,))
    [0.8, 0.8, 1.0]
    """
    return list(_speeds(tuple(demands), capacities))


@lru_cache(maxsize=1 << 14)
def _speeds(demands: tuple[tuple[float, ...], ...], capacities: tuple[float | Curve, ...]) -> tuple[float, ...]:
    speeds = [1.0] * len(demands)
    given = []
    for r, capacity in enumerate(capacities):
        wanted = sum(d[r] for d in demands)
        given.append(min(wanted, capacity.at(wanted)) if isinstance(capacity, Curve) else capacity)
    room = list(given)
    active = list(range(len(demands)))
    while active:
        limits = dict.fromkeys(active, 1.0)
        for r, left in enumerate(room):
            level = _water_level([demands[i][r] for i in active], left)
            for i in active:
                if demands[i][r] > level:
                    limits[i] = min(limits[i], level / demands[i][r])
        slowest = min(limits.values())
        if slowest >= 1.0:
            break
        # Whoever is held back most is settled first; the rest share what it leaves.
        for i in [i for i in active if limits[i] <= slowest * (1 + 1e-12)]:
            speeds[i] = slowest
            active.remove(i)
            # Rounding must not leave less than nothing, nor nothing at all for the tiniest demand.
            room = [
                max(1e-12 * whole, left - slowest * d) for left, d, whole in zip(room, demands[i], given, strict=True)
            ]
    return tuple(speeds)


def _water_level(wants: list[float], capacity: float) -> float:
    """The largest share that anyone gets when `capacity` is divided max-min fairly; inf if it suffices."""
    if sum(wants) <= capacity * (1 + 1e-12):
        return math.inf
    left = capacity
    ordered = sorted(wants)
    for k, want in enumerate(ordered):
        share = left / (len(ordered) - k)
        if want > share:
            return share
        left -= want
    return math.inf


def _shared(schedule: Schedule, costs: Costs) -> tuple[np.ndarray, np.ndarray]:
    n = len(schedule)
    durations = costs.seconds.tolist()
    names = list(costs.capacities)
    capacities = tuple(costs.capacities[name] for name in names)
    demands = list(zip(*(costs.demands[name].tolist() for name in names), strict=True))
    waits = np.diff(schedule.dep_start).tolist()
    owner = np.repeat(np.arange(n), np.diff(schedule.dep_start))
    by_dep = np.argsort(schedule.deps, kind="stable")
    users = owner[by_dep].tolist()
    first_user = np.searchsorted(schedule.deps[by_dep], np.arange(n + 1)).tolist()
    queues = [schedule.lane_tasks(lane).tolist() for lane in LANES]
    heads = [0] * len(LANES)
    start, end = [0.0] * n, [0.0] * n
    running: dict[int, tuple[int, float]] = {}  # lane -> (task, seconds of its own time left)
    speed: dict[int, float] = {}
    now, finished = 0.0, 0

    while finished < n:
        changed = False
        for lane, queue in enumerate(queues):
            head = heads[lane]
            if lane not in running and head < len(queue) and waits[queue[head]] == 0:
                task = queue[head]
                heads[lane] = head + 1
                start[task] = now
                running[lane] = (task, durations[task])
                changed = True
        if changed:
            lanes = list(running)
            rates = _speeds(tuple(demands[running[lane][0]] for lane in lanes), capacities)
            speed = dict(zip(lanes, rates, strict=True))
        # `order()` has proved that the schedule progresses, so something runs here.
        step = min(left / speed[lane] for lane, (_, left) in running.items())
        now += step
        done = []
        for lane, (task, left) in running.items():
            left -= step * speed[lane]
            running[lane] = (task, left)
            if left <= 1e-12:
                done.append(lane)
        for lane in done:
            task, _ = running.pop(lane)
            end[task] = now
            finished += 1
            for user in users[first_user[task] : first_user[task + 1]]:
                waits[user] -= 1
        if done and running:
            lanes = list(running)
            rates = _speeds(tuple(demands[running[lane][0]] for lane in lanes), capacities)
            speed = dict(zip(lanes, rates, strict=True))
    return np.array(start), np.array(end)
