"""The planner: feasible, best, bounded, monotone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import BatchShape, Hardware, MoEModel, Policy, Workload, catalog, evaluate, micro_batches, plan
from hrm.errors import DoesNotFit, HrmError, PolicyInfeasible
from hrm.latency import estimate
from hrm.memory import batch_footprint, check_fits, usable_bytes
from hrm.pipeline import prefill_slot_bytes

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")
L4 = Hardware.from_catalog("gcp-l4-1x")
# The catalog's machines whose host can hold the model.
MACHINES = [
    name
    for name in catalog.names("hardware")
    if float(Hardware.from_catalog(name).cpu.capacity) > 1.5 * MIXTRAL.num_expert_parameters * 2
]
WORKLOADS = ["mtbench", "helm-synthetic-reasoning", "helm-summarization", "512,32", "77,1", "16,2", "30,500"]

workloads = st.builds(Workload.uniform, st.integers(1, 2000), st.integers(1, 300))
factors = st.floats(1.0, 8.0)


def cases() -> list:
    """Every machine with each of its rate sets."""
    machines = [Hardware.from_catalog(name) for name in MACHINES]
    return [
        pytest.param(machine, efficiency, id=f"{machine.name}-{efficiency}")
        for machine in machines
        for efficiency in [*machine.rate_sets, "spec"]
    ]


def speed(found) -> float:
    """Predicted tokens per second."""
    return float(found.estimate.throughput)


@pytest.mark.parametrize(("machine", "efficiency"), cases())
@pytest.mark.parametrize("text", WORKLOADS)
def test_a_plan_is_feasible_bounded_and_reproducible(machine: Hardware, efficiency: str, text: str) -> None:
    """A plan fits both memories, stays under its physical bound, and evaluating its policy gives the same."""
    for padded in (False, True):
        workload = Workload.parse(text).with_options(padded=padded)
        found = plan(MIXTRAL, machine, workload, efficiency=efficiency)
        gpu, cpu = usable_bytes(machine)
        assert found.memory.gpu_bytes <= gpu
        assert found.memory.cpu_bytes <= cpu
        assert speed(found) <= found.bound_tok_s * (1 + 1e-9)
        again = evaluate(MIXTRAL, machine, workload, found.policy, efficiency=efficiency)
        assert speed(again) == pytest.approx(speed(found), rel=0.01)
        assert again.bound_tok_s == pytest.approx(found.bound_tok_s)
        assert again.memory.gpu_bytes == pytest.approx(found.memory.gpu_bytes)


@given(workloads, st.sampled_from(MACHINES), st.integers(1, 400))
@settings(deadline=None, max_examples=25)
def test_throughput_never_passes_the_bound(workload: Workload, name: str, most: int) -> None:
    """No plan, however small its batch, is predicted above what the machine can physically do."""
    machine = Hardware.from_catalog(name)
    found = plan(MIXTRAL, machine, workload, efficiency="spec", max_batch_size=most)
    assert found.policy.batch_size <= most
    assert speed(found) <= found.bound_tok_s * (1 + 1e-9)


@given(
    workloads,
    st.integers(1, 200),
    st.integers(1, 20),
    st.floats(0, 1),
    st.sampled_from(["h2d_bandwidth", "d2h_bandwidth", "gpu_bandwidth", "dram_bandwidth", "cpu_attention_flops"]),
    st.floats(0.01, 100),
)
@settings(deadline=None, max_examples=40)
def test_any_policy_on_any_machine_stays_under_its_bound(workload, mu, g, r_w, name, factor) -> None:
    """The bound holds for policies nobody would choose and for machines out of balance."""
    roomy = L4.with_capacity(gpu_bytes=2**50, cpu_bytes=2**50)
    rates = replace(L4.spec_rates(), provenance="measured", **{name: factor * getattr(L4.spec_rates(), name)})
    machine = replace(roomy, rate_sets={"measured": rates})
    found = evaluate(MIXTRAL, machine, workload, Policy(batch_size=mu * g, micro_batch_size=mu, weights_on_gpu=r_w))
    assert speed(found) <= found.bound_tok_s * (1 + 1e-9)


@given(workloads, st.sampled_from(["gcp-l4-1x", "gcp-t4-1x"]), factors)
@settings(deadline=None, max_examples=15)
def test_a_faster_link_never_lowers_the_best_plan(workload: Workload, name: str, factor: float) -> None:
    """More link bandwidth never lowers the best plan's throughput."""
    machine = Hardware.from_catalog(name)
    link = machine.rates("paper").h2d_bandwidth
    base = plan(MIXTRAL, machine.with_link(link), workload, efficiency="paper")
    more = plan(MIXTRAL, machine.with_link(factor * link), workload, efficiency="paper")
    assert speed(more) >= speed(base) * (1 - 1e-6)


