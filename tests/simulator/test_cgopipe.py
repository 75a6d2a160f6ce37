"""CGOPipe: the order of Algorithm 1, and that nothing is overwritten while it is read."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import Policy
from hrm.errors import InvalidValue, UnknownName
from hrm.pipeline import ACTIVATION_SLOTS, PINNED_PAGES
from simulator.engine import play
from simulator.schedules import SYSTEMS, build_schedule, cgopipe
from simulator.task import LANES, Op, Schedule
from simulator.validate import check_schedule
from tests.simulator.support import costs, random_seconds, schedules, shapes

# Two layers, three micro-batches, two decode steps in steady state, in the order of Algorithm 1.
# PinToG brings visit 0 first; then W_CtoPin runs two pages ahead of W_PinToG throughout.
ALGORITHM_1 = """
    WCtoPin(1,0,0) WCtoPin(1,0,1) WCtoPin(1,0,2) WPinToG(1,0,0)
    WCtoPin(1,1,0) WPinToG(1,0,1)
    WCtoPin(1,1,1) WPinToG(1,0,2)

    PreAttn(1,0,0) OffloadQKV(1,0,0) CPUAttn(1,0,0)
    PreAttn(1,0,1) OffloadQKV(1,0,1) CPUAttn(1,0,1)

    LoadH(1,0,0) WPinToG(1,1,0) PostAttn(1,0,0) PreAttn(1,0,2) OffloadQKV(1,0,2) CPUAttn(1,0,2) WCtoPin(1,1,2)
    LoadH(1,0,1) WPinToG(1,1,1) PostAttn(1,0,1) PreAttn(1,1,0) OffloadQKV(1,1,0) CPUAttn(1,1,0) WCtoPin(2,0,0)
    LoadH(1,0,2) WPinToG(1,1,2) PostAttn(1,0,2) PreAttn(1,1,1) OffloadQKV(1,1,1) CPUAttn(1,1,1) WCtoPin(2,0,1)

    LoadH(1,1,0) WPinToG(2,0,0) PostAttn(1,1,0) Sample(1,1,0)
        PreAttn(1,1,2) OffloadQKV(1,1,2) CPUAttn(1,1,2) WCtoPin(2,0,2)
    LoadH(1,1,1) WPinToG(2,0,1) PostAttn(1,1,1) Sample(1,1,1)
        PreAttn(2,0,0) OffloadQKV(2,0,0) CPUAttn(2,0,0) WCtoPin(2,1,0)
    LoadH(1,1,2) WPinToG(2,0,2) PostAttn(1,1,2) Sample(1,1,2)
        PreAttn(2,0,1) OffloadQKV(2,0,1) CPUAttn(2,0,1) WCtoPin(2,1,1)

    LoadH(2,0,0) WPinToG(2,1,0) PostAttn(2,0,0) PreAttn(2,0,2) OffloadQKV(2,0,2) CPUAttn(2,0,2) WCtoPin(2,1,2)
    LoadH(2,0,1) WPinToG(2,1,1) PostAttn(2,0,1) PreAttn(2,1,0) OffloadQKV(2,1,0) CPUAttn(2,1,0)
    LoadH(2,0,2) WPinToG(2,1,2) PostAttn(2,0,2) PreAttn(2,1,1) OffloadQKV(2,1,1) CPUAttn(2,1,1)

    LoadH(2,1,0) PostAttn(2,1,0) Sample(2,1,0) PreAttn(2,1,2) OffloadQKV(2,1,2) CPUAttn(2,1,2)
    LoadH(2,1,1) PostAttn(2,1,1) Sample(2,1,1)
    LoadH(2,1,2) PostAttn(2,1,2) Sample(2,1,2)
"""


def names(schedule: Schedule, indices) -> set[str]:
    """Names of tasks."""
    labels = schedule.labels()
    return {labels[i] for i in indices}


def waits(schedule: Schedule, name: str) -> set[str]:
    """What a task waits for."""
    return names(schedule, schedule[schedule.labels().index(name)].deps)


# -- order --------------------------------------------------------------------------------------------


def test_decode_is_algorithm_1() -> None:
    """Two layers of three micro-batches are issued exactly in the order of the paper's Algorithm 1."""
    schedule = cgopipe(num_layers=2, num_micro_batches=3, decode_steps=2, prefill=False)
    assert schedule.labels() == ALGORITHM_1.split()


