"""Pictures of timelines: every task class has a colour, every lane of every stage a row."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hrm.errors import InvalidValue
from simulator.engine import play
from simulator.gantt import _COLOURS, gantt, gantt_pair, gantt_stack, layer_window, steady_steps, step_window
from simulator.schedules import cgopipe, flexgen, zero_inference
from simulator.task import LANES, OPS, Lane, Op, Schedule
from simulator.timeline import Timeline
from tests.simulator.support import any_schedules, costs, random_seconds, story


def played(schedule: Schedule, seed: int = 0) -> Timeline:
    seconds = np.where(schedule.mask(Op.BARRIER), 0.0, random_seconds(schedule, seed))
    start, end = play(schedule, costs(seconds))
    return Timeline(schedule, start, end, seconds, seconds)


def rows(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def area(ax: Axes) -> float:
    """Width of all bars together."""
    return float(sum(bar.get_width() for bar in ax.patches))  # type: ignore[attr-defined]


def test_every_class_has_a_colour() -> None:
    """None is left out, and those that may stand in one row beside each other differ."""
    assert set(_COLOURS) == set(OPS)
    for lane in LANES:
        colours = [_COLOURS[op] for op in OPS if op.lane is lane and op is not Op.OFFLOAD_KV]
        assert len(set(colours)) == len(colours)


@given(any_schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=10)
def test_bars_are_the_tasks(schedule: Schedule, seed: int) -> None:
    """Over the whole run the bars are as long as the tasks, in a row for each lane in use."""
    timeline = played(schedule, seed)
    ax = gantt(timeline, first=0.0, last=timeline.makespan)
    scale = 1e3 if timeline.makespan < 10 else 1.0
    assert area(ax) == pytest.approx(scale * float((timeline.end - timeline.start).sum()))
    stages = schedule.num_stages
    assert len(rows(ax)) == (len(LANES) if stages == 1 else len(np.unique(schedule.queue)))
    plt.close("all")


def test_stages_have_rows_of_their_own() -> None:
    """Lanes are numbered by stage, and unused ones left out."""
    timeline = played(flexgen(num_layers=4, num_micro_batches=2, decode_steps=2, num_stages=2))
    ax = gantt(timeline)
    lanes = ["GPU", "link ↑", "link ↓", "staging"]
    assert rows(ax) == [f"{lane} {stage}" for stage in (0, 1) for lane in lanes]
    named = {text.get_text() for text in ax.get_legend().get_texts()}  # type: ignore[union-attr]
    assert {"Barrier", "KVtoPin", "LoadKV", "GPUAttn", "StoreKV"} <= named
    plt.close("all")


def test_barriers_are_marks() -> None:
    """A line per barrier, from its stage's first row to the last."""
    schedule = flexgen(num_layers=2, num_micro_batches=2, decode_steps=1)
    timeline = played(schedule)
    ax = gantt(timeline, first=0.0, last=timeline.makespan)
    assert len(ax.lines) == int(schedule.mask(Op.BARRIER).sum())
    assert {tuple(line.get_ydata()) for line in ax.lines} == {(-0.5, 4.5)}  # type: ignore[arg-type]
    plt.close("all")


def test_a_stack_shares_the_scale_and_marks_the_layers() -> None:
    """One panel per schedule, one legend, and the dashed line where each begins the layer after."""
    timelines = {
        "S1": played(cgopipe(num_layers=3, num_micro_batches=2, decode_steps=3)),
        "S4": played(flexgen(num_layers=3, num_micro_batches=2, decode_steps=3)),
        "ZeRO": played(zero_inference(num_layers=3, decode_steps=3)),
    }
    figure = gantt_stack(timelines, step=2, layer=1)
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(timelines)
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    longest = max(last - first for first, last in (layer_window(t, 2, 1, layers=2) for t in timelines.values()))
    assert figure.axes[0].get_xlim()[1] == pytest.approx(1.02 * longest)
    assert len(figure.legends) == 1 and all(ax.get_legend() is None for ax in figure.axes)
    plt.close("all")


def even(schedule: Schedule) -> Timeline:
    """Every task takes a second."""
    none = np.zeros(len(schedule))
    return Timeline(schedule, *play(schedule, costs(none + 1.0)), none, none)


def slower(timeline: Timeline, op: Op, seconds: float) -> Timeline:
    """The same schedule with so many seconds more for each task of a class."""
    spent = timeline.end - timeline.start + seconds * timeline.schedule.mask(op)
    start, end = play(timeline.schedule, costs(spent))
    return replace(timeline, start=start, end=end, source="measured")


