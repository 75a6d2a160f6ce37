"""From work to seconds: operators, layers, prefill, whole runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import Hardware, MoEModel
from hrm.hardware import Curve, Rates
from hrm.latency import TaskTimes, estimate, layer_terms, operator_seconds, prefill_seconds
from hrm.operators import Operator, attention_core, expert_ffn

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


def test_layer_terms_by_hand() -> None:
    """The link term is the streamed weights plus the attended states, and attention the KV of all sequences."""
    terms = layer_terms(
        TaskTimes(MIXTRAL, SPEC), micro_batch_size=50, num_micro_batches=4, context=300, weights_on_gpu=0.25
    )
    streamed = 0.75 * MIXTRAL.layer_expert_bytes
    assert terms["link (CPU to GPU)"] == pytest.approx((streamed + 200 * 4096 * 2) / 16e9)
    assert terms["link (GPU to CPU)"] == pytest.approx(200 * (4096 + 2048) * 2 / 16e9)
    assert terms["CPU attention"] == pytest.approx(200 * 300 * 4096 / 100e9)
    assert terms["staging copy"] == pytest.approx(streamed / 50e9)
    assert terms["CPU memory"] == pytest.approx((3 * streamed + 200 * (2 * 4096 + 2048) * 2 + 200 * 300 * 4096) / 100e9)


def run(rates: Rates, *, mu=64, g=8, prompt=100, gen_len=32, r_w=0.1):
    """The estimate of one policy."""
    return estimate(
        MIXTRAL,
        rates,
        micro_batch_size=mu,
        num_micro_batches=g,
        prompt_len=prompt,
        gen_len=gen_len,
        weights_on_gpu=r_w,
    )


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


def test_a_grid_equals_single_points() -> None:
    """Estimating a grid gives each point's estimate."""
    mu, g, r_w = np.array([8.0, 64.0, 200.0]), np.array([1.0, 2.0, 16.0]), np.array([0.0, 0.3, 1.0])
    grid = run(SPEC, mu=mu, g=g, r_w=r_w)
    for i in range(3):
        one, single = grid.at(i), run(SPEC, mu=mu[i], g=g[i], r_w=r_w[i])
        assert one.throughput == pytest.approx(float(single.throughput), rel=1e-12)
        assert one.prefill_s == pytest.approx(float(single.prefill_s), rel=1e-12)
        assert one.terms == pytest.approx({k: float(v) for k, v in single.terms.items()}, rel=1e-12)


SPEEDS = [
    "gpu_bandwidth",
    "cpu_attention_flops",
    "h2d_bandwidth",
    "d2h_bandwidth",
    "staging_bandwidth",
    "dram_bandwidth",
]


@given(
    st.integers(1, 300),
    st.integers(1, 32),
    st.integers(1, 1000),
    st.integers(1, 100),
    st.floats(0, 1),
    st.sampled_from(SPEEDS),
    st.floats(1, 8),
)
@settings(deadline=None, max_examples=60)
def test_a_faster_machine_is_never_slower(mu, g, prompt, gen_len, r_w, name, factor) -> None:
    """More of any rate never raises the time of a fixed policy."""
    shape = {"mu": mu, "g": g, "prompt": prompt, "gen_len": gen_len, "r_w": r_w}
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


def test_decode_integrates_a_growing_context() -> None:
    """Where attention binds, decode time is the sum over steps of a layer at that step's context."""
    rates = replace(SPEC, cpu_attention=Curve.constant(1e9))
    result = run(rates, g=1, prompt=50, gen_len=21)
    times = TaskTimes(MIXTRAL, rates)
    steps = 0.0
    for step in range(1, 21):
        terms = layer_terms(times, micro_batch_size=64, num_micro_batches=1, context=50 + step, weights_on_gpu=0.1)
        steps += 32 * max(float(v) for v in terms.values())
    assert float(result.decode_s) == pytest.approx(steps, rel=1e-3)


def test_prefill_is_bound_by_its_slowest_lane() -> None:
    """With a crawling link, prefill takes the model's streamed weights over the link."""
    rates = replace(SPEC, h2d_bandwidth=1e8)
    seconds = prefill_seconds(
        TaskTimes(MIXTRAL, rates), micro_batch_size=1, num_micro_batches=1, prompt_len=10, weights_on_gpu=0.0
    )
    assert float(seconds) == pytest.approx(33 * MIXTRAL.layer_expert_bytes / 1e8, rel=0.01)


def test_shared_cores_bound_a_machine_without_a_gpu() -> None:
    """On a CPU-only machine the lanes share cores, and fewer cores never make it faster."""
    box = replace(SPEC, cores=Curve.constant(2.0), copy_bandwidth=5e9)
    many, few = run(box), run(replace(box, cores=Curve.constant(1.0)))
    assert "CPU cores" in many.terms
    assert "CPU cores" not in run(SPEC).terms
    assert float(few.throughput) <= float(many.throughput)
