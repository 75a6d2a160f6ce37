"""The best placement there is, by mixed-integer programming: what the heuristics are judged by."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hrm.errors import InvalidValue, UnknownName
from simulator.experts.placement import Placement, batch_shares, check_devices, least_loaded
from simulator.experts.refinement import swap_refine
from simulator.experts.trace import RoutingTrace

__all__ = ["OBJECTIVES", "Objective", "Optimum", "objective_value", "optimal_placement"]

Objective = Literal["mean", "worst", "average"]
OBJECTIVES: tuple[Objective, ...] = ("mean", "worst", "average")


@dataclass(frozen=True, eq=False, kw_only=True)
class Optimum:
    """An optimal placement, or the best that was found in time, with what is known of it."""

    placement: Placement
    objective: Objective
    value: np.ndarray
    """[layers]: what the placement attains."""
    bound: np.ndarray
    """[layers]: no placement attains less."""
    proven: np.ndarray
    """[layers], bool: whether the solver proved the optimum (to its tolerance) before the time limit."""
    seconds: float

    @property
    def gap(self) -> np.ndarray:
        """[layers]: value over bound, less 1."""
        return np.where(self.bound > 0, self.value / np.where(self.bound > 0, self.bound, 1.0) - 1, np.inf)


def objective_value(shares: np.ndarray, devices: np.ndarray, num_devices: int, objective: Objective) -> float:
    """What the MILP minimises, of one layer.

    Parameters
    ----------
    shares : ndarray
        A, [batches, E].
    devices : ndarray
        [E]: device of every expert.
    """
    loads = np.zeros((len(shares), num_devices))
    np.add.at(loads.T, devices, shares.T)
    if objective == "mean":
        return float(loads.mean(axis=0).max())
    if objective == "worst":
        return float(np.abs(loads - 1.0 / num_devices).max())
    return float(loads.max(axis=1).mean())


def optimal_placement(
    trace: RoutingTrace,
    devices: int,
    *,
    batch: int | None = None,
    objective: Objective = "mean",
    time_limit: float = 30.0,
    relative_gap: float = 1e-4,
    progress: Callable[[int, int], None] | None = None,
) -> Optimum:
    """Minimise one of three objectives over all placements with E/D experts per device.

    With P_mn = 1 where expert m lies on device n, A_mb the share of batch b that falls on expert m and Ā its mean:

    - ``mean``: the largest mean load of a device, max_n Σ_m P_mn Ā_m. Its least value is 1/D, so that it is also the
      largest excess over the ideal.
    - ``worst``: the largest deviation in any batch, max_b,n |Σ_m P_mn A_mb - 1/D|: the objective of the paper.
    - ``average``: Avg Max Load, the mean over batches of max_n Σ_m P_mn A_mb.

    Devices are interchangeable: the i-th expert by load is kept to the first i devices. HiGHS solves each layer by
    itself, where greedy with swaps is not yet within `relative_gap` of a bound; that placement is the answer where time
    runs out before a better one.

    Parameters
    ----------
    trace : RoutingTrace
    devices : int
        D, which divides the number of experts.
    batch : int, optional
        Tokens per batch; by default the batches as they were run (for ``mean``, where they are not known, all as one).
    time_limit : float
        Seconds per layer. ``worst`` and ``average`` have D constraints per batch: keep to tens of batches and experts.
    relative_gap : float
        Between value and bound at which a layer counts as solved.
    progress : callable, optional
        Called with layers done and layers in all.

    References
    ----------
    arXiv 2303.06182, the section on load balancing.
    """
    if objective not in OBJECTIVES:
        raise UnknownName.of("objective", objective, OBJECTIVES)
    if not time_limit > 0:
        raise InvalidValue(f"'time_limit' must be > 0 seconds: {time_limit}")
    check_devices(trace.num_experts, devices)
    if batch is None and trace.batch_starts is None and objective == "mean":
        batch = trace.num_tokens
    shares = batch_shares(trace, batch)
    began = time.perf_counter()
    chosen, values, bounds, proven = [], [], [], []
    for layer in range(trace.num_layers):
        one = shares[:, layer]
        found, bound, done = _solve(one, devices, objective, time_limit, relative_gap)
        value = objective_value(one, found, devices, objective)
        chosen.append(found)
        values.append(value)
        bounds.append(min(bound, value))
        proven.append(done)
        if progress:
            progress(layer + 1, trace.num_layers)
    placement = Placement.of_devices(np.stack(chosen), num_devices=devices, layers=trace.layers, method="optimal")
    return Optimum(
        placement=placement,
        objective=objective,
        value=np.array(values),
        bound=np.array(bounds),
        proven=np.array(proven),
        seconds=time.perf_counter() - began,
    )


def _solve(
    shares: np.ndarray, devices: int, objective: Objective, time_limit: float, gap: float
) -> tuple[np.ndarray, float, bool]:
    """Device of every expert, a lower bound of the objective, and whether the solver finished."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    experts = shares.shape[1]
    mean = shares.mean(axis=0)
    room = experts // devices
    start = np.empty(experts, dtype=np.int64)
    start[swap_refine(mean, least_loaded(mean, devices)).ravel()] = np.repeat(np.arange(devices), room)
    ideal = 1.0 / devices
    known = objective_value(shares, start, devices, objective)
    least = 0.0 if objective == "worst" else ideal
    if objective == "mean":
        # The hottest expert lies somewhere, with others beside it.
        rising = np.sort(mean)
        least = max(least, float(rising[-1] + rising[: room - 1].sum()))
    if devices == 1 or devices == experts:
        return start, known, True
    if known <= least * (1 + gap):
        return start, least, True

    loads = mean[None] if objective == "mean" else shares
    batches = len(loads)
    binaries = experts * devices  # expert m on device n is variable m·D + n
    extra = batches if objective == "average" else 1
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    low: list[np.ndarray] = []
    high: list[np.ndarray] = []
    count = 0

    def add(row: Any, column: Any, value: Any, lower: Any, upper: Any) -> None:
        nonlocal count
        rows.append(np.ravel(row) + count)
        columns.append(np.ravel(column))
        values.append(np.ravel(value))
        low.append(np.ravel(lower))
        high.append(np.ravel(upper))
        count += len(low[-1])

    m, n = (index.ravel() for index in np.indices((experts, devices)))
    one = np.ones(binaries)
    add(m, m * devices + n, one, np.ones(experts), np.ones(experts))
    full = np.full(devices, room)
    add(n, m * devices + n, one, full, full)
    # load of device n in batch b, less (or plus) the variable it is bounded by
    b, n = (index.ravel() for index in np.indices((batches, devices)))
    t = binaries + (b if objective == "average" else np.zeros_like(b))
    row = np.repeat(b * devices + n, experts)
    column = (np.arange(experts)[None] * devices + n[:, None]).ravel()
    share = loads[b].ravel()
    rows_of_t = b * devices + n
    first = np.concatenate([row, rows_of_t]), np.concatenate([column, t])
    limit = np.full(batches * devices, ideal if objective == "worst" else 0.0)
    add(*first, np.concatenate([share, -np.ones(len(t))]), np.full(len(limit), -np.inf), limit)
    if objective == "worst":
        add(*first, np.concatenate([share, np.ones(len(t))]), limit, np.full(len(limit), np.inf))

    upper = np.ones(binaries + extra)
    for rank, expert in enumerate(np.argsort(-mean, kind="stable")[:devices]):
        upper[expert * devices + rank + 1 : (expert + 1) * devices] = 0.0
    lower = np.zeros(binaries + extra)
    lower[binaries:] = least
    upper[binaries:] = known if objective != "average" else 1.0
    cost = np.zeros(binaries + extra)
    cost[binaries:] = 1.0 / extra
    kinds = np.ones(binaries + extra)
    kinds[binaries:] = 0
    matrix = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(count, binaries + extra)
    ).tocsc()
    with _silence():
        result = milp(
            cost,
            integrality=kinds,
            bounds=Bounds(lower, upper),
            constraints=LinearConstraint(matrix, np.concatenate(low), np.concatenate(high)),
            options={"time_limit": float(time_limit), "mip_rel_gap": float(gap)},
        )
    bound = result.mip_dual_bound
    bound = least if bound is None or not np.isfinite(bound) else max(least, float(bound))
    if result.x is None:
        return start, bound, False
    found = result.x[:binaries].reshape(experts, devices).argmax(axis=1)
    better = objective_value(shares, found, devices, objective) < known
    return (found if better else start), bound, bool(result.status == 0)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep HiGHS's own lines, which its options do not switch off, out of standard output."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(nothing)
        os.close(kept)
