"""Work of a layer whose experts come through a cache on the device, task by task.

Of the experts that a micro-batch is expected to touch, a share misses the cache and crosses the link. The first piece
has those that are there; the missing ones are spread over the others as the executor does it: as evenly as possible,
and one each where they are fewer. How many miss is a trace's to say, or else the cache's policy's, replayed on routes
drawn independently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.errors import InvalidValue
from hrm.layers import FeedForward, Layer
from hrm.model import MoEModel
from hrm.operators import active_experts, expert_ffn
from hrm.task_times import TaskTimes
from simulator.expert_costs import addition_seconds, addition_work
from simulator.experts.cache import cache_policy
from simulator.experts.expected import independent_miss_rate, uniform_miss_rate
from simulator.task import Op

__all__ = ["ExpertCaching", "cached_seconds", "cached_work"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCaching:
    """An expert cache as predictions see it."""

    slots: int
    """K of every MoE layer."""
    policy: str | None = None
    """A key of `simulator.experts.cache.CACHE_POLICIES`; None: one that misses 1 - K/E, the fewest that are possible
    without foresight under uniform routing."""
    miss_rate: float | None = None
    """Misses per active expert in decode, from a trace (`simulator.experts`); None: those of the policy if tokens
    choose independently, uniformly or as the model's routing histogram says."""

    def __post_init__(self) -> None:
        if self.miss_rate is not None and not 0 <= self.miss_rate <= 1:
            raise InvalidValue(f"'miss_rate' must be between 0 and 1: {self.miss_rate}")
        if self.policy is not None:
            cache_policy(self.policy)

    def decode_rate(self, ffn: FeedForward, tokens: float) -> float:
        """Misses per active expert of a micro-batch of `tokens` tokens in decode."""
        return self._independent(ffn, tokens) if self.miss_rate is None else self.miss_rate

    def misses(self, ffn: FeedForward, prompt: bool, tokens: np.ndarray) -> np.ndarray:
        """Misses per active expert of each micro-batch, [micro-batches].

        The first micro-batch of all finds an empty cache. Prompts miss what the policy misses in micro-batches of so
        many independent tokens, whatever a trace says of decode.
        """
        if not prompt:
            return np.array([self.decode_rate(ffn, count) for count in tokens])
        return np.array([1.0, *(self._independent(ffn, count) for count in tokens[1:])])

    def _independent(self, ffn: FeedForward, tokens: float) -> float:
        if self.policy is None:
            return uniform_miss_rate(ffn.num_experts, self.slots)
        return independent_miss_rate(
            self.policy, self.slots, tokens, num_experts=ffn.num_experts, top_k=ffn.top_k, routing=ffn.routing
        )


def _spread(count: np.ndarray, pieces: int) -> np.ndarray:
    """Experts of every piece, [micro-batches, pieces], one each where they are fewer than pieces."""
    each = np.clip(count[:, None] - np.arange(pieces), 0.0, 1.0)
    return np.where(count[:, None] >= pieces, count[:, None] / max(1, pieces), each)


def _pieces(
    caching: ExpertCaching, ffn: FeedForward, tokens: np.ndarray, pieces: int, prompt: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of every piece: experts that miss the cache, and its share of the micro-batch's active experts."""
    if not ffn.routed:  # stays on the device, and the first piece computes it
        return np.zeros(len(tokens) * pieces), np.tile(np.arange(pieces) == 0, len(tokens)).astype(float)
    active = active_experts(ffn, tokens)
    missing = active * caching.misses(ffn, prompt, tokens)
    misses = np.column_stack([np.zeros(len(tokens)), _spread(missing, pieces - 1)])
    each = misses.copy()
    each[:, 0] = active - missing
    return misses.ravel(), (each / active[:, None]).ravel()


def cached_work(
    model: MoEModel, tokens: np.ndarray, layer: Layer, caching: ExpertCaching, pieces: int, *, prompt: bool
) -> dict[Op, tuple[Any, Any]]:
    """Bytes and FLOPs by task class.

    Parameters
    ----------
    tokens : ndarray, [micro-batches]
    pieces : int
        Pieces of each micro-batch.
    prompt : bool
        Prefill, whose first micro-batch finds the cache empty.

    Returns
    -------
    dict
        (bytes, FLOPs): [micro-batches], of classes with pieces [micro-batches * pieces]. Bytes cross the link, or are
        weights that a kernel reads.
    """
    ffn = layer.ffn
    misses, share = _pieces(caching, ffn, tokens, pieces, prompt)
    expert = ffn.expert_parameters * model.expert_element_bytes
    read = np.repeat(active_experts(ffn, tokens) * expert, pieces) * share
    flops = np.repeat(expert_ffn(model, tokens, layer).flops, pieces) * share
    return {
        Op.OFFLOAD_ROUTES: (8.0 * tokens * (ffn.top_k if ffn.routed else 0), 0.0 * tokens),
        Op.LOAD_E: (misses * expert, 0.0 * misses),
        Op.EXPERTS: (read, flops),
        Op.ADD_FFN: (0.0 * tokens, 0.0 * tokens + addition_work(model, tokens, layer)),
    }


def cached_seconds(
    times: TaskTimes, tokens: np.ndarray, layer: Layer, caching: ExpertCaching, pieces: int, *, prompt: bool
) -> dict[Op, Any]:
    """Seconds of these tasks, each alone; parameters as those of `cached_work`.

    Experts are computed by calls of their own, since their weights lie in slots here and there.

    A GPU copies an expert from pageable memory in two steps, one after the other: the driver's copy to pinned memory,
    at the rate of the staging copy, and the transfer. (Drivers overlap the two for large copies, some better than
    others; this is the slow end.)
    """
    rates, ffn = times.rates, layer.ffn
    misses, share = _pieces(caching, ffn, tokens, pieces, prompt)
    # GPUs that share an expert share the link, too.
    expert = ffn.expert_parameters * times.model.expert_element_bytes
    brought = rates.transfer_s + expert / rates.h2d_bandwidth
    if rates.fetches_pageable:
        brought += expert / rates.staging_bandwidth
    # A piece without experts is not handed over. (Here it still waits its turn; in the executor it does not.)
    first = np.tile(np.arange(pieces) == 0, len(tokens))
    handed_over = rates.task_s * np.where(first, 1.0, np.minimum(1.0, misses))
    single = active_experts(ffn, tokens) * rates.single_expert_s if ffn.routed else 0.0 * tokens
    computed = np.repeat(times.gpu_experts(tokens, layer) + single, pieces) * share
    choices = 8.0 * tokens * (ffn.top_k if ffn.routed else 0)
    return {
        Op.OFFLOAD_ROUTES: times.d2h(choices),
        Op.LOAD_E: handed_over + misses * brought,
        Op.EXPERTS: handed_over + computed,
        Op.ADD_FFN: rates.task_s + addition_seconds(times, tokens, layer),
    }
