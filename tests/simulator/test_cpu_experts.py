"""Experts where their weights lie: the schedules, their proof, their costs, and what a run takes."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import BatchShape, Hardware, MoEModel, Policy, Workload, evaluate
from hrm.bound import physical_bound
from hrm.errors import InvalidSchedule, InvalidValue
from hrm.hardware import Curve
from hrm.pipeline import ACTIVATION_SLOTS
from hrm.task_times import TaskTimes
from simulator.costs import schedule_costs
from simulator.engine import play
from simulator.expert_costs import expert_work
from simulator.loop import find_loop
from simulator.schedules import build_schedule, cgopipe, cpu_experts, schedule_builder
from simulator.simulate import simulate, simulate_schedule
from simulator.task import Lane, Op, Schedule
from simulator.timeline import Timeline
from simulator.validate import check_schedule
from tests.simulator.support import costs
from tests.simulator.test_validate import ancestors, without_line, without_wait

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b").with_layers(2)
L4 = Hardware.from_catalog("gcp-l4-1x")
ROOMY = L4.with_capacity(gpu_bytes=2**50, cpu_bytes=2**50)
PAPER, SPEC = L4.rates("paper"), L4.rates("spec")
EXPERTS = {Op.OFFLOAD_FFN, Op.CPU_FFN, Op.GPU_FFN, Op.LOAD_FFN, Op.ADD_FFN}


def lane_text(schedule: Schedule, lane: Lane) -> str:
    """The tasks of a lane in order."""
    return " ".join(str(schedule[int(i)]) for i in schedule.lane_tasks(lane))


# -- schedules ----------------------------------------------------------------------------------------


def test_one_micro_batch_of_one_layer() -> None:
    """With nothing to overlap, prefill and a decode step are chains; both crossings to the CPU stand in them."""
    schedule = cpu_experts(num_layers=1, num_micro_batches=1, decode_steps=1)
    text = """schedule cpu-experts layers=1 micro_batches=1 steps=2
        Prefill(0,0,0) @gpu
        OffloadFFN(0,0,0) @d2h < Prefill(0,0,0)
        CPUFFN(0,0,0) @cpu < OffloadFFN(0,0,0)
        GPUFFN(0,0,0) @gpu < Prefill(0,0,0)
        LoadFFN(0,0,0) @h2d < CPUFFN(0,0,0)
        AddFFN(0,0,0) @gpu < LoadFFN(0,0,0) GPUFFN(0,0,0)
        Sample(0,0,0) @gpu < AddFFN(0,0,0)
        OffloadKV(0,0,0) @d2h < AddFFN(0,0,0)
        PreAttn(1,0,0) @gpu < Sample(0,0,0)
        OffloadQKV(1,0,0) @d2h < PreAttn(1,0,0)
        CPUAttn(1,0,0) @cpu < OffloadQKV(1,0,0) OffloadKV(0,0,0)
        LoadH(1,0,0) @h2d < CPUAttn(1,0,0)
        PostAttn(1,0,0) @gpu < LoadH(1,0,0)
        OffloadFFN(1,0,0) @d2h < PostAttn(1,0,0)
        CPUFFN(1,0,0) @cpu < OffloadFFN(1,0,0)
        GPUFFN(1,0,0) @gpu < PostAttn(1,0,0)
        LoadFFN(1,0,0) @h2d < CPUFFN(1,0,0)
        AddFFN(1,0,0) @gpu < LoadFFN(1,0,0) GPUFFN(1,0,0)
        Sample(1,0,0) @gpu < AddFFN(1,0,0)"""
    assert Schedule.from_text(text).diff(schedule) == ""


def test_attention_on_the_gpu_crosses_once() -> None:
    """With attention and the whole KV cache on the GPU only the experts' input and output cross the link."""
    schedule = cpu_experts(
        num_layers=1, num_micro_batches=2, decode_steps=1, attention_on_gpu=True, stream_kv=False, resident=False,
        prefill=False,
    )  # fmt: skip
    text = """schedule cpu-experts layers=1 micro_batches=2 steps=1
        PreAttn(1,0,0) @gpu
        GPUAttn(1,0,0) @gpu < PreAttn(1,0,0)
        PostAttn(1,0,0) @gpu < GPUAttn(1,0,0)
        OffloadFFN(1,0,0) @d2h < PostAttn(1,0,0)
        CPUFFN(1,0,0) @cpu < OffloadFFN(1,0,0)
        PreAttn(1,0,1) @gpu
        GPUAttn(1,0,1) @gpu < PreAttn(1,0,1)
        PostAttn(1,0,1) @gpu < GPUAttn(1,0,1)
        OffloadFFN(1,0,1) @d2h < PostAttn(1,0,1)
        CPUFFN(1,0,1) @cpu < OffloadFFN(1,0,1)
        LoadFFN(1,0,0) @h2d < CPUFFN(1,0,0)
        AddFFN(1,0,0) @gpu < LoadFFN(1,0,0)
        Sample(1,0,0) @gpu < AddFFN(1,0,0)
        LoadFFN(1,0,1) @h2d < CPUFFN(1,0,1)
        AddFFN(1,0,1) @gpu < LoadFFN(1,0,1)
        Sample(1,0,1) @gpu < AddFFN(1,0,1)"""
    assert Schedule.from_text(text).diff(schedule) == ""


