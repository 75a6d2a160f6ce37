"""The engine's inner loops, compiled by numba where it is installed.

Written over flat one-dimensional sequences only, so that without numba the same functions run on Python lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["COMPILED", "FINISHED", "NEED_MORE", "STUCK", "advance", "compiled", "fair_shares", "recurrence", "vector"]

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]

try:
    from numba import njit

    COMPILED = True
    compiled: Compiler = njit(cache=True, nogil=True)
except ImportError:  # pragma: no cover - a test runs this in a process of its own
    COMPILED = False

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as it is: there is no numba."""
        return function


FINISHED, NEED_MORE, STUCK = 0, 1, 2
_DONE = 1e-12


def vector(values: Any, dtype: Any = np.float64) -> Any:
    """`values` as what the loops run on: an array, or without numba a list (several times faster there)."""
    array = np.ascontiguousarray(values, dtype=dtype)
    return array if COMPILED else array.tolist()


@compiled
def recurrence(queue, dep_start, dep_back, seconds, base, free, ring, start, end, keep):  # type: ignore[no-untyped-def]
    """start = max(end of dependencies, end of predecessor in the queue), in issue order.

    `ring` holds the ends of the last tasks (its length is a power of two); `dep_back` says how many tasks ago a
    dependency was issued; `base` tasks came before. Dependencies from before the beginning count as done.
    """
    mask = len(ring) - 1
    for i in range(len(queue)):
        q = queue[i]
        begin = free[q]
        for j in range(dep_start[i], dep_start[i + 1]):
            if dep_back[j] <= base + i:
                done = ring[(base + i - dep_back[j]) & mask]
                if done > begin:
                    begin = done
        stop = begin + seconds[i]
        free[q] = stop
        ring[(base + i) & mask] = stop
        if keep:
            start[i] = begin
            end[i] = stop


@compiled
def _curve(xs, ys, first, last, x):  # type: ignore[no-untyped-def]
    """The piecewise linear curve through points first..last-1, constant outside."""
    if x <= xs[first]:
        return ys[first]
    for k in range(first + 1, last):
        if x <= xs[k]:
            return ys[k - 1] + (ys[k] - ys[k - 1]) * (x - xs[k - 1]) / (xs[k] - xs[k - 1])
    return ys[last - 1]


@compiled
def fair_shares(running, count, demand, resources, curve_start, curve_x, curve_y, speed, limit, room, given, wants):  # type: ignore[no-untyped-def]
    """Max-min fair speeds of the `count` tasks in slots `running`; see `simulator.engine.fair_speeds`.

    `demand` holds `resources` numbers per slot, `speed` receives the result by slot; the rest is scratch space.
    """
    scarce = False
    for r in range(resources):
        wanted = 0.0
        for a in range(count):
            wanted += demand[running[a] * resources + r]
        first, last = curve_start[r], curve_start[r + 1]
        if last - first == 1:
            room[r] = curve_y[first]
        else:
            room[r] = min(wanted, _curve(curve_x, curve_y, first, last, wanted))
        given[r] = room[r]
        if wanted > room[r] * (1 + 1e-12):
            scarce = True
    for a in range(count):
        speed[running[a]] = 1.0
    if not scarce:
        return
    # limit: < 0 for tasks that are settled.
    for a in range(count):
        limit[running[a]] = 1.0
    left = count
    while left > 0:
        for a in range(count):
            if limit[running[a]] >= 0:
                limit[running[a]] = 1.0
        for r in range(resources):
            n = 0
            total = 0.0
            for a in range(count):
                slot = running[a]
                if limit[slot] >= 0:
                    want = demand[slot * resources + r]
                    total += want
                    k = n
                    while k > 0 and wants[k - 1] > want:
                        wants[k] = wants[k - 1]
                        k -= 1
                    wants[k] = want
                    n += 1
            if total <= room[r] * (1 + 1e-12):
                continue
            level = -1.0
            rest = room[r]
            for k in range(n):
                share = rest / (n - k)
                if wants[k] > share:
                    level = share
                    break
                rest -= wants[k]
            if level < 0:
                continue
            for a in range(count):
                slot = running[a]
                want = demand[slot * resources + r]
                if limit[slot] >= 0 and want > level and level / want < limit[slot]:
                    limit[slot] = level / want
        slowest = 1.0
        for a in range(count):
            slot = running[a]
            if 0 <= limit[slot] < slowest:
                slowest = limit[slot]
        if slowest >= 1.0:
            return
        # Whoever is held back most is settled first; the rest share what it leaves.
        for a in range(count):
            slot = running[a]
            if 0 <= limit[slot] <= slowest * (1 + 1e-12):
                speed[slot] = slowest
                limit[slot] = -1.0
                left -= 1
                for r in range(resources):
                    # Rounding must not leave less than nothing, nor nothing at all for the tiniest demand.
                    room[r] = max(1e-12 * given[r], room[r] - slowest * demand[slot * resources + r])


