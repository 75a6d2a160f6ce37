"""How evenly a placement spreads tokens: the load of every device in every batch of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.experts.placement import Placement, batch_shares
from simulator.experts.trace import RoutingTrace

__all__ = ["LoadReport", "device_loads", "judge"]


def device_loads(trace: RoutingTrace, placement: Placement, *, batch: int | None = None) -> np.ndarray:
    """Share of each batch's choices that every device computes, [batches, layers, devices]; rows add up to 1."""
    placement.check_trace(trace)
    return np.einsum("ble,led->bld", batch_shares(trace, batch), placement.shares(), optimize=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadReport:
    """What a placement makes of a trace.

    References
    ----------
    arXiv 2303.06182, the section on load balancing: Max Load stands for running out of memory, Avg Max Load for
    latency.
    """

    max_load: np.ndarray
    """[layers]: the largest share of a batch that one device has, worst over batches."""
    avg_max_load: np.ndarray
    """[layers]: the largest share of a batch that one device has, mean over batches."""
    mean_load: np.ndarray
    """[layers]: the largest over devices of the mean share over batches."""
    ideal: float
    """1/D."""

    def summary(self) -> dict[str, float]:
        """Means over layers, and the worst layer's Max Load, with the ideal."""
        return {
            "max_load": float(self.max_load.mean()),
            "worst_layer_max_load": float(self.max_load.max()),
            "avg_max_load": float(self.avg_max_load.mean()),
            "mean_load": float(self.mean_load.mean()),
            "ideal": self.ideal,
        }

    def to_frame(self) -> Any:
        """One row per layer."""
        import pandas as pd

        columns = {"max_load": self.max_load, "avg_max_load": self.avg_max_load, "mean_load": self.mean_load}
        return pd.DataFrame({"layer": np.arange(len(self.max_load))} | columns | {"ideal": self.ideal})


def judge(trace: RoutingTrace, placement: Placement, *, batch: int | None = None) -> LoadReport:
    """Max Load and Avg Max Load of a placement on a trace, layer by layer.

    Examples
    --------
    >>> trace = RoutingTrace(experts=[[[0, 1]], [[0, 2]]], num_experts=4)
    >>> report = judge(trace, Placement.of_devices([[0, 0, 1, 1]]), batch=1)
    >>> report.max_load.tolist(), report.avg_max_load.tolist(), report.ideal
    ([1.0], [0.75], 0.5)
    """
    loads = device_loads(trace, placement, batch=batch)
    largest = loads.max(axis=2)
    return LoadReport(
        max_load=largest.max(axis=0),
        avg_max_load=largest.mean(axis=0),
        mean_load=loads.mean(axis=0).max(axis=1),
        ideal=1.0 / placement.num_devices,
    )
