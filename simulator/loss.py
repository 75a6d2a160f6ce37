"""Where a lane's time went: predicted work, slower work and waits, item by item up to the measured time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hrm.errors import InvalidSchedule, InvalidValue
from hrm.units import format_seconds
from simulator.task import LANES, OPS, Lane, Schedule
from simulator.timeline import Timeline

__all__ = ["AFTER_LAST", "Loss", "account", "check_alike", "tail"]

AFTER_LAST = "after its last task"
"""What a lane is said to wait for when it has nothing left to do in the window."""
_BUSY, _SLOWER, _WAIT = "busy as predicted", "slower than predicted", "waited for"
_SMALL = 0.01
"""Waits below this share of the time are one item of the sentence."""
_ROUNDING = 1e-12
"""A task that is off by no more than this share of the run is as predicted: differences of times are rounded."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The distance of a measured run to its busiest lane's limit: the lane busy at predicted speed, never waiting.

    The limit is what the lane's tasks take in the prediction, with whatever they share a resource with there.
    """

    items: pd.DataFrame
    """By (item, task class): seconds predicted and measured, their difference, and the share of the measured time.

    The items are "busy as predicted", "slower than predicted" (negative if faster) and "waited for". Either column
    adds up to its side's seconds; a prediction has no slower tasks."""
    lane: str
    stage: int | None
    """Of a pipeline-parallel run, else None."""
    window: str
    """"steady" or "run"."""
    steps: int
    """Decode steps that the seconds are a mean of; 1 for the whole run."""
    predicted_s: float
    measured_s: float
    """Seconds of the whole run, or of a step."""

    @property
    def limit_s(self) -> float:
        """Seconds that the lane's measured tasks take at predicted speed without a wait."""
        return sum(self._measured(_BUSY).values())

    def _measured(self, item: str) -> dict[str, float]:
        """Measured seconds of one item by task class."""
        rows = zip(self.items.index.tolist(), self.items["measured_s"].tolist(), strict=True)
        return {name: seconds for (kind, name), seconds in rows if kind == item}

    def to_frame(self) -> pd.DataFrame:
        """The account by item and task class."""
        return self.items

    def to_dict(self) -> dict[str, Any]:
        """Part ``loss`` of the JSON of ``hrm compare``."""
        return {
            "lane": self.lane,
            "stage": self.stage,
            "window": self.window,
            "steps": self.steps,
            "predicted_s": self.predicted_s,
            "measured_s": self.measured_s,
            "limit_s": self.limit_s,
            "items": self.items.reset_index().to_dict("records"),
        }

    def sentence(self) -> str:
        """The account in one sentence; small waits are put together."""
        parts = [f"{format_seconds(self.limit_s)} is {self.lane} busy at predicted speed"]
        slower = sum(self._measured(_SLOWER).values())
        if slower:
            what = "its tasks slower than predicted" if slower > 0 else "saved by tasks faster than predicted"
            parts.append(f"{format_seconds(abs(slower))} {what}")
        rest = 0.0
        for name, seconds in self._measured(_WAIT).items():
            if seconds < _SMALL * self.measured_s:
                rest += seconds
            else:
                parts.append(f"{format_seconds(seconds)} {_reason(name)}")
        if rest > 0:
            parts.append(f"{format_seconds(rest)} in other waits")
        lane = f"lane {self.lane}" + ("" if self.stage is None else f" of stage {self.stage}")
        mean = f" (mean of {self.steps})" if self.steps > 1 else ""
        of = f"the whole run on {lane}" if self.window == "run" else f"a steady decode step on {lane}{mean}"
        return f"of {format_seconds(self.measured_s)} measured for {of}: {', '.join(parts)}."

    def __str__(self) -> str:
        columns = ["predicted_s", "measured_s", "difference_s"]
        total = (self.predicted_s, self.measured_s, self.measured_s - self.predicted_s, 1.0)
        keys = [*self.items.index.tolist(), ("total", "")]
        rows = [*self.items[[*columns, "share"]].itertuples(index=False, name=None), total]
        cells = [[*key, *map("{:.4g}".format, row[:3]), f"{row[3]:.1%}"] for key, row in zip(keys, rows, strict=True)]
        table = pd.DataFrame(cells, columns=["item", "task class", *columns, "share"])
        return f"{self.sentence()}\n{table.to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{self.sentence()}</p>" + self.items.to_html(float_format=lambda x: f"{x:.4g}")


def _reason(name: str) -> str:
    if name == AFTER_LAST:
        return "idle after its last task"
    return "idle while nothing ran for it" if name == "nothing" else f"waited for {name}"


def tail(timeline: Timeline, lane: Lane, stage: int, first: float, last: float) -> dict[str, float]:
    """Idle seconds between the lane's last task and the end of a window, by `AFTER_LAST`; empty if there are none."""
    queue = LANES.index(lane) + len(LANES) * stage
    seconds = last - max(first, float(timeline.end[timeline.schedule.queue == queue].max(initial=first)))
    return {AFTER_LAST: seconds} if seconds > 0 else {}


