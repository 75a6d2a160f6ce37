"""The schedule and the costs of an expert cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import BatchShape, Hardware, MoEModel, Policy, Workload
from hrm.errors import InvalidSchedule, InvalidValue, UnknownName
from hrm.operators import active_experts
from hrm.rates import Rates
from simulator import Prediction, simulate
from simulator.cache_costs import ExpertCaching
from simulator.costs import Costing, schedule_costs
from simulator.experts.residency import better_residency, evaluate_cached, plan_cached
from simulator.schedules import build_schedule, expert_cache
from simulator.task import Op, Schedule
from simulator.validate import check_schedule


@pytest.fixture(scope="module")
def qwen() -> MoEModel:
    """A model with many small experts."""
    return MoEModel.from_catalog("qwen3-30b-a3b")


@pytest.fixture(scope="module")
def machine() -> Hardware:
    """A machine whose memory holds a part of it."""
    return Hardware.from_catalog("gcp-l4-1x")


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 3), parts=st.integers(1, 5), pieces=st.integers(1, 4), steps=st.integers(0, 3),
    on_gpu=st.booleans(), stream=st.booleans(), prefill=st.booleans(),
)  # fmt: skip
def test_every_schedule_is_safe(
    layers: int, parts: int, pieces: int, steps: int, on_gpu: bool, stream: bool, prefill: bool
) -> None:
    """Nothing is read too early or overwritten in use, whatever the sizes."""
    schedule = expert_cache(
        num_layers=layers, num_micro_batches=parts, pieces=pieces, decode_steps=steps + (not prefill),
        attention_on_gpu=on_gpu, stream_kv=stream, prefill=prefill,
    )  # fmt: skip
    check_schedule(schedule)
    assert Schedule.from_text(schedule.to_text()).to_text() == schedule.to_text()


@pytest.mark.parametrize(
    ("task", "dependency", "message"),
    [
        ("LoadExperts(1,0,0)", "OffloadRoutes(1,0,0)", "OffloadRoutes"),
        ("Experts(1,0,1)", "LoadExperts(1,0,1)", "LoadExperts"),
        ("LoadExperts(1,0,2)", "Experts(1,0,0)", "slots it fills"),
        ("OffloadRoutes(1,0,0)", "PostAttn(1,0,0)", "PostAttn"),
    ],
)
def test_a_missing_dependency_is_found(task: str, dependency: str, message: str) -> None:
    """Without any one of the cache's dependencies the proof fails and names the two tasks."""
    schedule = expert_cache(num_layers=2, num_micro_batches=2, pieces=3, decode_steps=1, prefill=False)
    lines = []
    for line in schedule.to_text().splitlines():
        if line.startswith(task + " "):
            head, _, deps = line.partition(" < ")
            kept = [x for x in deps.replace(",L", ", L").split(" ") if x.strip(",") != dependency]
            assert len(kept) < len(deps.split(" ")), line
            line = head + (" < " + " ".join(kept).strip(", ") if kept else "")
        lines.append(line)
    with pytest.raises(InvalidSchedule, match=message):
        check_schedule(Schedule.from_text("\n".join(lines)))


def test_bytes_are_the_misses_of_the_active_experts(qwen: MoEModel, machine: Hardware) -> None:
    """All pieces of a decode step together bring a(1 - K/E) experts per layer."""
    policy = Policy(batch_size=4, micro_batch_size=4, expert_slots=32)
    batch = BatchShape.uniform(4, 4, 16, 3)
    schedule = build_schedule(qwen.num_layers, policy, gen_len=3, weight_pieces=qwen.num_experts)
    caching = ExpertCaching(slots=32)
    costs = Costing(schedule, qwen, machine.rates(), batch, weights_on_gpu=0.0, caching=caching).at()
    loads = schedule.mask(Op.LOAD_E) & (schedule.step == 1)
    ffn = qwen.main_layer.ffn
    active = float(active_experts(ffn, 4))
    size = ffn.expert_parameters * qwen.expert_element_bytes
    expected = qwen.num_layers * active * (1 - 32 / ffn.num_experts) * size
    assert costs.bytes[loads].sum() == pytest.approx(expected)
    first = schedule.mask(Op.LOAD_E) & (schedule.step == 0)
    assert costs.bytes[first].sum() == pytest.approx(qwen.num_layers * float(active_experts(ffn, 64)) * size)


