"""From work to seconds: operators, terms of every placement, prefill, whole runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import Hardware, MoEModel, Policy
from hrm.affine import KV_ON_GPU, KV_STREAMED, WEIGHTS_ON_GPU, WEIGHTS_STREAMED, Affine
from hrm.hardware import Curve, Rates
from hrm.latency import Estimate, estimate
from hrm.operators import Operator, attention_core, causal_pairs, expert_ffn
from hrm.task_times import TaskTimes, operator_seconds
from hrm.terms import Phase, Placement, Sizes, decode_phase, prefill_phase

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")
SPEC = Hardware.from_catalog("gcp-l4-1x").rates("spec")


def test_a_gemm_takes_the_slower_of_compute_and_memory() -> None:
    """Eq. 14: T_x is the larger of FLOPs over peak and bytes over bandwidth, plus its launches."""
    rates = replace(SPEC, gpu_gemm=Curve.constant(100.0), gpu_bandwidth=10.0, gpu_launch_s=0.5)
    compute = Operator(name="x", kind="gemm", flops=500.0, weight_bytes=20.0, launches=2)
    memory = Operator(name="x", kind="gemm", flops=100.0, weight_bytes=90.0, launches=2)
    assert operator_seconds(compute, rates) == 2 * 0.5 + 5.0
    assert operator_seconds(memory, rates) == 2 * 0.5 + 9.0


def test_cpu_attention_takes_the_slower_of_compute_and_kv() -> None:
    """Decode attention is bound by reading the KV cache or by the CPU's compute roof."""
    op = attention_core(MIXTRAL, 10, 1000)
    slow_memory = replace(SPEC, cpu_attention=Curve.constant(1e9), cpu_attention_flops=1e15)
    slow_compute = replace(SPEC, cpu_attention=Curve.constant(1e15), cpu_attention_flops=1e9)
    assert operator_seconds(op, slow_memory) == pytest.approx(10 * 1000 * 4096 / 1e9)
    assert operator_seconds(op, slow_compute) == pytest.approx(op.flops / 1e9)


def test_a_measured_expert_curve_is_used_at_tokens_per_expert() -> None:
    """The expert FFN takes its rate from the curve at the tokens that each active expert gets."""
    curve = Curve(((1.0, 1e12), (1000.0, 50e12)))
    op = expert_ffn(MIXTRAL, 2000)
    expected = op.flops / curve.at(float(op.rows))
    assert operator_seconds(op, replace(SPEC, gpu_experts=curve)) == pytest.approx(expected)


def test_transfers_cost_their_overhead() -> None:
    """A transfer takes its bytes over the link's rate, plus hand-over and per-transfer cost."""
    times = TaskTimes(MIXTRAL, replace(SPEC, h2d_bandwidth=2e9, d2h_bandwidth=4e9, task_s=0.25, transfer_s=0.5))
    assert times.h2d(2e9) == 1.75
    assert times.d2h(2e9) == 1.25
    assert times.staging(50e9) == pytest.approx(1.25)


# -- several GPUs --------------------------------------------------------------------------------------


def test_two_gpus_halve_a_gemm() -> None:
    """At data-sheet rates everything that is split takes half as long, and an exchange comes on top."""
    rates = replace(SPEC, gpu_launch_s=0.0, peer_bandwidth=8e9, peer_s=0.001)
    one, two = TaskTimes(MIXTRAL, rates), TaskTimes(MIXTRAL, rates, num_gpus=2)
    assert two.gpu_experts(100) == pytest.approx(one.gpu_experts(100) / 2)
    assert two.gpu_attention(10, 5000) == pytest.approx(one.gpu_attention(10, 5000) / 2)
    assert one.all_reduce(100) == 0
    # Twice per layer, each GPU sends 2(n-1)/n of the hidden states to its peer.
    exchange = 2 * (0.001 + 1.0 * 100 * 4096 * 2 / 8e9)
    assert two.all_reduce(100) == pytest.approx(exchange)
    whole = (one.after_attention(100) - two.after_attention(100) + exchange) * 2
    replicated = sum(operator_seconds(op, rates) for op in after_norms(100))
    assert whole == pytest.approx(one.after_attention(100) - replicated)


