"""Work of a batch whose requests end by themselves: every step has the requests that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hrm.hardware import Rates
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from simulator.costs import PIECES, WEIGHTS, Costing, Costs
from simulator.task import Schedule

__all__ = ["EarlyExits", "make_costing"]


class EarlyExits:
    """A `Costing` for a batch whose requests end by themselves: every step has the requests that are left.

    Parameters
    ----------
    make : callable
        Makes the `Costing` of a batch.
    schedule : Schedule
    batch : BatchShape
        With ``output_lens``.
    """

    def __init__(self, make: Callable[[BatchShape], Costing], schedule: Schedule, batch: BatchShape) -> None:
        self._make, self._schedule, self._batch = make, schedule, batch
        self._last: dict[BatchShape, Costing] = {}

    def at(self, first: int = 0, stop: int | None = None, shift: int = 0) -> Costs:
        """As `Costing.at`."""
        schedule = self._schedule
        stop = len(schedule) if stop is None else stop
        steps = schedule.step[first:stop]
        steps = np.where(steps > 0, steps + shift, 0)
        result: Costs | None = None
        for step in np.unique(steps):
            batch, present = self._batch.alive(int(step))
            if batch not in self._last:
                # Steps come in order: what older batches cost is not asked again.
                self._last = dict(list(self._last.items())[-2:]) | {batch: self._make(batch)}
            costs = self._last[batch].at(first, stop, shift)
            op, part = schedule.op[first:stop], schedule.part[first:stop]
            part = np.where(PIECES[op], part // schedule.num_pages, part)
            empty = ~np.array(present)[np.minimum(part, len(present) - 1)]
            empty &= ~WEIGHTS[op]
            costs = _scaled(costs, np.where(empty, 0.0, 1.0))
            result = costs if result is None else _merged(result, costs, steps == step)
        assert result is not None
        return result


def _scaled(costs: Costs, factor: np.ndarray) -> Costs:
    return Costs(
        costs.seconds * factor,
        costs.bytes * factor,
        costs.flops * factor,
        {name: values * factor for name, values in costs.demands.items()},
        costs.capacities,
    )


def _merged(one: Costs, other: Costs, where: np.ndarray) -> Costs:
    """`other` where `where`, else `one`."""
    return Costs(
        np.where(where, other.seconds, one.seconds),
        np.where(where, other.bytes, one.bytes),
        np.where(where, other.flops, one.flops),
        {name: np.where(where, other.demands[name], values) for name, values in one.demands.items()},
        one.capacities,
    )


def make_costing(schedule: Schedule, model: MoEModel, rates: Rates, batch: BatchShape, **options: Any) -> Any:
    """The `Costing` of a batch, or `EarlyExits` where its requests end by themselves."""
    if batch.output_lens is None:
        return Costing(schedule, model, rates, batch, **options)
    return EarlyExits(lambda left: Costing(schedule, model, rates, left, **options), schedule, batch)
