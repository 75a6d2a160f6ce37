"""Predicting a run by playing its schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import BatchShape, Hardware, MoEModel, Policy, Workload, evaluate, plan
from hrm.errors import UnknownName
from simulator.schedules import SYSTEMS, build_schedule
from simulator.simulate import simulate, simulate_schedule
from simulator.task import Op

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")
SHALLOW = MIXTRAL.with_layers(2)
L4 = Hardware.from_catalog("gcp-l4-1x")
RATES = L4.rates("paper")


def sampled_and_exact(micro: int, contention: bool):
    """The same run of Mixtral 8x7B at gen 128, from sampled steps and step by step."""
    policy = Policy(batch_size=2 * micro, micro_batch_size=micro, weights_on_gpu=0.1)
    batch = BatchShape.uniform(2 * micro, micro, 77, 128)
    return tuple(simulate(MIXTRAL, RATES, policy, batch, exact=exact, contention=contention) for exact in (False, True))


@pytest.mark.parametrize(("micro", "contention"), [(64, False), (300, True)])
def test_sampled_decode_equals_exact(micro: int, contention: bool) -> None:
    """Sampling decode steps of Mixtral 8x7B at gen 128 stays within 0.5 % of playing every step."""
    sampled, exact = sampled_and_exact(micro, contention)
    assert sampled.throughput_tok_s == pytest.approx(exact.throughput_tok_s, rel=0.005)
    assert sampled.decode_s == pytest.approx(exact.decode_s, rel=0.005)


def test_sampling_plays_fewer_tasks_and_counts_all() -> None:
    """A sampled run plays a few steps, knows how many tasks there are, and has the same prefill and lanes."""
    sampled, exact = sampled_and_exact(64, False)
    assert sampled.played_tasks < exact.played_tasks / 3
    assert sampled.num_tasks == exact.num_tasks == exact.played_tasks
    assert sampled.prefill_s == pytest.approx(exact.prefill_s, rel=0.005)
    for lane, share in exact.utilization.items():
        assert sampled.utilization[lane] == pytest.approx(share, abs=0.03)


def test_long_runs_are_sampled_by_default() -> None:
    """A run of more than 60,000 tasks is sampled unless asked otherwise, a short one is played whole."""
    policy = Policy(batch_size=60, micro_batch_size=20, weights_on_gpu=0.1)
    long = simulate(MIXTRAL, RATES, policy, BatchShape.uniform(60, 20, 50, 128))
    short = simulate(MIXTRAL, RATES, policy, BatchShape.uniform(60, 20, 50, 4))
    assert long.num_tasks > 60_000
    assert long.played_tasks < long.num_tasks
    assert short.played_tasks == short.num_tasks


@given(
    st.integers(1, 5),
    st.integers(1, 200),
    st.integers(1, 500),
    st.integers(1, 5),
    st.floats(0, 1),
    st.sampled_from(["paper", "spec"]),
)
@settings(deadline=None, max_examples=25)
def test_contention_is_never_faster(g, micro, prompt, gen_len, r_w, efficiency) -> None:
    """Lanes that share memory bandwidth never finish earlier than lanes with their own."""
    policy = Policy(batch_size=g * micro, micro_batch_size=micro, weights_on_gpu=r_w)
    batch = BatchShape.uniform(g * micro, micro, prompt, gen_len)
    rates = L4.rates(efficiency)
    shared = simulate(SHALLOW, rates, policy, batch, contention=True)
    alone = simulate(SHALLOW, rates, policy, batch, contention=False)
    assert shared.throughput_tok_s <= alone.throughput_tok_s * (1 + 1e-9)
    assert shared.prefill_s >= alone.prefill_s * (1 - 1e-9)


@given(
    st.integers(1, 5),
    st.integers(1, 300),
    st.integers(1, 500),
    st.integers(1, 6),
    st.floats(0, 1),
    st.sampled_from(["paper", "spec"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_no_simulation_passes_the_physical_bound(g, micro, prompt, gen_len, r_w, efficiency, contention) -> None:
    """What is simulated stays under what the machine can physically do, with contention or without."""
    roomy = L4.with_capacity(gpu_bytes=2**50, cpu_bytes=2**50)
    policy = Policy(batch_size=g * micro, micro_batch_size=micro, weights_on_gpu=r_w)
    bound = evaluate(SHALLOW, roomy, Workload.uniform(prompt, gen_len), policy, efficiency=efficiency).bound_tok_s
    batch = BatchShape.uniform(g * micro, micro, prompt, gen_len)
    result = simulate(SHALLOW, roomy.rates(efficiency), policy, batch, contention=contention)
    assert result.throughput_tok_s <= bound * (1 + 1e-9)


@pytest.mark.parametrize("name", ["h2d_bandwidth", "d2h_bandwidth", "staging_bandwidth", "gpu_bandwidth"])
@pytest.mark.parametrize("contention", [True, False])
def test_a_faster_machine_is_never_slower(name: str, contention: bool) -> None:
    """Doubling a rate never lowers the simulated throughput of a policy that it bounds or not."""
    policy = Policy(batch_size=200, micro_batch_size=50, weights_on_gpu=0.1)
    batch = BatchShape.uniform(200, 50, 100, 4)
    base = simulate(SHALLOW, RATES, policy, batch, contention=contention)
    rates = replace(RATES, **{name: 2 * getattr(RATES, name)})
    faster = simulate(SHALLOW, rates, policy, batch, contention=contention)
    assert faster.throughput_tok_s >= base.throughput_tok_s * (1 - 0.005)


def test_planner_and_simulator_agree_where_one_lane_binds() -> None:
    """Where the link binds by far, closed form and simulation give the same throughput within 5 %."""
    machine = L4.with_link(2e9)
    workload = Workload.uniform(77, 16)
    policy = Policy(batch_size=240, micro_batch_size=30, weights_on_gpu=0.1)
    closed = evaluate(MIXTRAL, machine, workload, policy, efficiency="paper")
    assert closed.estimate.bottleneck == "link (CPU to GPU)"
    played = simulate(MIXTRAL, machine.rates("paper"), policy, BatchShape.uniform(240, 30, 77, 16), contention=False)
    assert played.throughput_tok_s == pytest.approx(float(closed.estimate.throughput), rel=0.05)


def test_throughput_counts_every_generated_token() -> None:
    """Throughput is batch times generation length over prefill and decode."""
    policy = Policy(batch_size=6, micro_batch_size=4, weights_on_gpu=1.0)
    batch = BatchShape(((30, 20, 20, 10), (25, 25)), 5)
    result = simulate(SHALLOW, RATES, policy, batch)
    assert result.simulated_s == pytest.approx(result.prefill_s + result.decode_s)
    assert result.throughput_tok_s == pytest.approx(6 * 5 / result.simulated_s)
    assert result.timeline.makespan == pytest.approx(result.simulated_s)


def test_one_token_needs_no_decode() -> None:
    """With one token to generate, prefill is the whole run."""
    policy = Policy(batch_size=4, micro_batch_size=2)
    result = simulate(SHALLOW, RATES, policy, BatchShape.uniform(4, 2, 10, 1))
    assert result.decode_s == pytest.approx(0, abs=1e-12)
    assert result.prefill_s > 0


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_simulating_twice_gives_the_same() -> None:
    """Two simulations of one question are bit-identical."""
    found = plan(SHALLOW, L4, Workload.parse("77,4"), max_batch_size=60, efficiency="paper")
    batch = BatchShape.uniform(found.policy.batch_size, found.policy.micro_batch_size, 77, 4)
    first, second = (simulate(SHALLOW, RATES, found.policy, batch) for _ in range(2))
    assert first.timeline.end.tobytes() == second.timeline.end.tobytes()
    assert first.throughput_tok_s == second.throughput_tok_s


def test_simulate_is_its_schedule_played() -> None:
    """The prediction of a short run is the timeline of the schedule that would be run."""
    policy = Policy(batch_size=8, micro_batch_size=4)
    batch = BatchShape.uniform(8, 4, 20, 3)
    schedule = build_schedule(2, policy, gen_len=3)
    timeline = simulate_schedule(schedule, SHALLOW, RATES, batch, weights_on_gpu=0.0)
    result = simulate(SHALLOW, RATES, policy, batch)
    assert result.timeline.schedule == schedule
    assert result.timeline.end.tolist() == timeline.end.tolist()
    assert timeline.source == "simulated"


def test_plain_form_has_the_contracts_keys() -> None:
    """The JSON of a simulation has the stable keys."""
    data = simulate(SHALLOW, RATES, Policy(batch_size=4, micro_batch_size=2), BatchShape.uniform(4, 2, 10, 2)).to_dict()
    assert {
        "throughput_tok_s", "prefill_s", "decode_s", "num_tasks", "simulated_s", "wall_s", "tasks_per_s", "utilization",
    } <= set(data)  # fmt: skip
    assert set(data["utilization"]) == {"gpu", "cpu", "h2d", "d2h", "pin"}
    assert data["tasks_per_s"] > 0


@pytest.mark.parametrize(
    ("system", "placement"),
    [
        ("moe-lightning", {"attention_on_gpu": True, "kv_on_gpu": 0.1}),
        ("fastdecode", {}),
        ("flexgen", {"attention_on_gpu": True}),
        ("flexgen-c", {}),
        ("deepspeed-zero", {"attention_on_gpu": True, "kv_on_gpu": 1.0}),
    ],
)
def test_every_system_is_simulated(system: str, placement: dict) -> None:
    """Each system's run is its own schedule, played with its own kernels."""
    parts = 1 if SYSTEMS[system].single_batch else 2
    policy = Policy(batch_size=4 * parts, micro_batch_size=4, **placement)
    batch = BatchShape.uniform(4 * parts, 4, 20, 4)
    result = simulate(SHALLOW, RATES, policy, batch, system=system)
    assert result.timeline.schedule == build_schedule(2, policy, gen_len=4, system=system)
    assert result.throughput_tok_s == pytest.approx(16 * parts / result.simulated_s)
    assert result.prefill_s > 0
    assert result.decode_s > 0


