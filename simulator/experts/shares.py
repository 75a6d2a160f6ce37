"""What a trace says of the experts' loads: shares of batches, their means, and what goes together."""

from __future__ import annotations

import numpy as np

from simulator.experts.trace import RoutingTrace

__all__ = ["batch_shares", "correlations", "mean_shares", "typical_popularity"]


def batch_shares(trace: RoutingTrace, batch: int | None = None) -> np.ndarray:
    """A: share of each batch's choices that fall on every expert, [batches, layers, E]; rows add up to 1."""
    counts = trace.counts(batch)
    return counts / counts.sum(axis=2, keepdims=True)


def correlations(shares: np.ndarray) -> np.ndarray:
    """S: Pearson correlation over batches of every two experts' shares, [E, E]; 0 where an expert never varies.

    Parameters
    ----------
    shares : ndarray
        [batches, E] of one layer.
    """
    centred = shares - shares.mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=0))
    # A share that is equal in all batches leaves rounding, not variation.
    steady = length <= 1e-12 * np.sqrt(len(shares))
    unit = np.where(steady, 0.0, centred / np.where(steady, 1.0, length))
    return np.clip(unit.T @ unit, -1.0, 1.0)


def mean_shares(trace: RoutingTrace, batch: int | None) -> np.ndarray:
    """Ā: mean over batches of every expert's share, [layers, E]; without known batches, of all tokens as one."""
    if batch is None and trace.batch_starts is None:
        batch = trace.num_tokens
    return batch_shares(trace, batch).mean(axis=0)


def typical_popularity(trace: RoutingTrace) -> np.ndarray:
    """Share of the choices of a layer like the trace's that falls on every expert, [E]; for `MoEModel.with_routing`.

    Every layer has its own favourites, and what counts is how uneven they are: the mean over layers is taken rank by
    rank. Ranks are dealt out to experts at random, always in the same way, since caches ask for experts by id.
    """
    by_rank = np.sort(trace.popularity(), axis=1).mean(axis=0)
    return np.random.default_rng(0).permutation(by_rank)
