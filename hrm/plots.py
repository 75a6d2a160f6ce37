"""Figures of the hierarchical roofline, and maps of policies over machines.

Every function draws on the axes it is given, or on fresh ones, and returns them; none shows a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hrm.hardware import Hardware
from hrm.roofline import RooflinePoint, attainable, turning_points
from hrm.units import format_bandwidth, format_flops

__all__ = ["policy_map", "roofline"]

# Okabe and Ito's palette, which people with any common colour blindness can tell apart.
_COLOURS = {
    "GPU compute": "#0072B2",
    "GPU memory": "#56B4E9",
    "link": "#D55E00",
    "CPU compute": "#E69F00",
    "CPU memory": "#009E73",
}
_LEVELS = {"gpu": "GPU memory", "link": "link", "cpu": "CPU memory"}
_MARKERS = "osD^vP*Xhp"
_FONT = 11


@dataclass(frozen=True)
class _Roof:
    """One memory's slope and the compute roof that ends it."""

    bandwidth: float
    peak: float

    @property
    def ridge(self) -> float:
        return self.peak / self.bandwidth


def roofline(
    hardware: Hardware,
    points: Sequence[RooflinePoint] = (),
    ax: Any = None,
    *,
    labels: Literal["batch", "name"] | None = None,
    verticals: bool = False,
    turning: RooflinePoint | None = None,
    measured: Any = None,
    title: str | None = None,
) -> Any:
    """Draw a machine's roofs and where operators stand under them.

    One colour per roof, one symbol per operator. Without `labels` symbols are filled by batch size and a legend
    tells both.

    Parameters
    ----------
    hardware : Hardware
        Its data sheet (not its rate sets) makes the roofs; GPUs of a machine count together.
    points : sequence of RooflinePoint
        From `hrm.roofline.roofline_point`. An operator stands at its intensity in CPU memory, FLOP per byte
        that would cross the link, and at the higher of what it attains on the GPU and on the CPU.
    ax : matplotlib.axes.Axes, optional
    labels : {"batch", "name"}, optional
        Write this beside each point instead of a legend.
    verticals : bool
        Draw a line from the axis to each point, as the authors' figures do.
    turning : RooflinePoint, optional
        Mark P1 and P2 of this operator, its kernel on the GPU, and which side computes between them.
    measured : pandas.DataFrame, optional
        What tasks achieved: columns ``name``, ``level`` ("gpu", "link" or "cpu": whose bytes), ``intensity``,
        ``flops_per_s`` and ``share`` (of the roof there). Symbols take the colour of the level's memory.
    title : str, optional
        By default the machine's.

    Returns
    -------
    matplotlib.axes.Axes

    References
    ----------
    MoE-Lightning, Fig. 4 and 5 and Eq. 4-11. One symbol per kernel, one colour per level: C. Yang, T. Kurth and
    S. Williams, "Hierarchical Roofline analysis for GPUs", 2020.
    """
    ax = _axes(ax)
    roofs = _roofs(hardware)
    achieved = [] if measured is None else measured.to_dict("records")
    x, y = _limits(roofs, points, achieved, turning)
    _draw_roofs(ax, hardware, roofs, x)
    if turning is not None:
        _draw_turning_points(ax, hardware, roofs, turning, x, y)
    if verticals:
        at = [point.intensity["cpu"] for point in points]
        top = [point.attainable_flops for point in points]
        ax.vlines(at, y[0], top, color="0.35", linestyle="--", linewidth=1.2, zorder=2.5)
    entries = _draw_points(ax, points, labels) + _draw_achieved(ax, achieved, hardware)
    _finish(ax, x, y, title or hardware.title)
    if entries:
        first = ax.get_legend()
        # Above the names of the regions, where there are any.
        corner = (1.0, 0.0) if turning is None else (1.0, 0.11)
        ax.legend(handles=entries, loc="lower right", bbox_to_anchor=corner, fontsize=_FONT - 2, framealpha=0.9)
        ax.add_artist(first)
    return ax


def _axes(ax: Any) -> Any:
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(9.0, 5.5), layout="constrained")
    return ax


def _roofs(hardware: Hardware) -> dict[str, _Roof]:
    gpu, cpu, count = hardware.gpu, hardware.cpu, hardware.num_gpus
    peak = count * float(gpu.peak_flops)
    return {
        "GPU memory": _Roof(count * float(gpu.bandwidth), peak),
        "link": _Roof(float(hardware.h2d.bandwidth), peak),
        "CPU memory": _Roof(float(cpu.bandwidth), float(cpu.peak_flops)),
    }