def test_costs_of_other_schedules_know_no_cache(qwen: MoEModel, machine: Hardware) -> None:
    """Without a cache nothing has changed: all weights travel."""
    policy = Policy(batch_size=4, micro_batch_size=4)
    schedule = build_schedule(qwen.num_layers, policy, gen_len=2)
    costs = schedule_costs(schedule, qwen, machine.rates(), BatchShape.uniform(4, 4, 16, 2), weights_on_gpu=0.0)
    moved = costs.bytes[schedule.mask(Op.LOAD_W)].sum()
    assert moved == pytest.approx(2 * qwen.streamed_bytes)


@settings(max_examples=20, deadline=None)
@given(
    slots=st.lists(st.integers(1, 128), min_size=2, max_size=2).map(sorted), size=st.sampled_from((1, 3, 8)),
    on_gpu=st.booleans(),
)  # fmt: skip
def test_more_slots_never_hurt(qwen: MoEModel, machine: Hardware, slots: list[int], size: int, on_gpu: bool) -> None:
    """Predicted throughput does not fall with more slots."""
    batch = BatchShape.uniform(size, size, 32, 6)
    few, many = (
        simulate(
            qwen, machine.rates(), Policy(
                batch_size=size, micro_batch_size=size, attention_on_gpu=on_gpu, kv_on_gpu=float(on_gpu), expert_slots=k
            ), batch,
        ).throughput_tok_s
        for k in slots
    )  # fmt: skip
    assert many >= few * (1 - 1e-9)


def test_a_trace_with_fewer_misses_is_faster(qwen: MoEModel, machine: Hardware) -> None:
    """The miss rate of a trace takes the place of uniform routing's."""
    policy = Policy(batch_size=2, micro_batch_size=2, expert_slots=16)
    batch = BatchShape.uniform(2, 2, 32, 8)
    speeds = [
        simulate(qwen, machine.rates(), policy, batch, miss_rate=rate).throughput_tok_s
        for rate in (0.9, None, 0.3, 0.0)
    ]
    assert speeds == sorted(speeds)
    with pytest.raises(InvalidValue, match="miss_rate"):
        simulate(qwen, machine.rates(), policy, batch, miss_rate=1.5)


def test_predictions_know_the_cache_policy(qwen: MoEModel, machine: Hardware) -> None:
    """A policy that evicts what is still needed is predicted slower; a measured miss rate wins over any policy."""
    policy = Policy(batch_size=16, micro_batch_size=16, expert_slots=64)
    batch = BatchShape.uniform(16, 16, 32, 8)

    def predicted(name: str, miss_rate: float | None = None) -> Prediction:
        options: dict[str, Any] = {"cache_policy": name, "miss_rate": miss_rate}
        return simulate(qwen, machine.rates(), policy, batch, **options)

    def speed(name: str, miss_rate: float | None = None) -> float:
        return predicted(name, miss_rate).throughput_tok_s

    assert speed("lru") < 0.9 * speed("inactive-first-lifo") < speed("min")
    assert predicted("lru", 0.3).decode_s == predicted("fifo", 0.3).decode_s
    with pytest.raises(UnknownName, match="Did you mean 'lru'"):
        speed("lruu")


def test_a_bound_holds_with_popular_experts(qwen: MoEModel, machine: Hardware) -> None:
    """What a routing histogram lets a cache keep is in the bound, too."""
    model = qwen.with_routing([1 / (1 + n) for n in range(qwen.num_experts)])
    policy = Policy(batch_size=1, micro_batch_size=1, expert_slots=32)
    found = evaluate_cached(model, machine, Workload.parse("16,64"), policy, cache_policy="lfu")
    assert found.estimate.throughput <= found.bound.tok_s