def test_the_cpu_alternates_between_experts_and_attention() -> None:
    """In the middle of a step the CPU does experts of a micro-batch, then attention of the one two later."""
    schedule = cpu_experts(num_layers=1, num_micro_batches=5, decode_steps=1, prefill=False)
    assert lane_text(schedule, Lane.CPU) == (
        "CPUAttn(1,0,0) CPUAttn(1,0,1) CPUFFN(1,0,0) CPUAttn(1,0,2) CPUFFN(1,0,1) CPUAttn(1,0,3) CPUFFN(1,0,2) "
        "CPUAttn(1,0,4) CPUFFN(1,0,3) CPUFFN(1,0,4)"
    )
    assert "PostAttn(1,0,2) GPUFFN(1,0,2) AddFFN(1,0,1) Sample(1,0,1) PreAttn(1,0,4)" in lane_text(schedule, Lane.GPU)


SHAPES = [
    {
        "num_layers": layers,
        "num_micro_batches": parts,
        "decode_steps": steps,
        "attention_on_gpu": on_gpu,
        "stream_kv": kv,
        "resident": resident,
        "stream_prefill": streams,
        "prefill": prefill,
    }
    for layers, parts, steps, on_gpu, kv, resident, prefill, streams in itertools.product(
        (1, 2, 3), (1, 2, 3, 4), range(4), (False, True), (False, True), (False, True), (False, True), (False, True)
    )
    if (steps or prefill) and (kv or on_gpu) and (prefill or not streams)
]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_every_shape_is_safe(parts: int) -> None:
    """Whatever layers, micro-batches, steps and places, the schedule is proved, and has every task once."""
    for shape in SHAPES:
        if shape["num_micro_batches"] == parts:
            schedule = cpu_experts(**shape)
            check_schedule(schedule)
            visits = shape["num_layers"] * parts
            split = shape["decode_steps"] + (shape["prefill"] and not shape["stream_prefill"])
            for op in EXPERTS:
                wanted = 0 if op is Op.GPU_FFN and not shape["resident"] else visits * split
                assert schedule.mask(op).sum() == wanted


