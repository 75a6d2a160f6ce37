"""What kernels and copies attain on a machine: the numbers that turn work into seconds."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import numpy as np

from hrm.errors import InvalidConfig, InvalidValue
from hrm.systems import check_system

__all__ = ["RATE_SETS", "Curve", "Provenance", "Rates"]

Provenance = Literal["spec", "published", "paper", "measured", "fitted"]
RATE_SETS: tuple[Provenance, ...] = ("fitted", "measured", "paper", "published", "spec")
"""Best first: the order in which a machine's default set is chosen."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate that depends on the size of the work: linear between points, constant outside them.

    Examples
    --------
    >>> Curve(((1, 10.0), (3, 30.0))).at(2)
    20.0
    """

    points: tuple[tuple[float, float], ...]
    """(size, rate) in ascending size."""

    def __post_init__(self) -> None:
        sizes = [x for x, _ in self.points]
        if not self.points or sizes != sorted(set(sizes)):
            raise InvalidConfig(f"a rate curve needs points in ascending size: {self.points}")
        if any(not (y > 0) for _, y in self.points):
            raise InvalidConfig(f"a rate must be > 0: {self.points}")

    @classmethod
    def constant(cls, rate: float) -> Self:
        """A rate that does not depend on size."""
        return cls(((1.0, float(rate)),))

    def at(self, size: Any) -> Any:
        """Rate at `size` (number or array)."""
        if isinstance(size, int | float):
            return self._scalar(float(size))
        xs, ys = zip(*self.points, strict=True)
        return np.interp(size, xs, ys)

    def _scalar(self, size: float) -> float:
        points = self.points
        i = bisect.bisect_left(points, (size,))
        if i == 0:
            return points[0][1]
        if i == len(points):
            return points[-1][1]
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)

    def scaled(self, factor: float) -> Curve:
        """The curve with every rate multiplied."""
        return Curve(tuple((x, y * factor) for x, y in self.points))

    @property
    def peak(self) -> float:
        """Highest rate of the curve."""
        return max(y for _, y in self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What kernels and copies attain on a machine: everything that turns work into seconds.

    Rates of a GPU are those of one GPU of the machine; links are those of the whole node.
    Sizes of the curves: tokens per GEMM (`gpu_gemm`), tokens per active expert (`gpu_experts`), context
    (`cpu_attention`) and prompt length (`gpu_attention`) in tokens.
    """

    provenance: Provenance
    source: str
    gpu_gemm: Curve
    """FLOP/s of a dense projection by number of rows."""
    gpu_experts: Curve
    """FLOP/s of the expert FFN by tokens per active expert."""
    single_expert_s: float = 0.0
    """Seconds that an expert costs on top where it has calls of its own, as those of an expert cache have."""
    gpu_attention: Curve
    """FLOP/s of causal attention in prefill."""
    gpu_bandwidth: float
    """Bytes/s of the GPU's memory, for element-wise kernels and weight reads."""
    gpu_decode_attention: Curve
    """Bytes/s at which decode attention on the GPU reads the KV cache."""
    gpu_launch_s: float = 0.0
    """Seconds that every kernel costs at least (launch, or operator dispatch)."""
    cpu_attention: Curve
    """Bytes/s at which decode attention on the CPU reads the KV cache."""
    cpu_attention_flops: float | None = None
    """FLOP/s roof of decode attention on the CPU; None where only its KV traffic was measured."""
    cpu_experts: Curve
    """FLOP/s of the expert FFN on the CPU by tokens per active expert."""
    cpu_weight_bandwidth: float
    """Bytes/s at which experts on the CPU read their weights."""
    cpu_task_s: float = 0.0
    """Seconds that a CPU attention call costs beside its KV traffic."""
    gpu_attention_s: float = 0.0
    """Seconds that an attention call costs on the GPU beside its KV traffic and its launches."""
    h2d_bandwidth: float
    d2h_bandwidth: float
    transfer_s: float = 0.0
    """Seconds that every transfer costs beside its bytes."""
    peer_bandwidth: float | None = None
    """Bytes/s that one GPU sends to its peers; None on a machine with one GPU."""
    peer_s: float = 0.0
    """Seconds that every exchange between GPUs costs beside its bytes."""
    peer_by_host: bool = False
    """Whether GPUs reach each other over their links to the host."""
    stages_weights: bool = True
    """Whether weights lie in pageable memory, so that the host copies them to pinned memory on their way."""
    staging_bandwidth: float
    """Bytes/s of the copy from pageable to pinned memory, alone."""
    kv_staging_bandwidth: float | None = None
    """Bytes/s of that copy for the KV cache, where it is another; None: `staging_bandwidth`."""
    dram_bandwidth: float
    """Bytes/s that all users of CPU memory share, as a mix of them attains it."""
    copy_bandwidth: float | None = None
    """Bytes/s of a copy on one core, where copies are made by a core (no GPU)."""
    task_s: float = 0.0
    """Seconds between a task's last dependency and its start (hand-over between lanes)."""
    sync_s: float = 0.0
    """Seconds that the host takes to wait for all that it has issued and to issue more."""
    request_s: float = 0.0
    """Seconds that a layer of prefill takes per request beside its tokens (what a program does request by request)."""
    parallel_efficiency: float = 1.0
    """Share of their speed that GPUs keep when they share every layer."""
    gpu_capacity: float | None = None
    """Bytes of one GPU as the set's source counts them, where that is not the data sheet's figure."""
    cpu_capacity: float | None = None
    """Bytes of host memory, likewise."""
    cores: Curve | None = None
    """Lanes' worth of work done at once, by lanes' worth wanted, where lanes share cores; None with a GPU."""
    gpu_on_own_cores: bool = False
    """Whether the GPU lane is not among these lanes, where cores stand for the GPU."""
    processors: Curve | None = None
    """Lanes' worth of work done at once by that GPU lane and the host's, by lanes' worth wanted; None: all of it."""
    systems: Mapping[str, Mapping[str, float | Curve]] = field(default_factory=dict)
    """Rates that a system's own kernels attain, where they are not those of MoE-Lightning, by its name."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float):
                overhead = item.name.endswith("_s")
                if item.name == "parallel_efficiency" and value > 1:
                    raise InvalidConfig(f"rate {item.name!r} is a share and must be <= 1: {value}")
                if isinstance(value, bool):
                    continue
                if not (value >= 0 if overhead else value > 0):
                    raise InvalidConfig(f"rate {item.name!r} must be {'>=' if overhead else '>'} 0: {value}")

    @property
    def fetches_pageable(self) -> bool:
        """Whether weights that a GPU fetches on demand lie in pageable memory, and pass through pinned memory first."""
        return self.stages_weights and self.copy_bandwidth is None

    def with_link(self, bandwidth: float | None) -> Rates:
        """The same machine with a link of `bandwidth` bytes/s both ways (None: unchanged).

        A paced link cannot be faster than the copies that carry it.
        """
        if bandwidth is None:
            return self
        if not bandwidth > 0:
            raise InvalidValue(f"link bandwidth must be > 0: {bandwidth}")
        limit = self.copy_bandwidth or float("inf")
        return replace(self, h2d_bandwidth=min(bandwidth, limit), d2h_bandwidth=min(bandwidth, limit))

    def scaled(self, factors: Mapping[str, float]) -> Rates:
        """The same rates with some fields multiplied, curves point by point; those of systems likewise."""
        changed: dict[str, Any] = {}
        for name, factor in factors.items():
            value = getattr(self, name)
            if factor != 1 and value is not None:
                changed[name] = _times(value, factor)
        changed["systems"] = {
            system: {name: _times(value, factors.get(name, 1.0)) for name, value in own.items()}
            for system, own in self.systems.items()
        }
        return replace(self, **changed)

    def of_system(self, name: str) -> Rates:
        """What the kernels of a system attain on this machine.

        A system without rates of its own gets the machine's; attention that moves the KV cache several times
        (`hrm.systems.System.kv_passes`) is as much slower, unless the rates were measured here: this project's
        executor runs all systems with the same kernels.

        Raises
        ------
        UnknownName
            For an unknown system.
        """
        system, own = check_system(name), dict(self.systems.get(name, {}))
        if system.kv_passes != 1 and "cpu_attention" not in own and self.provenance != "measured":
            own["cpu_attention"] = self.cpu_attention.scaled(1 / system.kv_passes)
        return replace(self, systems={}, **own)  # type: ignore[arg-type]


def _times(value: float | Curve, factor: float) -> float | Curve:
    return value.scaled(factor) if isinstance(value, Curve) else value * factor