def _limits(
    roofs: Mapping[str, _Roof],
    points: Sequence[RooflinePoint],
    achieved: Sequence[Mapping[str, Any]],
    turning: RooflinePoint | None,
) -> tuple[tuple[float, float], tuple[float, float]]:
    xs = [p.intensity["cpu"] for p in points] + [a["intensity"] for a in achieved]
    ys = [p.attainable_flops for p in points] + [a["flops_per_s"] for a in achieved]
    if turning is not None:
        xs.append(turning.intensity["gpu"])
        xs.append(turning.p2)
    x = (min([1.0, *xs]) / 4, max([*(roof.ridge for roof in roofs.values()), *xs]) * 3)
    slowest = min(roof.bandwidth for roof in roofs.values()) * x[0]
    highest = max(roof.peak for roof in roofs.values())
    return x, (min(ys) / 12 if ys else slowest, highest * 4)


def _side(hardware: Hardware, roof: str) -> str:
    """The roof's name; "GPU" and "CPU" are two heaps of one memory where the machine has no GPU."""
    return roof.replace("GPU", "device").replace("CPU", "host") if hardware.shared_memory else roof


def _draw_roofs(ax: Any, hardware: Hardware, roofs: Mapping[str, _Roof], x: tuple[float, float]) -> None:
    for name, roof in roofs.items():
        slope = np.array([x[0], roof.ridge])
        label = f"{_side(hardware, name)} {format_bandwidth(roof.bandwidth)}"
        ax.plot(slope, attainable(roof.peak, roof.bandwidth, slope), color=_COLOURS[name], linewidth=2.5, label=label)
    for name, roof in (("GPU compute", roofs["GPU memory"]), ("CPU compute", roofs["CPU memory"])):
        label = f"{_side(hardware, name)} {format_flops(roof.peak)}"
        ax.plot([roof.ridge, x[1]], [roof.peak] * 2, color=_COLOURS[name], linewidth=2.5, label=label)
    ax.legend(loc="upper left", fontsize=_FONT - 2, framealpha=0.9)


def _draw_turning_points(
    ax: Any,
    hardware: Hardware,
    roofs: Mapping[str, _Roof],
    of: RooflinePoint,
    x: tuple[float, float],
    y: tuple[float, float],
) -> None:
    link = roofs["link"].bandwidth
    # Where the link's roof meets the CPU's: Eq. 9 with an intensity that leaves its compute roof alone.
    p1, _ = turning_points(hardware, gpu_intensity=of.intensity["gpu"], cpu_intensity=np.inf)
    p2 = of.p2
    kernel = link * p2
    regions = [("CPU memory", "compute on\nthe CPU", x[0], p1)]
    marks = [("P1", p1, link * p1)]
    if p2 > p1:
        # Otherwise the CPU is faster than the kernel at every intensity, and P2 says nothing.
        regions += [("link", "the link\nbinds", p1, p2), ("GPU memory", "the kernel\nbinds", p2, x[1])]
        marks.append(("P2", p2, kernel))
        at = of.intensity["gpu"]
        ax.plot([min(at, p2), x[1]], [kernel] * 2, color="black", linestyle=":", linewidth=1.8, zorder=2.6)
        ax.plot(at, kernel, "D", color=_COLOURS["GPU memory"], markeredgecolor="black", zorder=4)
        _write(ax, "kernel on the GPU", (at, kernel), (-7, 6), align="right")
    for roof, text, left, right in regions:
        if left < right:
            ax.axvspan(left, right, color=_COLOURS[roof], alpha=0.08, linewidth=0)
            _write(ax, text, (np.sqrt(left * right), y[0]), (0, 8), align="center", style="italic")
    for name, where, height in marks:
        ax.vlines(where, y[0], height, color="black", linewidth=1.5, zorder=2.6)
        ax.plot(where, height, ">", color="black", markersize=9, zorder=5)
        _write(ax, f"{name} = {where:.4g}", (where, height), (8, -14), weight="bold")