@pytest.mark.parametrize("pinned", [False, True])
def test_pageable_experts_are_copied_twice(qwen: MoEModel, machine: Hardware, pinned: bool) -> None:
    """From pageable memory a miss takes the staging copy and then the link; where a core copies, the link alone."""
    rates = replace(machine.rates(), stages_weights=not pinned)
    policy = Policy(batch_size=2, micro_batch_size=2, expert_slots=32)
    batch = BatchShape.uniform(2, 2, 16, 3)

    def loads(rates: Rates) -> tuple[float, float]:
        timeline = simulate(qwen, rates, policy, batch, exact=True, contention=False).timeline
        mask = timeline.schedule.mask(Op.LOAD_E)
        tasks = timeline.schedule.mask(Op.LOAD_E).sum() * rates.task_s
        seconds = float((timeline.end - timeline.start)[mask].sum()) - tasks
        return seconds, float(timeline.bytes[mask].sum())

    seconds, moved = loads(replace(rates, transfer_s=0.0))
    link = moved / rates.h2d_bandwidth
    assert seconds == pytest.approx(link if pinned else link + moved / rates.staging_bandwidth)
    by_core, moved = loads(replace(rates, transfer_s=0.0, copy_bandwidth=1e12))
    assert by_core == pytest.approx(moved / rates.h2d_bandwidth)


def test_calls_of_their_own_cost_every_active_expert(qwen: MoEModel, machine: Hardware) -> None:
    """What an expert costs on top is charged once for each expert that a micro-batch activates, hit or missed."""
    policy = Policy(batch_size=4, micro_batch_size=4, expert_slots=32)
    batch = BatchShape.uniform(4, 4, 16, 3)

    def computing(single: float) -> float:
        rates = replace(machine.rates(), single_expert_s=single)
        timeline = simulate(qwen, rates, policy, batch, exact=True, contention=False).timeline
        decode = timeline.schedule.mask(Op.EXPERTS) & (timeline.schedule.step == 1)
        return float((timeline.end - timeline.start)[decode].sum())

    active = qwen.num_layers * float(active_experts(qwen.main_layer.ffn, 4))
    assert computing(0.25) - computing(0.0) == pytest.approx(0.25 * active)


@pytest.mark.parametrize(
    ("changes", "passes", "rate"),
    [
        ({}, 3, 1 / (1 / 6e9 + 1 / 3e9)),
        ({"stages_weights": False}, 1, 6e9),
        ({"copy_bandwidth": 8e9}, 2, 6e9),
    ],
)
def test_misses_pass_the_hosts_memory(
    qwen: MoEModel, machine: Hardware, changes: dict[str, Any], passes: int, rate: float
) -> None:
    """Pageable experts are read, written to pinned memory and read there again; pinned ones are only read."""
    rates = replace(machine.rates("spec"), h2d_bandwidth=6e9, staging_bandwidth=3e9, dram_bandwidth=50e9, **changes)
    model, schedule = qwen.with_layers(1), expert_cache(num_layers=1, num_micro_batches=1, pieces=2, decode_steps=1)
    costing = Costing(
        schedule, model, rates, BatchShape.uniform(2, 2, 16, 2), weights_on_gpu=0.0,
        caching=ExpertCaching(slots=32, miss_rate=0.5),
    )  # fmt: skip
    misses = schedule.mask(Op.LOAD_E) & (schedule.step > 0)
    # The first piece is the experts that were found.
    assert costing.at().demands["dram"][misses] == pytest.approx([0.0, passes * rate])


def test_gpus_that_share_experts_share_the_link(qwen: MoEModel, machine: Hardware) -> None:
    """Two GPUs bring a missing expert in halves over the node's link: no sooner than one brings it whole."""
    policy = Policy(batch_size=2, micro_batch_size=2, expert_slots=32)
    batch = BatchShape.uniform(2, 2, 16, 3)
    options: dict[str, Any] = {"exact": True, "contention": False}
    one, two = (simulate(qwen, machine.rates(), policy, batch, num_gpus=n, **options).timeline for n in (1, 2))
    loads = one.schedule.mask(Op.LOAD_E)
    assert (two.end - two.start)[loads] == pytest.approx((one.end - one.start)[loads])