def after_norms(tokens: int) -> list[Operator]:
    """Operators of PostAttn that every GPU does in full."""
    from hrm.operators import after_attention

    return [op for op in after_attention(MIXTRAL, tokens) if op.replicated]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_more_gpus_send_more(count: int) -> None:
    """An all-reduce over n GPUs sends 2(n-1)/n of the hidden states, whatever the model."""
    rates = replace(SPEC, peer_bandwidth=1e9)
    seconds = TaskTimes(MIXTRAL, rates, num_gpus=count).all_reduce(10)
    assert seconds == pytest.approx(2 * 2 * (count - 1) / count * 10 * 8192 / 1e9)
    for name, tokens in (("post_attention", 10), ("after_attention", 10)):
        free = replace(rates, peer_bandwidth=1e30)
        fast = getattr(TaskTimes(MIXTRAL, free, num_gpus=count), name)(tokens)
        assert getattr(TaskTimes(MIXTRAL, rates, num_gpus=count), name)(tokens) == pytest.approx(fast + seconds)


# -- experts on the CPU, attention on the GPU ----------------------------------------------------------


def test_experts_on_the_cpu_take_the_slower_of_compute_and_weights() -> None:
    """The CPU's experts are bound by its FLOP/s at the tokens per expert, or by reading active experts."""
    curve = Curve(((1.0, 1e11), (100.0, 1e12)))
    slow = TaskTimes(MIXTRAL, replace(SPEC, cpu_experts=curve, cpu_weight_bandwidth=1e30))
    op = expert_ffn(MIXTRAL, 64)
    assert slow.cpu_experts(64) == pytest.approx(op.flops / curve.at(float(op.rows)))
    reads = TaskTimes(MIXTRAL, replace(SPEC, cpu_experts=Curve.constant(1e30), cpu_weight_bandwidth=50e9))
    assert reads.cpu_experts(2) == pytest.approx(8 * (1 - 0.75**2) * MIXTRAL.expert_bytes / 50e9)
    assert reads.active_expert_bytes(2) == pytest.approx(8 * (1 - 0.75**2) * MIXTRAL.expert_bytes)


def test_attention_on_the_gpu_takes_the_slower_of_kv_and_compute() -> None:
    """Decode attention on the GPU reads its KV at the rate for its context, or computes, after its launches."""
    curve = Curve(((1.0, 1e10), (1000.0, 1e11)))
    rates = replace(SPEC, gpu_decode_attention=curve, gpu_launch_s=1e-3)
    op = attention_core(MIXTRAL, 5, 400)
    expected = 3 * 1e-3 + op.kv_bytes / curve.at(400.0)
    assert TaskTimes(MIXTRAL, rates).gpu_attention(5, 2000) == pytest.approx(expected)
    called = replace(rates, gpu_attention_s=0.25, task_s=0.5)
    assert TaskTimes(MIXTRAL, called).gpu_attention(5, 2000) == pytest.approx(0.75 + expected)
    slow = replace(rates, gpu_attention=Curve.constant(1e9), gpu_launch_s=0.0)
    assert TaskTimes(MIXTRAL, slow).gpu_attention(5, 2000) == pytest.approx(op.flops / 1e9)


# -- terms of a layer ----------------------------------------------------------------------------------

EXPERTS = MIXTRAL.layer_expert_bytes
TIMES = TaskTimes(MIXTRAL, SPEC)


