"""What a routing trace is like: how many experts a batch leaves idle, how popularity falls, what stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hrm.errors import InvalidValue
from simulator.experts.placement import correlations
from simulator.experts.trace import RoutingTrace

if TYPE_CHECKING:
    from simulator.experts.synthesis import Routing

__all__ = ["STATISTICS", "asked_and_obtained", "trace_statistics", "zipf_exponent"]

STATISTICS = ("inactive_share", "zipf", "stickiness", "mean_correlation", "group_correlation")
"""Columns of `trace_statistics`."""


def trace_statistics(
    trace: RoutingTrace, *, batch: int | None = None, group_size: int = 1, only: Sequence[str] = STATISTICS
) -> Any:
    """Statistics of every MoE layer, a frame.

    Parameters
    ----------
    trace : RoutingTrace
    batch : int, optional
        Tokens per batch; by default the batches as they were run.
    group_size : int
        Experts with consecutive ids that count as a group.
    only : sequence of str
        Columns to work out.

    Returns
    -------
    DataFrame
        One row per layer:

        - ``inactive_share``: experts that a batch does not use, mean over batches;
        - ``zipf``: the exponent s of a popularity ~ rank^-s, by maximum likelihood over all choices;
        - ``stickiness``: (O - C) / (A - C), where A is the mean size of an active set, O the mean overlap of two
          successive ones and C that of any two. 0: a batch says no more about the next than about any; 1: the set
          never changes;
        - ``mean_correlation``: Pearson correlation over batches of two experts' shares of the batch, mean over pairs
          (shares add up to 1, so that it is about -1/(E-1) where nothing goes together);
        - ``group_correlation``: the same over pairs of one group; NaN without groups.
    """
    import pandas as pd

    for name in only:
        if name not in STATISTICS:
            raise InvalidValue(f"unknown statistic {name!r}; known: {', '.join(STATISTICS)}.")
    if trace.num_experts % group_size:
        raise InvalidValue(f"'group_size' must divide the {trace.num_experts} experts: {group_size}")
    counts = trace.counts(batch)
    columns: dict[str, list[float]] = {name: [] for name in only}
    for layer in range(trace.num_layers):
        here = counts[:, layer]
        for name in only:
            columns[name].append(_of_layer(name, here, group_size))
    return pd.DataFrame({"layer": list(trace.layers)} | columns)


def asked_and_obtained(routing: Routing, trace: RoutingTrace) -> Any:
    """What was asked of a synthetic trace beside what it has, a frame with one row per statistic.

    Columns ``asked`` (NaN where nothing was), ``obtained`` (mean over layers), ``least`` and ``most`` (of any layer).
    """
    import pandas as pd

    found = trace_statistics(trace, group_size=routing.group_size).drop(columns="layer")
    asked = pd.Series(routing.asked(), dtype=float).reindex(found.columns)
    frame = pd.DataFrame({"asked": asked, "obtained": found.mean(), "least": found.min(), "most": found.max()})
    return frame.rename_axis("statistic")


def zipf_exponent(counts: np.ndarray) -> float:
    """Exponent s of counts ~ rank^-s over all ranks, by maximum likelihood; 0 for equal counts.

    Few choices look uneven by chance, so that the exponent of an even popularity is a little above 0.

    Examples
    --------
    >>> round(zipf_exponent(1e6 / np.arange(1, 65) ** 0.8), 6)
    0.8
    """
    from scipy.optimize import brentq

    ordered = np.sort(np.asarray(counts, dtype=float))[::-1]
    logs = np.log(np.arange(1, len(ordered) + 1))
    mean = float(ordered @ logs / ordered.sum())

    def excess(s: float) -> float:
        weights = np.exp(-s * logs)
        return float(weights @ logs / weights.sum()) - mean

    if len(ordered) < 2 or excess(0.0) <= 0:
        return 0.0
    return 20.0 if excess(20.0) >= 0 else float(brentq(excess, 0.0, 20.0))


def _of_layer(name: str, counts: np.ndarray, group_size: int) -> float:
    """One statistic of one layer; `counts` is [batches, E]."""
    if name == "inactive_share":
        return float((counts == 0).mean())
    if name == "zipf":
        return zipf_exponent(counts.sum(axis=0))
    if name == "stickiness":
        return _stickiness(counts > 0)
    experts = counts.shape[1]
    if name == "group_correlation" and group_size == 1:
        return float("nan")
    if len(counts) < 2 or experts < 2:
        return float("nan")
    pairs = correlations(counts / counts.sum(axis=1, keepdims=True))
    if name == "mean_correlation":
        return float((pairs.sum() - np.trace(pairs)) / (experts * (experts - 1)))
    groups = np.arange(experts) // group_size
    inside = (groups[:, None] == groups) & ~np.eye(experts, dtype=bool)
    return float(pairs[inside].mean())


def _stickiness(active: np.ndarray) -> float:
    batches = len(active)
    if batches < 3:
        return float("nan")
    size = float(active.sum(axis=1).mean())
    following = float((active[1:] & active[:-1]).sum(axis=1).mean())
    often = active.sum(axis=0).astype(float)
    chance = float((often * (often - 1)).sum() / (batches * (batches - 1)))
    return (following - chance) / (size - chance) if size - chance > 1e-12 else 0.0
