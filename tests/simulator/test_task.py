"""Schedules as data: tasks, text form, order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from hrm.errors import InvalidSchedule
from simulator.schedules import cgopipe
from simulator.task import LANES, OPS, Lane, Op, Schedule, ScheduleBuilder, Task
from tests.simulator.support import schedules, story

HEAD = "schedule x layers=2 micro_batches=1 steps=1\n"


@given(schedules())
@settings(deadline=None, max_examples=60)
def test_text_form_reads_back(schedule: Schedule) -> None:
    """A schedule equals what is read from its text, task by task and column by column."""
    again = Schedule.from_text(schedule.to_text())
    assert again == schedule
    assert again.to_text() == schedule.to_text()
    assert list(again) == list(schedule)


def test_text_form() -> None:
    """The text form has a head and one line per task: its name, its lane, what it waits for."""
    schedule = cgopipe(num_layers=1, num_micro_batches=1, decode_steps=1, stream_weights=False)
    assert schedule.to_text() == (
        "schedule cgopipe layers=1 micro_batches=1 steps=2\n"
        "Prefill(0,0,0) @gpu\n"
        "Sample(0,0,0) @gpu < Prefill(0,0,0)\n"
        "OffloadKV(0,0,0) @d2h < Prefill(0,0,0)\n"
        "PreAttn(1,0,0) @gpu < Sample(0,0,0)\n"
        "OffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)\n"
        "CPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0) OffloadKV(0,0,0)\n"
        "LoadH(1,0,0) @h2d < CPUAttn(1,0,0)\n"
        "PostAttn(1,0,0) @gpu < LoadH(1,0,0)\n"
        "Sample(1,0,0) @gpu < PostAttn(1,0,0)"
    )


def test_a_dependency_may_stand_below() -> None:
    """The text form may name a task before its line; blank lines and indentation do not matter."""
    schedule = Schedule.from_text(f"\n{HEAD}\n  CPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0)\n\nOffloadQKV(1,0,0) @d2h\n")
    assert schedule[0].deps == (1,)
    assert (schedule.name, schedule.num_layers, len(schedule)) == ("x", 2, 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("Fly(1,0,0) @gpu", r"line 2: unknown task class 'Fly'; known: WCtoPin, "),
        ("PreAttn(1,0,0) @tpu", r"line 2: unknown lane 'tpu'; known: gpu, cpu, h2d, d2h, pin"),
        ("PreAttn(1,0,0) @gpu\nPreAttn(1,0,0) @gpu", r"line 3: PreAttn\(1,0,0\) stands twice"),
        (
            "PreAttn(1,0,0) @gpu < Sample(0,1,0)",
            r"PreAttn\(1,0,0\) waits for Sample\(0,1,0\), which is not in the schedule",
        ),
        ("PreAttn(1,0,0) @gpu\nPreAttn 1,0,0", r"line 3 is not 'Task\(step,layer,part\) @lane < deps': 'PreAttn 1"),
        ("PreAttn(1,0) @gpu", r"line 2 is not"),
        ("PreAttn(1,0,-1) @gpu", r"line 2 is not"),
        ("PreAttn(1,0,0)", r"line 2 is not"),
    ],
)
def test_bad_lines_are_named(lines: str, message: str) -> None:
    """Every mistake in the text is refused in one line that names the line or the task."""
    with pytest.raises(InvalidSchedule, match=message) as caught:
        Schedule.from_text(HEAD + lines)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "PreAttn(1,0,0) @gpu", "schedule x layers=2", "schedule x layers=a micro_batches=1 steps=1"]
)
def test_a_schedule_begins_with_its_head(text: str) -> None:
    """A text without the head is refused with the form of a head."""
    with pytest.raises(InvalidSchedule, match="a schedule begins with 'schedule NAME layers=L"):
        Schedule.from_text(text)


def test_line_numbers_count_blank_lines() -> None:
    """The number in the message is the line's number in the file."""
    with pytest.raises(InvalidSchedule, match="line 3"):
        Schedule.from_text(HEAD + "\nFly(1,0,0) @gpu")


def test_a_number_out_of_range_is_refused() -> None:
    """A step that no column can hold is refused in one line."""
    with pytest.raises(InvalidSchedule):
        Schedule.from_text(HEAD + "PreAttn(99999999999,0,0) @gpu")


def test_a_cycle_does_not_progress() -> None:
    """Tasks that wait for each other are refused by name."""
    schedule = story("PreAttn(1,0,0) @gpu < OffloadQKV(1,0,0)\nOffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)")
    with pytest.raises(InvalidSchedule, match=r"not progressing: PreAttn\(1,0,0\), OffloadQKV\(1,0,0\) wait"):
        schedule.order()


