"""Predicted beside measured: tables, waits, and accounts of time that add up."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hrm.errors import InvalidSchedule, InvalidValue
from simulator.compare import compare
from simulator.engine import play
from simulator.loss import AFTER_LAST
from simulator.schedules import cgopipe, flexgen, gpu_attention
from simulator.task import LANES, Lane, Op, Schedule
from simulator.timeline import Timeline
from tests.simulator.support import any_schedules, costs, random_seconds, story


def played(schedule: Schedule, seconds: np.ndarray, source: str = "simulated") -> Timeline:
    none = np.zeros(len(schedule))
    return Timeline(schedule, *play(schedule, costs(seconds)), none, none, source=source)


def pair(schedule: Schedule, seed: int) -> tuple[Timeline, Timeline]:
    """A prediction, and a measurement in which tasks took half to twice as long and some lanes paused."""
    seconds = random_seconds(schedule, seed)
    factors = np.random.default_rng(seed).lognormal(0.1, 0.3, len(schedule))
    return played(schedule, seconds), played(schedule, seconds * factors + 0.01, "measured")


@pytest.fixture
def story_pair() -> tuple[Timeline, Timeline]:
    """One layer; measured, attention takes twice as long, and the GPU pauses for a second before it samples."""
    schedule = story(
        "PreAttn(1,0,0) @gpu\n"
        "CPUAttn(1,0,0) @cpu < PreAttn(1,0,0)\n"
        "PostAttn(1,0,0) @gpu < CPUAttn(1,0,0)\n"
        "Sample(1,0,0) @gpu < PostAttn(1,0,0)"
    )
    none = np.zeros(4)
    predicted = Timeline(schedule, np.array([0.0, 2, 4, 8]), np.array([2.0, 4, 8, 9]), none, none)
    measured = Timeline(schedule, np.array([0.0, 3, 7, 12]), np.array([3.0, 7, 11, 12.5]), none, none, "measured")
    return predicted, measured


def test_waits_stand_side_by_side(story_pair: tuple[Timeline, Timeline]) -> None:
    """What a lane waited for on one side only is zero on the other; the end of the run counts as a wait."""
    waits = compare(*story_pair).waits
    assert waits.loc[("run", "gpu", "CPUAttn")].tolist() == [2.0, 4.0, 2.0]
    assert waits.loc[("run", "gpu", "nothing")].tolist() == [0.0, 1.0, 1.0]
    assert waits.loc[("run", "cpu", AFTER_LAST)].tolist() == [5.0, 5.5, 0.5]
    assert set(waits.loc["run"].index.get_level_values("lane")) == {"gpu", "cpu"}


def test_idle_seconds_and_shares(story_pair: tuple[Timeline, Timeline]) -> None:
    """Busy and idle make up each side's own run, for lanes without tasks, too."""
    idle = compare(*story_pair).idle.loc["run"]
    assert idle.loc["gpu", ["predicted_busy_s", "predicted_idle_s"]].tolist() == [7.0, 2.0]
    assert idle.loc["gpu", ["measured_busy_s", "measured_idle_s", "measured_idle_share"]].tolist() == [7.5, 5.0, 0.4]
    assert idle.loc["pin", ["predicted_idle_s", "measured_idle_s", "measured_idle_share"]].tolist() == [9.0, 12.5, 1.0]


def test_loss_of_a_story(story_pair: tuple[Timeline, Timeline]) -> None:
    """The measured run is the GPU's predicted work, slower and faster tasks by class, and its waits."""
    loss = compare(*story_pair).loss(window="run")
    assert (loss.lane, loss.stage, loss.limit_s, loss.predicted_s, loss.measured_s) == ("gpu", None, 7.0, 9.0, 12.5)
    assert loss.items["measured_s"].to_dict() == {
        ("busy as predicted", "PostAttn"): 4.0,
        ("busy as predicted", "PreAttn"): 2.0,
        ("busy as predicted", "Sample"): 1.0,
        ("slower than predicted", "PreAttn"): 1.0,
        ("slower than predicted", "Sample"): -0.5,
        ("waited for", "CPUAttn"): 4.0,
        ("waited for", "nothing"): 1.0,
    }
    assert loss.items["predicted_s"].sum() == 9.0
    assert loss.sentence() == (
        "of 12.5 s measured for the whole run on lane gpu: 7 s is gpu busy at predicted speed, "
        "500 ms its tasks slower than predicted, 4 s waited for CPUAttn, 1 s idle while nothing ran for it."
    )


