"""The planner: feasible, best, bounded, monotone, and true to how machines scale."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hrm import BatchShape, Hardware, MoEModel, Policy, Workload, catalog, evaluate, micro_batches, plan
from hrm.bound import machine_bound
from hrm.errors import DoesNotFit, HrmError, PolicyInfeasible
from hrm.memory import batch_footprint, check_fits, usable_bytes
from hrm.pipeline import prefill_slot_bytes
from hrm.task_times import TaskTimes
from hrm.units import parse_bytes

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")
L4 = Hardware.from_catalog("gcp-l4-1x")
OTHERS = {
    name: MoEModel.from_catalog(name)
    for name in (
        "mixtral-8x7b", "deepseek-v2-lite", "gpt-oss-20b", "nllb-moe-54b", "opt-6.7b", "qwen3-30b-a3b",
        "fairseq-moe-52b",
    )
}  # fmt: skip
WORKLOADS = ["mtbench", "512,32", "helm-summarization", "77,1", "16,2", "30,300", "helm-synthetic-reasoning"]
PLACES = [{"attention_on_gpu": attention, "ffn_on_gpu": ffn} for attention in (False, True) for ffn in (True, False)]
OFFLOADED = {"attention_on_gpu": False, "ffn_on_gpu": True}
FACTORS = ["gpu_memory", "cpu_memory", "gpu_speed", "gpu_bandwidth", "cpu_speed", "cpu_bandwidth", "link"]

workloads = st.builds(Workload.uniform, st.integers(1, 1500), st.integers(1, 300))
factors = st.floats(1.0, 8.0)


def cases() -> list:
    """Every catalog model and every machine several times, each pair with another workload."""
    models, machines = catalog.names("models"), catalog.names("hardware")
    pairs = [(models[i % len(models)], machines[(3 * i + i // 20) % len(machines)]) for i in range(len(models))]
    return [
        pytest.param(
            model, machine, WORKLOADS[i % len(WORKLOADS)], id=f"{model}-{machine}-{WORKLOADS[i % len(WORKLOADS)]}"
        )
        for i, (model, machine) in enumerate(pairs)
    ]


def speed(found) -> float:
    """Predicted tokens per second."""
    return float(found.estimate.throughput)


@pytest.mark.parametrize(("model_name", "machine_name", "text"), cases())
def test_a_plan_is_feasible_bounded_and_reproducible(model_name: str, machine_name: str, text: str) -> None:
    """A plan fits both memories, stays under both bounds, is what evaluating its policy gives, and its place's best."""
    model, machine = MoEModel.from_catalog(model_name), Hardware.from_catalog(machine_name)
    workload = Workload.parse(text)
    if workload.prompt_max + workload.gen_len > model.max_positions:
        pytest.skip("longer than the model's positions")
    try:
        free = plan(model, machine, workload, resolution="coarse")
    except PolicyInfeasible as error:
        assert re.search(r"(GPU|CPU) memory: .* needed.*usable: .* too little", str(error))
        for place in PLACES:
            with pytest.raises(PolicyInfeasible):
                plan(model, machine, workload, resolution="coarse", **place)
        return
    ceiling = machine_bound(model, machine, workload)
    plans = [free]
    for place in PLACES:
        try:
            plans.append(plan(model, machine, workload, resolution="coarse", **place))
        except PolicyInfeasible:
            continue
        policy = plans[-1].policy
        assert {"attention_on_gpu": policy.attention_on_gpu, "ffn_on_gpu": policy.ffn_on_gpu} == place
    for found in plans:
        for need, room in zip((found.memory.gpu_bytes, found.memory.cpu_bytes), usable_bytes(machine), strict=True):
            assert need <= room
        assert found.room == usable_bytes(machine)
        assert speed(found) <= found.bound_tok_s * (1 + 1e-9)
        assert speed(found) <= ceiling.tok_s * (1 + 1e-9)
        assert speed(found) <= speed(free) * 1.05  # the coarse search refines around one place only
        again = evaluate(model, machine, workload, found.policy)
        assert speed(again) == pytest.approx(speed(found), rel=1e-9)
        assert again.bound_tok_s == pytest.approx(found.bound_tok_s)
        assert again.memory.gpu_bytes == pytest.approx(found.memory.gpu_bytes)


