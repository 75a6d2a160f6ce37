"""What happened when: the one record that both the simulator and the executor return."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hrm.errors import InvalidSchedule
from simulator.task import LANES, OPS, Lane, Op, Schedule

__all__ = ["Timeline"]

_FORMAT = "moe-hrm timeline 1"


@dataclass(frozen=True)
class Timeline:
    """Start and end of every task of a schedule, in seconds from the beginning.

    `source` says whether it was "simulated" or "measured".
    """

    schedule: Schedule
    start: np.ndarray
    end: np.ndarray
    bytes: np.ndarray
    flops: np.ndarray
    source: str = "simulated"
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def makespan(self) -> float:
        """Seconds from the start to the end of the last task."""
        return float(self.end.max()) if len(self.end) else 0.0

    @property
    def prefill_s(self) -> float:
        """Seconds until every sequence has its first token."""
        first = self.schedule.mask(Op.SAMPLE) & (self.schedule.step == 0)
        return float(self.end[first].max()) if first.any() else 0.0

    @property
    def decode_s(self) -> float:
        """Seconds from the last first token to the end."""
        return self.makespan - self.prefill_s

    def step_ends(self) -> dict[int, float]:
        """Second at which the last sequence of each step has its token."""
        mask = self.schedule.mask(Op.SAMPLE)
        steps, ends = self.schedule.step[mask], self.end[mask]
        return {int(s): float(ends[steps == s].max()) for s in np.unique(steps)}

    def window(self, first: float, last: float) -> dict[str, float]:
        """Busy fraction of each lane between two moments; of the lanes of several stages on average."""
        if not last > first:
            raise ValueError(f"a window must have a length: {first}..{last}")
        inside = np.clip(np.minimum(self.end, last) - np.maximum(self.start, first), 0, None)
        whole = (last - first) * self.schedule.num_stages
        return {lane.value: float(inside[self.schedule.lane_tasks(lane)].sum()) / whole for lane in LANES}

    def utilization(self) -> dict[str, float]:
        """Busy fraction of each lane over the whole run."""
        return self.window(0.0, self.makespan) if self.makespan > 0 else {lane.value: 0.0 for lane in LANES}

    def steady_steps(self) -> list[int]:
        """The steps of `decode_window`: all decode steps but the first and the last; of fewer than three, all."""
        steps = sorted(self.step_ends())
        return steps[2:-1] if len(steps) >= 4 else steps[1:]

    def decode_window(self) -> tuple[float, float]:
        """First and last second of steady decode: all steps but the first and the last.

        With fewer than three decode steps from the end of prefill to the end, without decode the whole run.
        """
        ends = self.step_ends()
        steps = sorted(ends)
        if len(steps) >= 4:
            return ends[steps[1]], ends[steps[-2]]
        return (ends[steps[0]] if len(steps) > 1 else 0.0), self.makespan

    def decode_utilization(self) -> dict[str, float]:
        """Busy fraction of each lane in steady decode: all steps but the first and the last."""
        first, last = self.decode_window()
        return self.window(first, last) if last > first else {lane.value: 0.0 for lane in LANES}

    def waits(
        self, lane: Lane = Lane.GPU, *, first: float = 0.0, last: float | None = None, stage: int = 0
    ) -> dict[str, float]:
        """Seconds for which a lane was idle, by the class of task that it waited for.

        Every gap before a task is followed back along what ended last, of dependencies and of the task before on the
        same lane; each task on that way is charged with the time that it ran within the gap. What nothing ran for is
        charged to "nothing": launches, and the beginning of a run in progress.

        Parameters
        ----------
        lane : Lane
            Whose gaps.
        first, last : float, optional
            Window in seconds, by default the whole run. A gap after the lane's last task is not counted.
        stage : int
            Of a pipeline-parallel run.

        Returns
        -------
        dict
            Largest first.
        """
        schedule, last = self.schedule, self.makespan if last is None else last
        queues = schedule.queue
        before = np.full(len(schedule), -1)
        for queue in np.unique(queues):
            tasks = np.flatnonzero(queues == queue)
            before[tasks[1:]] = tasks[:-1]
        mine = np.flatnonzero((schedule.lane == LANES.index(lane)) & (schedule.stage == stage))
        # The latest end so far: measured tasks of one lane may overlap, and a gap is a time when none of them ran.
        ended = np.concatenate([[-np.inf], np.maximum.accumulate(self.end[mine])[:-1]]) if len(mine) else mine
        opening, closing = np.maximum(first, ended), np.minimum(last, self.start[mine])
        gaps = np.flatnonzero(closing > opening)
        spent: dict[str, float] = {}

        def charge(what: str, seconds: float) -> None:
            if seconds > 0:
                spent[what] = spent.get(what, 0.0) + seconds

        for task, opens, closes in zip(mine[gaps], opening[gaps].tolist(), closing[gaps].tolist(), strict=True):
            current = int(task)
            while closes > opens:
                causes = [int(d) for d in schedule.deps[schedule.dep_start[current] : schedule.dep_start[current + 1]]]
                causes += [int(before[current])] if before[current] >= 0 else []
                # A task with nothing to do may have ended before what others in its place would wait for.
                causes = [cause for cause in causes if self.end[cause] <= self.end[current]] or causes[-1:]
                if not causes:
                    break
                current = max(causes, key=lambda cause: self.end[cause])
                charge("nothing", closes - max(opens, min(closes, float(self.end[current]))))
                closes = min(closes, float(self.end[current]))
                begins = max(opens, min(closes, float(self.start[current])))
                charge(OPS[schedule.op[current]].value, closes - begins)
                closes = begins
            charge("nothing", closes - opens)
        return dict(sorted(spent.items(), key=lambda item: -item[1]))

    def to_frame(self) -> Any:
        """One row per task: task, op, step, layer, part, lane, start, end, seconds, bytes, flops."""
        import pandas as pd

        s = self.schedule
        return pd.DataFrame(
            {
                "task": s.labels(),
                "op": pd.Categorical.from_codes(s.op.tolist(), pd.Index([op.value for op in OPS])),
                "step": s.step,
                "layer": s.layer,
                "part": s.part,
                "lane": pd.Categorical.from_codes(s.lane.tolist(), pd.Index([lane.value for lane in LANES])),
                "start": self.start,
                "end": self.end,
                "seconds": self.end - self.start,
                "bytes": self.bytes,
                "flops": self.flops,
            }
        )

    def by_op(self) -> Any:
        """One row per phase and task class: how many, total and mean seconds, achieved GB/s and GFLOP/s."""
        frame = self.to_frame()
        frame["phase"] = np.where(frame["step"] == 0, "prefill", "decode")
        table = frame.groupby(["phase", "op"], observed=True).agg(
            lane=("lane", "first"),
            tasks=("seconds", "size"),
            seconds=("seconds", "sum"),
            bytes=("bytes", "sum"),
            flops=("flops", "sum"),
        )
        table["mean_s"] = table["seconds"] / table["tasks"]
        busy = table["seconds"].where(table["seconds"] > 0)
        table["gb_per_s"] = table["bytes"] / busy / 1e9
        table["gflop_per_s"] = table["flops"] / busy / 1e9
        return table

    def save(self, path: str | Path) -> None:
        """Write the timeline as JSON, compressed where the name ends in ".gz"; `load` reads it back."""
        data = {
            "format": _FORMAT,
            "source": self.source,
            "facts": dict(self.facts),
            "schedule": self.schedule.to_text().split("\n"),
            "start": np.round(self.start, 9).tolist(),
            "end": np.round(self.end, 9).tolist(),
            "bytes": self.bytes.tolist(),
            "flops": self.flops.tolist(),
        }
        text, path = json.dumps(data), Path(path)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            path.write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """Read a timeline that `save` wrote; raises `InvalidSchedule`, which names the file, on anything else."""
        try:
            raw = Path(path).read_bytes()
            data = json.loads(gzip.decompress(raw) if Path(path).suffix == ".gz" else raw)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InvalidSchedule(f"cannot read timeline {str(path)!r}: {reason}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidSchedule(f"timeline {str(path)!r} is not JSON: {error}.") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise InvalidSchedule(f"{str(path)!r} is not a timeline file (format {_FORMAT!r}).")
        try:
            schedule = Schedule.from_text("\n".join(data["schedule"]))
            arrays = {key: np.array(data[key], dtype=float) for key in ("start", "end", "bytes", "flops")}
            source, facts = str(data["source"]), dict(data["facts"])
        except InvalidSchedule as error:
            raise InvalidSchedule(f"timeline {str(path)!r}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidSchedule(f"timeline {str(path)!r} is damaged: {error!r}.") from None
        for key, array in arrays.items():
            if array.shape != (len(schedule),):
                raise InvalidSchedule(f"timeline {str(path)!r}: {key!r} has not one value per task.")
        finite = {f"{key!r} is not a finite number": ~np.isfinite(array) for key, array in arrays.items()}
        wrong = finite | {
            "'end' is before 'start'": arrays["end"] < arrays["start"],
            "'bytes' is < 0": arrays["bytes"] < 0,
        }
        for what, where in wrong.items():
            if where.any():
                task = schedule.labels()[int(np.argmax(where))]
                raise InvalidSchedule(f"timeline {str(path)!r} is damaged: {what} for {task}.")
        return cls(schedule, **arrays, source=source, facts=facts)

    def save_trace(self, path: str | Path) -> None:
        """Write a Chrome trace: open it at ui.perfetto.dev. A track per lane of each stage, and bytes per second."""
        events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": self.source}}]
        labels, queues = self.schedule.labels(), self.schedule.queue
        stages = self.schedule.num_stages
        for track in range(stages * len(LANES)):
            stage, lane = track // len(LANES), LANES[track % len(LANES)]
            of_stage = f", stage {stage}" if stages > 1 else ""
            meta = {"ph": "M", "pid": 1, "tid": track}
            events.append({**meta, "name": "thread_name", "args": {"name": _LANE_TITLES[lane] + of_stage}})
            events.append({**meta, "name": "thread_sort_index", "args": {"sort_index": track}})
            previous = 0.0
            for task in np.flatnonzero(queues == track):
                begin = max(round(self.start[task] * 1e6, 3), previous)
                stop = max(round(self.end[task] * 1e6, 3), begin)
                previous = stop
                events.append(
                    {
                        "ph": "X",
                        "pid": 1,
                        "tid": track,
                        "name": labels[task],
                        "cat": OPS[self.schedule.op[task]].value,
                        "ts": begin,
                        "dur": round(stop - begin, 3),
                        "args": {"bytes": self.bytes[task], "flops": self.flops[task]},
                    }
                )
                if lane in _COUNTED and stop > begin:
                    rate = self.bytes[task] / (stop - begin) / 1e3  # bytes per µs to GB/s
                    name = f"{lane.value} GB/s{of_stage}"
                    events.append({"ph": "C", "pid": 1, "name": name, "ts": begin, "args": {"GB/s": round(rate, 4)}})
                    events.append({"ph": "C", "pid": 1, "name": name, "ts": stop, "args": {"GB/s": 0}})
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def __repr__(self) -> str:
        busy = ", ".join(f"{lane} {share:.0%}" for lane, share in self.utilization().items())
        return f"<Timeline {self.source}: {len(self.start)} tasks in {self.makespan:.4g} s; busy: {busy}>"

    def _repr_html_(self) -> str:
        return f"<p>{repr(self)[1:-1]}</p>" + self.by_op().to_html(float_format=lambda x: f"{x:.4g}")


_LANE_TITLES = {
    Lane.GPU: "GPU: compute",
    Lane.CPU: "CPU: attention",
    Lane.H2D: "link: host to device",
    Lane.D2H: "link: device to host",
    Lane.PIN: "host: staging copies",
}
_COUNTED = (Lane.H2D, Lane.D2H, Lane.PIN, Lane.CPU)