def test_dependencies_of_algorithm_1() -> None:
    """Each kind of task waits for what it reads, and for whoever still reads what it overwrites."""
    schedule = cgopipe(num_layers=2, num_micro_batches=3, decode_steps=2, prefill=False)
    assert waits(schedule, "PreAttn(1,0,0)") == set()
    assert waits(schedule, "PreAttn(1,1,0)") == {"PostAttn(1,0,0)"}
    assert waits(schedule, "PreAttn(2,0,2)") == {"Sample(1,1,2)"}
    assert waits(schedule, "OffloadQKV(1,1,2)") == {"PreAttn(1,1,2)"}
    assert waits(schedule, "CPUAttn(1,1,2)") == {"OffloadQKV(1,1,2)"}
    assert waits(schedule, "LoadH(1,1,2)") == {"CPUAttn(1,1,2)"}
    assert waits(schedule, "PostAttn(1,1,0)") == {"LoadH(1,1,0)", "WPinToG(1,1,2)"}
    assert waits(schedule, "PostAttn(1,1,1)") == {"LoadH(1,1,1)"}
    assert waits(schedule, "WPinToG(1,1,0)") == {"WCtoPin(1,1,0)"}
    assert waits(schedule, "WPinToG(2,0,1)") == {"WCtoPin(2,0,1)", "PostAttn(1,0,2)"}
    assert waits(schedule, "WCtoPin(2,0,0)") == {"WPinToG(1,0,2)"}
    assert waits(schedule, "Sample(2,1,1)") == {"PostAttn(2,1,1)"}


def test_prefill_by_hand() -> None:
    """Prefill goes layer by layer; hidden states and KV leave, and hidden states come back a layer later."""
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=0, stream_weights=False)
    assert schedule.labels() == [
        "Prefill(0,0,0)", "OffloadKV(0,0,0)",
        "Prefill(0,0,1)", "OffloadKV(0,0,1)", "LoadX(0,1,0)",
        "Prefill(0,1,0)", "Sample(0,1,0)", "OffloadKV(0,1,0)", "LoadX(0,1,1)",
        "Prefill(0,1,1)", "Sample(0,1,1)", "OffloadKV(0,1,1)",
    ]  # fmt: skip
    assert waits(schedule, "LoadX(0,1,0)") == {"OffloadKV(0,0,0)"}
    assert waits(schedule, "LoadX(0,1,1)") == {"OffloadKV(0,0,1)", "OffloadKV(0,0,0)"}
    assert waits(schedule, "Prefill(0,1,1)") == {"LoadX(0,1,1)"}


def test_first_step_names_the_steps() -> None:
    """A piece of a run in progress carries the numbers of its own steps."""
    schedule = cgopipe(num_layers=1, num_micro_batches=2, decode_steps=2, prefill=False, first_step=7)
    assert set(schedule.step.tolist()) == {7, 8}
    assert schedule.num_steps == 2


@given(shapes())
@settings(deadline=None, max_examples=60)
def test_counts_of_tasks(shape: dict) -> None:
    """Every (step, layer, micro-batch) has each of its tasks once, and every visit each of its pages once."""
    schedule = cgopipe(**shape)
    layers, parts, steps = shape["num_layers"], shape["num_micro_batches"], shape["decode_steps"]
    first = 1 if shape["prefill"] else 0
    passes = steps + first
    assert len(set(schedule.labels())) == len(schedule)
    assert schedule.num_steps == passes
    decode, prefill = steps * layers * parts, first * layers * parts
    weights = passes * layers * parts if shape["stream_weights"] else 0
    expected = {
        Op.STAGE_W: weights,
        Op.LOAD_W: weights,
        Op.LOAD_X: first * (layers - 1) * parts,
        Op.PREFILL: prefill,
        Op.OFFLOAD_KV: prefill,
        Op.PRE_ATTN: decode,
        Op.OFFLOAD_QKV: decode,
        Op.CPU_ATTN: decode,
        Op.LOAD_H: decode,
        Op.POST_ATTN: decode,
        Op.SAMPLE: passes * parts,
    }
    assert Counter(task.op for task in schedule) == {op: n for op, n in expected.items() if n}