def test_most_cases_can_be_planned() -> None:
    """The pairs above are worth planning: on most of the machines the model fits."""
    fits = 0
    for case in cases():
        model, machine, _ = case.values
        try:
            plan(
                MoEModel.from_catalog(model),
                Hardware.from_catalog(machine),
                Workload.parse("20,20"),
                max_batch_size=4,
                resolution="coarse",
            )
            fits += 1
        except PolicyInfeasible:
            continue
    assert fits >= len(cases()) / 2


@pytest.mark.parametrize(("text", "efficiency"), list(zip(WORKLOADS, ["spec", "paper"] * 4, strict=False)))
def test_a_plan_of_known_and_padded_prompts(text: str, efficiency: str) -> None:
    """Prompts of known lengths, and padded ones, are planned on every rate set within memory and bound."""
    for padded in (False, True):
        workload = Workload.parse(text).with_options(padded=padded)
        found = plan(MIXTRAL, L4, workload, efficiency=efficiency, resolution="coarse")
        check_fits(found.memory, L4)
        assert found.rate_set == efficiency
        assert speed(found) <= found.bound_tok_s * (1 + 1e-9)
        assert speed(found) <= machine_bound(MIXTRAL, L4, workload, efficiency=efficiency).tok_s * (1 + 1e-9)
        again = evaluate(MIXTRAL, L4, workload, found.policy, efficiency=efficiency)
        assert speed(again) == pytest.approx(speed(found), rel=1e-9)


@given(workloads, st.sampled_from(["gcp-l4-1x", "gcp-t4-4x", "h100-sxm-1x", "a100-40g-1x"]), st.integers(1, 400))
@settings(deadline=None, max_examples=8)
def test_throughput_never_passes_the_bound(workload: Workload, name: str, most: int) -> None:
    """No plan, however small its batch, is predicted above what the machine can physically do."""
    machine = Hardware.from_catalog(name)
    found = plan(MIXTRAL, machine, workload, efficiency="spec", max_batch_size=most, resolution="coarse")
    assert found.policy.batch_size <= most
    assert speed(found) <= found.bound_tok_s * (1 + 1e-9)
    assert speed(found) <= machine_bound(MIXTRAL, machine, workload, efficiency="spec").tok_s * (1 + 1e-9)


@given(
    st.sampled_from(sorted(OTHERS)),
    st.integers(1, 500),
    st.integers(1, 100),
    st.integers(1, 200),
    st.integers(1, 20),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(PLACES),
    st.dictionaries(st.sampled_from(FACTORS[2:]), st.floats(0.01, 100)),
    st.sampled_from(["gcp-l4-1x", "gcp-t4-4x"]),
)
@settings(deadline=None, max_examples=60)
def test_any_policy_on_any_machine_stays_under_its_bound(
    name, prompt, gen_len, mu, g, r_w, r_c, place, factors, machine_name
) -> None:
    """The bound holds for policies nobody would choose, on any model and on machines out of balance."""
    machine = Hardware.from_catalog(machine_name)
    machine = machine.with_capacity(gpu_bytes=2**60, cpu_bytes=2**60).scaled(**factors)
    shares = {"weights_on_gpu": r_w, "kv_on_gpu": r_c if place["attention_on_gpu"] else 0.0}
    policy = Policy(batch_size=mu * g, micro_batch_size=mu, **shares, **place)
    found = evaluate(OTHERS[name], machine, Workload.uniform(prompt, gen_len), policy, efficiency="spec")
    assert speed(found) <= found.bound_tok_s * (1 + 1e-9)


@given(
    workloads,
    st.sampled_from(["mixtral-8x7b", "olmoe-1b-7b", "deepseek-v2-lite"]),
    st.sampled_from(["gcp-l4-1x", "gcp-t4-1x", "gcp-t4-4x", "h100-sxm-1x"]),
    st.sampled_from(FACTORS),
    factors,
    st.booleans(),
)
@settings(deadline=None, max_examples=10)
def test_more_of_any_resource_never_lowers_the_best_plan(
    workload, model_name, name, resource, factor, everywhere
) -> None:
    """More memory, link or memory bandwidth, or FLOP/s never lowers the best plan of the whole grid."""
    model, machine = MoEModel.from_catalog(model_name), Hardware.from_catalog(name)
    assume(workload.prompt_max + workload.gen_len <= model.max_positions)
    place = {} if everywhere else OFFLOADED
    base = plan(model, machine, workload, **place)
    more = plan(model, machine.scaled(**{resource: factor}), workload, **place)
    # The search weighs contexts by Simpson's rule and the prediction adds up every step.
    assert speed(more) >= speed(base) * (1 - 1e-3)


