"""Pictures of timelines: lanes as rows, tasks as bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from hrm.errors import InvalidValue
from hrm.units import format_seconds
from simulator.task import LANES, OPS, Lane, Op, Schedule
from simulator.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "gantt",
    "gantt_pair",
    "gantt_stack",
    "layer_window",
    "steady_steps",
    "steady_window",
    "step_window",
]

_COLOURS = {
    Op.PRE_ATTN: "#6baed6",
    Op.GPU_ATTN: "#17becf",
    Op.POST_ATTN: "#1f4e79",
    Op.GPU_FFN: "#2ca02c",
    Op.ADD_FFN: "#bcbd22",
    Op.SAMPLE: "#9467bd",
    Op.EXPERTS: "#00796b",
    Op.LOAD_E: "#9ccc65",
    Op.OFFLOAD_ROUTES: "#ffcc80",
    Op.PREFILL: "#3f51b5",
    Op.CPU_ATTN: "#f58518",
    Op.CPU_FFN: "#a63603",
    Op.LOAD_W: "#54a24b",
    Op.LOAD_H: "#d62fa5",
    Op.LOAD_FFN: "#ff9da6",
    Op.LOAD_X: "#8c564b",
    Op.LOAD_KV: "#e3ba22",
    Op.OFFLOAD_QKV: "#e45756",
    Op.OFFLOAD_FFN: "#fdae6b",
    Op.OFFLOAD_KV: "#b22222",
    Op.STORE_KV: "#b22222",
    Op.STORE_X: "#c49c94",
    Op.STAGE_W: "#a8a8a8",
    Op.STAGE_KV: "#857a3c",
    Op.BARRIER: "black",
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


def gantt(
    timeline: Timeline,
    ax: Axes | None = None,
    *,
    first: float | None = None,
    last: float | None = None,
    legend: bool = True,
    numbers: bool = False,
) -> Axes:
    """Draw a timeline: a row per lane, and per stage of a pipeline-parallel run.

    Parameters
    ----------
    timeline : Timeline
    ax : Axes, optional
        Where to draw; a new figure by default.
    first, last : float, optional
        Window in seconds; by default a few layers in the middle of decode. The axis starts at `first`.
    legend : bool
        Name the task classes beside the axes.
    numbers : bool
        Write into bars that are wide enough the micro-batch, or the page of weights, counted from 1.

    Returns
    -------
    Axes
    """
    import matplotlib.pyplot as plt

    schedule = timeline.schedule
    rows = _rows(schedule)
    if ax is None:
        _, ax = plt.subplots(figsize=(11, 1.0 + 0.32 * len(rows)), layout="constrained")
    if first is None or last is None:
        begin, end = steady_window(timeline)
        first, last = (begin if first is None else first), (end if last is None else last)
    scale, unit = (1e3, "ms") if last - first < 10 else (1.0, "s")
    inside = (timeline.end > first) & (timeline.start < last)
    start = (np.clip(timeline.start, first, last) - first) * scale
    width = (np.clip(timeline.end, first, last) - first) * scale - start
    least = _EDGE_WIDTH * (last - first) * scale
    odd = schedule.part % 2 == 1
    barrier = schedule.mask(Op.BARRIER) & (timeline.start >= first) & (timeline.start <= last)
    for row, queue in enumerate(rows):
        here = inside & (schedule.queue == queue)
        # A barrier hardly takes time; it is a mark over all rows of its stage.
        for at in start[barrier & (schedule.queue == queue)]:
            ax.plot([at, at], [row - 0.5, row + _lanes_of(rows, queue) - 0.5], color="black", linewidth=0.7, alpha=0.6)
        for op in OPS:
            for is_odd in (False, True):
                tasks = np.flatnonzero(here & (width > 0) & schedule.mask(op) & (odd == is_odd))
                if len(tasks):
                    ax.barh(
                        np.full(len(tasks), row),
                        width[tasks],
                        left=start[tasks],
                        height=0.8,
                        color=_COLOURS[op],
                        alpha=0.65 if is_odd else 1.0,
                        # A white edge parts bars that touch, but would hide those that are hardly wider than it.
                        edgecolor=np.where(width[tasks] > least, "white", _COLOURS[op]).tolist(),
                        linewidth=0.4,
                    )
        if numbers:
            for task in np.flatnonzero(here & (width > _NUMBER_WIDTH * (last - first) * scale)):
                middle = start[task] + width[task] / 2
                number = str(schedule.part[task] + 1)
                ax.text(middle, row, number, ha="center", va="center", fontsize=6.5, color="white")
    ax.set_yticks(range(len(rows)), [_row_name(schedule, queue) for queue in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, (last - first) * scale)
    ax.set_xlabel(f"time ({unit})")
    ax.set_title(f"{timeline.source}: {schedule.name}", loc="left", fontsize=10)
    if legend:
        handles = _handles(schedule.op[inside])
        ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


_EDGE_WIDTH = 0.002
"""Share of the axis that a bar must have for an edge of another colour."""
_NUMBER_WIDTH = 0.012
"""Share of the axis that a bar must have for a number."""


def _rows(schedule: Schedule) -> list[int]:
    """Queues that get a row: all lanes of a single stage, and of several stages the lanes in use."""
    if schedule.num_stages == 1:
        return list(range(len(LANES)))
    return [int(queue) for queue in np.unique(schedule.queue)]


def _lanes_of(rows: list[int], queue: int) -> int:
    """Rows of the queue's stage."""
    return sum(row // len(LANES) == queue // len(LANES) for row in rows)


def _row_name(schedule: Schedule, queue: int) -> str:
    name = _ROWS[LANES[queue % len(LANES)]]
    return name if schedule.num_stages == 1 else f"{name} {queue // len(LANES)}"


def _handles(codes: Iterable[int]) -> list[Artist]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = [op for op in OPS if op.code in {int(code) for code in codes}]
    return [
        Line2D([], [], color=_COLOURS[op], linewidth=1.0, label=op.value)
        if op is Op.BARRIER
        else Patch(color=_COLOURS[op], label=op.value)
        for op in shown
    ]


def layer_window(timeline: Timeline, step: int, layer: int, *, layers: int = 1) -> tuple[float, float]:
    """From when the GPU begins a layer of a step until it begins the one so many layers later, or is through.

    Returns
    -------
    first, last : float
        Seconds.
    """
    schedule = timeline.schedule
    begins = np.isin(schedule.op, [op.code for op in (Op.PREFILL, Op.PRE_ATTN)])

    def when(step: int, layer: int) -> np.ndarray:
        return timeline.start[begins & (schedule.step == step) & (schedule.layer == layer)]

    later = divmod(layer + layers, schedule.num_layers)
    found, following = when(step, layer), when(step + later[0], later[1])
    if not len(found):
        raise InvalidValue(f"the schedule has no layer {layer} in step {step}.")
    return float(found.min()), float(following.min()) if len(following) else timeline.makespan


def gantt_stack(
    timelines: Mapping[str, Timeline], *, step: int, layer: int = 0, layers: int = 2, length: float | None = None
) -> Figure:
    """Several schedules on one scale of time, each from the moment at which the GPU begins the same layer.

    A dashed line shows where the GPU begins the layer after the last of `layers` layers.

    Parameters
    ----------
    timelines : mapping
        By title, from top to bottom.
    step, layer, layers : int
        Which layers of which step.
    length : float, optional
        Seconds to show, by default until the slowest is through.

    References
    ----------
    MoE-Lightning, Fig. 6.
    """
    import matplotlib.pyplot as plt

    windows = [layer_window(timeline, step, layer, layers=layers) for timeline in timelines.values()]
    length = 1.02 * max(last - first for first, last in windows) if length is None else length
    rows = [len(_rows(timeline.schedule)) for timeline in timelines.values()]
    figure, axes = plt.subplots(
        len(timelines),
        1,
        figsize=(12, 0.8 + sum(0.55 + 0.24 * n for n in rows)),
        height_ratios=rows,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    codes: set[int] = set()
    for ax, (title, timeline), (first, last) in zip(axes[:, 0], timelines.items(), windows, strict=True):
        gantt(timeline, ax, first=first, last=first + length, legend=False, numbers=True)
        codes |= set(timeline.schedule.op[(timeline.end > first) & (timeline.start < first + length)].tolist())
        scale = 1e3 if length < 10 else 1.0
        ax.axvline((last - first) * scale, color="crimson", linestyle="--", linewidth=1.2)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("")
        ax.tick_params(axis="y", labelsize=8)
    axes[-1, 0].set_xlabel("time (ms)" if length < 10 else "time (s)")
    figure.legend(handles=_handles(codes), loc="outside right center", fontsize=8, frameon=False)
    return figure


def steady_steps(timeline: Timeline, count: int = 2) -> tuple[int, int] | None:
    """First and last of so many steps in the middle of steady decode, or of as many as there are.

    A run without decode gives its only step; None where no task says when a step is over.
    """
    steps = timeline.steady_steps() or sorted(timeline.step_ends())
    skipped = max(0, (len(steps) - count) // 2)
    chosen = steps[skipped : skipped + count]
    return (chosen[0], chosen[-1]) if chosen else None


def step_window(timeline: Timeline, first: int, last: int) -> tuple[float, float]:
    """From the end of the step before step `first` to the end of step `last`; 0 is prefill.

    Returns
    -------
    begin, end : float
        Seconds.

    Raises
    ------
    InvalidValue
        If the run has no such steps; the message says which it has.
    """
    ends = timeline.step_ends()
    if first not in ends or last not in ends or first > last:
        known = f"it has steps {min(ends)} to {max(ends)}" if ends else "no task says when a step is over"
        raise InvalidValue(f"the {timeline.source} run has no steps {first} to {last}; {known}, 0 being prefill.")
    return max((end for step, end in ends.items() if step < first), default=0.0), ends[last]


def gantt_pair(
    predicted: Timeline,
    measured: Timeline,
    *,
    layers: int = 3,
    steps: tuple[int, int] | None = None,
    title: str = "",
    figure: Figure | None = None,
) -> Figure:
    """Prediction above measurement on one scale of time, both from the same moment of the run.

    Beside them stands, per task class, by how many seconds its tasks took longer than predicted: all tasks of the
    steps shown. Dashed lines mark the ends of steps.

    Parameters
    ----------
    predicted, measured : Timeline
        Of one schedule.
    layers : int
        Show about so many layers in the middle of decode, unless `steps` are given.
    steps : tuple of int, optional
        First and last step to show, both included; 0 is prefill.
    title : str
        Above the figure.
    figure : Figure, optional
        Where to draw, empty; a new one by default.

    Raises
    ------
    InvalidValue
        If a run has no such steps.
    """
    import matplotlib.pyplot as plt

    pair = (predicted, measured)
    windows = [steady_window(t, layers=layers) if steps is None else step_window(t, *steps) for t in pair]
    length = max(last - first for first, last in windows) or 1e-9
    rows = len(_rows(predicted.schedule))
    size = (14.0, 2.2 + 0.56 * rows)
    if figure is None:
        figure = plt.figure(figsize=size, layout="constrained")
    else:
        figure.set_size_inches(*size)
    grid = figure.add_gridspec(2, 2, width_ratios=(4.2, 1))
    top = figure.add_subplot(grid[0, 0])
    bottom = figure.add_subplot(grid[1, 0], sharex=top)
    codes: set[int] = set()
    for ax, timeline, (first, last) in zip((top, bottom), pair, windows, strict=True):
        gantt(timeline, ax, first=first, last=first + length, legend=False)
        scale = 1e3 if length < 10 else 1.0
        for end in timeline.step_ends().values():
            if first < end <= first + length:
                ax.axvline((end - first) * scale, color="crimson", linestyle="--", linewidth=1.0)
        busy = timeline.decode_utilization()
        shares = ", ".join(f"{_ROWS[lane]} {busy[lane.value]:.0%}" for lane in LANES)
        shown = "" if steps is None else f"{_name_steps(steps)}: {format_seconds(last - first)}   "
        ax.set_title(f"{timeline.source}   {shown}busy in steady decode: {shares}", loc="left", fontsize=9)
        codes |= set(timeline.schedule.op[(timeline.end > first) & (timeline.start < first + length)].tolist())
    top.set_xlabel("")
    top.tick_params(axis="x", labelbottom=False)
    _differences(figure.add_subplot(grid[:, 1]), predicted, measured, steps or steady_steps(predicted, 1))
    handles = _handles(codes)
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _name_steps(steps: tuple[int, int]) -> str:
    return f"step {steps[0]}" if steps[0] == steps[1] else f"steps {steps[0]} to {steps[1]}"


def _differences(ax: Axes, predicted: Timeline, measured: Timeline, steps: tuple[int, int] | None) -> None:
    """Bars of measured minus predicted seconds by task class, summed over all tasks of the steps."""
    totals = []
    for timeline in (predicted, measured):
        step = timeline.schedule.step
        inside = np.ones(len(step), dtype=bool) if steps is None else (step >= steps[0]) & (step <= steps[1])
        seconds = (timeline.end - timeline.start)[inside]
        totals.append(np.bincount(timeline.schedule.op[inside], weights=seconds, minlength=len(OPS)))
    present = [op for op in OPS if totals[0][op.code] or totals[1][op.code]]
    changes = np.array([totals[1][op.code] - totals[0][op.code] for op in present])
    least = 1e-9 * float(np.max(totals))
    changes[np.abs(changes) <= least] = 0.0  # rounding
    reach = float(np.abs(changes).max(initial=0.0))
    scale, unit = (1e3, "ms") if reach < 1 else (1.0, "s")
    ax.barh(range(len(present)), changes * scale, color=[_COLOURS[op] for op in present], height=0.7)
    for row, (op, change) in enumerate(zip(present, changes, strict=True)):
        before = totals[0][op.code]
        share = f"{change / before:+.0%}" if before else "new"
        text = f" {change * scale:+.3g} ({share}) "
        ax.text(change * scale, row, text, va="center", ha="left" if change >= 0 else "right", fontsize=7.5)
    # Room for the numbers on both sides, since a bar may point either way.
    low, high = (float(f(changes, initial=0.0)) * scale for f in (np.min, np.max))
    room = (high - low) or 1.0
    ax.set_xlim(low - (room if low < 0 else 0.05 * room), high + (room if high > 0 else 0.05 * room))
    ax.set_yticks(range(len(present)), [op.value for op in present], fontsize=8)
    ax.set_ylim(max(len(present), 1) - 0.5, -0.5)
    ax.axvline(0.0, color="black", linewidth=0.8)
    ax.set_xlabel(f"measured - predicted ({unit})", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    which = "all tasks" if steps is None else f"all tasks of {_name_steps(steps)}"
    ax.set_title(f"difference, {which}", loc="left", fontsize=9)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