def test_loss_of_another_lane(story_pair: tuple[Timeline, Timeline]) -> None:
    """A lane can be chosen, if it has tasks; its time after the last one is an item."""
    comparison = compare(*story_pair)
    loss = comparison.loss(window="run", lane=Lane.CPU)
    assert loss.items["measured_s"].to_dict() == {
        ("busy as predicted", "CPUAttn"): 2.0,
        ("slower than predicted", "CPUAttn"): 2.0,
        ("waited for", AFTER_LAST): 5.5,
        ("waited for", "PreAttn"): 3.0,
    }
    assert "5.5 s idle after its last task" in loss.sentence()
    with pytest.raises(InvalidValue, match="no task on lane pin"):
        comparison.loss(lane=Lane.PIN)
    with pytest.raises(InvalidValue, match="'steady' or 'run', not 'decode'"):
        comparison.loss(window="decode")


def test_tasks_on_the_edge_of_the_window_count_in_part() -> None:
    """A transfer that began before steady decode counts with the part of it that lies inside, on both accounts."""
    lines = [f"Sample({step},0,0) @gpu" for step in range(5)]
    schedule = story("\n".join([*lines, "WPinToG(2,0,0) @h2d"]))
    ends, none = np.array([1.0, 2, 3, 4, 5]), np.zeros(6)
    predicted = Timeline(schedule, np.append(ends - 1, 0.0), np.append(ends, 4.0), none, none)
    measured = Timeline(schedule, np.append(2 * ends - 2, 2.0), np.append(2 * ends, 10.0), none, none, "measured")
    loss = compare(predicted, measured).loss(lane=Lane.H2D)
    # Four of the eight measured seconds lie in steady decode, 4 s to 8 s: half of the predicted four seconds, too.
    assert (loss.steps, loss.measured_s) == (2, 2.0)
    assert loss.items["measured_s"].to_dict() == {
        ("busy as predicted", "WPinToG"): 1.0,
        ("slower than predicted", "WPinToG"): 1.0,
    }


def test_overlapping_tasks_count_once() -> None:
    """Where clocks say that two tasks of one lane ran at once, the account still adds up to the run."""
    schedule = story("PreAttn(1,0,0) @gpu\nGPUAttn(1,0,0) @gpu\nPostAttn(1,0,0) @gpu")
    none = np.zeros(3)
    predicted = Timeline(schedule, np.array([0.0, 4, 5]), np.array([4.0, 5, 6]), none, none)
    measured = Timeline(schedule, np.array([0.0, 1, 4]), np.array([5.0, 2, 7]), none, none, "measured")
    loss = compare(predicted, measured).loss(window="run")
    assert loss.items["measured_s"].sum() == pytest.approx(loss.measured_s)
    assert "waited for" not in loss.items.index.get_level_values("item")


@given(any_schedules(), st.integers(0, 2**32 - 1), st.sampled_from(["steady", "run"]), st.sampled_from([None, *LANES]))
@settings(deadline=None, max_examples=40)
def test_every_account_adds_up(schedule: Schedule, seed: int, window: str, lane: Lane | None) -> None:
    """On both sides, for every lane and stage in use, the items are the window's seconds per step."""
    predicted, measured = pair(schedule, seed)
    comparison = compare(predicted, measured)
    if lane is not None and not len(schedule.lane_tasks(lane)):
        return
    loss = comparison.loss(window=window, lane=lane)
    scale = {"abs": 1e-9 * max(1.0, measured.makespan)}
    assert loss.items["predicted_s"].sum() == pytest.approx(loss.predicted_s, **scale)
    assert loss.items["measured_s"].sum() == pytest.approx(loss.measured_s, **scale)
    assert loss.items["difference_s"].sum() == pytest.approx(loss.measured_s - loss.predicted_s, **scale)
    assert (loss.stage is None) == (schedule.num_stages == 1)
    assert loss.items.loc[[item != "slower than predicted" for item, _ in loss.items.index], "measured_s"].min() >= 0
    first, last = measured.decode_window() if window == "steady" else (0.0, measured.makespan)
    assert loss.measured_s * loss.steps == pytest.approx(last - first)


