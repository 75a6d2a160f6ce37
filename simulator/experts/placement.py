"""Which device holds which expert: placements as data, and those that a trace's history suggests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm.errors import InvalidConfig, InvalidValue, UnknownName
from simulator.experts.shares import batch_shares, correlations, mean_shares
from simulator.experts.trace import RoutingTrace

__all__ = [
    "PLACEMENT_METHODS",
    "Placement",
    "anti_correlation_placement",
    "batch_shares",
    "check_devices",
    "correlations",
    "even_placement",
    "greedy_placement",
    "least_loaded",
    "mean_shares",
    "place",
]

_FORMAT = "hrm-placement-1"
_KEYS = {"format", "num_experts", "layers", "method", "slots"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """The expert in every slot of every device, layer by layer.

    Every device has as many slots as any other. Without replication each expert lies in exactly one; the tokens of an
    expert that lies in several are shared equally by its replicas.

    Examples
    --------
    >>> placement = Placement.of_devices([[0, 1, 1, 0]], num_devices=2)
    >>> placement
    <Placement 'given': 1 layer, 4 experts on 2 devices>
    >>> placement.slots.tolist()
    [[[0, 3], [1, 2]]]
    >>> placement.device_of.tolist()
    [[0, 1, 1, 0]]
    """

    slots: np.ndarray
    """[layers, devices, slots per device]: expert ids."""
    num_experts: int
    layers: tuple[int, ...] = ()
    """Number of every MoE layer in its model, as in the trace; by default 0, 1, ..."""
    method: str = "given"
    """How it was found."""

    def __post_init__(self) -> None:
        given = np.asarray(self.slots)
        if given.ndim != 3 or not given.size or given.dtype.kind not in "iu":
            raise InvalidValue(
                f"'slots' must be integers [layers, devices, slots per device], none of them 0: {given.dtype}, "
                f"shape {given.shape}"
            )
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= self.num_experts:
            raise InvalidValue(f"'slots' holds expert {low if low < 0 else high}, not one of {self.num_experts}.")
        slots = np.ascontiguousarray(given, dtype=np.int32)
        for layer, row in enumerate(slots.reshape(len(slots), -1)):
            missing = np.setdiff1d(np.arange(self.num_experts), row)
            if len(missing):
                raise InvalidValue(
                    f"'slots' of layer {layer} must hold each of {self.num_experts} experts: expert {missing[0]} is "
                    f"nowhere ({len(missing)} missing)."
                )
        layers = tuple(int(n) for n in self.layers) or tuple(range(len(slots)))
        if len(layers) != len(slots):
            raise InvalidValue(f"'layers' names {len(layers)} layers, 'slots' has {len(slots)}.")
        slots.flags.writeable = False
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "layers", layers)

    @classmethod
    def of_devices(
        cls, devices: Any, *, num_devices: int | None = None, layers: tuple[int, ...] = (), method: str = "given"
    ) -> Placement:
        """A placement without replicas, from the device of every expert.

        Parameters
        ----------
        devices : array_like of int
            [layers, E]: device of every expert; each device has the same number of them.
        num_devices : int, optional
            By default the largest device and one.
        """
        given = np.asarray(devices)
        if given.ndim != 2 or not given.size or given.dtype.kind not in "iu":
            raise InvalidValue(f"'devices' must be integers [layers, E]: {given.dtype}, shape {given.shape}")
        count = int(given.max()) + 1 if num_devices is None else num_devices
        room = _room(given.shape[1], count)
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= count:
            raise InvalidValue(f"'devices' names device {low if low < 0 else high}, not one of {count}.")
        for layer, row in enumerate(given):
            held = np.bincount(row, minlength=count)
            if (held != room).any():
                device = int(np.flatnonzero(held != room)[0])
                raise InvalidValue(
                    f"'devices' puts {held[device]} experts of layer {layer} on device {device}; every device must "
                    f"have {room}."
                )
        order = np.argsort(given, axis=1, kind="stable")
        slots = order.reshape(len(given), count, room)
        return cls(slots=slots, num_experts=given.shape[1], layers=layers, method=method)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.slots.shape[0])

    @property
    def num_devices(self) -> int:
        """D: devices that share the experts of every layer."""
        return int(self.slots.shape[1])

    @property
    def slots_per_device(self) -> int:
        """Experts, replicas included, of one layer on one device."""
        return int(self.slots.shape[2])

    @property
    def replicated(self) -> bool:
        """True where some expert lies in more than one slot."""
        return self.num_devices * self.slots_per_device > self.num_experts

    @property
    def device_of(self) -> np.ndarray:
        """Device of every expert, [layers, E].

        Raises
        ------
        InvalidValue
            Some experts have several.
        """
        if self.replicated:
            raise InvalidValue("experts of a placement with replicas have no single device; use 'slots' or 'shares()'.")
        device = np.empty((self.num_layers, self.num_experts), dtype=np.int32)
        owner = np.repeat(np.arange(self.num_devices, dtype=np.int32), self.slots_per_device)
        np.put_along_axis(device, self.slots.reshape(self.num_layers, -1), owner[None], axis=1)
        return device

    @property
    def replicas(self) -> np.ndarray:
        """Slots that hold each expert, [layers, E]."""
        counts = np.zeros((self.num_layers, self.num_experts), dtype=np.int64)
        for layer, row in enumerate(self.slots):
            counts[layer] = np.bincount(row.ravel(), minlength=self.num_experts)
        return counts

    def experts_of(self, *, layer: int, device: int) -> np.ndarray:
        """Ids of the experts that a device holds of a layer, in increasing id, each once; `layer` counts MoE layers."""
        return np.unique(self.slots[layer, device])

    def shares(self) -> np.ndarray:
        """P: share of every expert's tokens that each device computes, [layers, E, devices]; rows add up to 1."""
        shares = np.zeros((self.num_layers, self.num_experts, self.num_devices))
        layer, device = np.indices(self.slots.shape)[:2]
        np.add.at(shares, (layer, self.slots, device), 1.0)
        return shares / shares.sum(axis=2, keepdims=True)

    def check_trace(self, trace: RoutingTrace) -> None:
        """Raise `InvalidValue` unless the trace has these layers and experts."""
        mine, its = (self.num_layers, self.num_experts), (trace.num_layers, trace.num_experts)
        if mine != its:
            raise InvalidValue(
                f"a placement of {mine[0]} layers x {mine[1]} experts does not fit a trace of {its[0]} layers x "
                f"{its[1]} experts."
            )

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write JSON: format, num_experts, layers, method, and slots as nested lists [layers][devices][slots]."""
        path = Path(path)
        content = {
            "format": _FORMAT, "num_experts": self.num_experts, "layers": list(self.layers), "method": self.method,
            "slots": self.slots.tolist(),
        }  # fmt: skip
        try:
            path.write_text(json.dumps(content) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidValue(f"cannot write the placement {str(path)!r}: {error.strerror}.") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read a file of `save`.

        Raises
        ------
        InvalidConfig
            Not readable, not of this format, or a key missing or unknown.
        """
        path = Path(path)
        where = f"placement {str(path)!r}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidConfig(f"cannot read the {where}: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise InvalidConfig(f"{where} is not JSON: {error}.") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InvalidConfig(f"{where} must be a JSON object with 'format': {_FORMAT!r}.")
        for key in sorted(_KEYS ^ set(content)):
            raise InvalidConfig(f"{where} {'lacks' if key in _KEYS else 'has the unknown'} key {key!r}.")
        try:
            slots = np.array(content["slots"])
            if slots.dtype.kind not in "iu":
                raise InvalidValue("'slots' must be integers, as many in every device of every layer.")
            if type(content["num_experts"]) is not int:
                raise InvalidValue(f"'num_experts' must be an integer: {content['num_experts']!r}")
            return cls(
                slots=slots,
                num_experts=content["num_experts"],
                layers=tuple(int(n) for n in content["layers"]),
                method=str(content["method"]),
            )
        except (TypeError, ValueError, OverflowError) as error:  # InvalidValue is a ValueError
            raise InvalidConfig(f"{where}: {error}") from None

    def __repr__(self) -> str:
        layers = "1 layer" if self.num_layers == 1 else f"{self.num_layers} layers"
        held = f" in {self.num_devices * self.slots_per_device} slots" if self.replicated else ""
        devices = "1 device" if self.num_devices == 1 else f"{self.num_devices} devices"
        return f"<Placement {self.method!r}: {layers}, {self.num_experts} experts{held} on {devices}>"