def layer_terms(place: Placement, r_w: float, r_c: float, rates: Rates = SPEC, mu: int = 50, g: int = 4) -> Any:
    """Terms of one of Mixtral's 32 equal layers: 4 micro-batches of 50 sequences, context 300."""
    sizes = Sizes(micro_batch=mu, micro_batches=g, prompt_len=100)
    phase = decode_phase(TaskTimes(MIXTRAL, rates), sizes, place, context=300)
    ((count, terms),) = phase.pairs
    assert count == 32
    return {name: float(term.at(r_w, r_c)) for name, term in terms.items()}


def test_terms_with_attention_on_the_cpu_by_hand() -> None:
    """The link carries the streamed weights and attended states, and the CPU reads the KV of all sequences."""
    terms = layer_terms(Placement(), 0.25, 0.0)
    streamed = 0.75 * EXPERTS
    assert terms["link (CPU to GPU)"] == pytest.approx((streamed + 200 * 4096 * 2) / 16e9)
    assert terms["link (GPU to CPU)"] == pytest.approx(200 * (4096 + 2048) * 2 / 16e9)
    assert terms["CPU attention"] == pytest.approx(200 * 300 * 4096 / 100e9)
    assert terms["staging copy"] == pytest.approx(streamed / 50e9)
    assert terms["CPU memory"] == pytest.approx((3 * streamed + 200 * (2 * 4096 + 2048) * 2 + 200 * 300 * 4096) / 100e9)
    assert terms["GPU"] == pytest.approx(4 * (TIMES.pre_attention(50) + TIMES.post_attention(50)))
    one = TIMES.pre_attention(50) + TIMES.post_attention(50) + terms["CPU attention"] / 4
    one += (terms["link (GPU to CPU)"] + 200 * 4096 * 2 / 16e9) / 4
    assert terms["pipeline latency"] == pytest.approx(4 / 2 * one)


def test_terms_with_attention_on_the_gpu_by_hand() -> None:
    """A_g = 1: the KV that is not resident crosses the link every step, scaled by 1 - r_c; the CPU is idle."""
    terms = layer_terms(Placement(attention_on_gpu=True), 0.25, 0.6)
    streamed, read, new = 0.75 * EXPERTS, 0.4 * 200 * 300 * 4096, 0.4 * 200 * 4096
    assert terms["link (CPU to GPU)"] == pytest.approx((streamed + read) / 16e9)
    assert terms["link (GPU to CPU)"] == pytest.approx(new / 16e9)
    assert terms["staging copy"] == pytest.approx(streamed / 50e9)
    assert terms["CPU memory"] == pytest.approx((3 * streamed + read + new) / 100e9)
    gpu = TIMES.pre_attention(50) + TIMES.post_attention(50) + TIMES.gpu_attention(50, 50 * 300)
    assert terms["GPU"] == pytest.approx(4 * gpu)
    assert set(terms) == {"link (CPU to GPU)", "link (GPU to CPU)", "staging copy", "CPU memory", "GPU"}


def test_terms_with_experts_on_the_cpu_by_hand() -> None:
    """F_g = 0: the CPU computes 1 - r_w of the experts, the GPU r_w; no weight travels, hidden states do."""
    terms = layer_terms(Placement(ffn_on_gpu=False), 0.25, 0.0)
    hidden = 200 * 8192
    assert terms["link (CPU to GPU)"] == pytest.approx((200 * 4096 * 2 + hidden) / 16e9)
    assert terms["link (GPU to CPU)"] == pytest.approx((200 * (4096 + 2048) * 2 + hidden) / 16e9)
    cpu = 4 * 0.75 * TIMES.cpu_experts(50) + 200 * 300 * 4096 / 100e9
    assert terms["CPU attention and experts"] == pytest.approx(cpu)
    own = TIMES.pre_attention(50) + TIMES.after_attention(50)
    assert terms["GPU"] == pytest.approx(4 * (own + 0.25 * TIMES.gpu_experts(50)))
    reads = 4 * 0.75 * TIMES.active_expert_bytes(50) + 200 * 300 * 4096
    moved = 200 * (2 * 4096 + 2048) * 2 + 2 * hidden
    assert terms["CPU memory"] == pytest.approx((reads + moved) / 100e9)
    assert "staging copy" not in terms
    chain = own + 0.75 * TIMES.cpu_experts(50) + (200 * 300 * 4096 / 100e9 + moved / 16e9) / 4
    assert terms["pipeline latency"] == pytest.approx(4 / 2 * chain)