@compiled
def advance(  # type: ignore[no-untyped-def]
    num_queues, resources, last_segment, window_first, window_end, num_segments,
    seg_template, seg_offset, seg_base,
    task_first, queue_first, queue_tasks, dep_start, dep_queue, dep_index, is_mark,
    seconds, demands,
    curve_start, curve_x, curve_y,
    segment, position, done, awaited, await_count, running, run_segment, run_task, remaining, begun, held, clock,
    speed, limit, room, given, wants, active,
    seg_mark, busy, start, end, keep,
):  # fmt: skip
    """Play until everything is done, or until an idle queue needs a segment beyond the window.

    A queue's next task waits for queue `awaited` (or nobody: -1) to have done more than `await_count` tasks.
    """
    now = clock[0]
    changed = True
    while True:
        # Start whatever can start.
        waiting = False
        for q in range(num_queues):
            if running[q] or (awaited[q] >= 0 and done[awaited[q]] <= await_count[q]):
                continue
            # The next task of this queue, in this segment or a later one of the window.
            found = -1
            while segment[q] < window_end and segment[q] <= last_segment[q]:
                t = seg_template[segment[q] - window_first]
                at = queue_first[t * (num_queues + 1) + q] + position[q]
                if at < queue_first[t * (num_queues + 1) + q + 1]:
                    found = queue_tasks[at]
                    break
                segment[q] += 1
                position[q] = 0
            if found < 0:
                if segment[q] <= last_segment[q] and segment[q] < num_segments:
                    waiting = True
                continue
            w = segment[q] - window_first
            awaited[q] = -1
            for j in range(dep_start[found], dep_start[found + 1]):
                needed = seg_base[w * num_queues + dep_queue[j]] + dep_index[j]
                if done[dep_queue[j]] <= needed:
                    awaited[q] = dep_queue[j]
                    await_count[q] = needed
                    break
            if awaited[q] < 0:
                local = seg_offset[w] + found - task_first[seg_template[w]]
                running[q] = True
                run_segment[q] = segment[q]
                run_task[q] = found
                remaining[q] = seconds[local]
                begun[q] = now
                for r in range(resources):
                    held[q * resources + r] = demands[local * resources + r]
                if keep:
                    start[local] = now
                position[q] += 1
                changed = True
        if waiting:
            clock[0] = now
            return NEED_MORE
        count = 0
        for q in range(num_queues):
            if running[q]:
                active[count] = q
                count += 1
        if count == 0:
            clock[0] = now
            for q in range(num_queues):
                if segment[q] <= last_segment[q]:
                    return STUCK
            return FINISHED
        if changed:
            fair_shares(active, count, held, resources, curve_start, curve_x, curve_y, speed, limit, room, given, wants)
            changed = False
        step = -1.0
        for a in range(count):
            q = active[a]
            need = remaining[q] / speed[q]
            if step < 0 or need < step:
                step = need
        now += step
        for a in range(count):
            q = active[a]
            remaining[q] -= step * speed[q]
            if remaining[q] <= _DONE:
                running[q] = False
                done[q] += 1
                changed = True
                w = run_segment[q] - window_first
                busy[w * num_queues + q] += now - begun[q]
                if is_mark[run_task[q]] and now > seg_mark[w]:
                    seg_mark[w] = now
                if keep:
                    end[seg_offset[w] + run_task[q] - task_first[seg_template[w]]] = now
