"""The proof that a schedule is safe: it holds for every system's, and no dependency that matters can go missing."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hrm.errors import InvalidSchedule
from simulator.engine import play
from simulator.schedules import cgopipe, cpu_experts, flexgen, gpu_attention, zero_inference
from simulator.task import Op, Schedule
from simulator.validate import check_schedule, happens_before
from tests.simulator.support import any_schedules, costs, random_seconds, story


def without_line(schedule: Schedule, name: str) -> Schedule:
    """The schedule without one task; who waited for it waits for nothing in its place."""
    kept = [line for line in schedule.to_text().split("\n") if line.split()[0] != name]
    return Schedule.from_text("\n".join(_tidy(" ".join(x for x in line.split() if x != name)) for line in kept))


def without_wait(schedule: Schedule, task: str, dep: str) -> Schedule:
    """The schedule without one dependency."""
    lines = schedule.to_text().split("\n")
    i = next(i for i, line in enumerate(lines) if line.split()[0] == task)
    head, _, waits = lines[i].partition(" < ")
    assert dep in waits.split()
    lines[i] = _tidy(" ".join([head, "<", *(x for x in waits.split() if x != dep)]))
    return Schedule.from_text("\n".join(lines))


def _tidy(line: str) -> str:
    return line.removesuffix(" <")


def ancestors(schedule: Schedule) -> list[int]:
    """What happens before each task, as bits, the plain way: all ancestors of its dependencies and predecessor."""
    found = [0] * len(schedule)
    last: dict[int, int] = {}
    before = {}
    for i, queue in enumerate(schedule.queue.tolist()):
        before[i] = last.get(queue)
        last[queue] = i
    for i in schedule.order().tolist():
        for dep in (*schedule[i].deps, before[i]):
            if dep is not None:
                found[i] |= found[dep] | 1 << dep
    return found


# -- every builder ------------------------------------------------------------------------------------


@given(any_schedules())
@settings(deadline=None, max_examples=200)
def test_every_systems_schedule_is_safe(schedule: Schedule) -> None:
    """Whatever the shape, the schedules of all systems pass."""
    check_schedule(schedule)


@given(any_schedules())
@settings(deadline=None, max_examples=40)
def test_the_order_of_listing_does_not_matter(schedule: Schedule) -> None:
    """Listed lane by lane, the same schedule passes: only dependencies and the order within lanes count."""
    head, *lines = schedule.to_text().split("\n")
    by_lane = sorted(range(len(lines)), key=lambda i: (schedule.queue[i], i))
    check_schedule(Schedule.from_text("\n".join([head, *(lines[i] for i in by_lane)])))


@given(any_schedules())
@settings(deadline=None, max_examples=40)
def test_vector_clocks_know_what_happens_before(schedule: Schedule) -> None:
    """The clocks say of every pair of tasks what its ancestors say."""
    assume(len(schedule) < 250)
    queue, index, clock = happens_before(schedule)
    for task, known in enumerate(ancestors(schedule)):
        found = index <= clock[task, queue]
        found[task] = False
        assert found.tolist() == [bool(known >> i & 1) for i in range(len(schedule))]


# -- a dependency goes missing ------------------------------------------------------------------------


@given(any_schedules(), st.data())
@settings(deadline=None, max_examples=300)
def test_no_dependency_that_matters_can_go(schedule: Schedule, data: st.DataObject) -> None:
    """Without any one dependency a schedule is refused, unless what happens before what stays as it was."""
    waits = [(task, dep) for task in schedule for dep in task.deps]
    # FlexGen's host copies to pinned memory before it launches: that costs time, and protects nothing.
    waits = [(task, dep) for task, dep in waits if not (task.op in COMPUTE and schedule[dep].op in STAGING)]
    assume(waits and len(schedule) < 400)
    task, dep = data.draw(st.sampled_from(waits))
    changed = without_wait(schedule, str(task), str(schedule[dep]))
    if ancestors(changed) != ancestors(schedule):
        with pytest.raises(InvalidSchedule, match="wait"):
            check_schedule(changed)


COMPUTE, STAGING = (Op.PREFILL, Op.PRE_ATTN), (Op.STAGE_W, Op.STAGE_KV)
CGOPIPE = cgopipe(num_layers=2, num_micro_batches=3, decode_steps=2)
FLEXGEN = flexgen(num_layers=2, num_micro_batches=3, decode_steps=2, weight_pieces=2)
STAGES = flexgen(num_layers=2, num_micro_batches=2, decode_steps=1, weight_pieces=1, num_stages=2)
KV = gpu_attention(num_layers=2, num_micro_batches=3, decode_steps=2)
RESIDENT_KV = gpu_attention(num_layers=2, num_micro_batches=3, decode_steps=2, stream_kv=False)
SMALL_KV = gpu_attention(num_layers=1, num_micro_batches=3, decode_steps=2, prefill=False)
ZERO = zero_inference(num_layers=2, decode_steps=1)
EXPERTS = cpu_experts(num_layers=2, num_micro_batches=3, decode_steps=2)


@pytest.mark.parametrize(
    ("schedule", "task", "dep", "message"),
    [
        (CGOPIPE, "WPinToG(1,1,1)", "WCtoPin(1,1,1)", "which stages what it moves"),
        (CGOPIPE, "CPUAttn(1,1,1)", "OffloadQKV(1,1,1)", "whose result it reads"),
        (CGOPIPE, "OffloadQKV(2,1,1)", "PreAttn(2,1,1)", "which makes what it moves"),
        (CGOPIPE, "LoadH(1,1,1)", "CPUAttn(1,1,1)", "whose result it reads"),
        (CGOPIPE, "PostAttn(1,1,1)", "LoadH(1,1,1)", "whose result it reads"),
        (CGOPIPE, "Prefill(0,1,2)", "LoadX(0,1,2)", "which brings hidden states that it reads"),
        (CGOPIPE, "OffloadKV(0,0,1)", "Prefill(0,0,1)", "which makes what it moves"),
        (CGOPIPE, "WCtoPin(1,1,2)", "WPinToG(1,0,1)", "which still uses the slot that it fills"),
        (FLEXGEN, "LoadKV(1,0,1)", "KVtoPin(1,0,1)", "which stages what it moves"),
        (FLEXGEN, "Barrier(2,1,2)", "StoreKV(2,1,2)", "nor StoreKV(2,1,2) for it"),
        (STAGES, "LoadX(1,1,1)", "StoreX(1,0,1)", "which writes hidden states that it reads"),
        (STAGES, "PreAttn(1,0,1)", "Sample(0,1,1)", "which chooses the token it reads"),
        (KV, "GPUAttn(2,1,1)", "LoadKV(2,1,1)", "which brings keys and values that it reads"),
        (SMALL_KV, "LoadKV(2,0,1)", "StoreKV(1,0,1)", "which writes keys and values that it reads"),
        (SMALL_KV, "PreAttn(2,0,1)", "StoreKV(1,0,1)", "which still uses the slot that it fills"),
        (SMALL_KV, "LoadKV(2,0,0)", "GPUAttn(1,0,1)", "which still uses the slot that it fills"),
        (EXPERTS, "OffloadFFN(0,1,1)", "Prefill(0,1,1)", "which makes what it moves"),
        (EXPERTS, "OffloadFFN(1,1,1)", "PostAttn(1,1,1)", "which makes what it moves"),
        (EXPERTS, "CPUFFN(1,1,1)", "OffloadFFN(1,1,1)", "whose result it reads"),
        (EXPERTS, "LoadFFN(1,1,1)", "CPUFFN(1,1,1)", "whose result it reads"),
        (EXPERTS, "AddFFN(1,1,1)", "LoadFFN(1,1,1)", "whose result it reads"),
        (EXPERTS, "OffloadKV(0,0,1)", "AddFFN(0,0,1)", "which makes what it moves"),
        (ZERO, "PreAttn(1,0,0)", "WPinToG(1,0,0)", "which brings weights that it reads"),
        (ZERO, "WPinToG(1,0,0)", "Prefill(0,0,0)", "which reads the weights that it overwrites"),
    ],
)
def test_a_missing_wait_is_named(schedule: Schedule, task: str, dep: str, message: str) -> None:
    """One line names the task, what it does not wait for, and why it would have to."""
    with pytest.raises(InvalidSchedule) as caught:
        check_schedule(without_wait(schedule, task, dep))
    assert str(caught.value) == f"{task} does not wait for {dep}, {message}."


@pytest.mark.parametrize(
    ("schedule", "task", "dep", "named"),
    [
        # A wait for the last task of a lane stands for those before it; the first that is not over is named.
        (CGOPIPE, "WPinToG(1,0,0)", "Prefill(0,0,2)", "WPinToG(1,0,0) does not wait for Prefill(0,0,1), which reads"),
        (CGOPIPE, "LoadX(0,1,1)", "OffloadKV(0,0,1)", "LoadX(0,1,1) does not wait for OffloadKV(0,0,1), which writes"),
        (
            RESIDENT_KV,
            "PostAttn(1,1,0)",
            "WPinToG(1,1,2)",
            "PostAttn(1,1,0) does not wait for WPinToG(1,1,0), which br",
        ),
        # What a barrier no longer holds back may fill a slot too early.
        (FLEXGEN, "Barrier(1,0,1)", "StoreKV(1,0,0)", "LoadX(1,1,0) does not wait for StoreKV(1,0,0), which still"),
    ],
)
def test_what_a_missing_wait_leads_to(schedule: Schedule, task: str, dep: str, named: str) -> None:
    """The pair that is named is one that reads or overwrites too early, wherever the wait is missing."""
    with pytest.raises(InvalidSchedule, match=re.escape(named)):
        check_schedule(without_wait(schedule, task, dep))


def test_attention_on_the_cpu_waits_for_the_prompt() -> None:
    """The first token's attention reads keys and values of the prompt."""
    text = "Prefill(0,0,0) @gpu\nSample(0,0,0) @gpu < Prefill(0,0,0)\nPreAttn(1,0,0) @gpu < Sample(0,0,0)\n"
    text += "OffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)\nOffloadKV(0,0,0) @d2h < Prefill(0,0,0)\n"
    attention = "CPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0)"
    with pytest.raises(
        InvalidSchedule, match=r"CPUAttn\(1,0,0\) does not wait for OffloadKV\(0,0,0\), which writes keys"
    ):
        check_schedule(story(text + attention))
    check_schedule(story(text + attention + " OffloadKV(0,0,0)"))


