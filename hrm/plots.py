"""Figures of the hierarchical roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hrm.hardware import Hardware
from hrm.roofline import RooflinePoint, attainable

__all__ = ["roofline"]

_COLOURS = {
    "GPU compute": "tab:green",
    "GPU memory": "tab:blue",
    "link": "tab:red",
    "CPU compute": "tab:orange",
    "CPU memory": "tab:purple",
}
_MARKERS = "osD^vP*X"


def roofline(hardware: Hardware, points: Sequence[RooflinePoint], ax: Any = None) -> Any:
    """Draw a machine's roofs and where operators stand under them.

    Parameters
    ----------
    hardware : Hardware
    points : sequence of RooflinePoint
        From `hrm.roofline.roofline_point`. An operator stands at its intensity in CPU memory, FLOP per byte
        that would cross the link. Batch sizes of one operator share a marker; the legend lists them.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    References
    ----------
    MoE-Lightning, Fig. 4 and 5.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(layout="constrained")
    gpu, cpu = hardware.gpu, hardware.cpu
    slopes = {
        "GPU memory": (float(gpu.bandwidth), float(gpu.peak_flops)),
        "link": (float(hardware.h2d.bandwidth), float(gpu.peak_flops)),
        "CPU memory": (float(cpu.bandwidth), float(cpu.peak_flops)),
    }
    seen = [point.intensity["cpu"] for point in points]
    ridges = [peak / bandwidth for bandwidth, peak in slopes.values()]
    x = np.geomspace(min([0.1, *seen]) / 2, max([*ridges, *seen]) * 4, 200)
    for name, (bandwidth, peak) in slopes.items():
        rising = np.append(x[bandwidth * x < peak], peak / bandwidth)
        ax.plot(rising, attainable(peak, bandwidth, rising), color=_COLOURS[name], label=f"{name} roof")
    for name, level in (("GPU compute", gpu), ("CPU compute", cpu)):
        peak = float(level.peak_flops)
        ax.plot([peak / float(level.bandwidth), x[-1]], [peak, peak], color=_COLOURS[name], label=f"{name} roof")
    for number, name in enumerate(dict.fromkeys(point.name for point in points)):
        mine = sorted((p for p in points if p.name == name), key=lambda p: p.batch)
        ax.plot(
            [point.intensity["cpu"] for point in mine],
            [point.attainable_flops for point in mine],
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=8,
            color="black",
            fillstyle="none",
            label=f"{name}, N = {', '.join(str(point.batch) for point in mine)}",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operational intensity (FLOP/B)")
    ax.set_ylabel("attainable performance (FLOP/s)")
    ax.set_title(hardware.title)
    ax.grid(True, which="major", alpha=0.3)
    ax.legend(fontsize=8)
    return ax