def test_routed_experts_leave_in_copies_of_their_own() -> None:
    """Hidden states, choices and weights go down in three copies, beside one each for QKV, attended and results."""
    place = Placement(ffn_on_gpu=False)
    free, terms = layer_terms(place, 0.25, 0.0), layer_terms(place, 0.25, 0.0, replace(SPEC, transfer_s=0.5))
    assert terms["link (GPU to CPU)"] - free["link (GPU to CPU)"] == pytest.approx(4 * 4 * 0.5)
    assert terms["link (CPU to GPU)"] - free["link (CPU to GPU)"] == pytest.approx(4 * 2 * 0.5)
    assert terms["pipeline latency"] - free["pipeline latency"] == pytest.approx(4 / 2 * 6 * 0.5)


def test_terms_with_only_experts_on_the_cpu_by_hand() -> None:
    """A_g = 1, F_g = 0: KV and hidden states on the link, and the CPU has nothing but its experts."""
    terms = layer_terms(Placement(attention_on_gpu=True, ffn_on_gpu=False), 0.5, 0.5)
    hidden, read, new = 200 * 8192, 0.5 * 200 * 300 * 4096, 0.5 * 200 * 4096
    assert terms["link (CPU to GPU)"] == pytest.approx((read + hidden) / 16e9)
    assert terms["link (GPU to CPU)"] == pytest.approx((new + hidden) / 16e9)
    assert terms["CPU experts"] == pytest.approx(4 * 0.5 * TIMES.cpu_experts(50))
    gpu = TIMES.pre_attention(50) + TIMES.after_attention(50) + TIMES.gpu_attention(50, 50 * 300)
    assert terms["GPU"] == pytest.approx(4 * (gpu + 0.5 * TIMES.gpu_experts(50)))


def test_what_does_not_stream_costs_no_transfers() -> None:
    """With everything resident no page travels, so that the link costs nothing, not even its overheads."""
    rates = replace(SPEC, transfer_s=0.5, task_s=0.25)
    idle = Placement(attention_on_gpu=True, streams_weights=False, streams_kv=False)
    terms = layer_terms(idle, 1.0, 1.0, rates)
    assert terms["link (CPU to GPU)"] == terms["link (GPU to CPU)"] == 0
    busy = layer_terms(Placement(attention_on_gpu=True), 1.0, 1.0, rates)
    assert busy["link (CPU to GPU)"] == pytest.approx(4 * 0.75 + 4 * 0.75)  # a page and KV per micro-batch
    assert busy["link (GPU to CPU)"] == pytest.approx(4 * 0.75)


def test_copies_by_a_core_pass_memory_twice() -> None:
    """Without a copy engine a byte over the link is read and written in CPU memory, and takes a core."""
    box = replace(SPEC, copy_bandwidth=5e9, cores=Curve.constant(2.0))
    terms, spec = layer_terms(Placement(), 0.25, 0.0, box), layer_terms(Placement(), 0.25, 0.0)
    linked = 0.75 * EXPERTS + 200 * (2 * 4096 + 2048) * 2
    assert terms["CPU memory"] == pytest.approx(spec["CPU memory"] + linked / 100e9)
    work = terms["GPU"] + terms["CPU attention"] + linked / 5e9 + terms["staging copy"]
    assert terms["CPU cores"] == pytest.approx(work / 2)
    apart = layer_terms(Placement(), 0.25, 0.0, replace(box, gpu_on_own_cores=True))
    assert apart["CPU cores"] == pytest.approx((work - terms["GPU"]) / 2)
    assert "all cores" not in apart
    slowed = replace(box, gpu_on_own_cores=True, processors=Curve(((1.0, 1.0), (3.0, 1.6))))
    both = layer_terms(Placement(), 0.25, 0.0, slowed)
    assert both == pytest.approx(apart | {"all cores": work / 1.6})


