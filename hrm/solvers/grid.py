"""The vectorised grid: every size at once, the shares of each in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hrm.affine import Affine, is_zero
from hrm.problem import Problem
from hrm.solvers.solution import Solution

__all__ = ["SolvedGrid", "solve_grid", "solved_grid"]


@dataclass(frozen=True, slots=True)
class _Line:
    """Shares along a line: (r_w, r_c) = start + x·direction for x in [low, high]."""

    w: tuple[Any, Any]
    c: tuple[Any, Any]
    low: Any
    high: Any

    def shares(self, x: Any) -> tuple[Any, Any]:
        return self.w[0] + self.w[1] * x, self.c[0] + self.c[1] * x

    def project(self, value: Affine) -> tuple[Any, Any]:
        """Intercept and slope in x."""
        return value.constant + value.w * self.w[0] + value.c * self.c[0], value.w * self.w[1] + value.c * self.c[1]


@dataclass(frozen=True, slots=True)
class SolvedGrid:
    """Every point of a problem's grid with its best shares; infinite seconds where nothing fits."""

    problem: Problem
    seconds_per_token: np.ndarray
    weights_on_gpu: np.ndarray
    kv_on_gpu: np.ndarray


def solve_grid(problems: Sequence[Problem]) -> Solution | None:
    """The best of all points of all problems, each with its optimal shares; None if nothing fits.

    The shares of a point are found in closed form: with experts on the GPU more resident bytes never cost
    time, so the optimum lies where GPU memory is full; along that edge, and where experts are split between
    processors, the objective is convex and piecewise linear, and its tangents meet in the optimum.
    """
    best: tuple[float, float, Solution] | None = None
    for problem in problems:
        bound = np.inf if best is None else best[0]
        solved = solved_grid(problem, bound)
        seconds = solved.seconds_per_token
        if not np.isfinite(seconds).any():
            continue
        # Ties go to the smaller batch, then to fewer micro-batches: less memory for the same speed.
        candidates = np.flatnonzero(seconds.ravel() <= seconds.min() * (1 + 1e-9))
        mu = np.broadcast_to(problem.micro_batch, problem.shape).ravel()[candidates]
        g = np.broadcast_to(problem.micro_batches, problem.shape).ravel()[candidates]
        pick = np.lexsort((g, mu * g))[0]
        at = np.unravel_index(candidates[pick], problem.shape)
        value, batch = float(seconds[at]), float(mu[pick] * g[pick])
        if best is not None and (value > best[0] * (1 + 1e-9) or (value >= best[0] * (1 - 1e-9) and batch >= best[1])):
            continue
        solution = Solution(
            problem=problem,
            micro_batch_size=int(mu[pick]),
            num_micro_batches=int(g[pick]),
            weights_on_gpu=float(solved.weights_on_gpu[at]),
            kv_on_gpu=float(solved.kv_on_gpu[at]),
            seconds_per_token=value,
        )
        best = (value, batch, solution)
    return None if best is None else best[2]


def solved_grid(problem: Problem, bound: float | None = None) -> SolvedGrid:
    """Optimal shares of every point of a problem's grid.

    Parameters
    ----------
    bound : float, optional
        Seconds per token that are already reached: only points that can be better, and than each other, get
        their optimal shares; the others keep feasible ones. By default every point gets its own optimum.
    """
    line = _free_line(problem)
    shape = problem.shape
    low, high = (np.broadcast_to(np.asarray(edge, dtype=float), shape) for edge in (line.low, line.high))
    feasible = problem.allowed & (low <= high + 1e-12)
    x = np.where(feasible, np.maximum(high, low), 0.0)
    seconds, slope = _value_and_slope(problem, line, x)
    seconds = np.where(feasible, np.broadcast_to(seconds, shape), np.inf)
    if np.ndim(slope) or slope > 0:
        inner = feasible & (np.broadcast_to(slope, shape) > 1e-15) & (high > low)
        if inner.any():
            x, seconds = _tangents(problem, line, inner, low, high, x, seconds, bound)
    w, c = line.shares(x)
    return SolvedGrid(
        problem,
        seconds,
        np.clip(np.broadcast_to(w, shape), 0.0, 1.0),
        np.clip(np.broadcast_to(c, shape), 0.0, 1.0),
    )