def test_few_requests_are_cached_and_many_stream(qwen: MoEModel, machine: Hardware) -> None:
    """A batch that touches few experts gets a cache, one that touches all of them does not."""
    from hrm import plan

    workload = Workload.parse("64,16")
    few = plan(qwen, machine, workload, ffn_on_gpu=True, max_batch_size=2)
    chosen = better_residency(few, max_batch_size=2)
    assert chosen.policy.expert_slots is not None
    assert chosen.estimate.throughput > few.estimate.throughput
    assert chosen.fits and chosen.estimate.throughput <= chosen.bound_tok_s
    many = plan(qwen, machine, workload, ffn_on_gpu=True)
    assert better_residency(many, max_batch_size=None) is many


@settings(max_examples=15, deadline=None)
@given(slots=st.integers(1, 24), size=st.integers(1, 16), on_gpu=st.booleans())
def test_no_prediction_passes_the_bound(qwen: MoEModel, machine: Hardware, slots: int, size: int, on_gpu: bool) -> None:
    """With uniform routing the physical bound holds for caches, too."""
    policy = Policy(
        batch_size=size, micro_batch_size=size, attention_on_gpu=on_gpu, kv_on_gpu=float(on_gpu), expert_slots=slots
    )
    found = evaluate_cached(qwen, machine, Workload.parse("32,8"), policy)
    assert found.estimate.throughput <= found.bound_tok_s * (1 + 1e-9)


def test_slots_fill_the_memory(qwen: MoEModel, machine: Hardware) -> None:
    """The planned number of slots fits, and one more would not."""
    found = plan_cached(qwen, machine, Workload.parse("64,16"), max_batch_size=1)
    slots = found.policy.expert_slots
    assert slots is not None and found.fits
    per_slot = found.memory.gpu["resident_experts"] / slots
    assert slots == qwen.num_experts or found.memory.gpu_bytes + per_slot > found.room[0]


def test_requests_that_end_leave_their_pieces_empty(qwen: MoEModel, machine: Hardware) -> None:
    """Where all requests of a micro-batch have ended, its pieces cost nothing."""
    policy = Policy(batch_size=4, micro_batch_size=2, expert_slots=8)
    whole = BatchShape.uniform(4, 2, 16, 8)
    short = BatchShape(whole.micro_batches, 8, output_lens=((8, 8), (2, 2)))
    full, part = (simulate(qwen, machine.rates(), policy, shape) for shape in (whole, short))
    assert part.decode_s < 0.8 * full.decode_s
    assert np.isfinite(part.throughput_tok_s)


def test_a_cache_is_planned_where_no_stream_fits(qwen: MoEModel, machine: Hardware) -> None:
    """Where two layers of weights do not fit, a cache does; where neither fits, the first error stands."""
    from hrm import plan
    from hrm.errors import DoesNotFit
    from simulator.experts.residency import cached_instead

    workload = Workload.parse("32,8")
    full = plan_cached(qwen, machine, workload, max_batch_size=1)
    bare = evaluate_cached(qwen, machine, workload, Policy(batch_size=1, micro_batch_size=1, expert_slots=1))
    tight = machine.with_capacity(gpu_bytes=int(bare.memory.gpu_bytes / 0.92) + 2**20)
    with pytest.raises(DoesNotFit) as error:
        plan(qwen, tight, workload, max_batch_size=1)
    found = cached_instead(error.value, qwen, tight, workload, max_batch_size=1)
    assert found.policy.expert_slots == 1 < (full.policy.expert_slots or 0)
    with pytest.raises(DoesNotFit) as again:
        cached_instead(error.value, qwen, machine.with_capacity(gpu_bytes=2**20), workload, max_batch_size=1)
    assert again.value is error.value


def test_encoder_decoder_models_stream() -> None:
    """Schedules know decoders only, so that no cache is looked at for others."""
    from hrm import plan

    model = MoEModel.from_catalog("nllb-moe-54b")
    found = plan(model, Hardware.from_catalog("v100-node-8x"), Workload.parse("32,16"), max_batch_size=4)
    assert better_residency(found, max_batch_size=4) is found


def test_a_dense_model_has_no_experts_to_cache(machine: Hardware) -> None:
    """One line for slots of a model without routed experts."""
    policy = Policy(batch_size=1, micro_batch_size=1, expert_slots=4)
    with pytest.raises(InvalidValue, match="no routed experts"):
        evaluate_cached(MoEModel.from_catalog("opt-6.7b"), machine, Workload.parse("32,8"), policy)