@given(workloads, st.sampled_from(sorted(OTHERS)), st.sampled_from(["a100-80g-1x", "gcp-t4-4x", "gh200-1x"]))
@settings(deadline=None, max_examples=5)
def test_more_places_never_lower_the_best_plan(workload: Workload, model_name: str, name: str) -> None:
    """The search over all places finds the best of the four searches in one place."""
    model, machine = OTHERS[model_name], Hardware.from_catalog(name)
    assume(workload.prompt_max + workload.gen_len <= model.max_positions)
    each = []
    for place in PLACES:
        try:
            each.append(speed(plan(model, machine, workload, **place)))
        except PolicyInfeasible:
            continue
    assume(each)
    free = speed(plan(model, machine, workload))
    assert free == pytest.approx(max(each), rel=1e-3)
    assert free >= max(each) * (1 - 1e-3)


def test_a_coarse_search_loses_little() -> None:
    """The coarse search comes within 2 % of the whole grid on average and within 5 % always, on far fewer points."""
    shares = []
    for model, name, text in (
        ("mixtral-8x7b", "gcp-l4-1x", "mtbench"),
        ("mixtral-8x22b", "a100-80g-2x", "77,32"),
        ("deepseek-v2-lite", "gcp-t4-1x", "300,100"),
        ("olmoe-1b-7b", "gcp-l4-1x", "77,32"),
        ("opt-30b", "a5000-1x", "100,50"),
        ("nllb-moe-54b", "a100-80g-1x", "100,50"),
        ("fairseq-moe-52b", "gcp-l4-1x", "77,32"),
    ):
        question = (MoEModel.from_catalog(model), Hardware.from_catalog(name), Workload.parse(text))
        fine, coarse = plan(*question), plan(*question, resolution="coarse")
        assert coarse.evaluated < 0.3 * fine.evaluated
        shares.append(speed(coarse) / speed(fine))
    assert min(shares) >= 0.95
    assert np.mean(shares) >= 0.98


@given(workloads, st.integers(1, 100), st.integers(0, 400))
@settings(deadline=None, max_examples=8)
def test_more_requests_never_lower_the_best_plan(workload: Workload, most: int, extra: int) -> None:
    """A larger limit on the batch never lowers the best plan's throughput."""
    base = plan(MIXTRAL, L4, workload, efficiency="paper", max_batch_size=most)
    more = plan(MIXTRAL, L4, workload, efficiency="paper", max_batch_size=most + extra)
    assert speed(more) >= speed(base) * (1 - 1e-6)