def _draw_points(ax: Any, points: Sequence[RooflinePoint], labels: str | None) -> list[Any]:
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(point.name for point in points))
    batches = sorted({point.batch for point in points})
    fills = {
        batch: colormaps["viridis"](1.0 - number / max(1, len(batches) - 1)) for number, batch in enumerate(batches)
    }
    markers = {name: _MARKERS[number % len(_MARKERS)] for number, name in enumerate(names)}
    style: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "black"}
    # Later operators are smaller, so that those that fall on the same place all show.
    sizes = {name: max(6.0, 13.0 - 2 * number) if len(names) > 1 and not labels else 9.0
             for number, name in enumerate(names)}  # fmt: skip
    for name in names:
        for point in sorted((p for p in points if p.name == name), key=lambda p: p.batch):
            at = (point.intensity["cpu"], point.attainable_flops)
            face = "black" if labels else fills[point.batch]
            ax.plot(*at, marker=markers[name], markersize=sizes[name], markerfacecolor=face, zorder=5, **style)
            if labels == "name":
                _write(ax, point.name, at, (8, -14))
            elif labels == "batch":
                _write(ax, f"N = {point.batch:,}".replace(",", " "), at, (-7, 7), align="right")
    if labels or not points:
        return []
    style["markersize"] = 8
    entries = [Line2D([], [], marker=markers[name], markerfacecolor="white", label=name, **style) for name in names]
    return entries + [
        Line2D([], [], marker="o", markerfacecolor=fills[batch], label=f"N = {batch}", **style) for batch in batches
    ]


def _draw_achieved(ax: Any, achieved: Sequence[Mapping[str, Any]], hardware: Hardware) -> list[Any]:
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(point["name"] for point in achieved))
    style: dict[str, Any] = {"linestyle": "none", "markersize": 10, "markeredgecolor": "black"}
    for point in achieved:
        marker = _MARKERS[names.index(point["name"]) % len(_MARKERS)]
        colour = _COLOURS[_LEVELS[point["level"]]]
        at = (point["intensity"], point["flops_per_s"])
        ax.plot(*at, marker=marker, markerfacecolor=colour, zorder=6, **style)
        _write(ax, f"{point['share']:.0%}", at, (8, -4))
    levels = [level for level in _LEVELS if any(point["level"] == level for point in achieved)]
    return [
        Line2D([], [], marker=_MARKERS[number % len(_MARKERS)], markerfacecolor="white", label=name, **style)
        for number, name in enumerate(names)
    ] + [
        Line2D([], [], marker="o", markerfacecolor=_COLOURS[_LEVELS[level]],
               label="per byte over the link" if level == "link" else f"per byte of {_side(hardware, _LEVELS[level])}",
               **style)
        for level in levels
    ]  # fmt: skip


def _write(
    ax: Any, text: str, at: tuple[float, float], offset: tuple[float, float], *, align: str = "left", **font: str
) -> None:
    """Text beside a point, with a halo so that lines behind it do not cross it."""
    from matplotlib.patheffects import withStroke

    ax.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        ha=align,
        fontsize=_FONT - 1,
        zorder=7,
        **font,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _finish(ax: Any, x: tuple[float, float], y: tuple[float, float], title: str) -> None:
    from matplotlib.ticker import EngFormatter

    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(*x)
    ax.set_ylim(*y)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("operational intensity (FLOP/B)", fontsize=_FONT)
    ax.set_ylabel("performance (FLOP/s)", fontsize=_FONT)
    ax.tick_params(labelsize=_FONT - 1)
    ax.set_title(title, fontsize=_FONT)
    ax.grid(True, which="major", alpha=0.25)


def policy_map(
    frame: Any,
    value: str,
    ax: Any = None,
    *,
    x: str,
    y: str,
    marked: str | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
    title: str | None = None,
) -> Any:
    """Colour one number of the best policy over two properties of a machine.

    Parameters
    ----------
    frame : pandas.DataFrame
        One row per machine.
    value, x, y : str
        Columns: the colour, and the two axes. A row is missing where nothing fits; its field stays white.
    ax : matplotlib.axes.Axes, optional
    marked : str, optional
        Boolean column: these fields get a dot.
    limits : (float, float), optional
        Ends of the colour scale; by default 0 and 1, the scale of a share.
    title : str, optional

    Returns
    -------
    matplotlib.axes.Axes

    References
    ----------
    MoE-Lightning, Fig. 10.
    """
    ax = _axes(ax)
    table = frame.pivot(index=y, columns=x, values=value)
    low, high = limits or (None, None)
    mesh = ax.pcolormesh(
        table.columns, table.index, table.to_numpy(dtype=float), cmap="viridis", vmin=low, vmax=high, shading="nearest",
        edgecolors="white", linewidth=0.5,
    )  # fmt: skip
    if marked is not None:
        dots = frame[frame[marked].astype(bool)]
        ax.plot(dots[x], dots[y], "o", color="#D55E00", markeredgecolor="white", markersize=7, linestyle="none")
    ax.figure.colorbar(mesh, ax=ax)
    ax.set_xlabel(x, fontsize=_FONT)
    ax.set_ylabel(y, fontsize=_FONT)
    ax.set_title(title or value, fontsize=_FONT)
    return ax