def test_a_kernel_of_another_system_takes_its_own_time() -> None:
    """FlexGen's attention on the CPU moves the KV cache five times; its schedule plays with that."""
    policy, batch = Policy(batch_size=80, micro_batch_size=40), BatchShape.uniform(80, 40, 2000, 4)
    slow, fast = (
        simulate(SHALLOW, RATES, policy, batch, system=system, contention=False).timeline
        for system in ("flexgen-c", "moe-lightning")
    )
    seconds = [(x.end - x.start)[x.schedule.mask(Op.CPU_ATTN)].sum() for x in (slow, fast)]
    assert seconds[0] == pytest.approx(5 * seconds[1], rel=0.01)


@pytest.mark.parametrize("system", ["flexgen", "flexgen-c"])
def test_flexgens_stages_share_the_work_and_the_link(system: str) -> None:
    """Two GPUs with half of FlexGen's layers each are faster than one, unless all weights come over one link."""
    model, batch = MIXTRAL.with_layers(4), BatchShape.uniform(80, 20, 200, 6)

    def run(num_gpus: int, weights_on_gpu: float):
        policy = Policy(
            batch_size=80,
            micro_batch_size=20,
            attention_on_gpu=system == "flexgen",
            weights_on_gpu=weights_on_gpu,
        )
        return simulate(model, RATES, policy, batch, system=system, num_gpus=num_gpus)

    assert 1.5 * run(1, 1.0).throughput_tok_s < run(2, 1.0).throughput_tok_s < 2 * run(1, 1.0).throughput_tok_s
    # Each stage streams its layers for both blocks of micro-batches.
    assert run(2, 0.0).throughput_tok_s < run(1, 0.0).throughput_tok_s
    result = run(2, 1.0)
    assert result.timeline.schedule.num_stages == 2
    assert all(0 <= share <= 1 for share in result.utilization.values())


def test_an_unknown_system_is_refused() -> None:
    """A misspelt system is answered with the nearest."""
    with pytest.raises(UnknownName, match="Did you mean 'flexgen'"):
        simulate(
            SHALLOW, RATES, Policy(batch_size=1, micro_batch_size=1), BatchShape.uniform(1, 1, 5, 2), system="flexgn"
        )