def test_a_barrier_leaves_nothing_beside_it() -> None:
    """A task that a barrier neither waits for nor holds back is refused; the order of lines does not matter."""
    lines = "PreAttn(1,0,0) @gpu\nBarrier(1,0,0) @gpu\nStoreKV(1,0,0) @d2h < PreAttn(1,0,0)"
    message = r"Barrier\(1,0,0\) does not wait for StoreKV\(1,0,0\), nor StoreKV\(1,0,0\) for it"
    with pytest.raises(InvalidSchedule, match=message):
        check_schedule(story(lines))
    check_schedule(story(lines + " Barrier(1,0,0)"))
    check_schedule(story(lines.replace("@gpu\nStore", "@gpu < StoreKV(1,0,0)\nStore")))


# -- a task goes missing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "task", "message"),
    [
        (CGOPIPE, "WPinToG(1,1,1)", "PostAttn(1,1,0) reads weights of which WPinToG(1,1,1) is missing."),
        (STAGES, "WPinToG(1,1,1)", "PreAttn(1,1,1) reads weights of which WPinToG(1,1,1) is missing."),
        (CGOPIPE, "WCtoPin(1,1,1)", "WPinToG(1,1,1) has no WCtoPin to wait for, which stages what it moves."),
        (CGOPIPE, "OffloadQKV(1,1,1)", "CPUAttn(1,1,1) has no OffloadQKV to wait for, whose result it reads."),
        (RESIDENT_KV, "GPUAttn(1,1,1)", "PostAttn(1,1,1) has no GPUAttn to wait for, whose result it reads."),
        (
            CGOPIPE,
            "OffloadKV(0,1,1)",
            "CPUAttn(1,1,1) has no OffloadKV to wait for, which writes keys and values that it reads.",
        ),
        (EXPERTS, "OffloadFFN(1,0,1)", "CPUFFN(1,0,1) has no OffloadFFN to wait for, whose result it reads."),
        (EXPERTS, "CPUFFN(1,0,1)", "LoadFFN(1,0,1) has no CPUFFN to wait for, whose result it reads."),
        (EXPERTS, "GPUFFN(1,0,1)", "AddFFN(1,0,1) has no GPUFFN to wait for, whose result it reads."),
        (EXPERTS, "LoadFFN(1,0,1)", "AddFFN(1,0,1) has no LoadFFN to wait for, whose result it reads."),
        (EXPERTS, "AddFFN(1,0,1)", "PreAttn(1,1,1) has no AddFFN to wait for, whose result it reads."),
        (EXPERTS, "AddFFN(0,0,1)", "OffloadKV(0,0,1) has no AddFFN to wait for, which makes what it moves."),
        (EXPERTS, "AddFFN(1,1,1)", "Sample(1,1,1) has no AddFFN to wait for, whose result it reads."),
        (FLEXGEN, "StoreX(1,0,1)", "LoadX(1,1,1) has no StoreX to wait for, which writes hidden states that it reads."),
        (CGOPIPE, "Sample(1,1,1)", "PreAttn(2,0,1) has no Sample to wait for, which chooses the token it reads."),
        (ZERO, "PostAttn(1,0,0)", "PreAttn(1,1,0) has no PostAttn to wait for, whose result it reads."),
    ],
)
def test_a_missing_task_is_named(schedule: Schedule, task: str, message: str) -> None:
    """What would have made the data is missed by whoever reads it."""
    with pytest.raises(InvalidSchedule) as caught:
        check_schedule(without_line(schedule, task))
    assert str(caught.value) == message


