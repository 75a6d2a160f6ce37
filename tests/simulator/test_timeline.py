"""Timelines: arithmetic, files, traces, tables."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import BatchShape, Hardware, MoEModel
from hrm.errors import InvalidSchedule
from simulator.engine import play
from simulator.schedules import cgopipe, flexgen
from simulator.simulate import simulate_schedule
from simulator.task import LANES, Schedule
from simulator.timeline import Timeline
from tests.simulator.support import costs, random_seconds, schedules, story


@pytest.fixture
def tiny() -> Timeline:
    """One micro-batch through one layer, ten and a half seconds."""
    schedule = story(
        "PreAttn(1,0,0) @gpu\n"
        "OffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)\n"
        "CPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0)\n"
        "LoadH(1,0,0) @h2d < CPUAttn(1,0,0)\n"
        "PostAttn(1,0,0) @gpu < LoadH(1,0,0)\n"
        "Sample(1,0,0) @gpu < PostAttn(1,0,0)"
    )
    return Timeline(
        schedule,
        start=np.array([0.0, 2, 3, 7, 8, 10]),
        end=np.array([2.0, 3, 7, 8, 10, 10.5]),
        bytes=np.array([10.0, 4e9, 8e9, 2e9, 30, 5]),
        flops=np.array([100.0, 0, 300, 0, 400, 50]),
        facts={"machine": "paper"},
    )


@pytest.fixture(scope="module")
def simulated() -> Timeline:
    """Two layers of Mixtral 8x7B, prefill and three steps, played with contention."""
    model = MoEModel.from_catalog("mixtral-8x7b").with_layers(2)
    schedule = cgopipe(num_layers=2, num_micro_batches=3, decode_steps=3)
    rates = Hardware.from_catalog("gcp-l4-1x").rates("paper")
    return simulate_schedule(schedule, model, rates, BatchShape.uniform(90, 30, 100, 4), weights_on_gpu=0.1)


def played(schedule: Schedule, seed: int) -> Timeline:
    """A schedule with random durations."""
    seconds = random_seconds(schedule, seed)
    start, end = play(schedule, costs(seconds))
    rng = np.random.default_rng(seed)
    return Timeline(schedule, start, end, rng.integers(0, 10**9, len(seconds)) * 1.0, seconds * 7)


# -- arithmetic ---------------------------------------------------------------------------------------


def test_window_is_exact(tiny: Timeline) -> None:
    """Busy fractions count only what lies inside the window, to the last bit."""
    assert tiny.window(1, 9) == {"gpu": 0.25, "cpu": 0.5, "h2d": 0.125, "d2h": 0.125, "pin": 0.0}
    assert tiny.window(3, 7) == {"gpu": 0.0, "cpu": 1.0, "h2d": 0.0, "d2h": 0.0, "pin": 0.0}
    assert tiny.window(20, 30) == dict.fromkeys(["gpu", "cpu", "h2d", "d2h", "pin"], 0.0)


@pytest.mark.parametrize(("first", "last"), [(1.0, 1.0), (2.0, 1.0), (0.0, float("nan"))])
def test_a_window_has_a_length(tiny: Timeline, first: float, last: float) -> None:
    """An empty, reversed or undefined window is refused with its ends."""
    with pytest.raises(ValueError, match=f"{first}..{last}"):
        tiny.window(first, last)


def test_times_of_the_whole(tiny: Timeline) -> None:
    """Makespan, phases and steps follow from the samples."""
    assert tiny.makespan == 10.5
    assert (tiny.prefill_s, tiny.decode_s) == (0.0, 10.5)  # no prefill in this piece
    assert tiny.step_ends() == {1: 10.5}
    assert tiny.utilization()["gpu"] == pytest.approx(4.5 / 10.5)


def test_phases_of_a_run(simulated: Timeline) -> None:
    """Prefill ends with the last first token, decode with the last token, steps in between."""
    ends = simulated.step_ends()
    assert sorted(ends) == [0, 1, 2, 3]
    assert simulated.prefill_s == ends[0]
    assert simulated.prefill_s + simulated.decode_s == pytest.approx(simulated.makespan)
    assert list(ends.values()) == sorted(ends.values())


@given(schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_utilization_is_a_fraction(schedule: Schedule, seed: int) -> None:
    """No lane is busier than all the time, whole run and steady decode alike, and busy times add up."""
    timeline = played(schedule, seed)
    for busy in (timeline.utilization(), timeline.decode_utilization()):
        assert set(busy) == {lane.value for lane in LANES}
        assert all(0 <= share <= 1 + 1e-9 for share in busy.values())
    total = sum(timeline.utilization().values()) * timeline.makespan
    assert total == pytest.approx(float((timeline.end - timeline.start).sum()))


def test_an_empty_timeline() -> None:
    """A timeline without tasks lasts no time and uses nothing."""
    nothing = np.array([])
    timeline = Timeline(story(""), nothing, nothing, nothing, nothing)
    assert timeline.makespan == 0
    assert set(timeline.utilization().values()) == {0.0}


# -- tables -------------------------------------------------------------------------------------------


def test_frame(tiny: Timeline) -> None:
    """The table has one row per task with its place, its times and its work."""
    frame = tiny.to_frame()
    assert list(frame.columns) == [
        "task", "op", "step", "layer", "part", "lane", "start", "end", "seconds", "bytes", "flops",
    ]  # fmt: skip
    assert frame.loc[2].to_dict() == {
        "task": "CPUAttn(1,0,0)", "op": "CPUAttn", "step": 1, "layer": 0, "part": 0, "lane": "cpu",
        "start": 3.0, "end": 7.0, "seconds": 4.0, "bytes": 8e9, "flops": 300.0,
    }  # fmt: skip


def test_table_by_class(tiny: Timeline, simulated: Timeline) -> None:
    """The summary adds up seconds and work by phase and class and divides them into rates."""
    table = tiny.by_op()
    assert table.loc[("decode", "CPUAttn"), "gb_per_s"] == 2.0
    assert table.loc[("decode", "LoadH"), "gb_per_s"] == 2.0
    assert table.loc[("decode", "PostAttn"), "gflop_per_s"] == pytest.approx(200e-9)
    whole = simulated.by_op()
    assert whole["tasks"].sum() == len(simulated.schedule)
    assert whole["seconds"].sum() == pytest.approx(float((simulated.end - simulated.start).sum()))
    assert set(whole.index.get_level_values(0)) == {"prefill", "decode"}


def test_prints(tiny: Timeline) -> None:
    """The short form says how long, how many tasks and how busy; the notebook form has the table."""
    assert repr(tiny).startswith("<Timeline simulated: 6 tasks in 10.5 s; busy: gpu 43%")
    assert "<table" in tiny._repr_html_()


# -- files --------------------------------------------------------------------------------------------


@given(schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, schedule: Schedule, seed: int) -> None:
    """A saved timeline reads back with the same schedule and work, and with times to the nanosecond."""
    path = tmp_path_factory.mktemp("timeline") / "t.json"
    timeline = played(schedule, seed)
    timeline.save(path)
    again = Timeline.load(path)
    assert again.schedule == timeline.schedule
    assert np.abs(again.start - timeline.start).max() <= 1e-9
    assert np.abs(again.end - timeline.end).max() <= 1e-9
    assert again.bytes.tolist() == timeline.bytes.tolist()
    assert again.flops.tolist() == timeline.flops.tolist()


def test_source_and_facts_are_kept(tiny: Timeline, tmp_path: Path) -> None:
    """Where a timeline comes from stays with it."""
    replace(tiny, source="measured").save(tmp_path / "t.json")
    again = Timeline.load(tmp_path / "t.json")
    assert (again.source, again.facts) == ("measured", {"machine": "paper"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is not a timeline file"),
        (b'{"format": "another"}', "is not a timeline file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that is no timeline is refused in one line that names it."""
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(InvalidSchedule, match=message) as caught:
        Timeline.load(tmp_path / "t.json")
    assert "t.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_compressed_timeline_is_the_same(simulated: Timeline, tmp_path: Path) -> None:
    """The name says that it is compressed; a part of it is refused."""
    plain, packed = tmp_path / "t.json", tmp_path / "t.json.gz"
    simulated.save(plain)
    simulated.save(packed)
    one, two = Timeline.load(plain), Timeline.load(packed)
    assert one.schedule == two.schedule and np.array_equal(one.end, two.end)
    assert packed.stat().st_size < plain.stat().st_size / 3
    for content in (packed.read_bytes()[:-40], b"plain", plain.read_bytes()):
        packed.write_bytes(content)
        with pytest.raises(InvalidSchedule, match="cannot read"):
            Timeline.load(packed)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that is not there is refused by path."""
    with pytest.raises(InvalidSchedule, match=r"cannot read timeline '.*none.json': No such file"):
        Timeline.load(tmp_path / "none.json")


def damaged(tiny: Timeline, path: Path, key: str, value: Any = None) -> Path:
    """A saved timeline with one entry replaced, or left out."""
    tiny.save(path)
    data = json.loads(path.read_text())
    data[key] = value
    if value is None:
        del data[key]
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("value", [[1.0], [[1.0]] * 6, []])
def test_columns_of_the_wrong_length_are_refused(tiny: Timeline, tmp_path: Path, value: list) -> None:
    """A column without one value per task is refused by its name."""
    with pytest.raises(InvalidSchedule, match="'end' has not one value per task"):
        Timeline.load(damaged(tiny, tmp_path / "t.json", "end", value))


def test_a_damaged_schedule_is_refused(tiny: Timeline, tmp_path: Path) -> None:
    """A timeline whose schedule does not parse is refused by the schedule's line."""
    lines = [*tiny.schedule.to_text().split("\n")[:-1], "Fly(1,0,0) @gpu"]
    with pytest.raises(InvalidSchedule, match=r"timeline '.*t\.json': .*line 7: unknown task class 'Fly'"):
        Timeline.load(damaged(tiny, tmp_path / "t.json", "schedule", lines))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("schedule", "start", "end", "bytes", "flops", "source", "facts")),
        ("schedule", 3),
        ("schedule", [3]),
        ("start", ["a"] * 6),
    ],
)
def test_missing_or_mistyped_entries_are_refused(tiny: Timeline, tmp_path: Path, key: str, value: Any) -> None:
    """A timeline file that lacks an entry, or has another type there, is refused in one line."""
    with pytest.raises(InvalidSchedule) as caught:
        Timeline.load(damaged(tiny, tmp_path / "t.json", key, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["start", "end", "bytes", "flops"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(tiny: Timeline, tmp_path: Path, column: str, value: float) -> None:
    """A time or an amount of work that is no number is refused by its file, its column and its task."""
    values = [*getattr(tiny, column)[:2].tolist(), value, *getattr(tiny, column)[3:].tolist()]
    message = rf"t\.json' is damaged: '{column}' is not a finite number for {re.escape(tiny.schedule.labels()[2])}"
    with pytest.raises(InvalidSchedule, match=message):
        Timeline.load(damaged(tiny, tmp_path / "t.json", column, values))


def test_a_task_does_not_end_before_it_starts(tiny: Timeline, tmp_path: Path) -> None:
    """Neither does it move less than nothing."""
    last = re.escape(tiny.schedule.labels()[-1])
    ends = [*tiny.end[:-1].tolist(), tiny.start[-1] - 1e-6]
    with pytest.raises(InvalidSchedule, match=rf"t\.json' is damaged: 'end' is before 'start' for {last}"):
        Timeline.load(damaged(tiny, tmp_path / "t.json", "end", ends))
    with pytest.raises(InvalidSchedule, match=rf"t\.json' is damaged: 'bytes' is < 0 for {last}"):
        Timeline.load(damaged(tiny, tmp_path / "t.json", "bytes", [*tiny.bytes[:-1].tolist(), -1.0]))


# -- traces -------------------------------------------------------------------------------------------


def trace(timeline: Timeline, path: Path) -> list[dict[str, Any]]:
    """Events of the trace that a timeline writes."""
    timeline.save_trace(path)
    return json.loads(path.read_text())["traceEvents"]


@given(schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_trace_has_one_track_per_lane(tmp_path_factory: pytest.TempPathFactory, schedule: Schedule, seed: int) -> None:
    """Every task is one slice on its lane's named track, and slices of a track do not overlap."""
    timeline = played(schedule, seed)
    events = trace(timeline, tmp_path_factory.mktemp("trace") / "t.json")
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(tracks) == len(set(tracks.values())) == len(LANES)
    slices = [e for e in events if e["ph"] == "X"]
    assert sorted(e["name"] for e in slices) == sorted(schedule.labels())
    for number, lane in enumerate(LANES):
        mine = [e for e in slices if e["tid"] == number]
        assert [e["name"] for e in mine] == [schedule.labels()[i] for i in schedule.lane_tasks(lane)]
        for before, after in itertools.pairwise(mine):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-5
    last = max((e["ts"] + e["dur"] for e in slices), default=0.0)
    assert last == pytest.approx(timeline.makespan * 1e6, abs=0.01)


def test_trace_carries_the_work(tiny: Timeline, tmp_path: Path) -> None:
    """A slice has its class as category and its bytes and FLOPs as arguments, in microseconds."""
    (attention,) = [e for e in trace(tiny, tmp_path / "t.json") if e["name"] == "CPUAttn(1,0,0)"]
    assert (attention["ts"], attention["dur"], attention["cat"]) == (3e6, 4e6, "CPUAttn")
    assert attention["args"] == {"bytes": 8e9, "flops": 300.0}


def test_byte_counters_integrate_to_the_bytes(simulated: Timeline, tmp_path: Path) -> None:
    """The bytes-per-second counter of a lane, integrated over time, gives what the lane moved."""
    events = trace(simulated, tmp_path / "t.json")
    for lane in LANES:
        steps = [e for e in events if e["ph"] == "C" and e["name"] == f"{lane.value} GB/s"]
        if lane.value == "gpu":
            assert not steps
            continue
        assert [e["ts"] for e in steps] == sorted(e["ts"] for e in steps)
        assert steps[-1]["args"]["GB/s"] == 0
        moved = sum(a["args"]["GB/s"] * 1e3 * (b["ts"] - a["ts"]) for a, b in itertools.pairwise(steps))
        assert moved == pytest.approx(float(simulated.bytes[simulated.schedule.lane_tasks(lane)].sum()), rel=1e-3)


def test_stages_have_tracks_of_their_own(tmp_path: Path) -> None:
    """With two pipeline stages slices of a track do not overlap, and its name and counter say which stage."""
    timeline = played(flexgen(num_layers=4, num_micro_batches=2, decode_steps=2, num_stages=2), 1)
    events = trace(timeline, tmp_path / "t.json")
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(set(tracks.values())) == 2 * len(LANES) and tracks[len(LANES)] == "GPU: compute, stage 1"
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == len(timeline.schedule)
    for track in tracks:
        mine = [e for e in slices if e["tid"] == track]
        assert len(mine) == int((timeline.schedule.queue == track).sum())
        for before, after in itertools.pairwise(mine):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-5
    counters = {e["name"] for e in events if e["ph"] == "C"}
    assert {"h2d GB/s, stage 0", "h2d GB/s, stage 1"} <= counters