# -- devices -------------------------------------------------------------------------------------------


def check_devices(num_experts: int, devices: int) -> int:
    """Experts per device, or `InvalidValue` if `devices` do not share them evenly."""
    return _room(num_experts, devices)


def _room(num_experts: int, devices: int) -> int:
    if not isinstance(devices, int | np.integer) or isinstance(devices, bool) or devices < 1:
        raise InvalidValue(f"'devices' must be an integer >= 1: {devices!r}")
    if devices > num_experts:
        raise InvalidValue(f"'devices' must be at most the number of experts, {num_experts}: {devices}")
    if num_experts % devices:
        fitting = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
        near = sorted(sorted(fitting, key=lambda d: abs(d - devices))[:2])
        raise InvalidValue(
            f"'devices' must divide the {num_experts} experts evenly: {devices}; the nearest that do are "
            f"{' and '.join(map(str, near))}."
        )
    return num_experts // int(devices)


# -- methods -------------------------------------------------------------------------------------------


def even_placement(trace: RoutingTrace, devices: int, *, batch: int | None = None) -> Placement:
    """Experts in order, E/D to each device: the default of expert parallelism. What the trace holds plays no part.

    Examples
    --------
    >>> trace = RoutingTrace(experts=[[[0]], [[3]]], num_experts=4)
    >>> even_placement(trace, 2).slots.tolist()
    [[[0, 1], [2, 3]]]
    """
    room = _room(trace.num_experts, devices)
    one = np.arange(trace.num_experts).reshape(devices, room)
    slots = np.broadcast_to(one, (trace.num_layers, devices, room))
    return Placement(slots=slots, num_experts=trace.num_experts, layers=trace.layers, method="even")