@given(any_schedules(), st.data())
@settings(deadline=None, max_examples=60)
def test_a_page_is_never_missed_in_silence(schedule: Schedule, data: st.DataObject) -> None:
    """Without any one page of weights a schedule is refused, if anybody reads the layer."""
    pages = [str(schedule[i]) for i in np.flatnonzero(schedule.mask(Op.LOAD_W))]
    assume(len(pages) > 1)
    with pytest.raises(InvalidSchedule, match=r"is missing|does not wait"):
        check_schedule(without_line(schedule, data.draw(st.sampled_from(pages))))


# -- other mistakes -----------------------------------------------------------------------------------


def test_a_cycle_is_refused() -> None:
    """Tasks that wait for each other are named."""
    with pytest.raises(InvalidSchedule, match=r"not progressing: PreAttn\(1,0,0\), OffloadQKV\(1,0,0\) wait for each"):
        check_schedule(story("PreAttn(1,0,0) @gpu < OffloadQKV(1,0,0)\nOffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)"))


def test_swapped_tasks_of_a_lane_are_refused() -> None:
    """Dependencies that all hold do not help where a lane has two layers of pages in the wrong order."""
    lines = CGOPIPE.to_text().split("\n")
    one, other = (next(i for i, x in enumerate(lines) if x.startswith(name)) for name in ("WPinToG(1,1", "WPinToG(2,0"))
    lines[one], lines[other] = lines[other], lines[one]
    with pytest.raises(InvalidSchedule):
        check_schedule(Schedule.from_text("\n".join(lines)))


