"""Whole traces through the policies of `simulator.experts.cache`, in compiled code: the same accesses hit and miss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.errors import InvalidValue
from simulator.experts import replay_kernels as kernels
from simulator.experts.cache import NextUse, cache_policy
from simulator.experts.trace import RoutingTrace

__all__ = ["LayerAccesses", "layer_accesses", "replay"]


@dataclass(frozen=True, eq=False)
class LayerAccesses:
    """The experts that the batches of one MoE layer use, batch after batch."""

    experts: np.ndarray
    """[accesses], int32: ids, rising within a batch."""
    offsets: np.ndarray
    """[batches + 1], int64: first access of every batch, and their number."""
    num_experts: int

    def __len__(self) -> int:
        return len(self.experts)

    def batches(self) -> list[list[int]]:
        """The active set of every batch."""
        return [part.tolist() for part in np.split(self.experts, self.offsets[1:-1])]

    def only(self, mine: np.ndarray) -> LayerAccesses:
        """What is left for a device that holds the experts where `mine`, [E], is true, numbered anew from 0."""
        keep = mine[self.experts]
        before = np.concatenate([[0], np.cumsum(keep)])
        number = np.cumsum(mine, dtype=np.int32) - np.int32(1)
        return LayerAccesses(number[self.experts[keep]], before[self.offsets], int(mine.sum()))


def layer_accesses(trace: RoutingTrace, *, layer: int, batch: int | None = None) -> LayerAccesses:
    """Who is asked for in one layer: the distinct experts of every batch, in increasing id.

    Parameters
    ----------
    trace : RoutingTrace
    layer : int
        Number among the MoE layers, from 0.
    batch : int, optional
        Tokens per batch; a rest that fills none is left out. By default the batches as they were run.
    """
    if not 0 <= layer < trace.num_layers:
        raise InvalidValue(f"'layer' must be between 0 and {trace.num_layers - 1}: {layer}")
    chosen = np.ascontiguousarray(trace.experts[:, layer])
    bounds = np.append(trace.starts(batch), trace.num_tokens)
    if batch is not None and trace.num_tokens % batch:
        if batch > trace.num_tokens:
            raise InvalidValue(f"'batch' must be at most the trace's {trace.num_tokens} tokens: {batch}")
        bounds = bounds[:-1]
    experts = np.empty(chosen.size, dtype=np.int32)
    offsets = np.zeros(len(bounds), dtype=np.int64)
    found = kernels.active_sets(chosen, bounds, trace.num_experts, experts, offsets)
    return LayerAccesses(experts[:found].copy(), offsets, trace.num_experts)


def replay(policy: str, accesses: LayerAccesses, slots: int) -> np.ndarray:
    """Which accesses miss in a cache of one layer that begins empty.

    Parameters
    ----------
    policy : str
        A key of `simulator.experts.cache.CACHE_POLICIES`.
    accesses : LayerAccesses
    slots : int
        K, at least 1.

    Returns
    -------
    ndarray
        [accesses], uint8: 1 where the expert was not there.
    """
    cache_policy(policy)
    if slots < 1:
        raise InvalidValue(f"'slots' must be >= 1: {slots}")
    missed = np.zeros(len(accesses), dtype=np.uint8)
    more: tuple[Any, ...] = ()
    if policy == NextUse.name:
        more = (
            NextUse.window(accesses.num_experts),
            NextUse.ONE,
            *NextUse.FORGET,
            NextUse.LATEST,
            NextUse.JUDGE,
            np.array(NextUse.WEIGHTS),
        )
    count = min(slots, accesses.num_experts)
    _KERNELS[policy](accesses.experts, accesses.offsets, accesses.num_experts, count, missed, *more)
    return missed


_KERNELS: dict[str, Callable[..., Any]] = {
    "inactive-first-lifo": kernels.inactive_first_lifo,
    "lifo": kernels.lifo,
    "fifo": kernels.fifo,
    "lru": kernels.lru,
    "lfu": kernels.lfu,
    "min": kernels.belady,
    "next-use": kernels.next_use,
}