def test_the_weights_of_the_next_layer_travel_in_a_layers_time() -> None:
    """A dense layer before a layer of experts pays for the experts' transfer, and the last for the first's."""
    model = MoEModel.from_catalog("deepseek-v2-lite")
    assert model.layer_counts == {0: 1, 1: 26}
    sizes = Sizes(micro_batch=10, micro_batches=2, prompt_len=100)
    phase = decode_phase(TaskTimes(model, SPEC), sizes, Placement(), context=100)
    staged = {
        pair: float(terms["staging copy"].at(0.0, 0.0)) * 50e9
        for pair, (_, terms) in zip(model.layer_pairs, phase.pairs, strict=True)
    }
    assert [count for count, _ in phase.pairs] == list(model.layer_pairs.values())
    assert staged == pytest.approx({pair: model.kind_expert_bytes(pair[1]) for pair in model.layer_pairs})


# -- shares --------------------------------------------------------------------------------------------

numbers = st.floats(-1e3, 1e3)
affines = st.builds(Affine, numbers, numbers, numbers)


@given(affines, affines, numbers, st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 1))
def test_affine_algebra(a: Affine, b: Affine, factor: float, divisor: float, w: float, c: float) -> None:
    """Sums and multiples of affine quantities have the sums and multiples of their values."""

    def same(made: Affine, value: float) -> bool:
        return math.isclose(made.at(w, c), value, rel_tol=1e-9, abs_tol=1e-6)

    assert same(a + b, a.at(w, c) + b.at(w, c))
    assert same(factor * a, factor * a.at(w, c)) and same(a * factor, factor * a.at(w, c))
    assert same(a / divisor, a.at(w, c) / divisor)
    assert same(a + factor, a.at(w, c) + factor) and same(factor + a, a.at(w, c) + factor)
    assert same(sum([a, b, a], Affine(0.0)), 2 * a.at(w, c) + b.at(w, c))


def test_affine_quantities_over_a_grid() -> None:
    """Arrays as coefficients, and an array times an affine quantity, give every point's value."""
    grid = np.array([1.0, 2.0, 3.0])
    value = grid * WEIGHTS_STREAMED + 10 * KV_ON_GPU + grid
    assert isinstance(value, Affine)
    assert value.at(0.5, 0.25).tolist() == [4.0, 5.5, 7.0]
    assert (WEIGHTS_ON_GPU + WEIGHTS_STREAMED).at(0.3, 0.7) == (KV_ON_GPU + KV_STREAMED).at(0.3, 0.7) == 1


def test_a_phase_is_its_busiest_resources() -> None:
    """Pairs of layers each take their longest term, the floor holds for all, and extra time comes on top."""
    pairs = ((3, {"a": Affine(2.0, -1.0), "b": Affine(1.0)}), (1, {"a": Affine(0.0), "b": Affine(5.0)}))
    assert Phase(pairs).seconds(0.5) == 3 * 1.5 + 5
    assert Phase(pairs).seconds(1.0) == 3 * 1.0 + 5
    assert Phase(pairs, floor=Affine(20.0)).seconds(0.5) == 20
    assert Phase(pairs, floor=Affine(20.0), extras={"c": Affine(1.0, 2.0)}).seconds(0.5) == 22
    assert Phase(pairs).needs(0.5) == {"a": 4.5, "b": 8.0}
    assert Phase(pairs).binding(0.5) == {"a": 4.5, "b": 5.0}


# -- whole runs ----------------------------------------------------------------------------------------