def test_a_pair_has_panels_on_one_scale() -> None:
    """Prediction above measurement, each from the end of the step before, as long as the longer one takes."""
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=4)
    predicted = even(schedule)
    measured = slower(predicted, Op.POST_ATTN, 2.0)
    figure = gantt_pair(predicted, measured, steps=(2, 3), title="twice")
    top, bottom, beside = figure.axes
    first, last = step_window(measured, 2, 3)
    ends = measured.step_ends()
    assert (first, last) == (ends[1], ends[3])
    assert top.get_xlim() == bottom.get_xlim()
    unit = 1e3 if last - first < 10 else 1.0
    assert top.get_xlim()[1] == pytest.approx(unit * (last - first))
    assert top.get_title(loc="left").startswith("simulated   steps 2 to 3: ")
    assert bottom.get_title(loc="left").startswith("measured   steps 2 to 3: ")
    assert beside.get_title(loc="left") == "difference, all tasks of steps 2 to 3"
    plt.close("all")


@pytest.mark.parametrize("extra", [0.002, -0.5, 3.0])
def test_bars_beside_a_pair_are_the_differences(extra: float) -> None:
    """Of the classes in the steps only the slower one has a bar, as long as its tasks' seconds more or less."""
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=4)
    predicted = even(schedule)
    measured = slower(predicted, Op.CPU_ATTN, extra)
    ax = gantt_pair(predicted, measured, steps=(2, 2)).axes[2]
    tasks = int((schedule.mask(Op.CPU_ATTN) & (schedule.step == 2)).sum())
    unit = 1e3 if abs(tasks * extra) < 1 else 1.0
    bars = dict(zip(rows(ax), [bar.get_width() for bar in ax.patches], strict=True))  # type: ignore[attr-defined]
    assert bars.pop("CPUAttn") == pytest.approx(unit * tasks * extra)
    assert set(bars) >= {"WCtoPin", "WPinToG", "PostAttn"} and not any(bars.values())
    low, high = ax.get_xlim()
    assert low < min(0.0, unit * tasks * extra) and high > max(0.0, unit * tasks * extra)
    plt.close("all")


@given(any_schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=10)
def test_any_pair_can_be_drawn(schedule: Schedule, seed: int) -> None:
    """Every schedule's steady steps, or its only step, on a figure of the caller's."""
    predicted, measured = played(schedule, seed), played(schedule, seed + 1)
    figure = Figure(layout="constrained")
    assert gantt_pair(predicted, measured, steps=steady_steps(predicted), figure=figure) is figure
    assert len(figure.axes) == 3
    assert len(gantt_pair(predicted, measured).axes) == 3
    plt.close("all")


@pytest.mark.parametrize(
    ("decode_steps", "count", "expected"),
    [(0, 2, (0, 0)), (1, 2, (1, 1)), (3, 2, (2, 2)), (9, 2, (4, 5)), (9, 3, (4, 6))],
)
def test_steady_steps_are_in_the_middle(decode_steps: int, count: int, expected: tuple[int, int]) -> None:
    """Neither the first nor the last step of decode where there are others."""
    timeline = played(cgopipe(num_layers=1, num_micro_batches=1, decode_steps=decode_steps))
    assert steady_steps(timeline, count) == expected


def test_window_of_steps() -> None:
    """From the end of the step before; prefill begins at zero, and steps that the run has not are refused."""
    timeline = played(cgopipe(num_layers=1, num_micro_batches=2, decode_steps=2))
    ends = timeline.step_ends()
    assert step_window(timeline, 0, 1) == (0.0, ends[1])
    assert step_window(timeline, 2, 2) == (ends[1], ends[2])
    for first, last in ((2, 3), (2, 1)):
        with pytest.raises(InvalidValue, match=f"no steps {first} to {last}; it has steps 0 to 2"):
            step_window(timeline, first, last)
    without = story("PreAttn(1,0,0) @gpu")
    with pytest.raises(InvalidValue, match="no task says when a step is over"):
        step_window(played(without), 1, 1)
    assert steady_steps(played(without)) is None