@given(schedules())
@settings(deadline=None, max_examples=60)
def test_issue_order_is_a_valid_order(schedule: Schedule) -> None:
    """Every dependency stands before the task that has it, and every task is on its class's lane."""
    for task in schedule:
        assert all(dep < task.id for dep in task.deps)
        assert task.lane is task.op.lane


@given(schedules(stream=True))
@settings(deadline=None, max_examples=40)
def test_a_layers_pages_precede_its_first_reader(schedule: Schedule) -> None:
    """By dependencies and lane order alone, all pages of a visit end before anything reads it."""
    before: list[set[int]] = []
    last: dict = {}
    for task in schedule:
        known = set(task.deps).union(*(before[d] for d in task.deps))
        if task.lane in last:
            known |= {last[task.lane]} | before[last[task.lane]]
        before.append(known)
        last[task.lane] = task.id
        if task.op in (Op.PREFILL, Op.POST_ATTN):
            pages = {
                i
                for i in np.flatnonzero(schedule.mask(Op.LOAD_W))
                if schedule.step[i] == task.step and schedule.layer[i] == task.layer
            }
            assert len(pages) == schedule.num_micro_batches
            assert pages <= known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "'num_layers' must be >= 1: 0"),
        ({"num_micro_batches": 0}, "'num_micro_batches' must be >= 1: 0"),
        ({"decode_steps": -1}, "'decode_steps' must be >= 0: -1"),
        ({"decode_steps": 0, "prefill": False}, "'decode_steps' must be >= 1: 0"),
    ],
)
def test_shapes_are_checked(arguments: dict, message: str) -> None:
    """An empty schedule is refused with the value."""
    with pytest.raises(InvalidValue) as caught:
        cgopipe(**{"num_layers": 1, "num_micro_batches": 1, "decode_steps": 1, **arguments})
    assert str(caught.value) == message


# -- safety -------------------------------------------------------------------------------------------


class Played:
    """A schedule that was played with some durations; finds tasks by class and place."""

    def __init__(self, schedule: Schedule, seconds: np.ndarray) -> None:
        self.schedule = schedule
        self.start, self.end = play(schedule, costs(seconds))
        self.layers, self.parts = schedule.num_layers, schedule.num_micro_batches
        self._ids = {(t.op, t.step, t.layer, t.part): t.id for t in schedule}

    def tasks(self, op: Op):
        """(number of layer visit, part, start, end) of every task of a class."""
        for i in np.flatnonzero(self.schedule.mask(op)):
            visit = int(self.schedule.step[i]) * self.layers + int(self.schedule.layer[i])
            yield visit, int(self.schedule.part[i]), self.start[i], self.end[i]

    def end_of(self, op: Op, step: int, layer: int, part: int) -> float:
        """End of one task."""
        return float(self.end[self._ids[op, step, layer, part]])


class Buffers:
    """Who uses which slot when: a tenant writes first, and may be followed only once its readers are done."""

    def __init__(self) -> None:
        self.slots: dict = defaultdict(dict)

    def write(self, slot, tenant: int, start: float, end: float) -> None:
        """`tenant` fills `slot` from `start` to `end`."""
        use = self.slots[slot].setdefault(tenant, {"from": start, "written": end, "read": np.inf, "until": end})
        use["from"], use["written"] = min(use["from"], start), max(use["written"], end)
        use["until"] = max(use["until"], end)

    def read(self, slot, tenant: int, start: float, end: float) -> None:
        """`tenant`'s content is read from `start` to `end`."""
        use = self.slots[slot][tenant]  # KeyError: read before any write was issued
        use["read"], use["until"] = min(use["read"], start), max(use["until"], end)

    def check(self) -> None:
        """Every read follows its writes, and no tenant writes while an earlier one is still in use."""
        for slot, tenants in self.slots.items():
            uses = [tenants[tenant] for tenant in sorted(tenants)]
            for use in uses:
                assert use["read"] >= use["written"], f"slot {slot} is read before it is written"
            for before, after in itertools.pairwise(uses):
                assert after["from"] >= before["until"], f"slot {slot} is overwritten while in use"