def test_a_page_beyond_the_last_is_refused() -> None:
    """A page number that a layer does not have is refused."""
    text = CGOPIPE.to_text().replace("WPinToG(1,1,2)", "WPinToG(1,1,7)").replace("WCtoPin(1,1,2)", "WCtoPin(1,1,7)")
    with pytest.raises(InvalidSchedule, match=r"WPinToG\(1,1,7\) is not one of a layer's 3 pages"):
        check_schedule(Schedule.from_text(text))


def test_a_task_that_stands_twice_is_refused() -> None:
    """Two tasks of one name cannot be told apart."""
    one = story("PreAttn(1,0,0) @gpu\nPreAttn(1,0,1) @gpu")
    columns = {key: getattr(one, key) for key in ("op", "step", "layer", "lane", "dep_start", "deps")}
    twice = Schedule(name="x", num_layers=1, num_micro_batches=1, num_steps=1, part=[0, 0], **columns)
    with pytest.raises(InvalidSchedule, match=r"PreAttn\(1,0,0\) stands twice"):
        check_schedule(twice)


def test_states_reach_another_stage_by_a_copy() -> None:
    """That the GPU before is through with a micro-batch is not enough: its states must come over."""
    lines = without_line(STAGES, "LoadX(1,1,1)").to_text().split("\n")
    text = "\n".join(x + " StoreX(1,0,1)" if x.startswith("PreAttn(1,1,1)") else x for x in lines)
    with pytest.raises(
        InvalidSchedule, match=r"PreAttn\(1,1,1\) has no LoadX to wait for, which brings hidden states f"
    ):
        check_schedule(Schedule.from_text(text))