def _inside(timeline: Timeline, tasks: np.ndarray, first: float, last: float) -> np.ndarray:
    """Seconds of a window for which each task of one lane occupied it; where two overlap, the earlier one's."""
    end = np.clip(np.maximum.accumulate(timeline.end[tasks]), first, last)
    return np.clip(end - np.maximum(np.clip(timeline.start[tasks], first, last), np.append(first, end[:-1])), 0, None)


def _by_class(codes: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    sums = np.bincount(codes, weights=seconds, minlength=len(OPS))
    return {OPS[code].value: float(sums[code]) for code in np.unique(codes)}


def check_alike(predicted: Timeline, measured: Timeline) -> None:
    """Raise `InvalidSchedule` if two timelines are of different schedules; the message names both."""
    if predicted.schedule != measured.schedule:
        first, second = _describe(predicted.schedule), _describe(measured.schedule)
        detail = "" if first != second else " (equal in size, other tasks or dependencies)"
        raise InvalidSchedule(
            f"the timelines are of different schedules, {first} ({predicted.source}) and {second} "
            f"({measured.source}){detail}; simulate the policy and lengths that were run, with --exact."
        )


def _describe(schedule: Schedule) -> str:
    return repr(schedule).strip("<>")


def account(predicted: Timeline, measured: Timeline, *, window: str = "steady", lane: Lane | None = None) -> Loss:
    """Split the measured time of a lane; `Comparison.loss` has the parameters.

    Tasks that reach into the window with a part of their measured time count there with that part of their predicted
    time.
    """
    check_alike(predicted, measured)
    schedule = measured.schedule
    if window not in ("steady", "run"):
        raise InvalidValue(f"window must be 'steady' or 'run', not {window!r}.")
    steady = measured.steady_steps()
    windows = [(0.0, t.makespan) if window == "run" else t.decode_window() for t in (predicted, measured)]
    first, last = windows[1]
    queues = np.unique(schedule.queue)
    if lane is not None:
        queues = queues[queues % len(LANES) == LANES.index(lane)]
        if not len(queues):
            raise InvalidValue(f"the schedule has no task on lane {lane.value}.")
    if not len(queues):
        raise InvalidSchedule("the timelines have no tasks.")
    members = [np.flatnonzero(schedule.queue == queue) for queue in queues]
    tasks = max(members, key=lambda tasks: float(_inside(measured, tasks, first, last).sum()))
    on, stage = LANES[schedule.lane[tasks[0]]], int(schedule.stage[tasks[0]])

    inside = _inside(measured, tasks, first, last)
    whole = measured.end[tasks] - measured.start[tasks]
    instant = (measured.start[tasks] >= first) & (measured.start[tasks] < last)
    share = np.where(whole > 0, inside / np.where(whole > 0, whole, 1.0), instant)
    as_predicted = share * (predicted.end[tasks] - predicted.start[tasks])
    as_predicted = np.where(np.abs(inside - as_predicted) <= _ROUNDING * measured.makespan, inside, as_predicted)
    codes = schedule.op[tasks]
    theirs = {(_BUSY, op): seconds for op, seconds in _by_class(codes, as_predicted).items()}
    theirs |= {(_SLOWER, op): seconds for op, seconds in _by_class(codes, inside - as_predicted).items()}
    ours = {(_BUSY, op): seconds for op, seconds in _by_class(codes, _inside(predicted, tasks, *windows[0])).items()}
    for sums, timeline, (begin, end) in ((ours, predicted, windows[0]), (theirs, measured, windows[1])):
        waits = timeline.waits(on, first=begin, last=end, stage=stage) | tail(timeline, on, stage, begin, end)
        sums |= {(_WAIT, name): seconds for name, seconds in waits.items()}

    steps = 1 if window == "run" else max(1, len(steady))
    order = {item: i for i, item in enumerate((_BUSY, _SLOWER, _WAIT))}
    used = {key for key in ours.keys() | theirs.keys() if ours.get(key) or theirs.get(key)}
    keys = sorted(used, key=lambda key: (order[key[0]], -abs(theirs.get(key, 0.0)), key[1]))
    items = pd.DataFrame(
        {
            "predicted_s": [ours.get(key, 0.0) / steps for key in keys],
            "measured_s": [theirs.get(key, 0.0) / steps for key in keys],
        },
        index=pd.MultiIndex.from_tuples(keys, names=["item", "op"]),
    )
    spans = [max(end - begin, 0.0) / steps for begin, end in windows]
    items["difference_s"] = items["measured_s"] - items["predicted_s"]
    items["share"] = items["measured_s"] / spans[1] if spans[1] > 0 else 0.0
    return Loss(
        items=items,
        lane=on.value,
        stage=stage if schedule.num_stages > 1 else None,
        window=window,
        steps=steps,
        predicted_s=spans[0],
        measured_s=spans[1],
    )