def test_the_plan_is_the_best_of_an_independent_search() -> None:
    """No feasible policy of a plain loop over two thousand points, in any place, beats the plan."""
    workload, machine = Workload.parse("100,16"), L4.scaled(gpu_memory=2.0)
    best = plan(MIXTRAL, machine, workload, efficiency="paper", max_batch_size=12)
    tried = 0
    for mu, place in itertools.product(range(1, 13), PLACES):
        for g, r_w in itertools.product(range(1, 12 // mu + 1), np.linspace(0, 0.6, 7)):
            for r_c in (0.0, 0.5, 1.0) if place["attention_on_gpu"] else (0.0,):
                shares = {"weights_on_gpu": float(r_w), "kv_on_gpu": r_c}
                policy = Policy(batch_size=mu * g, micro_batch_size=mu, **shares, **place)
                try:
                    found = evaluate(MIXTRAL, machine, workload, policy, efficiency="paper")
                except DoesNotFit:
                    continue
                tried += 1
                assert speed(found) <= speed(best) * (1 + 1e-5)
    assert tried > 1000


@pytest.mark.parametrize("requests", [5, 64, 1000])
def test_a_number_of_requests_is_answered_soonest(requests: int) -> None:
    """The policy for a number of requests answers them no later than the policy for endless ones would."""
    workload = Workload.parse("100,16")

    def seconds(policy: Policy) -> float:
        whole, rest = divmod(requests, policy.batch_size)
        sizes = [policy.batch_size] * whole + ([rest] if rest else [])
        total = 0.0
        for size in sizes:
            part = replace(policy, batch_size=size, micro_batch_size=min(size, policy.micro_batch_size))
            estimate = evaluate(MIXTRAL, L4, workload, part).estimate
            total += estimate.prefill_s + estimate.decode_s
        return total

    chosen = plan(MIXTRAL, L4, workload, num_requests=requests).policy
    assert chosen.batch_size <= requests
    endless = plan(MIXTRAL, L4, workload, max_batch_size=requests).policy
    # The last batch's micro-batches are counted as evenly filled, so that the two may differ by a little.
    assert seconds(chosen) <= seconds(endless) * 1.01


@pytest.mark.parametrize("requests", [97, 503, 1009])
def test_a_number_without_factors_is_no_worse(requests: int) -> None:
    """A prime number of requests is answered nearly as fast, each, as a few less that divide evenly."""
    workload = Workload.parse("77,32")
    prime, round_number = (plan(MIXTRAL, L4, workload, num_requests=n) for n in (requests, requests // 8 * 8))
    assert prime.policy.batch_size <= requests
    assert speed(prime) >= 0.97 * speed(round_number)


# -- how predictions scale -----------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["mixtral-8x7b", "deepseek-v2-lite", "nllb-moe-54b"])
@pytest.mark.parametrize("place", PLACES)
def test_a_machine_twice_as_fast_is_twice_as_fast(model_name: str, place: dict[str, bool]) -> None:
    """At data-sheet rates, doubling all of them halves every time and leaves the best policy as it is."""
    model, machine = MoEModel.from_catalog(model_name), Hardware.from_catalog("a100-80g-1x").scaled(gpu_memory=2)
    twice = machine.scaled(gpu_speed=2, gpu_bandwidth=2, cpu_speed=2, cpu_bandwidth=2, link=2)
    slow, fast = (
        plan(model, x, Workload.parse("77,32"), efficiency="spec", resolution="coarse", **place)
        for x in (machine, twice)
    )
    assert speed(fast) == pytest.approx(2 * speed(slow), rel=1e-6)
    assert fast.estimate.bottleneck == slow.estimate.bottleneck


def test_a_larger_batch_amortises_the_link() -> None:
    """Where the link binds, twice the batch at the same μ makes twice the tokens per pass in nearly the same time."""
    workload = Workload.parse("77,32")
    small, large = (
        evaluate(MIXTRAL, L4, workload, Policy(batch_size=32 * g, micro_batch_size=32), efficiency="paper")
        for g in (4, 8)
    )
    assert small.estimate.bottleneck == large.estimate.bottleneck == "link (CPU to GPU)"
    assert large.estimate.layer_s == pytest.approx(small.estimate.layer_s, rel=0.01)
    assert speed(large) == pytest.approx(2 * speed(small), rel=0.02)


def test_a_larger_micro_batch_reads_weights_less_often() -> None:
    """Where the GPU reads weights, twice μ at the same N halves its time, until it computes."""
    machine = L4.with_capacity(gpu_bytes=200 * 10**9).scaled(gpu_speed=0.1)
    workload = Workload.parse("77,32")

    def gpu(mu: int) -> float:
        policy = Policy(batch_size=3200, micro_batch_size=mu, weights_on_gpu=1.0)
        return evaluate(MIXTRAL, machine, workload, policy, efficiency="spec").estimate.terms["GPU"]

    assert gpu(100) == pytest.approx(gpu(50) / 2, rel=0.05)
    assert gpu(3200) == pytest.approx(gpu(1600), rel=0.05)


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 400), st.floats(0, 0.9), st.booleans())
@settings(deadline=None, max_examples=30)
def test_without_a_link_the_plain_roofline_is_left(mu, g, prompt, r_w, attention_on_gpu) -> None:
    """With link, staging and shared memory bandwidth without end, a layer takes its GPU or its CPU roof alone."""
    spec = L4.spec_rates()
    free = dict.fromkeys(("h2d_bandwidth", "d2h_bandwidth", "staging_bandwidth", "dram_bandwidth"), 1e24)
    rates = replace(spec, provenance="measured", **free)
    machine = replace(L4.with_capacity(gpu_bytes=2**50, cpu_bytes=2**50), rate_sets={"measured": rates})
    workload = Workload.uniform(prompt, 3)
    policy = Policy(
        batch_size=mu * g, micro_batch_size=mu, weights_on_gpu=r_w, attention_on_gpu=attention_on_gpu, kv_on_gpu=0.0
    )
    found = evaluate(MIXTRAL, machine, workload, policy).estimate
    times, context = TaskTimes(MIXTRAL, rates), prompt + 1.5
    gpu = g * (times.pre_attention(mu) + times.post_attention(mu))
    if attention_on_gpu:
        assert found.layer_s == pytest.approx(gpu + g * times.gpu_attention(mu, mu * context), rel=1e-6)
        return
    cpu = g * times.cpu_attention(mu, mu * context)
    # One micro-batch has nobody to overlap with.
    assert found.layer_s == pytest.approx(max(gpu, cpu) if g > 1 else gpu + cpu, rel=1e-6)


def test_the_link_is_what_the_streamed_share_costs() -> None:
    """Where the link binds, a layer takes 1 - r_w of its weights over the link."""
    machine = L4.with_capacity(gpu_bytes=200 * 10**9)
    for r_w in (0.0, 0.25, 0.5):
        policy = Policy(batch_size=8, micro_batch_size=8, weights_on_gpu=r_w)
        found = evaluate(MIXTRAL, machine, Workload.parse("20,8"), policy, efficiency="spec").estimate
        assert found.layer_s == pytest.approx((1 - r_w) * MIXTRAL.layer_expert_bytes / 16e9, rel=1e-3)


# -- several GPUs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("gcp-t4-1x", "gcp-t4-2x"), ("gcp-t4-2x", "gcp-t4-4x")])
def test_more_gpus_beat_fewer(names: tuple[str, str]) -> None:
    """A machine with more GPUs of a kind, a wider link and more host memory plans faster, using them all."""
    few, many = (
        plan(MIXTRAL, Hardware.from_catalog(name), Workload.parse("mtbench"), efficiency="spec") for name in names
    )
    assert speed(many) > speed(few)
    count = many.hardware.num_gpus
    assert count > few.hardware.num_gpus
    assert f"on each of {count} GPUs" in str(many)
    # The model's dense weights are divided among them.
    assert many.memory.gpu["dense_weights"] == pytest.approx(MIXTRAL.dense_bytes / count)


def test_gpus_beside_each_other_beat_one() -> None:
    """On the same host and the same link, four GPUs still plan faster than one: their memories add up."""
    four = Hardware.from_catalog("gcp-t4-4x")
    one = replace(four, num_gpus=1)
    assert speed(plan(MIXTRAL, four, Workload.parse("mtbench"))) > speed(plan(MIXTRAL, one, Workload.parse("mtbench")))


# -- advice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_name", "name", "options"),
    [
        ("mixtral-8x7b", "gcp-l4-1x", {}),
        ("mixtral-8x7b", "gcp-l4-1x", {"objective": "paper"}),
        ("mixtral-8x7b", "gcp-t4-4x", {"resolution": "coarse"}),
        ("deepseek-v2-lite", "gcp-t4-1x", {"attention_on_gpu": False, "ffn_on_gpu": True}),
        ("olmoe-1b-7b", "gcp-l4-1x", {"max_batch_size": 64}),
    ],
)
def test_advice_gains_and_is_sorted(model_name: str, name: str, options: dict) -> None:
    """No larger machine is slower, the most useful change comes first, and each names what it changes."""
    found = plan(MoEModel.from_catalog(model_name), Hardware.from_catalog(name), Workload.parse("77,32"), **options)
    changes = found.advice()
    gains = [change.gain for change in changes]
    assert gains == sorted(gains, reverse=True)
    assert min(gains) >= -1e-3
    assert len({change.change for change in changes}) == len(changes) == 7
    for change in changes:
        assert change.throughput_tok_s == pytest.approx(speed(found) * (1 + change.gain))
        assert re.search("memory|link|FLOP/s", change.change)
    if "max_batch_size" not in options:
        assert gains[0] > 0.01


def test_advice_names_what_binds() -> None:
    """Where the link is slow, a faster link is the best advice, and it is among the lines of the text."""
    found = plan(MIXTRAL, L4.scaled(link=0.1), Workload.parse("77,32"), **OFFLOADED, max_batch_size=64)
    assert found.advice()[0].change == "2x link"
    assert found.advice()[0].gain == pytest.approx(1.0, abs=0.1)
    assert re.search(r"faster with 2x link: \+\d+%", found.text(advice=True))
    assert found.to_dict(advice=True)["advice"][0]["change"] == "2x link"
    assert evaluate(MIXTRAL, L4, Workload.parse("77,32"), Policy(batch_size=4, micro_batch_size=4)).advice() == []


# -- edges ---------------------------------------------------------------------------------------------


def test_a_machine_that_holds_everything_streams_nothing() -> None:
    """With room for all experts on the GPU, the plan keeps them there."""
    big = L4.with_capacity(gpu_bytes=200 * 10**9)
    found = plan(MIXTRAL, big, Workload.parse("77,32"), **OFFLOADED)
    assert found.policy.weights_on_gpu == 1.0
    assert "staging copy" not in found.estimate.terms
    both = plan(MIXTRAL, big, Workload.parse("77,32"), attention_on_gpu=True, ffn_on_gpu=True).policy
    assert both.weights_on_gpu == 1.0
    alone = plan(MIXTRAL, big, Workload.parse("77,32"), attention_on_gpu=True, ffn_on_gpu=True, max_batch_size=64)
    assert (alone.policy.weights_on_gpu, alone.policy.kv_on_gpu) == (1.0, 1.0)
    assert alone.estimate.terms["link (CPU to GPU)"] == 0


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("gpu_gb", [8, 12, 24])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_models_of_few_layers_are_planned(layers: int, gpu_gb: int) -> None:
    """With one or two layers, buffering them costs what keeping them would; the plan still fits and is bounded."""
    shallow = MIXTRAL.with_layers(layers)
    machine = L4.with_capacity(gpu_bytes=gpu_gb * 10**9)
    found = plan(shallow, machine, Workload.parse("77,32"), efficiency="paper", resolution="coarse")
    check_fits(found.memory, machine)
    assert speed(found) <= found.bound_tok_s * (1 + 1e-9)
    if gpu_gb == 24:  # room for a small batch and every expert
        few = plan(shallow, machine, Workload.parse("77,32"), efficiency="paper", max_batch_size=64, **OFFLOADED)
        assert few.policy.weights_on_gpu == 1.0


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_planning_two_layers_warns_of_nothing() -> None:
    """A model of two layers, whose GPU memory does not depend on r_w, is planned without a numpy warning."""
    found = plan(MIXTRAL.with_layers(2), L4, Workload.parse("77,32"), **OFFLOADED)
    assert found.policy.weights_on_gpu == 1
    for place in PLACES:
        check_fits(plan(MIXTRAL.with_layers(2), L4, Workload.parse("77,32"), **place).memory, L4)


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


@pytest.mark.parametrize(
    ("model_name", "gpu_gb", "cpu_gb"),
    [("mixtral-8x7b", 24, 60), ("mixtral-8x7b", 60, 40), ("mixtral-8x7b", 4, 192), ("deepseek-v2-lite", 24, 6)],
)
def test_a_machine_with_what_lacked_is_planned(model_name: str, gpu_gb: int, cpu_gb: int) -> None:
    """The amounts that an infeasible machine lacks are what it needs: with a little more it plans, with less not."""
    model, workload = MoEModel.from_catalog(model_name), Workload.parse("77,32")
    sizes = {"gpu": gpu_gb * 10**9, "cpu": cpu_gb * 10**9}
    with pytest.raises(PolicyInfeasible) as caught:
        plan(model, L4.with_capacity(gpu_bytes=sizes["gpu"], cpu_bytes=sizes["cpu"]), workload, resolution="coarse")
    ((tier, amount),) = re.findall(r"(GPU|CPU) memory: .*: ([\d.]+ GiB) too little", str(caught.value))
    key, lacking = tier.lower(), parse_bytes(amount)
    share = dict(zip(("gpu", "cpu"), usable_bytes(L4), strict=True))[key] / float(L4.level(key).capacity)

    def with_more(factor: float) -> Hardware:
        more = {**sizes, key: sizes[key] + int(factor * lacking / share)}
        return L4.with_capacity(gpu_bytes=more["gpu"], cpu_bytes=more["cpu"])

    assert plan(model, with_more(1.02), workload, resolution="coarse").policy.batch_size >= 1
    with pytest.raises(PolicyInfeasible):
        plan(model, with_more(0.95), workload, resolution="coarse")


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
        policy = Policy(batch_size=1, micro_batch_size=1, weights_on_gpu=r_w)
        return batch_footprint(MIXTRAL, BatchShape.uniform(1, 1, 77, 32), policy)

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