def test_weights_on_another_stage_do_not_count() -> None:
    """Every stage has its own memory: a page that comes to another one is missing."""
    text = STAGES.to_text().replace("WPinToG(1,1,1) @h2d1", "WPinToG(1,1,1) @h2d")
    with pytest.raises(InvalidSchedule, match=r"PreAttn\(1,1,1\) reads weights of which WPinToG\(1,1,1\) is missing"):
        check_schedule(Schedule.from_text(text))


def test_dense_weights_are_read_before_attention_where_they_travel() -> None:
    """With ZeRO-Inference the queries need the layer's weights; waiting for them after attention is too late."""
    changed = without_wait(ZERO, "PreAttn(1,1,0)", "WPinToG(1,1,0)")
    lines = [
        line + " WPinToG(1,1,0)" if line.startswith("PostAttn(1,1,0)") else line
        for line in changed.to_text().split("\n")
    ]
    late = Schedule.from_text("\n".join(lines))
    with pytest.raises(InvalidSchedule, match=r"PreAttn\(1,1,0\) does not wait for WPinToG\(1,1,0\)"):
        check_schedule(late)
    check_schedule(Schedule.from_text(late.to_text().replace("schedule zero-inference", "schedule experts-only")))


def test_an_empty_schedule_is_safe() -> None:
    """A head without tasks has nothing that could go wrong."""
    check_schedule(Schedule.from_text("schedule nothing layers=1 micro_batches=1 steps=1"))


# -- hazards that the proof has found -----------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_a_stage_waits_for_the_states_of_the_one_before(parts: int) -> None:
    """FlexGen's second GPU starts no micro-batch, the last of a block included, before the first is through with it."""
    schedule = flexgen(num_layers=4, num_micro_batches=parts, decode_steps=2, num_stages=2)
    start, end = play(schedule, costs(random_seconds(schedule, 5)))
    ids = {(t.op, t.step, t.layer, t.part): t.id for t in schedule}
    for part in range(parts):
        for step, first, last in ((0, Op.PREFILL, Op.PREFILL), (1, Op.PRE_ATTN, Op.POST_ATTN)):
            assert start[ids[first, step, 2, part]] >= end[ids[last, step, 1, part]]
    crossings = Counter(t.op for t in schedule if t.layer == 1 and t.op is Op.STORE_X)
    assert crossings == {Op.STORE_X: 3 * parts}


def test_new_keys_and_values_are_not_overwritten() -> None:
    """With attention on the GPU the slot of the queries holds new keys and values until they are stored."""
    build = partial(gpu_attention, num_layers=2, num_micro_batches=2, decode_steps=3)
    schedule = build()
    seconds = np.where(schedule.mask(Op.STORE_KV), 100.0, 1.0)
    start, end = play(schedule, costs(seconds))
    queries = np.flatnonzero(schedule.mask(Op.PRE_ATTN))
    stored = np.flatnonzero(schedule.mask(Op.STORE_KV))
    assert (start[queries[3:]] >= end[stored[:-3]]).all()