def run(rates: Rates, *, mu=64, g=8, prompt=100, gen_len=32, r_w=0.1, model=MIXTRAL, gpus=1, **place) -> Estimate:
    """The estimate of one policy."""
    policy = Policy(batch_size=mu * g, micro_batch_size=mu, weights_on_gpu=r_w, **place)
    return estimate(model, rates, policy, prompt_len=prompt, gen_len=gen_len, num_gpus=gpus)


def test_throughput_is_tokens_over_prefill_and_decode() -> None:
    """Generated tokens count from the first one, which prefill yields."""
    result = run(SPEC)
    assert float(result.throughput) == pytest.approx(64 * 8 * 32 / float(result.prefill_s + result.decode_s))
    assert float(run(SPEC, gen_len=1).decode_s) == 0


def test_bottleneck_is_the_largest_term() -> None:
    """The named bottleneck is the resource with the most seconds per layer, which is T_layer."""
    result = run(SPEC)
    assert float(result.terms[result.bottleneck]) == max(float(v) for v in result.terms.values())
    assert float(result.layer_s) == pytest.approx(float(result.terms[result.bottleneck]))
    assert run(replace(SPEC, h2d_bandwidth=1e9)).bottleneck == "link (CPU to GPU)"
    assert run(replace(SPEC, cpu_attention=Curve.constant(1e8))).bottleneck in ("CPU attention", "pipeline latency")


@pytest.mark.parametrize("attention_on_gpu", [False, True])
@pytest.mark.parametrize("ffn_on_gpu", [False, True])
def test_a_grid_equals_single_points(attention_on_gpu: bool, ffn_on_gpu: bool) -> None:
    """Phases over a grid of sizes and shares have each point's seconds, with prefill and decode."""
    place = Placement(attention_on_gpu=attention_on_gpu, ffn_on_gpu=ffn_on_gpu)
    mu, g = np.array([8.0, 64.0, 200.0]), np.array([1.0, 2.0, 16.0])
    w, c = np.array([0.0, 0.3, 0.9]), np.array([0.5, 0.0, 1.0])

    def phases(mu: Any, g: Any) -> list[Phase]:
        sizes = Sizes(micro_batch=mu, micro_batches=g, prompt_len=100.0)
        return [prefill_phase(TIMES, sizes, place), decode_phase(TIMES, sizes, place, context=110.0)]

    for together, *single in zip(phases(mu, g), *(phases(mu[i], g[i]) for i in range(3)), strict=True):
        each = [float(single[i].seconds(w[i], c[i])) for i in range(3)]
        assert together.seconds(w, c).tolist() == pytest.approx(each, rel=1e-12)


SPEEDS = [
    "gpu_bandwidth",
    "cpu_attention_flops",
    "h2d_bandwidth",
    "d2h_bandwidth",
    "staging_bandwidth",
    "dram_bandwidth",
    "cpu_weight_bandwidth",
]
places = st.fixed_dictionaries(
    {"attention_on_gpu": st.booleans(), "ffn_on_gpu": st.booleans(), "kv_on_gpu": st.sampled_from([0.0, 0.4, 1.0])}
)


@given(
    st.integers(1, 300),
    st.integers(1, 32),
    st.integers(1, 1000),
    st.integers(1, 100),
    st.floats(0, 1),
    places,
    st.sampled_from(SPEEDS),
    st.floats(1, 8),
)
@settings(deadline=None, max_examples=60)
def test_a_faster_machine_is_never_slower(mu, g, prompt, gen_len, r_w, place, name, factor) -> None:
    """More of any rate never raises the time of a fixed policy, wherever it computes."""
    shape = {"mu": mu, "g": g, "prompt": prompt, "gen_len": gen_len, "r_w": r_w, **place}
    base, faster = run(SPEC, **shape), run(replace(SPEC, **{name: factor * getattr(SPEC, name)}), **shape)
    assert float(faster.throughput) >= float(base.throughput) * (1 - 1e-9)