@given(any_schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_waits_are_the_idle_time(schedule: Schedule, seed: int) -> None:
    """Of each lane in use with all its stages, in both windows and on both sides."""
    comparison = compare(*pair(schedule, seed))
    waits = comparison.waits.groupby(level=["window", "lane"]).sum()
    for key, row in waits.iterrows():
        stages = len(np.unique(schedule.stage[schedule.lane_tasks(Lane(key[1]))]))  # type: ignore[index]
        if stages < schedule.num_stages:
            continue  # of stages without the lane only the idle time is counted
        idle = comparison.idle.loc[key]
        assert row["predicted_s"] == pytest.approx(idle["predicted_idle_s"], abs=1e-6)
        assert row["measured_s"] == pytest.approx(idle["measured_idle_s"], abs=1e-6)


@given(any_schedules(), st.integers(0, 2**32 - 1))
@example(gpu_attention(num_layers=2, num_micro_batches=1, decode_steps=3), 14)  # differs by rounding alone
@settings(deadline=None, max_examples=10)
def test_every_comparison_prints(schedule: Schedule, seed: int) -> None:
    """As text, HTML and JSON; a run beside itself has no difference and no slower tasks."""
    comparison = compare(*pair(schedule, seed))
    assert "busy at predicted speed" in str(comparison)
    assert "<table" in comparison._repr_html_()
    json.dumps(comparison.to_dict(), allow_nan=False)
    same = compare(comparison.measured, comparison.measured)
    assert not same.waits["difference_s"].any()
    assert "slower than predicted" not in same.loss().items.index.get_level_values("item")


def test_tables_by_class_and_lane() -> None:
    """Seconds by phase and class, busy seconds by lane, and the whole."""
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=4)
    predicted = played(schedule, np.ones(len(schedule)))
    measured = played(schedule, np.where(schedule.mask(Op.CPU_ATTN), 3.0, 1.0), "measured")
    comparison = compare(predicted, measured)
    ops = comparison.to_frame()
    assert ops["ratio"].drop(index=("decode", "CPUAttn")).eq(1.0).all()
    assert ops.loc[("decode", "CPUAttn"), ["tasks", "ratio", "measured_total_s"]].tolist() == [16, 3.0, 48.0]
    assert comparison.lanes.loc["cpu", "measured_busy_s"] == 48.0
    assert comparison.totals.loc["makespan_s", "measured"] == measured.makespan
    assert comparison.totals.loc["makespan_s", "ratio"] == measured.makespan / predicted.makespan


def test_a_run_that_takes_no_time() -> None:
    """All zero on one side: no ratio, no share, and nothing raised."""
    schedule = cgopipe(num_layers=1, num_micro_batches=1, decode_steps=4)
    none = played(schedule, np.zeros(len(schedule)))
    comparison = compare(none, none)
    assert comparison.waits.empty and comparison.loss().items.empty
    assert comparison.idle["measured_idle_share"].eq(1.0).all()
    assert pd.isna(comparison.totals.loc["makespan_s", "ratio"])
    assert "0 s measured" in str(comparison)


def test_stages_are_named() -> None:
    """The busiest lane of a pipeline-parallel run is one stage's, and the sentence says which."""
    schedule = flexgen(num_layers=4, num_micro_batches=2, decode_steps=4, num_stages=2)
    seconds = np.where((schedule.stage == 1) & schedule.mask(Op.POST_ATTN), 9.0, 1.0)
    loss = compare(played(schedule, seconds), played(schedule, 2 * seconds, "measured")).loss()
    assert (loss.lane, loss.stage) == ("gpu", 1)
    assert "on lane gpu of stage 1 (mean of 2)" in loss.sentence()


def test_different_schedules_are_refused() -> None:
    """The message names both; of equal size it says that tasks or dependencies differ; no tasks is refused, too."""
    one, other = (cgopipe(num_layers=layers, num_micro_batches=2, decode_steps=2) for layers in (1, 2))
    first = played(one, np.ones(len(one)))
    with pytest.raises(InvalidSchedule, match=r"1 layers.*simulated.*2 layers.*measured"):
        compare(first, played(other, np.ones(len(other)), "measured"))
    moved = Schedule.from_text(one.to_text().replace("Sample(2,0,0)", "Sample(2,0,7)"))
    with pytest.raises(InvalidSchedule, match="equal in size, other tasks or dependencies"):
        compare(first, replace(first, schedule=moved))
    empty = Timeline(story(""), *np.zeros((4, 0)))
    with pytest.raises(InvalidSchedule, match="no tasks"):
        compare(empty, empty)
