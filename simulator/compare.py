"""Predicted beside measured: two timelines of one schedule, class by class, lane by lane and wait by wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from hrm.errors import InvalidSchedule
from hrm.units import format_seconds
from simulator.loss import Loss, account, check_alike, tail
from simulator.task import LANES, OPS, Lane
from simulator.timeline import Timeline

__all__ = ["Comparison", "compare"]

_SHORT = 0.01
"""Waits below this share of their window on both sides are not printed; JSON and the frame have them."""
_BUSY = ("predicted_busy_s", "measured_busy_s")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Where a prediction is off. Every ``ratio`` is measured / predicted: above 1, the run took longer."""

    ops: pd.DataFrame
    """By (phase, op): lane, tasks, mean seconds, their ratio, total seconds, each predicted and measured."""
    lanes: pd.DataFrame
    """By lane: busy seconds of the whole run, and utilisation in steady decode, predicted and measured."""
    totals: pd.DataFrame
    """``prefill_s``, ``decode_s`` and ``makespan_s``: predicted, measured, ratio."""
    idle: pd.DataFrame
    """By (window, lane): busy and idle seconds and the idle share, predicted and measured. The windows are the whole
    ``run`` and ``steady`` decode, each side's own; of the lanes of several stages the seconds are summed."""
    waits: pd.DataFrame
    """By (window, lane, waited for): idle seconds predicted and measured, and measured - predicted.

    They add up to ``idle``. What was waited for is a task class, "nothing" where nothing ran that the lane could wait
    for (launches), or "after its last task". Lanes without tasks are left out. See `Timeline.waits`."""
    schedule: str
    """What was played and run."""
    predicted: Timeline = field(repr=False)
    measured: Timeline = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """The table by phase and task class."""
        return self.ops

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``hrm compare``; a ratio to a prediction of zero is None."""
        return {
            "schedule": self.schedule,
            "tasks": _records(self.ops.reset_index()),
            "lanes": _records(self.lanes.reset_index()),
            "totals": {row.pop("total"): row for row in _records(self.totals.reset_index())},
            "idle": _records(self.idle.reset_index()),
            "waits": _records(self.waits.reset_index()),
            "loss": self.loss().to_dict(),
        }

    def loss(self, *, window: str = "steady", lane: Lane | None = None) -> Loss:
        """Where the time of a decode step went on the busiest lane, in items that add up to the measured time.

        Parameters
        ----------
        window : str
            "steady": a step of steady decode, on average; "run": the whole run.
        lane : Lane, optional
            By default the one that was busy longest in the measured window.

        Raises
        ------
        InvalidValue
            If the window is unknown, or the schedule has no task on the lane.
        """
        return account(self.predicted, self.measured, window=window, lane=lane)

    def plot(self, ax: Any = None) -> Any:
        """Total seconds of every task class, predicted and measured, as bars; returns the Axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(layout="constrained")
        places = np.arange(len(self.ops))
        for offset, key, colour in ((-0.2, "predicted", "tab:blue"), (0.2, "measured", "tab:orange")):
            ax.barh(places + offset, self.ops[f"{key}_total_s"], height=0.4, label=key, color=colour)
        ax.set_yticks(places, [f"{op} ({phase})" for phase, op in self.ops.index])
        ax.invert_yaxis()
        ax.set_xlabel("seconds on its lane, all tasks together (s)")
        ax.legend()
        return ax

    def __str__(self) -> str:
        ops = self.ops.drop(columns="lane").map(_seconds_or_number)
        lanes, totals = (frame.map(_seconds_or_number) for frame in (self.lanes, self.totals))
        (_, run), (first, last) = _windows(self.measured).values()
        seen = f"measured: the whole run {format_seconds(run)}, steady decode {format_seconds(last - first)}"
        least = f"waits of {_SHORT:.0%} of their window and more, difference = measured - predicted"
        return "\n\n".join(
            [
                f"{self.schedule}; ratio = measured / predicted",
                *(frame.reset_index().to_string(index=False) for frame in (ops, lanes, totals)),
                f"idle seconds and their share; {seen}\n{_beside(self.idle.drop(columns=list(_BUSY)))}",
                f"{least}\n{_beside(self._long_waits())}",
                str(self.loss()),
            ]
        )

    def _long_waits(self) -> pd.DataFrame:
        """Waits that are worth a line: those of a lane that are long in one of the windows, on one of the sides."""
        length = {name: max(last - first, 0.0) for name, (first, last) in _windows(self.measured).items()}
        least = self.waits.index.get_level_values("window").map(length).to_numpy(dtype=float) * _SHORT
        long = self.waits[["predicted_s", "measured_s"]].max(axis=1).to_numpy() > least
        keys = self.waits.reset_index("window").index
        return self.waits[keys.isin(keys[long])]

    def _repr_html_(self) -> str:
        frames = (self.totals, self.ops, self.lanes, self.idle, self._long_waits())
        tables = "".join(frame.to_html(float_format=lambda x: f"{x:.4g}") for frame in frames)
        return f"<p>{self.schedule}; ratio = measured / predicted</p>{tables}{self.loss()._repr_html_()}"