@given(schedules(prefill=True), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=200)
def test_no_buffer_is_overwritten_while_in_use(schedule: Schedule, seed: int) -> None:
    """Whatever the durations, every slot and ring is written before it is read and read before it is reused."""
    run = Played(schedule, random_seconds(schedule, seed))
    parts, layers = run.parts, run.layers
    buffers = Buffers()
    # The double buffer of weights and the pinned ring that feeds it.
    for visit, _, start, end in run.tasks(Op.LOAD_W):
        buffers.write(("weights", visit % 2), visit, start, end)
    for visit, page, start, end in run.tasks(Op.STAGE_W):
        number = visit * parts + page
        buffers.write(("pinned", number % PINNED_PAGES), number, start, end)
    for visit, page, start, end in run.tasks(Op.LOAD_W):
        number = visit * parts + page
        buffers.read(("pinned", number % PINNED_PAGES), number, start, end)
    if schedule.mask(Op.LOAD_W).any():
        for op in (Op.PREFILL, Op.POST_ATTN):
            for visit, _, start, end in run.tasks(op):
                buffers.read(("weights", visit % 2), visit, start, end)
    # Decode: slots on the device and on the host, for what goes down and for what comes up.
    uses = [
        ("device qkv", Op.PRE_ATTN, Op.OFFLOAD_QKV),
        ("host qkv", Op.OFFLOAD_QKV, Op.CPU_ATTN),
        ("host attended", Op.CPU_ATTN, Op.LOAD_H),
        ("device attended", Op.LOAD_H, Op.POST_ATTN),
    ]
    # Prefill: prompt slots hold hidden states and KV; layer 0 has no transfer, Prefill itself fills them.
    uses += [("prompt", Op.LOAD_X, Op.PREFILL), ("prompt", Op.PREFILL, Op.OFFLOAD_KV)]
    for kind, writer, reader in uses:
        for op, note in ((writer, buffers.write), (reader, buffers.read)):
            for visit, part, start, end in run.tasks(op):
                if op is Op.PREFILL and note == buffers.read and visit == 0:
                    continue
                if op is Op.PREFILL and note == buffers.write and visit > 0:
                    continue  # in place, on what LoadX brought
                number = visit * parts + part
                note((kind, number % ACTIVATION_SLOTS), number, start, end)
    for visit, part, start, end in run.tasks(Op.SAMPLE):
        if visit == layers - 1:  # the prefill's own
            number = visit * parts + part
            buffers.read(("prompt", number % ACTIVATION_SLOTS), number, start, end)
    # The prompts' hidden states on the host: written by each layer, read by the next.
    for visit, part, start, end in run.tasks(Op.OFFLOAD_KV):
        if visit < layers - 1:
            buffers.write(("prompt hidden", part), visit, start, end)
    for visit, part, start, end in run.tasks(Op.LOAD_X):
        buffers.read(("prompt hidden", part), visit - 1, start, end)
    buffers.check()