def test_a_cycle_made_by_lane_order_alone() -> None:
    """Tasks whose dependencies have no cycle still deadlock if their lanes list them in crossed order."""
    schedule = story(
        "PreAttn(1,0,0) @gpu < OffloadQKV(1,0,1)\n"
        "PreAttn(1,0,1) @gpu\n"
        "OffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)\n"
        "OffloadQKV(1,0,1) @d2h < PreAttn(1,0,1)"
    )
    with pytest.raises(InvalidSchedule, match=r"not progressing: PreAttn\(1,0,0\)") as caught:
        schedule.order()
    assert "OffloadQKV(1,0,1)" in str(caught.value)


def test_a_task_that_waits_for_itself() -> None:
    """A self-dependency is a cycle."""
    with pytest.raises(InvalidSchedule, match=r"not progressing: PreAttn\(1,0,0\)"):
        story("PreAttn(1,0,0) @gpu < PreAttn(1,0,0)").order()


def test_the_stuck_tasks_do_not_flood_the_message() -> None:
    """At most four of many stuck tasks are named."""
    lines = ["PreAttn(1,0,0) @gpu < PreAttn(1,0,0)", *(f"PreAttn(1,0,{i}) @gpu" for i in range(1, 9))]
    with pytest.raises(InvalidSchedule) as caught:
        story("\n".join(lines)).order()
    assert str(caught.value).count("PreAttn") == 4


@given(schedules())
@settings(deadline=None, max_examples=40)
def test_order_of_a_shuffled_listing(schedule: Schedule) -> None:
    """An order exists even if tasks are listed lane by lane, and respects dependencies and lanes."""
    by_lane = sorted(range(len(schedule)), key=lambda i: (LANES.index(schedule[i].lane), i))
    lines = schedule.to_text().split("\n")
    shuffled = Schedule.from_text("\n".join([lines[0], *(lines[1 + i] for i in by_lane)]))
    position = np.empty(len(shuffled), dtype=int)
    order = shuffled.order()
    assert sorted(order) == list(range(len(shuffled)))
    position[order] = np.arange(len(shuffled))
    for task in shuffled:
        assert all(position[dep] < position[task.id] for dep in task.deps)
    for lane in LANES:
        assert (np.diff(position[shuffled.lane_tasks(lane)]) > 0).all()


def test_a_task_prints_short() -> None:
    """A task prints as its class and its place."""
    task = Task(id=3, op=Op.LOAD_W, step=1, layer=2, part=0, lane=Lane.H2D, deps=(1, 2))
    assert str(task) == "WPinToG(1,2,0)"


@pytest.mark.parametrize("op", OPS)
def test_every_class_has_a_lane(op: Op) -> None:
    """Every class of task has its lane, and a builder puts it there unless told otherwise."""
    builder = ScheduleBuilder()
    builder.add(op, 1, 0, 0)
    builder.add(op, 1, 0, 1, lane=Lane.CPU)
    schedule = builder.build(name="x", num_layers=1, num_micro_batches=2, num_steps=1)
    assert [task.lane for task in schedule] == [op.lane, Lane.CPU]


def test_a_schedule_is_an_immutable_sequence() -> None:
    """A schedule can be indexed, sliced and counted, and its columns cannot be written."""
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=1)
    assert schedule[-1] == schedule[len(schedule) - 1]
    assert [str(t) for t in schedule[:3]] == schedule.labels()[:3]
    assert len(list(schedule)) == len(schedule)
    with pytest.raises(IndexError):
        schedule[len(schedule)]
    with pytest.raises(ValueError, match="read-only"):
        schedule.step[0] = 5
    assert repr(schedule).startswith(f"<Schedule cgopipe: {len(schedule)} tasks, 2 layers, 2 micro-batches, 2 steps")


def test_equality_looks_at_everything() -> None:
    """Schedules that differ in a name, a dependency or a lane are different."""
    one = story("PreAttn(1,0,0) @gpu\nCPUAttn(1,0,0) @cpu < PreAttn(1,0,0)")
    assert one == story("PreAttn(1,0,0) @gpu\nCPUAttn(1,0,0) @cpu < PreAttn(1,0,0)")
    assert one != story("PreAttn(1,0,0) @gpu\nCPUAttn(1,0,0) @cpu")
    assert one != story("PreAttn(1,0,0) @gpu\nCPUAttn(1,0,0) @pin < PreAttn(1,0,0)")
    assert one != "schedule"


def test_lane_tasks_and_masks() -> None:
    """Tasks are found by lane, in order, and by class."""
    schedule = story("PreAttn(1,0,0) @gpu\nOffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)\nPreAttn(1,0,1) @gpu")
    assert schedule.lane_tasks(Lane.GPU).tolist() == [0, 2]
    assert schedule.lane_tasks(Lane.PIN).tolist() == []
    assert schedule.mask(Op.PRE_ATTN).tolist() == [True, False, True]