@given(st.integers(1, 300), st.integers(1, 32), st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_resident_weights_never_slow_a_layer(mu, g, prompt, one, other) -> None:
    """A larger r_w never raises prefill or decode time."""
    low, high = sorted((one, other))
    slow, fast = run(SPEC, mu=mu, g=g, prompt=prompt, r_w=low), run(SPEC, mu=mu, g=g, prompt=prompt, r_w=high)
    assert float(fast.decode_s) <= float(slow.decode_s) * (1 + 1e-9)
    assert float(fast.prefill_s) <= float(slow.prefill_s) * (1 + 1e-9)


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(2, 200))
@settings(deadline=None, max_examples=60)
def test_longer_prompts_take_longer(prompt: int, more: int, gen_len: int) -> None:
    """A longer prompt never shortens prefill or decode."""
    short, long = run(SPEC, prompt=prompt, gen_len=gen_len), run(SPEC, prompt=prompt + more, gen_len=gen_len)
    assert float(long.prefill_s) >= float(short.prefill_s)
    assert float(long.decode_s) >= float(short.decode_s)


def test_decode_adds_up_a_growing_context() -> None:
    """Decode time is the sum over steps of a layer at that step's context."""
    rates = replace(SPEC, cpu_attention=Curve.constant(1e9))
    result = run(rates, g=1, prompt=50, gen_len=21)
    sizes, steps = Sizes(micro_batch=64, micro_batches=1, prompt_len=50), 0.0
    for step in range(1, 21):
        ((_, terms),) = decode_phase(TaskTimes(MIXTRAL, rates), sizes, Placement(), context=50 + step).pairs
        steps += 32 * max(float(term.at(0.1, 0.0)) for term in terms.values())
    assert result.decode_s == pytest.approx(steps, rel=1e-9)


def test_decode_waits_for_the_head() -> None:
    """A step takes at least the GPU's work on all layers and the choice of the next tokens."""
    free = replace(SPEC, h2d_bandwidth=1e18, d2h_bandwidth=1e18, staging_bandwidth=1e18, dram_bandwidth=1e18)
    free = replace(free, cpu_attention=Curve.constant(1e18), cpu_attention_flops=1e24)
    times = TaskTimes(MIXTRAL, free)
    result = run(free, gen_len=2, r_w=1.0)
    layers = 32 * 8 * (times.pre_attention(64) + times.post_attention(64))
    assert result.decode_s == pytest.approx(layers + 8 * times.sample(64), rel=1e-6)
    assert result.bottleneck == "GPU"


def test_prefill_is_bound_by_its_slowest_lane() -> None:
    """With a crawling link, prefill takes the model's streamed weights over the link, and the first layer's twice."""
    rates = replace(SPEC, h2d_bandwidth=1e8)
    sizes = Sizes(micro_batch=1, micro_batches=1, prompt_len=10)
    phase = prefill_phase(TaskTimes(MIXTRAL, rates), sizes, Placement())
    assert float(phase.seconds(0.0)) == pytest.approx(33 * EXPERTS / 1e8, rel=0.01)


def test_prefill_computes_every_prompt() -> None:
    """With everything resident and links without end, prefill is the GPU's work on all prompts and layers."""
    free = replace(SPEC, h2d_bandwidth=1e18, d2h_bandwidth=1e18, staging_bandwidth=1e18, dram_bandwidth=1e18)
    times, sizes = TaskTimes(MIXTRAL, free), Sizes(micro_batch=3, micro_batches=5, prompt_len=40)
    place = Placement(streams_weights=False)
    layer = times.prefill(120, 3 * causal_pairs(40), 40)
    assert float(prefill_phase(times, sizes, place).seconds(1.0)) == pytest.approx(5 * (32 * layer + times.sample(3)))