def least_loaded(weights: np.ndarray, bins: int) -> np.ndarray:
    """Put things, the heaviest first, into the lightest bin that has room; as many things in every bin.

    Parameters
    ----------
    weights : ndarray
        [things]; `bins` divides their number.
    bins : int

    Returns
    -------
    ndarray
        [bins, things per bin]: indices, in the order in which they came.
    """
    room = len(weights) // bins
    packed = np.empty((bins, room), dtype=np.int64)
    held = np.zeros(bins, dtype=np.int64)
    loads = np.zeros(bins)
    for thing in np.argsort(-weights, kind="stable"):
        chosen = int(np.argmin(np.where(held < room, loads, np.inf)))
        packed[chosen, held[chosen]] = thing
        held[chosen] += 1
        loads[chosen] += weights[thing]
    return packed


def greedy_placement(trace: RoutingTrace, devices: int, *, batch: int | None = None) -> Placement:
    """By mean historical load, descending, to the least-loaded device with room.

    Parameters
    ----------
    trace : RoutingTrace
        The history.
    devices : int
        D, which divides the number of experts.
    batch : int, optional
        Tokens per batch; by default the batches as they were run, or, where they are not known, all tokens as one.
        The mean load of an expert is the mean over batches of its share.

    References
    ----------
    arXiv 2303.06182, the section on load balancing. Greedy multi-way number partitioning (longest processing time
    first) with a limit on the number per device.
    """
    _room(trace.num_experts, devices)
    mean = mean_shares(trace, batch)
    slots = np.stack([least_loaded(layer, devices) for layer in mean])
    return Placement(slots=slots, num_experts=trace.num_experts, layers=trace.layers, method="greedy")


def anti_correlation_placement(
    trace: RoutingTrace, devices: int, *, batch: int | None = None, weight: float = 0.5
) -> Placement:
    """As greedy, but an expert keeps away from those that are busy when it is.

    While expert a is placed, the load of device n counts as the sum over its experts m of Ā_m + 0.5·S_am: mean share
    plus half the Pearson correlation of the two experts' shares over batches.

    Parameters
    ----------
    trace : RoutingTrace
        The history, of at least two batches.
    devices : int
        D, which divides the number of experts.
    batch : int, optional
        Tokens per batch; by default the batches as they were run.
    weight : float
        Of the correlation beside the mean share.

    References
    ----------
    arXiv 2303.06182, the section on load balancing.
    """
    room = _room(trace.num_experts, devices)
    shares = batch_shares(trace, batch)
    if len(shares) < 2:
        raise InvalidValue(
            f"correlation needs at least 2 batches of history, there is {len(shares)}; give a smaller 'batch' or a "
            "longer trace."
        )
    slots = np.empty((trace.num_layers, devices, room), dtype=np.int64)
    for layer in range(trace.num_layers):
        mean, together = shares[:, layer].mean(axis=0), correlations(shares[:, layer])
        held = np.zeros(devices, dtype=np.int64)
        loads = np.zeros(devices)
        beside = np.zeros((devices, trace.num_experts))  # of each expert with those on the device
        for expert in np.argsort(-mean, kind="stable"):
            counted = np.where(held < room, loads + weight * beside[:, expert], np.inf)
            chosen = int(np.argmin(counted))
            slots[layer, chosen, held[chosen]] = expert
            held[chosen] += 1
            loads[chosen] += mean[expert]
            beside[chosen] += together[expert]
    return Placement(slots=slots, num_experts=trace.num_experts, layers=trace.layers, method="anti-correlation")


def _optimal(trace: RoutingTrace, devices: int, *, batch: int | None = None) -> Placement:
    from simulator.experts.optimal import optimal_placement

    return optimal_placement(trace, devices, batch=batch).placement


def _refined(trace: RoutingTrace, devices: int, *, batch: int | None = None) -> Placement:
    from simulator.experts.refinement import refined_placement

    return refined_placement(trace, devices, batch=batch)


def _replicated(trace: RoutingTrace, devices: int, *, batch: int | None = None) -> Placement:
    from simulator.experts.replication import replicated_placement

    return replicated_placement(trace, devices, batch=batch)


PLACEMENT_METHODS: dict[str, Callable[..., Placement]] = {
    "even": even_placement,
    "greedy": greedy_placement,
    "anti-correlation": anti_correlation_placement,
    "refined": _refined,
    "optimal": _optimal,
    "greedy-replicated": _replicated,
}
"""Each takes ``(trace, devices, batch=None)``."""


def place(trace: RoutingTrace, devices: int, method: str = "greedy", *, batch: int | None = None) -> Placement:
    """The placement that `method` makes of a trace's history.

    Raises
    ------
    UnknownName
        For an unknown method.
    """
    if method not in PLACEMENT_METHODS:
        raise UnknownName.of("placement method", method, PLACEMENT_METHODS)
    return PLACEMENT_METHODS[method](trace, devices, batch=batch)
