"""Placements in which hot experts have replicas, packed as DeepSeek's EPLB packs them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hrm.errors import InvalidValue
from simulator.experts.placement import Placement, least_loaded, mean_shares
from simulator.experts.trace import RoutingTrace

__all__ = ["replicate", "replicated_placement", "replicated_slots"]


@dataclass(frozen=True)
class _Split:
    """How experts, groups of them and slots are divided over nodes and devices."""

    experts: int
    slots: int
    groups: int
    nodes: int
    devices: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise InvalidValue(f"{name!r} must be an integer >= 1: {value!r}")
        if self.slots < self.experts:
            raise InvalidValue(f"'slots' must be at least the number of experts, {self.experts}: {self.slots}")
        if self.devices > self.slots:
            raise InvalidValue(f"'devices' must be at most the number of slots, {self.slots}: {self.devices}")
        for what, whole, by, parts in (
            ("slots", self.slots, "devices", self.devices),
            ("experts", self.experts, "groups", self.groups),
            ("devices", self.devices, "nodes", self.nodes),
        ):
            if whole % parts:
                raise InvalidValue(f"{by!r} must divide the {whole} {what} evenly: {parts}")


def replicate(weights: np.ndarray, slots: int) -> np.ndarray:
    """Which expert each slot holds, when every further slot goes to the expert with most load per replica.

    Parameters
    ----------
    weights : ndarray
        [E], loads >= 0.
    slots : int
        At least E.

    Returns
    -------
    ndarray
        [slots] expert ids: first each expert once, then the replicas in the order in which they were given.

    Examples
    --------
    >>> replicate(np.array([1.0, 5.0, 2.0]), 5).tolist()
    [0, 1, 2, 1, 1]
    """
    experts = len(weights)
    held = np.arange(slots)
    replicas = np.ones(experts)
    for slot in range(experts, slots):
        hottest = int(np.argmax(weights / replicas))
        held[slot] = hottest
        replicas[hottest] += 1
    return held


def replicated_slots(weights: np.ndarray, *, slots: int, devices: int, groups: int = 1, nodes: int = 1) -> np.ndarray:
    """Pack experts and replicas of their hottest onto devices, the same number of slots on each.

    Where the groups can be shared evenly by the nodes, packing is hierarchical: whole groups go to nodes (the
    heaviest first, to the lightest node with room), each node replicates its own experts, and its devices share
    them. Otherwise nodes and groups play no part (global).

    Parameters
    ----------
    weights : ndarray
        [layers, E]: load of every expert.
    slots : int
        Experts and replicas in all, a multiple of `devices`.
    devices : int
        GPUs, a multiple of `nodes`.
    groups : int
        Groups of consecutive experts that tokens are routed to as a whole (DeepSeek-V3).
    nodes : int

    Returns
    -------
    ndarray
        [layers, devices, slots per device] expert ids.

    References
    ----------
    https://github.com/deepseek-ai/EPLB, the algorithms that its README describes.
    """
    loads = np.asarray(weights, dtype=float)
    if loads.ndim != 2 or not loads.size or not np.isfinite(loads).all() or (loads < 0).any():
        raise InvalidValue(f"'weights' must be [layers, E] loads >= 0: shape {loads.shape}")
    split = _Split(loads.shape[1], slots, groups, nodes, devices)
    if groups % nodes:
        split = replace(split, groups=1, nodes=1)
    return np.stack([_pack_layer(layer, split) for layer in loads])


def _pack_layer(weights: np.ndarray, split: _Split) -> np.ndarray:
    members = np.arange(split.experts).reshape(split.groups, -1)
    group_weights = weights[members].sum(axis=1)
    if split.groups == split.nodes:  # one to each, as they come
        of_node = np.arange(split.groups)[:, None]
    else:
        of_node = least_loaded(group_weights, split.nodes)
    rows = []
    for groups in of_node:
        experts = members[groups].ravel()
        own = replicate(weights[experts], split.slots // split.nodes)
        replicas = np.bincount(own, minlength=len(experts))
        each = (weights[experts] / replicas)[own]
        per_node = split.devices // split.nodes
        packed = np.arange(len(own))[:, None] if len(own) == per_node else least_loaded(each, per_node)
        rows.append(experts[own[packed]])
    return np.concatenate(rows)


def replicated_placement(
    trace: RoutingTrace,
    devices: int,
    *,
    batch: int | None = None,
    slots: int | None = None,
    groups: int = 1,
    nodes: int = 1,
) -> Placement:
    """Greedy with replicas of hot experts, from a trace's mean loads.

    Parameters
    ----------
    trace : RoutingTrace
        The history.
    devices : int
    batch : int, optional
        Tokens per batch; by default the batches as they were run, or all tokens as one.
    slots : int, optional
        Experts and replicas in all; by default at least one slot per device more than there are experts.
    groups, nodes : int
        See `replicated_slots`.
    """
    if not isinstance(devices, int | np.integer) or isinstance(devices, bool) or devices < 1:
        raise InvalidValue(f"'devices' must be an integer >= 1: {devices!r}")
    if slots is None:
        slots = (trace.num_experts // devices + 1) * devices
    packed = replicated_slots(mean_shares(trace, batch), slots=slots, devices=devices, groups=groups, nodes=nodes)
    return Placement(slots=packed, num_experts=trace.num_experts, layers=trace.layers, method="greedy-replicated")
