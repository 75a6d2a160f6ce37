"""Work of tasks: bytes, FLOPs, seconds, demands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import BatchShape, Hardware, MoEModel
from hrm.hardware import Curve
from hrm.task_times import TaskTimes
from simulator.costs import Costs, schedule_costs
from simulator.schedules import cgopipe
from simulator.task import Op, Schedule
from tests.simulator.support import schedules

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b").with_layers(2)
SPEC = Hardware.from_catalog("gcp-l4-1x").rates("spec")
RUN = cgopipe(num_layers=2, num_micro_batches=3, decode_steps=2)
BATCH = BatchShape(((100, 90, 40), (100, 60, 50), (70, 70)), 3)


def work(schedule: Schedule = RUN, *, r_w: float = 0.25, batch: BatchShape = BATCH, rates=SPEC) -> Costs:
    """Costs of a small run."""
    return schedule_costs(schedule, MIXTRAL, rates, batch, weights_on_gpu=r_w)


def of(column: np.ndarray, op: Op) -> np.ndarray:
    """A column's values for one class of task."""
    return column[RUN.mask(op)]


def test_pages_carry_the_streamed_weights() -> None:
    """The pages of a visit add up to the layer's experts that are not resident, staged and transferred."""
    moved = work().bytes
    per_visit = 0.75 * MIXTRAL.layer_expert_bytes
    assert of(moved, Op.LOAD_W).sum() == pytest.approx(RUN.num_steps * 2 * per_visit)
    assert of(moved, Op.STAGE_W).sum() == pytest.approx(of(moved, Op.LOAD_W).sum())


def test_transfers_carry_their_tensors() -> None:
    """Q, K and V go down, attended states come up, prompt states and KV leave in prefill."""
    moved = work().bytes
    assert set(of(moved, Op.OFFLOAD_QKV)) == {3 * (4096 + 2048) * 2, 2 * (4096 + 2048) * 2}
    assert set(of(moved, Op.LOAD_H)) == {3 * 4096 * 2, 2 * 4096 * 2}
    assert of(moved, Op.LOAD_X).tolist() == [230 * 8192, 210 * 8192, 140 * 8192]
    kv, both = 2048 * 2, 2048 * 2 + 8192
    assert sorted(of(moved, Op.OFFLOAD_KV)) == sorted([n * w for n in (230, 210, 140) for w in (kv, both)])


def test_attention_reads_a_cache_that_grows() -> None:
    """Each decode step attends to one more token of every sequence."""
    moved, flops = work().bytes, work().flops
    for part, sequences in enumerate((3, 3, 2)):
        first, second = (moved[RUN.mask(Op.CPU_ATTN) & (RUN.step == step) & (RUN.part == part)] for step in (1, 2))
        assert (second - first).tolist() == [sequences * MIXTRAL.kv_token_bytes] * 2
        assert first[0] >= (BATCH.prompt_tokens[part] + sequences) * MIXTRAL.kv_token_bytes
    assert of(flops, Op.CPU_ATTN) == pytest.approx(of(moved, Op.CPU_ATTN) / MIXTRAL.kv_token_bytes * 4 * 4096)


def test_transfers_compute_nothing() -> None:
    """Copies have no FLOPs, kernels have some."""
    flops = work().flops
    for op in (Op.LOAD_W, Op.STAGE_W, Op.LOAD_H, Op.LOAD_X, Op.OFFLOAD_KV, Op.OFFLOAD_QKV):
        assert not of(flops, op).any()
    for op in (Op.PRE_ATTN, Op.POST_ATTN, Op.CPU_ATTN, Op.PREFILL, Op.SAMPLE):
        assert (of(flops, op) > 0).all()


def test_seconds_are_the_closed_forms() -> None:
    """Every class takes the time that the closed-form model gives it: one source of task times."""
    times, seconds = TaskTimes(MIXTRAL, SPEC), work().seconds
    third = RUN.part == 2
    pick = {op: float(seconds[RUN.mask(op) & third][0]) for op in (Op.PRE_ATTN, Op.POST_ATTN, Op.SAMPLE, Op.LOAD_H)}
    assert pick[Op.PRE_ATTN] == pytest.approx(float(times.pre_attention(2.0)))
    assert pick[Op.POST_ATTN] == pytest.approx(float(times.post_attention(2.0)))
    assert pick[Op.SAMPLE] == pytest.approx(float(times.sample(2.0)))
    assert pick[Op.LOAD_H] == pytest.approx(float(times.h2d(2 * 8192)))
    page = float(times.h2d(0.25 * MIXTRAL.layer_expert_bytes))
    assert of(seconds, Op.LOAD_W) == pytest.approx(page)


@given(schedules(), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_costs_are_sane(schedule: Schedule, r_w: float) -> None:
    """Durations are finite and not negative, and no task alone asks for more than a resource has."""
    model = MIXTRAL.with_layers(schedule.num_layers)
    batch = BatchShape.uniform(2 * schedule.num_micro_batches, 2, 50, 4)
    for rates in (SPEC, replace(SPEC, copy_bandwidth=4e9, cores=Curve.constant(1.5))):
        result = schedule_costs(schedule, model, rates, batch, weights_on_gpu=r_w)
        assert np.isfinite(result.seconds).all()
        assert (result.seconds >= 0).all()
        assert (result.bytes >= 0).all()
        assert set(result.demands) == set(result.capacities)
        for name, demand in result.demands.items():
            assert demand.shape == (len(schedule),)
            assert (demand >= 0).all()
            capacity = result.capacities[name]
            most = capacity.peak if isinstance(capacity, Curve) else capacity
            assert (demand <= most * (1 + 1e-12)).all()


def test_without_contention_nothing_is_shared() -> None:
    """The same tasks on resources of their own keep their times and lose their demands."""
    shared = work()
    alone = shared.without_contention()
    assert alone.demands == {}
    assert alone.seconds is shared.seconds
    assert alone.bytes is shared.bytes


def test_staging_takes_twice_its_bytes_of_memory_bandwidth() -> None:
    """A copy by a core reads and writes memory, a transfer by a copy engine only reads it."""
    slow = replace(SPEC, staging_bandwidth=1e9, h2d_bandwidth=1e9)
    demand = work(rates=slow).demands["dram"]
    assert of(demand, Op.STAGE_W) == pytest.approx(2e9)
    assert of(demand, Op.LOAD_W) == pytest.approx(1e9)