@given(schedules(prefill=True), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_data_arrives_before_it_is_used(schedule: Schedule, seed: int) -> None:
    """No task starts before what it reads has arrived: queries, prompt KV, attended states, the last token."""
    run = Played(schedule, random_seconds(schedule, seed))
    for task in schedule:
        place = (task.step, task.layer, task.part)
        if task.op is Op.CPU_ATTN:
            assert run.start[task.id] >= run.end_of(Op.OFFLOAD_QKV, *place)
            assert run.start[task.id] >= run.end_of(Op.OFFLOAD_KV, 0, task.layer, task.part)
            if task.step > 1:
                assert run.start[task.id] >= run.end_of(Op.CPU_ATTN, task.step - 1, task.layer, task.part)
        elif task.op is Op.PRE_ATTN and task.layer == 0:
            assert run.start[task.id] >= run.end_of(Op.SAMPLE, task.step - 1, run.layers - 1, task.part)
        elif task.op is Op.PRE_ATTN:
            assert run.start[task.id] >= run.end_of(Op.POST_ATTN, task.step, task.layer - 1, task.part)
        elif task.op is Op.POST_ATTN:
            assert run.start[task.id] >= run.end_of(Op.LOAD_H, *place)
        elif task.op is Op.SAMPLE:
            last = Op.PREFILL if task.step == 0 else Op.POST_ATTN
            assert run.start[task.id] >= run.end_of(last, *place)


@given(schedules(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_lanes_run_in_order_without_overlap(schedule: Schedule, seed: int) -> None:
    """Tasks of one lane follow each other in the order in which the schedule lists them."""
    run = Played(schedule, random_seconds(schedule, seed))
    for lane in LANES:
        ids = schedule.lane_tasks(lane)
        assert (run.start[ids][1:] >= run.end[ids][:-1]).all()


def test_a_layer_of_weights_never_blocks_attended_states() -> None:
    """With weights cut into pages, LoadH waits for at most one page, not for a whole layer."""
    schedule = cgopipe(num_layers=4, num_micro_batches=4, decode_steps=2, prefill=False)
    labels = schedule.labels()
    h2d = [labels[i] for i in schedule.lane_tasks(LANES[2])]
    steady = h2d[h2d.index("LoadH(1,0,0)") : h2d.index("LoadH(2,3,0)")]
    assert all(name.startswith(("LoadH", "WPinToG")[i % 2]) for i, name in enumerate(steady))


# -- systems ------------------------------------------------------------------------------------------


def test_build_schedule_follows_the_policy() -> None:
    """The schedule of a run has prefill, gen_len - 1 steps, and weights only if some travel."""
    policy = Policy(batch_size=10, micro_batch_size=4, weights_on_gpu=0.5)
    schedule = build_schedule(3, policy, gen_len=4)
    assert schedule == cgopipe(num_layers=3, num_micro_batches=3, decode_steps=3)
    resident = build_schedule(3, Policy(batch_size=10, micro_batch_size=4, weights_on_gpu=1.0), gen_len=4)
    assert not resident.mask(Op.LOAD_W).any()
    assert build_schedule(3, policy, gen_len=4, num_micro_batches=2).num_micro_batches == 2


@pytest.mark.parametrize(
    ("system", "placement", "name"),
    [
        ("moe-lightning", {}, "cgopipe"),
        ("moe-lightning", {"attention_on_gpu": True}, "gpu-attention"),
        ("moe-lightning", {"attention_on_gpu": True, "kv_on_gpu": 0.5}, "gpu-attention"),
        ("fastdecode", {}, "overlapped"),
        ("flexgen", {"attention_on_gpu": True}, "flexgen"),
        ("flexgen-c", {}, "flexgen-c"),
        ("deepspeed-zero", {"attention_on_gpu": True, "kv_on_gpu": 1.0}, "zero-inference"),
    ],
)
def test_every_system_has_its_schedule(system: str, placement: dict, name: str) -> None:
    """A system's schedule is built, safe, and runs prefill and a step per further token."""
    parts = 1 if system == "deepspeed-zero" else 3
    schedule = build_schedule(
        2, Policy(batch_size=2 * parts, micro_batch_size=2, **placement), gen_len=4, system=system
    )
    assert (schedule.name, schedule.num_steps, schedule.num_micro_batches) == (name, 4, parts)
    assert schedule.mask(Op.SAMPLE).sum() == 4 * parts
    check_schedule(schedule)


def test_every_system_is_tried() -> None:
    """The list above has all systems that there are."""
    assert set(SYSTEMS) == {"moe-lightning", "fastdecode", "flexgen", "flexgen-c", "deepspeed-zero"}


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        ("moe-lightning", {"kv_on_gpu": 0.5}, "'kv_on_gpu' must be 0 where attention runs on the CPU: 0.5"),
        ("flexgen", {}, "'flexgen' computes decode attention on the GPU; use --attention-on-gpu 1"),
        (
            "flexgen-c",
            {"attention_on_gpu": True},
            "'flexgen-c' computes decode attention on the CPU; use --attention-on",
        ),
        ("fastdecode", {"attention_on_gpu": True}, "'fastdecode' computes decode attention on the CPU"),
        ("deepspeed-zero", {}, "'deepspeed-zero' computes decode attention on the GPU"),
        ("deepspeed-zero", {"attention_on_gpu": True}, "'deepspeed-zero' has one batch and no micro-batches; .*: 2"),
    ],
)
def test_a_policy_that_contradicts_its_system_is_refused(system: str, options: dict, message: str) -> None:
    """A placement that a system does not have is refused with the option that would do."""
    with pytest.raises(InvalidValue, match=message):
        build_schedule(2, Policy(batch_size=2, micro_batch_size=1, **options), gen_len=2, system=system)


def test_an_unknown_system_is_refused() -> None:
    """A misspelt system is answered with the nearest."""
    with pytest.raises(UnknownName, match="Did you mean 'moe-lightning'"):
        build_schedule(2, Policy(batch_size=2, micro_batch_size=1), gen_len=2, system="moe-lightening")