def test_window_of_layers() -> None:
    """From a layer's first kernel to that of the layer after, across steps; at the end until all is over."""
    timeline = played(zero_inference(num_layers=2, decode_steps=2, stream_weights=False))
    at = {str(task): task.id for task in timeline.schedule}
    start = timeline.start
    assert layer_window(timeline, 1, 0) == (start[at["PreAttn(1,0,0)"]], start[at["PreAttn(1,1,0)"]])
    assert layer_window(timeline, 1, 1, layers=2) == (start[at["PreAttn(1,1,0)"]], start[at["PreAttn(2,1,0)"]])
    assert layer_window(timeline, 2, 1) == (start[at["PreAttn(2,1,0)"]], timeline.makespan)
    with pytest.raises(InvalidValue, match="no layer 2 in step 1"):
        layer_window(timeline, 1, 2)


# -- what a lane waited for ---------------------------------------------------------------------------


def test_waits_follow_what_ended_last() -> None:
    """A gap is charged to whatever ran on the way to it, be it a dependency or the task before on its lane."""
    schedule = story(
        "PreAttn(1,0,0) @gpu\n"
        "OffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)\n"
        "CPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0)\n"
        "WPinToG(1,1,0) @h2d\n"
        "LoadH(1,0,0) @h2d < CPUAttn(1,0,0)\n"
        "PostAttn(1,0,0) @gpu < LoadH(1,0,0)"
    )
    none = np.zeros(6)
    timeline = Timeline(schedule, np.array([0.0, 2, 3, 0, 9, 10]), np.array([2.0, 3, 7, 9, 10, 12]), none, none)
    # Hidden states queue behind the weights: those of the gap's eight seconds that weights ran are theirs.
    assert timeline.waits() == {"WPinToG": 7.0, "LoadH": 1.0}
    assert timeline.waits(first=4.0, last=9.5) == {"WPinToG": 5.0, "LoadH": 0.5}
    assert timeline.waits(Lane.CPU) == {"PreAttn": 2.0, "OffloadQKV": 1.0}
    assert timeline.waits(Lane.PIN) == {}


def test_what_ended_later_was_not_waited_for() -> None:
    """A task that turned out to have nothing to do may end before its dependencies: the way goes on past it."""
    schedule = story(
        "LoadExperts(1,0,0) @h2d\n"
        "Experts(1,0,0) @gpu < LoadExperts(1,0,0)\n"
        "LoadExperts(1,0,1) @h2d\n"
        "Experts(1,0,1) @gpu < LoadExperts(1,0,1)\n"
        "OffloadQKV(1,0,0) @d2h < Experts(1,0,1)"
    )
    none = np.zeros(5)
    start, end = np.array([0.0, 8, 10.5, 10, 10]), np.array([8.0, 10, 10.5, 10, 11])
    assert Timeline(schedule, start, end, none, none).waits(Lane.D2H) == {"LoadExperts": 8.0, "Experts": 2.0}


def test_what_nothing_ran_for_is_told() -> None:
    """Before the first task, and between tasks that nothing held up."""
    schedule = story("PreAttn(1,0,0) @gpu\nPostAttn(1,0,0) @gpu < PreAttn(1,0,0)")
    none = np.zeros(2)
    timeline = Timeline(schedule, np.array([1.0, 4.0]), np.array([3.0, 5.0]), none, none)
    assert timeline.waits() == {"nothing": 2.0}


def test_overlapping_tasks_leave_no_gap() -> None:
    """Where tasks of one lane overlap, as clocks may say, a gap opens when the last of them has ended."""
    schedule = story("PreAttn(1,0,0) @gpu\nGPUAttn(1,0,0) @gpu\nPostAttn(1,0,0) @gpu")
    none = np.zeros(3)
    timeline = Timeline(schedule, np.array([0.0, 1, 6]), np.array([5.0, 2, 7]), none, none)
    assert timeline.waits() == {"nothing": 1.0}


@given(any_schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_waits_add_up_to_the_idle_time(schedule: Schedule, seed: int) -> None:
    """Busy time, gaps and what is left after the last task make up the run, for every lane of every stage."""
    timeline = played(schedule, seed)
    for lane in LANES:
        for stage in range(schedule.num_stages):
            mine = (schedule.queue == LANES.index(lane) + len(LANES) * stage).nonzero()[0]
            if len(mine):
                busy = float((timeline.end - timeline.start)[mine].sum())
                gaps = float(timeline.end[mine].max()) - busy
                found = timeline.waits(lane, stage=stage)
                assert sum(found.values()) == pytest.approx(gaps, abs=1e-9)
                assert list(found.values()) == sorted(found.values(), reverse=True)
