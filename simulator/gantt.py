"""Pictures of timelines: lanes as rows, tasks as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.task import LANES, OPS, Lane, Op
from simulator.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["gantt", "gantt_pair", "steady_window"]

_COLOURS = {
    Op.PRE_ATTN: "#4c78a8",
    Op.POST_ATTN: "#1f4e79",
    Op.SAMPLE: "#9ecae9",
    Op.PREFILL: "#1f4e79",
    Op.CPU_ATTN: "#f58518",
    Op.LOAD_W: "#54a24b",
    Op.LOAD_H: "#b279a2",
    Op.LOAD_X: "#b279a2",
    Op.OFFLOAD_QKV: "#e45756",
    Op.OFFLOAD_KV: "#e45756",
    Op.STAGE_W: "#a8a8a8",
}
_ROWS = {Lane.GPU: "GPU", Lane.CPU: "CPU", Lane.H2D: "link ↑", Lane.D2H: "link ↓", Lane.PIN: "staging"}


def steady_window(timeline: Timeline, *, layers: int = 3) -> tuple[float, float]:
    """A piece in the middle of decode, long enough for about `layers` layers; the whole run if there is none.

    Returns
    -------
    first, last : float
        Seconds.
    """
    ends = timeline.step_ends()
    steps = sorted(ends)
    if len(steps) < 3:
        return 0.0, timeline.makespan
    middle = len(steps) // 2
    first, last = ends[steps[middle - 1]], ends[steps[middle]]
    share = min(1.0, layers / timeline.schedule.num_layers)
    return first, first + share * (last - first)


def gantt(timeline: Timeline, ax: Axes | None = None, *, first: float | None = None, last: float | None = None) -> Axes:
    """Draw a timeline.

    Parameters
    ----------
    timeline : Timeline
    ax : Axes, optional
        Where to draw; a new figure by default.
    first, last : float, optional
        Window in seconds; by default a few layers in the middle of decode. The axis starts at `first`.

    Returns
    -------
    Axes
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    if ax is None:
        _, ax = plt.subplots(figsize=(11, 2.6), layout="constrained")
    if first is None or last is None:
        begin, end = steady_window(timeline)
        first, last = (begin if first is None else first), (end if last is None else last)
    scale, unit = (1e3, "ms") if last - first < 10 else (1.0, "s")
    shown = set()
    inside = (timeline.end > first) & (timeline.start < last)
    for row, lane in enumerate(LANES):
        for task in timeline.schedule.lane_tasks(lane):
            if not inside[task]:
                continue
            op = OPS[timeline.schedule.op[task]]
            shown.add(op)
            start = (max(timeline.start[task], first) - first) * scale
            width = (min(timeline.end[task], last) - first) * scale - start
            odd = timeline.schedule.part[task] % 2
            ax.barh(
                row,
                width,
                left=start,
                height=0.8,
                color=_COLOURS[op],
                alpha=0.65 if odd else 1.0,
                edgecolor="white",
                linewidth=0.4,
            )
    ax.set_yticks(range(len(LANES)), [_ROWS[lane] for lane in LANES])
    ax.invert_yaxis()
    ax.set_xlim(0, (last - first) * scale)
    ax.set_xlabel(f"time ({unit})")
    ax.set_title(f"{timeline.source}: {timeline.schedule.name}", loc="left", fontsize=10)
    handles = [Patch(color=_COLOURS[op], label=op.value) for op in OPS if op in shown]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def gantt_pair(predicted: Timeline, measured: Timeline, *, layers: int = 3, title: str = "") -> Figure:
    """Prediction above measurement, both from the same task of decode, on one scale of time."""
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(12, 5.2), sharex=True, layout="constrained")
    windows = [steady_window(t, layers=layers) for t in (predicted, measured)]
    length = float(np.max([last - first for first, last in windows]))
    for ax, timeline, (first, _) in zip((top, bottom), (predicted, measured), windows, strict=True):
        gantt(timeline, ax, first=first, last=first + length)
        busy = timeline.decode_utilization()
        shares = ", ".join(f"{_ROWS[lane]} {busy[lane.value]:.0%}" for lane in LANES)
        ax.set_title(f"{timeline.source}   busy in steady decode: {shares}", loc="left", fontsize=9)
    top.set_xlabel("")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure
