"""Miss rates of policies, slots and batches over whole traces, on one device or on several."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from hrm.errors import InvalidValue
from simulator.experts.cache import CACHE_POLICIES, DEFAULT_POLICY, ExpertCache, cache_policy
from simulator.experts.expected import uniform_miss_rate
from simulator.experts.placement import Placement
from simulator.experts.replay import layer_accesses, replay
from simulator.experts.trace import RoutingTrace

__all__ = [
    "MissRates",
    "decode_miss_rate",
    "expected_miss_rate",
    "miss_rates",
    "miss_rates_frame",
    "replay_warm_up",
    "uniform_miss_rate",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class MissRates:
    """What one policy with so many slots made of a trace. First loads of an empty cache count as misses."""

    policy: str
    slots: int
    """K: experts per MoE layer that lie on each device."""
    batch: int | None
    """Tokens per batch; None: as they were run."""
    accesses: np.ndarray
    """[layers, devices]: experts asked for, over all batches."""
    misses: np.ndarray
    """[layers, devices]: experts that were not there."""
    num_batches: int
    seconds: float
    """That the replay took."""

    @property
    def miss_rate(self) -> float:
        """Misses over accesses, all layers and devices together."""
        return _rate(self.misses.sum(), self.accesses.sum())

    @property
    def layer_miss_rates(self) -> np.ndarray:
        """[layers], all devices together."""
        return np.array([_rate(m, a) for m, a in zip(self.misses.sum(axis=1), self.accesses.sum(axis=1), strict=True)])

    @property
    def worst_layer_miss_rate(self) -> float:
        """The highest of any layer."""
        return float(self.layer_miss_rates.max())

    @property
    def worst_device_miss_rate(self) -> float:
        """The highest of any device in any layer."""
        return max(_rate(m, a) for m, a in zip(self.misses.ravel(), self.accesses.ravel(), strict=True))

    @property
    def loads_per_batch(self) -> float:
        """Experts copied to the busiest device for one batch, mean over batches, all its layers."""
        return float(self.misses.sum(axis=0).max()) / self.num_batches

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return {
            "policy": self.policy,
            "slots": self.slots,
            "batch": self.batch,
            "miss_rate": self.miss_rate,
            "mean_layer_miss_rate": float(self.layer_miss_rates.mean()),
            "worst_layer_miss_rate": self.worst_layer_miss_rate,
            "worst_device_miss_rate": self.worst_device_miss_rate,
            "accesses": int(self.accesses.sum()),
            "misses": int(self.misses.sum()),
            "loads_per_batch": self.loads_per_batch,
            "seconds": self.seconds,
        }


def miss_rates(
    trace: RoutingTrace,
    *,
    batches: Sequence[int | None],
    slots: Sequence[int],
    policies: Sequence[str] = (DEFAULT_POLICY,),
    placement: Placement | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[MissRates]:
    """Replay a trace for every batch size, policy and number of slots.

    Parameters
    ----------
    trace : RoutingTrace
    batches : sequence of int or None
        Tokens per batch; None for the batches as they were run.
    slots : sequence of int
        K per device.
    policies : sequence of str
        Keys of `CACHE_POLICIES`.
    placement : Placement, optional
        Which device holds which expert; each has its own slots and sees its own experts only. By default one device
        holds all.
    progress : callable, optional
        Called with the accesses that were replayed since the last call.

    Returns
    -------
    list of MissRates
        By batch, policy, slots, in the order given.
    """
    for policy in policies:
        cache_policy(policy)
    for name, values in (("batches", batches), ("slots", slots), ("policies", policies)):
        if not values:
            raise InvalidValue(f"{name!r} is empty: give at least one.")
    for count in slots:
        if count < 1:
            raise InvalidValue(f"'slots' must be >= 1: {count}")
    owner = np.zeros((trace.num_layers, trace.num_experts), dtype=np.int32)
    if placement is not None:
        placement.check_trace(trace)
        owner = placement.device_of
    devices = int(owner.max()) + 1
    replay_warm_up(policies)
    found = []
    for batch in batches:
        shape = (len(policies), len(slots), trace.num_layers, devices)
        misses, seconds = np.zeros(shape, dtype=np.int64), np.zeros(shape[:2])
        accesses = np.zeros(shape[2:], dtype=np.int64)
        num_batches = 0
        for layer in range(trace.num_layers):
            whole = layer_accesses(trace, layer=layer, batch=batch)
            num_batches = len(whole.offsets) - 1
            for device in range(devices):
                mine = whole if devices == 1 else whole.only(owner[layer] == device)
                accesses[layer, device] = len(mine)
                for p, policy in enumerate(policies):
                    for k, count in enumerate(slots):
                        started = time.perf_counter()
                        misses[p, k, layer, device] = int(replay(policy, mine, count).sum(dtype=np.int64))
                        seconds[p, k] += time.perf_counter() - started
                        if progress is not None:
                            progress(len(mine))
        for p, policy in enumerate(policies):
            for k, count in enumerate(slots):
                found.append(
                    MissRates(
                        policy=policy,
                        slots=count,
                        batch=batch,
                        accesses=accesses,
                        misses=misses[p, k],
                        num_batches=num_batches,
                        seconds=float(seconds[p, k]),
                    )
                )
    return found


def miss_rates_frame(found: Sequence[MissRates]) -> Any:
    """Rows of `MissRates` as a pandas frame."""
    import pandas as pd

    return pd.DataFrame([rates.row() for rates in found])


def replay_warm_up(policies: Sequence[str] = tuple(CACHE_POLICIES)) -> None:
    """Compile, or load what was compiled before, so that it is not timed."""
    trace = RoutingTrace(experts=np.array([[[0, 1]], [[1, 2]]]), num_experts=3)
    accesses = layer_accesses(trace, layer=0, batch=1)
    for policy in policies:
        replay(policy, accesses, 1)


_known: WeakKeyDictionary[RoutingTrace, dict[tuple[int | None, int, str], float]] = WeakKeyDictionary()


def expected_miss_rate(trace: RoutingTrace, batch: int | None, slots: int, policy: str = DEFAULT_POLICY) -> float:
    """Misses over accesses on one device, remembered as long as the trace lives.

    Parameters
    ----------
    trace : RoutingTrace
    batch : int or None
        Tokens per batch; None: as they were run.
    slots : int
        K.
    policy : str
        A key of `CACHE_POLICIES`.
    """
    answers = _known.setdefault(trace, {})
    key = (batch, slots, policy)
    if key not in answers:
        [found] = miss_rates(trace, batches=[batch], slots=[slots], policies=[policy])
        answers[key] = found.miss_rate
    return answers[key]


def decode_miss_rate(trace: RoutingTrace, slots: int, *, most_tokens: int, policy: str = DEFAULT_POLICY) -> float:
    """Misses over accesses in the batches of a recorded run that have at most `most_tokens` tokens: those of decode.

    Batches of prompts fill the cache and are not counted.

    Raises
    ------
    InvalidValue
        If the trace has no batches, or none so small.
    """
    sizes = np.diff(np.append(trace.starts(), trace.num_tokens))
    misses = accesses = 0
    for layer in range(trace.num_layers):
        cache = ExpertCache(policy, slots, trace.num_experts)
        for size, active in zip(sizes, trace.active(layer=layer), strict=True):
            seen = cache.batch(active.tolist())
            if size <= most_tokens:
                misses += sum(not access.hit for access in seen)
                accesses += len(seen)
    if not accesses:
        raise InvalidValue(f"no batch of the trace has at most {most_tokens} tokens.")
    return misses / accesses


def _rate(misses: Any, accesses: Any) -> float:
    return float(misses) / float(accesses) if accesses else 0.0