def _beside(frame: pd.DataFrame) -> str:
    """A table by (window, ...) as text, the windows beside each other under their names."""
    order = frame.reset_index("window").index.drop_duplicates()
    parts = {
        title: frame.xs(window, level="window").reindex(order).fillna(0.0)
        for window, title in (("run", "whole run"), ("steady", "steady decode"))
        if window in frame.index.get_level_values("window")
    }
    if not parts:
        return "none"
    together = pd.concat(parts, axis=1).map("{:.4g}".format).rename(columns=lambda name: name.removesuffix("_s"))
    keys = order.to_frame(index=False)
    lines = together.to_string(index=False).split("\n")
    names = keys.to_string(index=False, justify="right").split("\n")
    return "\n".join(f"{left}  {right}" for left, right in zip([" " * len(names[0]), *names], lines, strict=True))


def _seconds_or_number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    records = []
    for row in frame.to_dict("records"):
        records.append({str(k): None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()})
    return records


def _ratio(measured: pd.Series, predicted: pd.Series) -> pd.Series:
    return measured / predicted.where(predicted > 0)


def _by_op(timeline: Timeline) -> pd.DataFrame:
    schedule = timeline.schedule
    frame = pd.DataFrame(
        {
            "phase": np.where(schedule.step == 0, "prefill", "decode"),
            "op": [OPS[code].value for code in schedule.op],
            "lane": [LANES[code].value for code in schedule.lane],
            "seconds": timeline.end - timeline.start,
        }
    )
    return frame.groupby(["phase", "op"], sort=False).agg(
        lane=("lane", "first"),
        tasks=("seconds", "size"),
        mean_s=("seconds", "mean"),
        total_s=("seconds", "sum"),
    )


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Prefill before decode, classes in the order in which a layer runs them."""
    order = [(phase, op.value) for phase in ("prefill", "decode") for op in OPS]
    present = set(frame.index)
    return frame.loc[[key for key in order if key in present]]


def _busy(timeline: Timeline) -> list[float]:
    spent = timeline.end - timeline.start
    return [float(spent[timeline.schedule.lane_tasks(lane)].sum()) for lane in LANES]


def _windows(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {"run": (0.0, timeline.makespan), "steady": timeline.decode_window()}


def _idle(predicted: Timeline, measured: Timeline) -> pd.DataFrame:
    """Busy and idle seconds of every lane in both windows."""
    columns: dict[str, list[float]] = {}
    for key in ("busy_s", "idle_s", "idle_share"):
        for side, timeline in (("predicted", predicted), ("measured", measured)):
            column = columns[f"{side}_{key}"] = []
            for first, last in _windows(timeline).values():
                whole = max(last - first, 0.0) * timeline.schedule.num_stages
                busy = timeline.window(first, last) if whole > 0 else {}
                for lane in LANES:
                    share = busy.get(lane.value, 0.0)
                    column.append({"busy_s": share * whole, "idle_s": whole - share * whole}.get(key, 1.0 - share))
    index = [(window, lane.value) for window in _windows(measured) for lane in LANES]
    return pd.DataFrame(columns, index=pd.MultiIndex.from_tuples(index, names=["window", "lane"]))


def _waits(predicted: Timeline, measured: Timeline) -> pd.DataFrame:
    """What the lanes waited for in both windows, the longest measured wait of each lane first."""
    sides = [(timeline, _windows(timeline)) for timeline in (predicted, measured)]
    rows = []
    for window in sides[0][1]:
        for lane in LANES:
            ours, theirs = (_waits_of(timeline, lane, *windows[window]) for timeline, windows in sides)
            names = sorted(ours.keys() | theirs.keys(), key=lambda name: (-theirs.get(name, 0.0), name))
            rows += [(window, lane.value, name, ours.get(name, 0.0), theirs.get(name, 0.0)) for name in names]
    columns = ["window", "lane", "waited_for", "predicted_s", "measured_s"]
    frame = pd.DataFrame(rows, columns=columns).set_index(columns[:3])
    frame["difference_s"] = frame["measured_s"] - frame["predicted_s"]
    return frame


def _waits_of(timeline: Timeline, lane: Lane, first: float, last: float) -> dict[str, float]:
    """Of one lane, over all stages that use it; with the idle time after the last task."""
    spent: dict[str, float] = {}
    for stage in np.unique(timeline.schedule.stage[timeline.schedule.lane_tasks(lane)]).tolist():
        waits = timeline.waits(lane, first=first, last=last, stage=stage)
        for what, seconds in {**waits, **tail(timeline, lane, stage, first, last)}.items():
            spent[what] = spent.get(what, 0.0) + seconds
    return spent


def compare(predicted: Timeline, measured: Timeline) -> Comparison:
    """Set two timelines of the same schedule side by side.

    Parameters
    ----------
    predicted, measured : Timeline
        Of the same tasks in the same order, e.g. of `simulator.simulate` and of an execution.

    Returns
    -------
    Comparison

    Raises
    ------
    InvalidSchedule
        If the schedules differ; the message names both.
    """
    check_alike(predicted, measured)
    if not len(predicted.schedule):
        raise InvalidSchedule("the timelines have no tasks.")
    ours, theirs = _by_op(predicted), _by_op(measured)
    ops = pd.DataFrame(
        {
            "lane": ours["lane"],
            "tasks": ours["tasks"],
            "predicted_mean_s": ours["mean_s"],
            "measured_mean_s": theirs["mean_s"],
            "ratio": _ratio(theirs["mean_s"], ours["mean_s"]),
            "predicted_total_s": ours["total_s"],
            "measured_total_s": theirs["total_s"],
        }
    )
    names = [lane.value for lane in LANES]
    lanes = pd.DataFrame(
        {
            "predicted_busy_s": _busy(predicted),
            "measured_busy_s": _busy(measured),
            "predicted_utilization": _shares(predicted.decode_utilization(), names),
            "measured_utilization": _shares(measured.decode_utilization(), names),
        },
        index=pd.Index(names, name="lane"),
    )
    totals = pd.DataFrame(
        {
            "predicted": [predicted.prefill_s, predicted.decode_s, predicted.makespan],
            "measured": [measured.prefill_s, measured.decode_s, measured.makespan],
        },
        index=pd.Index(["prefill_s", "decode_s", "makespan_s"], name="total"),
    )
    totals["ratio"] = _ratio(totals["measured"], totals["predicted"])
    return Comparison(
        ops=_ordered(ops),
        lanes=lanes,
        totals=totals,
        idle=_idle(predicted, measured),
        waits=_waits(predicted, measured),
        schedule=f"{repr(predicted.schedule).strip('<>')}: {predicted.source} "
        f"{format_seconds(predicted.makespan)}, {measured.source} {format_seconds(measured.makespan)}",
        predicted=predicted,
        measured=measured,
    )


def _shares(utilization: dict[str, float], names: Iterable[str]) -> list[float]:
    return [utilization[name] for name in names]