@given(workloads, st.sampled_from(["gpu", "cpu"]), factors)
@settings(deadline=None, max_examples=20)
def test_more_memory_never_lowers_the_best_plan(workload: Workload, level: str, factor: float) -> None:
    """More GPU or CPU memory never lowers the best plan's throughput."""
    size = int(factor * float(L4.level(level).capacity))
    base = plan(MIXTRAL, L4, workload, efficiency="paper")
    more = plan(MIXTRAL, L4.with_capacity(**{f"{level}_bytes": size}), workload, efficiency="paper")
    assert speed(more) >= speed(base) * (1 - 1e-6)


@given(workloads, st.integers(1, 100), st.integers(0, 400))
@settings(deadline=None, max_examples=15)
def test_more_requests_never_lower_the_best_plan(workload: Workload, most: int, extra: int) -> None:
    """A larger limit on the batch never lowers the best plan's throughput."""
    base = plan(MIXTRAL, L4, workload, efficiency="paper", max_batch_size=most)
    more = plan(MIXTRAL, L4, workload, efficiency="paper", max_batch_size=most + extra)
    assert speed(more) >= speed(base) * (1 - 1e-6)


def test_the_plan_is_the_best_of_an_independent_search() -> None:
    """No feasible policy of a plain loop over a few hundred points beats the plan."""
    workload = Workload.parse("100,16")
    best = plan(MIXTRAL, L4, workload, efficiency="paper", max_batch_size=24)
    rates = L4.rates("paper")
    tried = 0
    for mu in range(1, 25):
        for g in range(1, 24 // mu + 1):
            for r_w in np.linspace(0, 0.3, 13):
                memory = batch_footprint(MIXTRAL, BatchShape.uniform(mu * g, mu, 100, 16), float(r_w))
                try:
                    check_fits(memory, L4)
                except DoesNotFit:
                    continue
                tried += 1
                result = estimate(
                    MIXTRAL,
                    rates,
                    micro_batch_size=mu,
                    num_micro_batches=g,
                    prompt_len=100,
                    gen_len=16,
                    weights_on_gpu=r_w,
                )
                assert float(result.throughput) <= speed(best) * (1 + 1e-5)
    assert tried > 300


def test_a_machine_that_holds_everything_streams_nothing() -> None:
    """With room for all experts on the GPU, the plan keeps them there."""
    big = L4.with_capacity(gpu_bytes=200 * 10**9)
    assert plan(MIXTRAL, big, Workload.parse("77,32")).policy.weights_on_gpu == 1.0


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("gpu_gb", [8, 12, 24])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_models_of_few_layers_are_planned(layers: int, gpu_gb: int) -> None:
    """With one or two layers, buffering them costs what keeping them would; the plan still fits and is bounded."""
    shallow = MIXTRAL.with_layers(layers)
    machine = L4.with_capacity(gpu_bytes=gpu_gb * 10**9)
    found = plan(shallow, machine, Workload.parse("77,32"), efficiency="paper")
    check_fits(found.memory, machine)
    assert speed(found) <= found.bound_tok_s * (1 + 1e-9)
    if gpu_gb == 24:  # room for a small batch and every expert
        few = plan(shallow, machine, Workload.parse("77,32"), efficiency="paper", max_batch_size=64)
        assert few.policy.weights_on_gpu == 1.0


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_planning_two_layers_warns_of_nothing() -> None:
    """A model of two layers, whose GPU memory does not depend on r_w, is planned without a numpy warning."""
    found = plan(MIXTRAL.with_layers(2), L4, Workload.parse("77,32"))
    assert found.policy.weights_on_gpu == 1


def test_planning_is_deterministic() -> None:
    """The same question gives the same policy."""
    first, second = (plan(MIXTRAL, L4, Workload.parse("mtbench")).policy for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("sizes", "word"), [({"gpu_bytes": 4 * 10**9}, "GPU memory"), ({"cpu_bytes": 40 * 10**9}, "CPU memory")]
)
def test_an_infeasible_machine_is_refused_with_amounts(sizes: dict[str, int], word: str) -> None:
    """Where not one sequence fits, the error names the memory, what is needed and what there is; exit code 3."""
    with pytest.raises(PolicyInfeasible, match=word) as caught:
        plan(MIXTRAL, L4.with_capacity(**sizes), Workload.parse("77,32"))
    message = str(caught.value)
    assert "mixtral-8x7b does not fit on gcp-l4-1x" in message
    assert message.count("GiB") >= 2
    assert "usable" in message
    assert caught.value.exit_code == 3


def test_both_memories_are_named_when_both_lack() -> None:
    """A machine that is too small everywhere hears of both memories at once."""
    with pytest.raises(PolicyInfeasible, match=r"GPU memory: .*; CPU memory: "):
        plan(MIXTRAL, L4.with_capacity(gpu_bytes=10**9, cpu_bytes=10**9), Workload.parse("77,32"))


def test_evaluating_what_does_not_fit() -> None:
    """A given policy that needs too much is refused with the amounts; exit code 3."""
    policy = Policy(batch_size=100, micro_batch_size=10, weights_on_gpu=0.9)
    with pytest.raises(DoesNotFit, match="GPU memory") as caught:
        evaluate(MIXTRAL, L4, Workload.parse("77,32"), policy)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("call", ["plan", "evaluate"])
def test_prompts_beyond_the_positions_are_refused(call: str) -> None:
    """Prompt and generation longer than the model's positions are refused with both numbers."""
    workload = Workload.uniform(32_700, 100)
    with pytest.raises(PolicyInfeasible, match=r"prompt 32700 \+ gen_len 100 = 32800 tokens.*32768 positions"):
        if call == "plan":
            plan(MIXTRAL, L4, workload)
        else:
            evaluate(MIXTRAL, L4, workload, Policy(batch_size=1, micro_batch_size=1))
    assert plan(MIXTRAL, L4, Workload.uniform(32_668, 100), max_batch_size=1).policy.batch_size == 1


def test_plain_form_has_the_contracts_keys() -> None:
    """The JSON of a plan has the stable keys, in plain numbers."""
    data = plan(MIXTRAL, L4, Workload.parse("77,32")).to_dict()
    assert {"policy", "predicted", "memory", "bound_tok_s", "search"} <= set(data)
    assert {"throughput_tok_s", "prefill_s", "decode_s", "layer_s", "bottleneck"} <= set(data["predicted"])
    assert {"gpu_bytes", "cpu_bytes"} <= set(data["memory"])
    assert data["search"]["evaluated"] > 1000
    assert isinstance(data["predicted"]["throughput_tok_s"], float)


def test_plan_prints() -> None:
    """The text form names policy, prediction and bound; spec rates are called an upper bound."""
    text = str(plan(MIXTRAL, L4, Workload.parse("77,32"), efficiency="spec"))
    assert "policy" in text
    assert "bound" in text
    assert "upper bound" in text
    assert "upper bound" not in str(plan(MIXTRAL, L4, Workload.parse("77,32"), efficiency="paper"))


def test_frame_ranks_the_resources() -> None:
    """The frame lists resources with the binding one first, at a share of 1."""
    found = plan(MIXTRAL, L4, Workload.parse("77,32"))
    frame = found.to_frame()
    assert frame.index[0] == found.estimate.bottleneck
    assert frame["share_of_bottleneck"].iloc[0] == 1.0
    assert frame["seconds_per_layer"].is_monotonic_decreasing


@pytest.mark.parametrize("most", [0, -5])
def test_a_batch_limit_below_one_is_refused(most: int) -> None:
    """A limit that leaves no policy is refused in one line."""
    with pytest.raises(HrmError):
        plan(MIXTRAL, L4, Workload.parse("77,32"), max_batch_size=most)


def test_a_plan_at_the_edge_of_cpu_memory_still_fits() -> None:
    """A plan whose r_w both memories pin down within 1e-6 can be evaluated, that is, run."""
    workload = Workload.parse("77,32")

    def need(r_w: float):
        return batch_footprint(MIXTRAL, BatchShape.uniform(1, 1, 77, 32), r_w)

    none, full = need(0.0), need(1.0)
    most = (usable_bytes(L4)[0] - none.gpu_bytes) / (full.gpu_bytes - none.gpu_bytes)
    per_byte = usable_bytes(L4)[1] / float(L4.cpu.capacity)
    edge = L4.with_capacity(cpu_bytes=math.ceil(need(most - 1e-8).cpu_bytes / per_byte))
    found = plan(MIXTRAL, edge, workload, max_batch_size=1)
    again = evaluate(MIXTRAL, edge, workload, found.policy)
    assert float(again.memory.cpu_bytes) <= usable_bytes(edge)[1]


def test_the_footprint_covers_the_heaviest_micro_batch() -> None:
    """Prefill slots have room for the largest micro-batch that Algorithm 2 makes of the batch."""
    workload = Workload.parse("mtbench")
    policy = Policy(batch_size=60, micro_batch_size=60)
    lengths = workload.lengths(60)
    batches, _ = micro_batches(lengths, num_micro_batches=1, micro_batch_size=60)
    heaviest = max(sum(lengths[i] for i in batch) for batch in batches)
    slots = evaluate(MIXTRAL, L4, workload, policy).memory.gpu["prefill_slots"]
    assert slots >= 3 * prefill_slot_bytes(MIXTRAL, heaviest)