def _free_line(problem: Problem) -> _Line:
    """The line on which the optimal shares lie, cut to where they are shares and everything fits."""
    gpu = problem.rooms[0]
    w, c = problem.fixed_weights, problem.fixed_kv
    line: tuple[tuple[Any, Any], tuple[Any, Any]]
    if w is not None and c is not None:
        line = ((w, 0.0), (c, 0.0))
    elif c is not None:
        line = ((0.0, 1.0), (c, 0.0))
    elif w is not None:
        line = ((w, 0.0), (0.0, 1.0))
    else:
        # GPU memory is full: r_c takes what r_w leaves. (r_c = 1 and r_w = 1 are problems of their own.)
        with np.errstate(divide="ignore", invalid="ignore"):
            start = (gpu.room - gpu.need.constant) / gpu.need.c
            slope = -gpu.need.w / gpu.need.c
        some = np.asarray(gpu.need.c) > 0
        line = ((0.0, 1.0), (np.where(some, start, -1.0), np.where(some, slope, 0.0)))
    low: Any = 0.0
    high: Any = 0.0 if w is not None and c is not None else 1.0
    cut = _Line(line[0], line[1], low, high)
    limits = [(-share[0], -share[1]) for share in (cut.w, cut.c)] + [
        (share[0] - 1.0, share[1]) for share in (cut.w, cut.c)
    ]
    for room in problem.rooms:
        intercept, rise = cut.project(room.need)
        # The edge itself satisfies the GPU's constraint up to rounding.
        scale = max(room.room, 1.0)
        limits.append(((intercept - room.room) / scale - 1e-12, rise / scale))
    for intercept, rise in limits:
        low, high = _cut(low, high, intercept, rise)
    return _Line(cut.w, cut.c, low, high)


def _cut(low: Any, high: Any, intercept: Any, rise: Any) -> tuple[Any, Any]:
    """The part of [low, high] where intercept + rise·x <= 0; an empty one has low > high."""
    with np.errstate(divide="ignore", invalid="ignore"):
        root = -np.asarray(intercept) / np.where(np.asarray(rise) == 0, 1.0, rise)
    flat = np.abs(rise) <= 1e-300
    high = np.where(~flat & (np.asarray(rise) > 0), np.minimum(high, root), high)
    low = np.where(~flat & (np.asarray(rise) < 0), np.maximum(low, root), low)
    return low, np.where(flat & (np.asarray(intercept) > 1e-9), -1.0, high)


def _value_and_slope(problem: Problem, line: _Line, x: Any) -> tuple[Any, Any]:
    """Seconds per token at `x` and the slope there, from the left."""
    total: Any = 0.0
    total_slope: Any = 0.0
    for weight, phase in problem.phases:
        value: Any = 0.0
        slope: Any = 0.0
        for count, terms in phase.pairs:
            top, rise = _steepest([line.project(term) for term in terms.values()], x)
            value, slope = value + count * top, slope + count * rise
        if phase.floor is not None:
            floor, rise = line.project(phase.floor)
            floor = floor + rise * x
            slope = slope if is_zero(rise) and is_zero(slope) else np.where(floor > value, rise, slope)
            value = np.maximum(value, floor)
        if phase.extra is not None:
            extra, rise = line.project(phase.extra)
            value, slope = value + extra + rise * x, slope + rise
        total, total_slope = total + weight * value, total_slope + weight * slope
    return total / problem.tokens, total_slope / problem.tokens


