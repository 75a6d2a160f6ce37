"""How often a cache misses when nothing is known but how popular experts are: each policy replayed on drawn routes.

Policies differ even where routing has no pattern, because experts of a micro-batch are asked for in increasing id: one
that evicts what the micro-batch still needs (LRU, FIFO) misses more than 1 - K/E, one that keeps popular experts less.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from hrm.errors import InvalidValue
from simulator.experts.cache import DEFAULT_POLICY, cache_policy

if TYPE_CHECKING:
    from simulator.experts.replay import LayerAccesses

__all__ = ["independent_accesses", "independent_miss_rate", "uniform_miss_rate"]

_ACCESSES = 20_000
"""Accesses that a replay has about: enough for a rate within one point."""
_VISITS = (64, 4096)
"""Fewest and most micro-batches of a replay."""
_WARM = 4
"""One in so many of the micro-batches fills the cache and is not counted."""
_MOST_CHOICES = 400_000
"""Choices that are drawn one by one; beyond, experts are active or not independently of each other."""
_SEED = 0
_EXACT_TOKENS = 32
_PER_OCTAVE = 16
"""Larger micro-batches are taken to the nearest of so many sizes between one and its double."""


def independent_miss_rate(
    policy: str, slots: int, tokens: float, *, num_experts: int, top_k: int, routing: tuple[float, ...] | None = None
) -> float:
    """Misses per active expert of a warm cache, if every token chooses independently of all others.

    The rate of a run of some hundred to some thousand micro-batches. Only "lfu" gets better with longer ones, where
    nearly all experts are active: its counts take long to differ.

    Parameters
    ----------
    policy : str
        A key of `simulator.experts.cache.CACHE_POLICIES`.
    slots : int
        K.
    tokens : float
        Of each micro-batch.
    num_experts, top_k : int
        E and k.
    routing : tuple of float, optional
        Probability that a token is sent to each expert, as `hrm.layers.FeedForward.routing`; None: uniform.

    Raises
    ------
    UnknownName, InvalidValue
        No such policy; sizes below one.

    Examples
    --------
    >>> independent_miss_rate("inactive-first-lifo", 16, 1, num_experts=64, top_k=8)
    0.75
    >>> independent_miss_rate("lru", 16, 64, num_experts=64, top_k=8) > 0.99
    True
    """
    cache_policy(policy)
    if slots < 1 or tokens <= 0:
        raise InvalidValue(f"'slots' must be >= 1 and 'tokens' > 0: {slots}, {tokens}")
    if slots >= num_experts:
        return 0.0
    size = _rounded(tokens)
    if routing is None and policy == DEFAULT_POLICY and size * top_k <= slots:
        return uniform_miss_rate(num_experts, slots)
    return _replayed(policy, slots, size, num_experts, top_k, routing)


def uniform_miss_rate(num_experts: int, slots: int) -> float:
    """The miss rate under uniform routing, batches independent of each other: 1 - K/E, whatever the batch.

    A batch asks for each of its experts once, so that a hit is an expert that lay there when the batch began. What lies
    there then was chosen without knowing the batch; of a uniform active set of a experts it holds a K/E on average. No
    policy that cannot see beyond the batch does better. One that evicts nothing that the batch still needs does as
    well: "inactive-first-lifo" where no batch uses more than K experts, "next-use" but for the rare batch that begins
    with all slots needed. The first loads of an empty cache come on top, at most K of them.

    Examples
    --------
    >>> uniform_miss_rate(64, 16)
    0.75
    """
    if num_experts < 1 or slots < 1:
        raise InvalidValue(f"'num_experts' and 'slots' must be >= 1: {num_experts}, {slots}")
    return 1.0 - min(slots, num_experts) / num_experts


def _rounded(tokens: float) -> int:
    size = max(1, round(tokens))
    if size <= _EXACT_TOKENS:
        return size
    return round(2 ** (round(math.log2(size) * _PER_OCTAVE) / _PER_OCTAVE))


@lru_cache(maxsize=4096)
def _replayed(
    policy: str, slots: int, tokens: int, num_experts: int, top_k: int, routing: tuple[float, ...] | None
) -> float:
    from simulator.experts.replay import replay  # what is compiled is loaded when it is needed

    accesses = independent_accesses(tokens, num_experts=num_experts, top_k=top_k, routing=routing)
    first = accesses.offsets[(len(accesses.offsets) - 1) // _WARM]
    return float(replay(policy, accesses, slots)[first:].mean())


@lru_cache(maxsize=16)
def independent_accesses(
    tokens: int, *, num_experts: int, top_k: int, routing: tuple[float, ...] | None = None
) -> LayerAccesses:
    """Active experts of many micro-batches whose tokens choose independently; always the same ones.

    Parameters
    ----------
    tokens : int
        Of each micro-batch.
    num_experts, top_k, routing
        As those of `independent_miss_rate`.
    """
    from simulator.experts.replay import LayerAccesses, layer_accesses
    from simulator.experts.synthesis import draw_choices
    from simulator.experts.trace import RoutingTrace

    random = np.random.default_rng(_SEED)
    shares = np.full(num_experts, top_k / num_experts) if routing is None else np.array(routing)
    chances = 1 - (1 - shares) ** tokens
    visits = int(np.clip(_ACCESSES / max(1.0, chances.sum()), *_VISITS))
    if visits * tokens * top_k > _MOST_CHOICES:
        active = random.random((visits, num_experts)) < chances
        offsets = np.concatenate([[0], np.cumsum(active.sum(axis=1))])
        return LayerAccesses(np.nonzero(active)[1].astype(np.int32), offsets.astype(np.int64), num_experts)
    chosen = draw_choices(shares, top_k, visits * tokens, random)
    trace = RoutingTrace(experts=chosen[:, None], num_experts=num_experts)
    return layer_accesses(trace, layer=0, batch=tokens)
