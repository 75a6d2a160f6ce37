"""The Hierarchical Roofline Model: roofs of any number of memory levels, turning points, balance point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.errors import InvalidValue
from hrm.hardware import Hardware, Link
from hrm.operators import Operator

__all__ = [
    "RooflinePoint",
    "attainable",
    "balance_point",
    "link_path",
    "performance",
    "roofline_point",
    "roofs",
    "turning_points",
]


def attainable(peak_flops: Any, bandwidth: Any, intensity: Any) -> Any:
    """Eq. 4, 5 and 8: min(P, B·I), the roof of a processor whose data is local."""
    return np.minimum(peak_flops, bandwidth * intensity)


def link_path(hardware: Hardware, source: str, target: str) -> list[Link]:
    """The links that data takes from one memory level to another, through others where it has to.

    Raises
    ------
    InvalidValue
        If no chain of links connects them.
    """
    paths: list[list[Link]] = [[link] for link in hardware.links if link.source == source]
    seen = {source}
    while paths:
        path = paths.pop(0)
        here = path[-1].target
        if here == target:
            return path
        if here not in seen:
            seen.add(here)
            paths += [[*path, link] for link in hardware.links if link.source == here]
    raise InvalidValue(f"{hardware.name} has no link from {source!r} to {target!r}.")


def roofs(
    hardware: Hardware, intensity: Mapping[str, float], *, run_on: str, data_on: str | None = None
) -> dict[str, float]:
    """Every roof over an operator that runs on one level with its data on another.

    Parameters
    ----------
    intensity : mapping
        I_x^i by level, FLOP per byte that the operator touches there.
    run_on : str
        Level i whose processor runs it.
    data_on : str, optional
        Level j where its data lies; by default `run_on`.

    Returns
    -------
    dict
        FLOP/s by name of the roof: compute and memory of i, and each link on the way from j, which the data
        crosses at its intensity in j.

    References
    ----------
    MoE-Lightning, Eq. 4-8, for any number of levels.

    Examples
    --------
    >>> l4 = Hardware.from_catalog("gcp-l4-1x")
    >>> roofs(l4, {"gpu": 100.0, "cpu": 50.0}, run_on="gpu", data_on="cpu")["link cpu->gpu"] / 1e9
    800.0
    """
    level = hardware.level(run_on)
    count = hardware.num_gpus if run_on == "gpu" else 1
    result = {
        f"{run_on} compute": count * float(level.peak_flops),
        f"{run_on} memory": count * float(level.bandwidth) * _at(intensity, run_on),
    }
    if data_on is not None and data_on != run_on:
        for link in link_path(hardware, data_on, run_on):
            result[f"link {link.source}->{link.target}"] = float(link.bandwidth) * _at(intensity, data_on)
    return result


def _at(intensity: Mapping[str, float], level: str) -> float:
    if level not in intensity:
        raise InvalidValue(f"an operational intensity for level {level!r} is needed; given: {', '.join(intensity)}.")
    return intensity[level]


def performance(
    hardware: Hardware, intensity: Mapping[str, float], *, run_on: str, data_on: str | None = None
) -> tuple[float, str]:
    """Eq. 7 and 8: attainable FLOP/s of an operator, and the roof that binds it. Parameters as in `roofs`."""
    all_roofs = roofs(hardware, intensity, run_on=run_on, data_on=data_on)
    binding = min(all_roofs, key=lambda name: all_roofs[name])
    return all_roofs[binding], binding


def _link_bandwidth(hardware: Hardware, upper: str, lower: str) -> float:
    return min(float(link.bandwidth) for link in link_path(hardware, lower, upper))


def turning_points(
    hardware: Hardware,
    *,
    gpu_intensity: Any,
    cpu_intensity: Any,
    link_bandwidth: float | None = None,
    upper: str = "gpu",
    lower: str = "cpu",
) -> tuple[Any, Any]:
    """P1 and P2 of an operator whose data lies in the lower level (CPU memory).

    Below P1 it never pays to move the data up; below P2 the link binds the operator on the upper level.

    Parameters
    ----------
    gpu_intensity, cpu_intensity : float
        I_x^i and I_x^j: FLOPs per byte that the operator touches in the upper and in the lower level.
    upper, lower : str
        Levels i and j.

    Returns
    -------
    (p1, p2) : FLOP per byte

    References
    ----------
    MoE-Lightning, Eq. 9 and 10.
    """
    link = _link_bandwidth(hardware, upper, lower) if link_bandwidth is None else link_bandwidth
    below, above = hardware.level(lower), hardware.level(upper)
    count = hardware.num_gpus if upper == "gpu" else 1
    p1 = attainable(float(below.peak_flops), float(below.bandwidth), cpu_intensity) / link
    p2 = attainable(count * float(above.peak_flops), count * float(above.bandwidth), gpu_intensity) / link
    return p1, p2


def balance_point(hardware: Hardware, *, gpu_intensity: Any, upper: str = "gpu", lower: str = "cpu") -> Any:
    """Intensity in the lower level at which link and upper memory bind alike: B^i·I_x^i = B^{j,i}·I_x^j.

    A batch beyond it gains nothing until kernels grow with it.

    References
    ----------
    MoE-Lightning, Eq. 11.

    Examples
    --------
    >>> balance_point(Hardware.from_catalog("gcp-l4-1x"), gpu_intensity=32.0)
    600.0
    """
    count = hardware.num_gpus if upper == "gpu" else 1
    memory = count * float(hardware.level(upper).bandwidth)
    return memory * gpu_intensity / _link_bandwidth(hardware, upper, lower)


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflinePoint:
    """An operator on the hierarchical roofline."""

    name: str
    batch: int
    intensity: dict[str, float]
    """FLOP/B by level: "gpu" for one kernel's traffic, "cpu" for what crosses the link per batch."""
    attainable_flops: float
    """Best of computing on the GPU (Eq. 7) and on the CPU (Eq. 8)."""
    p1: float
    p2: float
    balance: float
    """Intensity in CPU memory at which link and GPU memory bind alike (Eq. 11)."""
    bound_by: str
    on_gpu_flops: float
    """Attainable on the GPU with the data in CPU memory (Eq. 7)."""
    on_cpu_flops: float
    """Attainable on the CPU (Eq. 8)."""


