"""Predicted beside measured: two timelines of one schedule, class by class and lane by lane."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hrm.errors import InvalidSchedule
from hrm.units import format_seconds
from simulator.task import LANES, OPS, Schedule
from simulator.timeline import Timeline

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Where a prediction is off. Every ``ratio`` is measured / predicted: above 1, the run took longer."""

    ops: pd.DataFrame
    """By (phase, op): lane, tasks, mean seconds, their ratio, total seconds, each predicted and measured."""
    lanes: pd.DataFrame
    """By lane: busy seconds of the whole run, and utilisation in steady decode, predicted and measured."""
    totals: pd.DataFrame
    """``prefill_s``, ``decode_s`` and ``makespan_s``: predicted, measured, ratio."""
    schedule: str
    """What was played and run."""

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
        }

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
        return "\n\n".join(
            [
                f"{self.schedule}; ratio = measured / predicted",
                *(frame.reset_index().to_string(index=False) for frame in (ops, lanes, totals)),
            ]
        )

    def _repr_html_(self) -> str:
        frames = "".join(
            frame.to_html(float_format=lambda x: f"{x:.4g}") for frame in (self.totals, self.ops, self.lanes)
        )
        return f"<p>{self.schedule}; ratio = measured / predicted</p>{frames}"


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


def _describe(schedule: Schedule) -> str:
    return repr(schedule).strip("<>")


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
    if predicted.schedule != measured.schedule:
        first, second = _describe(predicted.schedule), _describe(measured.schedule)
        detail = "" if first != second else " (equal in size, other tasks or dependencies)"
        raise InvalidSchedule(
            f"the timelines are of different schedules, {first} ({predicted.source}) and {second} "
            f"({measured.source}){detail}; simulate the policy and lengths that were run, with --exact."
        )
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
        schedule=f"{_describe(predicted.schedule)}: {predicted.source} "
        f"{format_seconds(predicted.makespan)}, {measured.source} {format_seconds(measured.makespan)}",
    )


def _shares(utilization: dict[str, float], names: Iterable[str]) -> list[float]:
    return [utilization[name] for name in names]
