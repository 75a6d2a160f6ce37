"""Greedy placements made better by swaps."""

from __future__ import annotations

import numpy as np

from simulator.experts.placement import Placement, greedy_placement, mean_shares
from simulator.experts.trace import RoutingTrace

__all__ = ["refined_placement", "swap_refine"]


def swap_refine(weights: np.ndarray, packed: np.ndarray, *, rounds: int = 10_000) -> np.ndarray:
    """Swap two experts of the busiest device and another one as long as that lowers the larger of the two loads.

    The best swap of the busiest device is taken each time. Greedy packing with a limit on the number per device fills
    some devices with light experts early and is then left with too few places; swaps mend that.

    Parameters
    ----------
    weights : ndarray
        [E]: load of every expert.
    packed : ndarray
        [devices, experts per device].
    rounds : int
        Swaps at most.

    Returns
    -------
    ndarray
        [devices, experts per device].

    Examples
    --------
    >>> swap_refine(np.array([4.0, 3.0, 2.0, 1.0]), np.array([[0, 1], [2, 3]])).tolist()
    [[2, 1], [0, 3]]
    """
    packed = packed.copy()
    loads = weights[packed].sum(axis=1)
    for _ in range(rounds):
        busiest = int(np.argmax(loads))
        # less[i, n, j]: what the busiest device loses when its i-th expert goes for device n's j-th one
        less = weights[packed[busiest]][:, None, None] - weights[packed][None]
        after = np.maximum(loads[busiest] - less, loads[None, :, None] + less)
        after[:, busiest] = np.inf
        i, n, j = (int(x) for x in np.unravel_index(int(np.argmin(after)), after.shape))
        if not after[i, n, j] < loads[busiest] * (1 - 1e-12):
            break
        packed[busiest, i], packed[n, j] = packed[n, j], packed[busiest, i]
        loads[[busiest, n]] = weights[packed[[busiest, n]]].sum(axis=1)
    return packed


def refined_placement(trace: RoutingTrace, devices: int, *, batch: int | None = None) -> Placement:
    """Greedy by mean historical load, then `swap_refine`; parameters as for `greedy_placement`. Not in the paper."""
    start = greedy_placement(trace, devices, batch=batch)
    mean = mean_shares(trace, batch)
    slots = np.stack([swap_refine(weights, packed) for weights, packed in zip(mean, start.slots, strict=True)])
    return Placement(slots=slots, num_experts=trace.num_experts, layers=trace.layers, method="refined")