@pytest.mark.parametrize("attention_on_gpu", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_no_dependency_can_go(attention_on_gpu: bool, parts: int) -> None:
    """Without any one dependency, or any one task of the experts, the schedule is refused, or says what it said."""
    schedule = cpu_experts(num_layers=2, num_micro_batches=parts, decode_steps=1, attention_on_gpu=attention_on_gpu)
    known = ancestors(schedule)
    for task in schedule:
        for dep in task.deps:
            changed = without_wait(schedule, str(task), str(schedule[dep]))
            if ancestors(changed) != known:
                with pytest.raises(InvalidSchedule, match="wait"):
                    check_schedule(changed)
        if task.op in EXPERTS:
            with pytest.raises(InvalidSchedule, match="to wait for"):
                check_schedule(without_line(schedule, str(task)))


def test_slots_are_a_ring() -> None:
    """A result that is added up only after three more were handed over lies in a slot that is filled again."""
    schedule = cpu_experts(num_layers=1, num_micro_batches=4, decode_steps=1, prefill=False)
    lines = schedule.to_text().split("\n")
    late = [line for line in lines if line.startswith(("LoadFFN(1,0,0)", "AddFFN(1,0,0)", "Sample(1,0,0)"))]
    rest = [line for line in lines if line not in late]
    last = max(i for i, line in enumerate(rest) if line.startswith("PostAttn"))
    moved = Schedule.from_text("\n".join([*rest[: last + 1], *late, *rest[last + 1 :]]))
    with pytest.raises(InvalidSchedule, match=re.escape("CPUFFN(1,0,3) does not wait for LoadFFN(1,0,0), which still")):
        check_schedule(moved)


@given(st.sampled_from([x for x in SHAPES if x["decode_steps"] == 3]), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_few_micro_batches_are_in_flight(shape: dict, seed: int) -> None:
    """Played with random durations, between PreAttn and AddFFN are never more micro-batches than slots."""
    schedule = cpu_experts(**shape)
    seconds = np.random.default_rng(seed).exponential(size=len(schedule))
    start, end = play(schedule, costs(seconds))
    began, over = (
        np.sort(start[schedule.mask(Op.PRE_ATTN)]),
        np.sort(end[schedule.mask(Op.ADD_FFN) & (schedule.step > 0)]),
    )
    assert (began[ACTIVATION_SLOTS:] >= over[:-ACTIVATION_SLOTS]).all()


@pytest.mark.parametrize(
    ("seconds", "busy"),
    [
        # Attention and experts on the CPU beside a GPU with less to do, and the other way round.
        ({Op.CPU_ATTN: 1.0, Op.CPU_FFN: 1.0, Op.PRE_ATTN: 0.4, Op.POST_ATTN: 0.7, Op.GPU_FFN: 0.7}, Lane.CPU),
        ({Op.CPU_ATTN: 0.1, Op.CPU_FFN: 3.0, Op.PRE_ATTN: 0.7, Op.POST_ATTN: 1.0, Op.GPU_FFN: 1.0}, Lane.CPU),
        ({Op.CPU_ATTN: 1.0, Op.CPU_FFN: 0.2, Op.PRE_ATTN: 0.4, Op.POST_ATTN: 0.4, Op.GPU_FFN: 1.0}, Lane.GPU),
        ({Op.CPU_ATTN: 0.4, Op.CPU_FFN: 1.0, Op.PRE_ATTN: 0.7, Op.POST_ATTN: 0.7, Op.GPU_FFN: 0.4}, Lane.GPU),
    ],
)
@pytest.mark.parametrize("parts", [3, 4, 7])
def test_the_busier_processor_never_waits(seconds: dict, busy: Lane, parts: int) -> None:
    """From three micro-batches on, the processor with more to do has no gap in steady decode."""
    schedule = cpu_experts(num_layers=3, num_micro_batches=parts, decode_steps=5, prefill=False)
    each = {Op.ADD_FFN: 0.1, Op.OFFLOAD_QKV: 0.1, Op.OFFLOAD_FFN: 0.1, Op.LOAD_H: 0.1, Op.LOAD_FFN: 0.1} | seconds
    spent = np.array([each.get(task.op, 0.0) for task in schedule])
    start, end = play(schedule, costs(spent))
    timeline = Timeline(schedule, start, end, spent, spent)
    assert timeline.decode_utilization()[busy.value] == pytest.approx(1.0, abs=1e-9)


def test_two_micro_batches_take_turns() -> None:
    """With two, the CPU does not wait either, if the GPU does its part while the CPU has the other one."""
    schedule = cpu_experts(num_layers=3, num_micro_batches=2, decode_steps=5, prefill=False, resident=False)
    each = {Op.CPU_ATTN: 1.0, Op.CPU_FFN: 1.0, Op.PRE_ATTN: 0.3, Op.POST_ATTN: 0.7, Op.ADD_FFN: 0.3}
    spent = np.array([each.get(task.op, 0.1 if task.op is not Op.SAMPLE else 0.0) for task in schedule])
    start, end = play(schedule, costs(spent))
    assert Timeline(schedule, start, end, spent, spent).decode_utilization()["cpu"] == pytest.approx(1.0, abs=1e-9)


def test_bad_sizes_are_refused() -> None:
    """No layers, no micro-batches, or nothing to do is one line."""
    for options in ({"num_layers": 0}, {"num_micro_batches": 0}):
        with pytest.raises(InvalidValue, match="must be >= 1"):
            cpu_experts(**({"num_layers": 1, "num_micro_batches": 1, "decode_steps": 1} | options))
    with pytest.raises(InvalidValue, match="'decode_steps' must be >= 1: 0"):
        cpu_experts(num_layers=1, num_micro_batches=1, decode_steps=0, prefill=False)


# -- policies -----------------------------------------------------------------------------------------


def test_a_policy_chooses_the_schedule() -> None:
    """F_g = 0 has this schedule, without tasks for resident experts where r_w = 0, and the usual one where r_w = 1."""
    policy = Policy(batch_size=4, micro_batch_size=2, ffn_on_gpu=False)
    for options in ({}, {"attention_on_gpu": True}, {"attention_on_gpu": True, "kv_on_gpu": 1.0}):
        for share in (0.0, 0.5):
            schedule = build_schedule(2, replace(policy, weights_on_gpu=share, **options), gen_len=3)
            assert schedule.name == "cpu-experts"
            assert set(schedule.step[schedule.mask(Op.LOAD_W)]) == {0}
            assert schedule.mask(Op.GPU_FFN).any() == (share > 0)
            assert schedule.mask(Op.GPU_ATTN).any() == bool(options)
            assert schedule.mask(Op.LOAD_KV).any() == (options.get("kv_on_gpu") is None and bool(options))
        whole = replace(policy, weights_on_gpu=1.0, **options)
        assert build_schedule(2, whole, gen_len=3) == build_schedule(2, replace(whole, ffn_on_gpu=True), gen_len=3)


@pytest.mark.parametrize("system", ["flexgen", "flexgen-c", "fastdecode", "deepspeed-zero"])
def test_other_systems_have_their_experts_on_the_gpu(system: str) -> None:
    """One line says what to do."""
    message = f"'{system}' computes all experts on the GPU; use --ffn-on-gpu 1 or --system moe-lightning"
    with pytest.raises(InvalidValue, match=message):
        schedule_builder(2, Policy(batch_size=2, micro_batch_size=2, ffn_on_gpu=False), system=system)


# -- costs --------------------------------------------------------------------------------------------

OVERHEADS = replace(SPEC, task_s=1e-5, cpu_task_s=3e-5, transfer_s=2e-5, gpu_launch_s=1e-6)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v2-lite", "opt-30b"])
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_tasks_add_up_to_the_closed_form(name: str, num_gpus: int) -> None:
    """GPU and CPU get what the closed form gives them and two more tasks; no FLOP is lost, in any kind of layer."""
    model, r_w = MoEModel.from_catalog(name).with_layers(2), 0.3
    batch = BatchShape(((100, 90, 40), (100, 60)), 3)
    split = cpu_experts(num_layers=2, num_micro_batches=2, decode_steps=1)
    whole = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=1)
    options = {"rates": OVERHEADS, "batch": batch, "weights_on_gpu": r_w, "num_gpus": num_gpus}
    found, usual = (schedule_costs(schedule, model, **options) for schedule in (split, whole))
    times = TaskTimes(model, OVERHEADS, num_gpus)
    for step, tokens in ((0, (230.0, 160.0)), (1, (3.0, 2.0))):
        usual_gpu = [Op.PREFILL] if step == 0 else [Op.PRE_ATTN, Op.POST_ATTN]
        for layer, part in itertools.product(range(2), range(2)):
            kind, n = model.kinds[model.order[layer]], tokens[part]
            at, was = (
                {op: (x.step == step) & (x.layer == layer) & (x.part == part) & x.mask(op) for op in Op}
                for x in (split, whole)
            )
            gpu = sum(found.seconds[at[op]].sum() for op in (*usual_gpu, Op.GPU_FFN, Op.ADD_FFN))
            before = sum(usual.seconds[was[op]].sum() for op in usual_gpu)
            assert gpu == pytest.approx(before - (1 - r_w) * times.gpu_experts(n, kind) + 2e-5)
            assert found.seconds[at[Op.CPU_FFN]] == pytest.approx((1 - r_w) * times.cpu_experts(n, kind) + 4e-5)
            assert found.seconds[at[Op.OFFLOAD_FFN]] == pytest.approx(times.offload_routed(n * model.hidden_bytes))
            assert found.seconds[at[Op.LOAD_FFN]] == pytest.approx(times.h2d(n * model.hidden_bytes))
            work = sum(found.flops[at[op]].sum() for op in (*usual_gpu, *EXPERTS))
            assert work == pytest.approx(sum(usual.flops[was[op]].sum() for op in usual_gpu))
            weights = sum(found.bytes[at[op]].sum() for op in (Op.CPU_FFN, Op.GPU_FFN))
            assert weights == pytest.approx(times.active_expert_bytes(n, kind))
            read = (1 - r_w) * weights / found.seconds[at[Op.CPU_FFN]]
            assert found.demands["dram"][at[Op.CPU_FFN]] == pytest.approx(np.minimum(read, OVERHEADS.dram_bandwidth))
            assert not found.demands["dram"][at[Op.GPU_FFN]].any()


def test_experts_on_the_cpu_share_its_memory() -> None:
    """What the CPU's experts read of its memory, KV on its way to the GPU cannot have at the same time."""
    policy = Policy(batch_size=96, micro_batch_size=32, ffn_on_gpu=False, attention_on_gpu=True)
    batch = BatchShape.uniform(96, 32, 1500, 6)
    shared, alone = (simulate(MIXTRAL, SPEC, policy, batch, contention=x) for x in (True, False))
    assert shared.decode_s > 1.02 * alone.decode_s


def test_without_a_gpu_experts_take_cores() -> None:
    """On a machine whose lanes share cores, tasks of the experts ask for one each."""
    rates = replace(SPEC, copy_bandwidth=4e9, cores=Curve.constant(1.5))
    schedule = cpu_experts(num_layers=1, num_micro_batches=1, decode_steps=1, prefill=False)
    demands = schedule_costs(
        schedule, MIXTRAL.with_layers(1), rates, BatchShape.uniform(2, 2, 9, 3), weights_on_gpu=0.5
    )
    for op in (Op.CPU_FFN, Op.GPU_FFN, Op.ADD_FFN):
        assert demands.demands["cores"][schedule.mask(op)].tolist() == [1.0]


def test_a_gpu_lane_on_its_own_cores_takes_none_of_the_hosts() -> None:
    """Where half the cores stand for the GPU, its tasks ask for none of the shared ones; the others still do."""
    rates = replace(SPEC, copy_bandwidth=4e9, cores=Curve.constant(1.0), gpu_on_own_cores=True)
    schedule = cpu_experts(num_layers=1, num_micro_batches=1, decode_steps=1, prefill=False)
    batch = BatchShape.uniform(2, 2, 9, 3)
    cores = schedule_costs(schedule, MIXTRAL.with_layers(1), rates, batch, weights_on_gpu=0.5).demands["cores"]
    for op, wanted in ((Op.PRE_ATTN, 0.0), (Op.GPU_FFN, 0.0), (Op.CPU_FFN, 1.0), (Op.CPU_ATTN, 1.0)):
        assert cores[schedule.mask(op)].tolist() == [wanted], op


def test_processors_that_slow_each_other_are_asked_by_all_lanes() -> None:
    """Of both processors together every task wants a lane's worth, a paced copy the part in which its core works."""
    both = Curve(((1.0, 1.0), (3.0, 1.7)))
    rates = replace(
        SPEC, copy_bandwidth=4e9, h2d_bandwidth=1e9, d2h_bandwidth=2e9, transfer_s=3e-6,
        cores=Curve.constant(2.0), gpu_on_own_cores=True, processors=both,
    )  # fmt: skip
    schedule = cpu_experts(num_layers=1, num_micro_batches=1, decode_steps=1, prefill=False)
    batch = BatchShape.uniform(2, 2, 9, 3)
    found = schedule_costs(schedule, MIXTRAL.with_layers(1), rates, batch, weights_on_gpu=0.5)
    assert found.capacities["processors"] is both
    wanted = {op: found.demands["processors"][schedule.mask(op)] for op in Op}
    for op in (Op.PRE_ATTN, Op.GPU_FFN, Op.CPU_FFN, Op.CPU_ATTN):
        assert wanted[op].tolist() == [1.0], op
    for op, pace, transfers in ((Op.LOAD_H, 1e9, 1), (Op.OFFLOAD_QKV, 2e9, 1), (Op.OFFLOAD_FFN, 2e9, 3)):
        overhead, moved = transfers * 3e-6, found.bytes[schedule.mask(op)]
        busy = (overhead + moved / 4e9) / (overhead + moved / pace)
        assert wanted[op] == pytest.approx(busy), op
        assert found.demands["cores"][schedule.mask(op)] == pytest.approx(busy), op


# -- whole runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("efficiency", ["spec", "paper", "fitted"])
@pytest.mark.parametrize("attention_on_gpu", [False, True])
@pytest.mark.parametrize("weights_on_gpu", [0.0, 0.3, 0.9])
def test_decode_takes_what_the_closed_form_says(efficiency: str, attention_on_gpu: bool, weights_on_gpu: float) -> None:
    """Where one resource binds, decode is within 1 % of the closed form: the CPU for small r_w, the GPU for large."""
    model = MIXTRAL.with_layers(8)
    policy = Policy(
        batch_size=64, micro_batch_size=16, ffn_on_gpu=False, attention_on_gpu=attention_on_gpu,
        weights_on_gpu=weights_on_gpu,
    )  # fmt: skip
    closed = evaluate(model, ROOMY, Workload.uniform(128, 9), policy, efficiency=efficiency).estimate
    assert closed.bottleneck.startswith("CPU" if weights_on_gpu < 0.5 else "GPU")
    played = simulate(model, L4.rates(efficiency), policy, BatchShape.uniform(64, 16, 128, 9))
    assert played.decode_s == pytest.approx(closed.decode_s, rel=0.01)


@pytest.mark.parametrize("attention_on_gpu", [False, True])
def test_a_run_with_streamed_prefill_takes_what_the_closed_form_says(attention_on_gpu: bool) -> None:
    """The closed form prefills on the GPU; with such a prefill the whole run is within 2 % of it."""
    model = MIXTRAL.with_layers(8)
    policy = Policy(
        batch_size=256, micro_batch_size=32, ffn_on_gpu=False, attention_on_gpu=attention_on_gpu, weights_on_gpu=0.3
    )
    closed = evaluate(model, ROOMY, Workload.uniform(128, 9), policy, efficiency="paper").estimate
    schedule = cpu_experts(
        num_layers=8, num_micro_batches=8, decode_steps=8, attention_on_gpu=attention_on_gpu, stream_prefill=True
    )
    timeline = simulate_schedule(schedule, model, PAPER, BatchShape.uniform(256, 32, 128, 9), weights_on_gpu=0.3)
    assert timeline.prefill_s == pytest.approx(closed.prefill_s, rel=0.02)
    assert timeline.makespan == pytest.approx(closed.prefill_s + closed.decode_s, rel=0.02)


def test_prefill_where_weights_lie_is_bound_by_the_cpu() -> None:
    """Without weights that travel, prompts of many tokens keep the CPU at their experts all the time."""
    schedule = cpu_experts(num_layers=2, num_micro_batches=4, decode_steps=1, resident=False)
    result = simulate_schedule(schedule, MIXTRAL, SPEC, BatchShape.uniform(64, 16, 200, 2), weights_on_gpu=0.0)
    compute = 2 * 4 * float(TaskTimes(MIXTRAL, SPEC).cpu_experts(3200.0))
    assert compute <= result.prefill_s <= 1.05 * compute


@given(
    st.integers(1, 5), st.integers(1, 200), st.integers(1, 300), st.integers(1, 6), st.floats(0, 0.9), st.booleans(),
    st.booleans(), st.sampled_from(["paper", "spec"]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_no_run_passes_the_physical_bound(g, micro, prompt, gen_len, r_w, on_gpu, contention, efficiency) -> None:
    """What is simulated stays under what the machine can physically do, decode alone too.

    The bound has all of prefill's experts on the GPU. Left out are shares so large (of the machine here, above 0.98)
    that taking the rest to the CPU would make prefill faster.
    """
    policy = Policy(
        batch_size=g * micro, micro_batch_size=micro, ffn_on_gpu=False, attention_on_gpu=on_gpu, weights_on_gpu=r_w
    )
    rates = L4.rates(efficiency)
    result = simulate(
        MIXTRAL, rates, policy, BatchShape.uniform(g * micro, micro, prompt, gen_len), contention=contention
    )
    bound = partial(physical_bound, MIXTRAL, rates, policy, prompt_len=prompt, gen_len=gen_len)
    assert result.throughput_tok_s <= bound().tok_s * (1 + 1e-9)
    if gen_len > 1:
        assert result.decode_s >= max(bound(prefill=False).seconds.values()) * (1 - 1e-9)


@pytest.mark.parametrize("attention_on_gpu", [False, True])
def test_long_runs_are_sampled(attention_on_gpu: bool) -> None:
    """A run has a step that repeats; sampled and exact differ by less than 0.5 %."""
    model = MIXTRAL.with_layers(4)
    policy = Policy(
        batch_size=60, micro_batch_size=20, ffn_on_gpu=False, attention_on_gpu=attention_on_gpu, weights_on_gpu=0.2
    )
    assert find_loop(schedule_builder(4, policy), 100) is not None
    batch = BatchShape.uniform(60, 20, 77, 100)
    sampled, exact = (simulate(model, L4.rates("fitted"), policy, batch, exact=x) for x in (False, True))
    assert sampled.played_tasks < exact.played_tasks / 3
    assert sampled.num_tasks == exact.played_tasks
    assert sampled.simulated_s == pytest.approx(exact.simulated_s, rel=0.005)


def test_requests_that_end_early_leave_the_experts_less() -> None:
    """With outputs of different lengths a run is shorter, by the experts' work too."""
    policy = Policy(batch_size=8, micro_batch_size=4, ffn_on_gpu=False)
    whole = BatchShape.uniform(8, 4, 20, 6)
    early = replace(whole, output_lens=((6, 2, 2, 1), (1, 1, 1, 1)))
    one, other = (simulate(MIXTRAL, SPEC, policy, batch) for batch in (whole, early))
    assert other.prefill_s == pytest.approx(one.prefill_s)
    assert other.decode_s < 0.6 * one.decode_s
    timeline = other.timeline
    ended = (timeline.schedule.part == 1) & timeline.schedule.mask(Op.CPU_FFN) & (timeline.schedule.step > 0)
    assert not (timeline.end - timeline.start)[ended].any()


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), skew=st.floats(0, 3), tokens=st.integers(1, 200))
def test_popular_residents_take_more_of_the_work(share: float, skew: float, tokens: int) -> None:
    """The GPU with popular experts does at least their share, and nothing is lost; even routing changes nothing."""
    model = MoEModel.from_catalog("mixtral-8x7b").with_routing([1 / (1 + e) ** skew for e in range(8)])
    layer, count = model.main_layer, np.array([float(tokens)])
    even = expert_work(model, count, layer, share)
    popular = expert_work(model, count, layer, share, popular=True)
    for which in (0, 1):
        both = popular[Op.GPU_FFN][which] + popular[Op.CPU_FFN][which]
        assert both == pytest.approx(even[Op.GPU_FFN][which] + even[Op.CPU_FFN][which])
        assert popular[Op.GPU_FFN][which] >= even[Op.GPU_FFN][which] * (1 - 1e-9)
        if skew == 0:
            assert popular[Op.GPU_FFN][which] == pytest.approx(even[Op.GPU_FFN][which])