def test_prefill_offloads_what_is_not_on_the_gpu() -> None:
    """With attention on the GPU, 1 - r_c of the prompt's KV goes to the host, with hidden states in any case."""
    rates = replace(SPEC, d2h_bandwidth=1e9, staging_bandwidth=1e18)
    sizes = Sizes(micro_batch=3, micro_batches=5, prompt_len=40)
    for place, r_c, share in (
        (Placement(), 0.0, 1.0),
        (Placement(attention_on_gpu=True), 0.25, 0.75),
        (Placement(attention_on_gpu=True, streams_kv=False), 1.0, 0.0),
    ):
        ((_, terms),) = prefill_phase(TaskTimes(MIXTRAL, rates), sizes, place).pairs
        moved = 600 * (8192 + share * 4096)
        assert terms["link (GPU to CPU)"].at(0.0, r_c) == pytest.approx(moved / 1e9)


def test_an_encoder_decoder_run() -> None:
    """NLLB-MoE is encoded, then decoded from nothing: finite, positive, and longer for longer prompts."""
    model = MoEModel.from_catalog("nllb-moe-54b")
    for place in (
        {},
        {"attention_on_gpu": True},
        {"ffn_on_gpu": False},
        {"attention_on_gpu": True, "ffn_on_gpu": False},
    ):
        short, long = (run(SPEC, model=model, prompt=prompt, **place) for prompt in (100, 400))
        assert 0 < short.prefill_s < long.prefill_s < math.inf
        assert 0 < short.decode_s <= long.decode_s < math.inf
        assert 0 < long.throughput <= short.throughput < math.inf
    one = run(SPEC, model=model, gen_len=1)
    assert one.decode_s > 0  # the first token, too, is decoded


def test_cross_attention_reads_the_prompts_every_step() -> None:
    """The CPU reads, per sequence, the tokens so far and the encoder's keys and values of the whole prompt."""
    model = MoEModel.from_catalog("nllb-moe-54b")
    sizes = Sizes(micro_batch=10, micro_batches=2, prompt_len=500)
    phase = decode_phase(TaskTimes(model, SPEC), sizes, Placement(), context=7)
    per_token = 2 * 2048 * 4  # keys and values in float32
    for _, terms in phase.pairs:
        assert float(terms["CPU attention"].at(0.0, 0.0)) == pytest.approx(20 * (500 + 7) * per_token / 100e9)


@pytest.mark.parametrize("gpus", [1, 2])
def test_slack_and_needs(gpus: int) -> None:
    """A resource is idle for what is left of the run, and none is needed for longer than the run lasts."""
    result = run(replace(SPEC, peer_bandwidth=1e10), gpus=gpus)
    whole = result.prefill_s + result.decode_s
    assert set(result.slack) == set(result.needs)
    for name, need in result.needs.items():
        assert need <= whole * 1.01
        assert result.slack[name] == pytest.approx(1 - min(1, need / whole))


def test_shared_cores_bound_a_machine_without_a_gpu() -> None:
    """On a CPU-only machine the lanes share cores, and fewer cores never make it faster."""
    box = replace(SPEC, cores=Curve.constant(2.0), copy_bandwidth=5e9)
    many, few = run(box), run(replace(box, cores=Curve.constant(1.0)))
    assert "CPU cores" in many.terms
    assert "CPU cores" not in run(SPEC).terms
    assert float(few.throughput) <= float(many.throughput)


def test_the_only_busy_resource_has_no_slack() -> None:
    """With everything on the GPU the GPU is busy all the time, the LM head included, and is what all wait for."""
    model = MoEModel.from_catalog("gpt-oss-20b")
    rates = Hardware.from_catalog("h200-1x").rates("spec")
    everything = {"attention_on_gpu": True, "weights_on_gpu": 1.0, "kv_on_gpu": 1.0}
    alone = Policy(batch_size=8, micro_batch_size=8, **everything)
    found = estimate(model, rates, alone, prompt_len=8, gen_len=512)
    assert found.slack["GPU"] == pytest.approx(0, abs=0.01)
    assert found.binding["GPU"] == pytest.approx(found.prefill_s + found.decode_s, rel=0.01)