_NAMES = {"gpu compute": "GPU compute", "gpu memory": "GPU memory", "link cpu->gpu": "link"} | {
    "cpu compute": "CPU compute",
    "cpu memory": "CPU memory",
}


def roofline_point(hardware: Hardware, op: Operator, *, batch: int, kernel_op: Operator | None = None) -> RooflinePoint:
    """Place an operator.

    Parameters
    ----------
    op : Operator
        The operator on the whole batch: its bytes lie in CPU memory and may cross the link once.
    kernel_op : Operator, optional
        The same operator on one micro-batch, which decides the GPU-side intensity.
    """
    kernel = kernel_op or op
    intensity = {"cpu": float(op.intensity), "gpu": float(kernel.intensity)}
    p1, p2 = turning_points(hardware, gpu_intensity=intensity["gpu"], cpu_intensity=intensity["cpu"])
    on_gpu, gpu_roof = performance(hardware, intensity, run_on="gpu", data_on="cpu")
    on_cpu, cpu_roof = performance(hardware, intensity, run_on="cpu")
    bound = cpu_roof if on_cpu > on_gpu else gpu_roof
    return RooflinePoint(
        name=op.name,
        batch=batch,
        intensity=intensity,
        attainable_flops=max(on_gpu, on_cpu),
        p1=float(p1),
        p2=float(p2),
        balance=float(balance_point(hardware, gpu_intensity=intensity["gpu"])),
        bound_by=_NAMES.get(bound, bound),
        on_gpu_flops=on_gpu,
        on_cpu_flops=on_cpu,
    )