def _steepest(lines: list[tuple[Any, Any]], x: Any) -> tuple[Any, Any]:
    """Largest of several lines at `x`, with its slope (the smallest among ties)."""
    top: Any = None
    slope: Any = 0.0
    for intercept, rise in lines:
        value = intercept if is_zero(rise) else intercept + rise * x
        if top is None:
            top, slope = value, rise
            continue
        if not (is_zero(rise) and is_zero(slope)):
            above = value > top
            slope = np.where(above | ((value == top) & (rise < slope)), rise, slope)
        top = np.maximum(top, value)
    return top, slope


def _tangents(
    problem: Problem,
    line: _Line,
    inner: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    x: np.ndarray,
    seconds: np.ndarray,
    bound: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimum of a convex, piecewise linear function in [low, high], whose slope at `high` is positive."""
    x, seconds = x.copy(), seconds.copy()
    index = np.flatnonzero(inner.ravel())
    part, at = _flat(problem, line, index)
    left, right = low.ravel()[index].copy(), high.ravel()[index].copy()
    # The slopes are those to the left; at the low end the one to the right counts, which a tiny step gives.
    f_left, s_left = _value_and_slope(part, at, left + 1e-9 * (right - left))
    f_right, s_right = _value_and_slope(part, at, right)
    start = f_left <= f_right
    x.ravel()[index] = np.where(start, left, right)
    seconds.ravel()[index] = np.where(start, f_left, f_right)
    alive = s_left < 0
    for _ in range(64):
        with np.errstate(divide="ignore", invalid="ignore"):
            step = (f_right - f_left - s_right * (right - left)) / (s_left - s_right)
        meet = np.clip(left + step, left, right)
        reach = f_left + s_left * (meet - left)  # no point of the function lies below the tangents
        best = np.inf if bound is None else min(bound, float(seconds.min()))
        alive &= (reach < best) & (reach < seconds.ravel()[index] * (1 - 1e-12)) & np.isfinite(meet)
        if not alive.any():
            break
        if not alive.all():
            index, left, right, meet = index[alive], left[alive], right[alive], meet[alive]
            f_left, f_right, s_left, s_right = f_left[alive], f_right[alive], s_left[alive], s_right[alive]
            part, at = _flat(problem, line, index)
            alive = np.ones(len(index), dtype=bool)
        value, slope = _value_and_slope(part, at, meet)
        better = value < seconds.ravel()[index]
        x.ravel()[index[better]] = meet[better]
        seconds.ravel()[index[better]] = value[better]
        up = slope > 0
        right, f_right, s_right = np.where(up, meet, right), np.where(up, value, f_right), np.where(up, slope, s_right)
        left, f_left, s_left = np.where(up, left, meet), np.where(up, f_left, value), np.where(up, s_left, slope)
        alive &= s_left < 0
    return x, seconds


def _flat(problem: Problem, line: _Line, index: np.ndarray) -> tuple[Problem, _Line]:
    """The chosen points of a problem, as arrays of one dimension."""

    def pick(value: Any) -> Any:
        if np.ndim(value) == 0:
            return value
        return np.broadcast_to(value, problem.shape).ravel()[index]

    def pick_affine(value: Affine) -> Affine:
        return Affine(pick(value.constant), pick(value.w), pick(value.c))

    phases = []
    for weight, phase in problem.phases:
        pairs = tuple(
            (count, {name: pick_affine(term) for name, term in terms.items()}) for count, terms in phase.pairs
        )
        phases.append(
            (
                pick(weight),
                replace(
                    phase,
                    pairs=pairs,
                    floor=phase.floor and pick_affine(phase.floor),
                    extras={name: pick_affine(extra) for name, extra in phase.extras.items()},
                ),
            )
        )
    part = replace(problem, tokens=pick(problem.tokens), phases=tuple(phases))
    w, c = ((pick(start), pick(direction)) for start, direction in (line.w, line.c))
    at = _Line(w, c, pick(line.low), pick(line.high))
    return part, at
