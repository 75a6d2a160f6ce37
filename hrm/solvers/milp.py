"""The same problem by mixed-integer programming, with pulp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.affine import Affine, is_zero
from hrm.errors import HrmError
from hrm.problem import Problem
from hrm.solvers.solution import Solution

__all__ = ["solve_milp"]

_CHUNK = 48
"""Points that one call of the solver weighs."""


@dataclass(slots=True)
class _Candidate:
    problem: Problem
    index: int
    bound: float


def solve_milp(problems: Sequence[Problem]) -> Solution | None:
    """The same optimum by mixed-integer programming: binaries choose the sizes, the shares stay continuous.

    A point that a binary z chooses has r_w·z and r_c·z as variables, so that the relaxation is tight. Points
    whose most favourable shares are no better than what is found are never handed to the solver; the others
    go to it in groups, the most promising first.

    Raises
    ------
    HrmError
        If pulp has no working solver.
    """
    candidates = sorted(_candidates(problems), key=lambda candidate: candidate.bound)
    best: Solution | None = None
    for start in range(0, len(candidates), _CHUNK):
        chunk = candidates[start : start + _CHUNK]
        if best is not None:
            chunk = [x for x in chunk if x.bound < best.seconds_per_token * (1 - 1e-9)]
            if not chunk:
                break
        found = _solve_chunk(chunk)
        if found is not None and (best is None or found.seconds_per_token < best.seconds_per_token):
            best = found
    return best


def _candidates(problems: Sequence[Problem]) -> list[_Candidate]:
    result = []
    for problem in problems:
        shape = problem.shape
        # The most that each share can be when the other asks for nothing.
        most, fits = [], np.broadcast_to(problem.allowed, shape).copy()
        gpu = problem.rooms[0]
        for fixed, own, other in (
            (problem.fixed_weights, gpu.need.w, gpu.need.c),
            (problem.fixed_kv, gpu.need.c, gpu.need.w),
        ):
            if fixed is not None:
                most.append((np.full(shape, fixed), np.full(shape, fixed)))
                continue
            rise = np.broadcast_to(np.asarray(own, dtype=float), shape)
            left = gpu.room - gpu.need.constant - np.minimum(other, 0.0)
            with np.errstate(divide="ignore", invalid="ignore"):
                high = np.where(rise > 0, np.clip(left / rise, 0.0, 1.0), 1.0)
            most.append((np.zeros(shape), high))
        for room in problem.rooms:
            fits &= np.broadcast_to(_least(room.need, most), shape) <= room.room * (1 + 1e-9)
        total: Any = 0.0
        for weight, phase in problem.phases:
            value: Any = 0.0
            for count, terms in phase.pairs:
                value = value + count * np.maximum.reduce(
                    np.broadcast_arrays(*(_least(term, most) for term in terms.values()))
                )
            if phase.floor is not None:
                value = np.maximum(value, _least(phase.floor, most))
            if phase.extra is not None:
                value = value + _least(phase.extra, most)
            total = total + weight * value
        bounds = np.broadcast_to(total / problem.tokens, shape).ravel()
        result += [_Candidate(problem, int(i), float(bounds[i])) for i in np.flatnonzero(fits.ravel())]
    return result


def _least(value: Affine, most: list[tuple[np.ndarray, np.ndarray]]) -> Any:
    """Smallest value over the box of shares."""
    total = value.constant
    for slope, (low, high) in zip((value.w, value.c), most, strict=True):
        if not is_zero(slope):
            total = total + np.minimum(slope * low, slope * high)
    return total


def _solve_chunk(candidates: list[_Candidate]) -> Solution | None:
    try:
        import pulp
    except ImportError:
        raise HrmError("the MILP solver needs pulp: pip install pulp.") from None

    model = pulp.LpProblem("policy", pulp.LpMinimize)
    scale = 1.0 / max(1e-30, min(candidate.bound for candidate in candidates))
    objective, chosen, shares = [], [], []
    for number, candidate in enumerate(candidates):
        problem = candidate.problem

        def number_of(value: Any, problem: Problem = problem, index: int = candidate.index) -> float:
            if np.ndim(value) == 0:
                return float(value)
            return float(np.broadcast_to(value, problem.shape).ravel()[index])

        z = model.add_variable(f"z{number}", cat=pulp.LpBinary)
        w = model.add_variable(f"w{number}", lowBound=0)
        c = model.add_variable(f"c{number}", lowBound=0)
        for share, fixed in ((w, problem.fixed_weights), (c, problem.fixed_kv)):
            if fixed is None:
                model += share <= z
            else:
                model += share == fixed * z

        def expression(
            value: Affine, factor: float, z: Any = z, w: Any = w, c: Any = c, number_of: Any = number_of
        ) -> Any:
            parts = [(z, value.constant), (w, value.w), (c, value.c)]
            return pulp.LpAffineExpression([(v, number_of(x) * factor) for v, x in parts])

        for room in problem.rooms:
            size = max(room.room, 1.0)
            model += expression(room.need, 1.0 / size) <= (room.room / size) * z
        per_token = scale / number_of(problem.tokens)
        for p, (weight, phase) in enumerate(problem.phases):
            factor = number_of(weight) * per_token
            whole = []
            for q, (count, terms) in enumerate(phase.pairs):
                t = model.add_variable(f"t{number}_{p}_{q}", lowBound=0)
                for term in terms.values():
                    model += t >= expression(term, factor * count)
                whole.append(t)
            s = model.add_variable(f"s{number}_{p}", lowBound=0)
            model += s >= pulp.lpSum(whole)
            if phase.floor is not None:
                model += s >= expression(phase.floor, factor)
            objective.append(s)
            if phase.extra is not None:
                objective.append(expression(phase.extra, factor))
        chosen.append(z)
        shares.append((w, c))
    model += pulp.lpSum(objective)
    model += pulp.lpSum(chosen) == 1
    status = model.solve(_solver(pulp))
    if status != pulp.LpStatusOptimal:
        return None
    pick = max(range(len(chosen)), key=lambda i: chosen[i].value() or 0.0)
    candidate = candidates[pick]
    problem = candidate.problem
    at = np.unravel_index(candidate.index, problem.shape)
    w, c = (min(1.0, max(0.0, share.value() or 0.0)) for share in shares[pick])
    seconds = np.broadcast_to(problem.seconds_per_token(w, c), problem.shape)[at]
    return Solution(
        problem=problem,
        micro_batch_size=int(np.broadcast_to(problem.micro_batch, problem.shape)[at]),
        num_micro_batches=int(np.broadcast_to(problem.micro_batches, problem.shape)[at]),
        weights_on_gpu=w,
        kv_on_gpu=c,
        seconds_per_token=float(seconds),
    )


def _solver(pulp: Any) -> Any:
    """HiGHS where it is installed, else CBC, which comes with pulp."""
    available = pulp.listSolvers(onlyAvailable=True)
    for name in ("HiGHS", "HiGHS_CMD", "PULP_CBC_CMD"):
        if name in available:
            return pulp.getSolver(name, msg=False)
    raise HrmError(f"pulp has no working MILP solver; available: {', '.join(available) or 'none'}.")
