"""The hierarchical roofline of the paper's case study."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm import Hardware, MoEModel
from hrm.operators import attention_core, expert_ffn
from hrm.roofline import attainable, physical_bound, roofline_point, turning_points

L4 = Hardware.from_catalog("gcp-l4-1x")
MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")


def test_p1_of_the_case_study() -> None:
    """Where the CPU's compute roof binds, P1 is 1.3 TFLOP/s over 16 GB/s = 81.25 FLOP/B."""
    p1, _ = turning_points(L4, gpu_intensity=100, cpu_intensity=13.0)
    assert p1 == 81.25
    p1, _ = turning_points(L4, gpu_intensity=100, cpu_intensity=1e6)
    assert p1 == 81.25


def test_p1_under_the_cpus_memory_roof() -> None:
    """At an intensity of 2, memory binds the CPU and P1 is 200 GFLOP/s over 16 GB/s."""
    p1, _ = turning_points(L4, gpu_intensity=100, cpu_intensity=2.0)
    assert p1 == pytest.approx(100e9 * 2 / 16e9)


def test_p2_by_the_papers_count() -> None:
    """The paper's count of Mixtral's MoE FFN at micro-batch 128 puts P2 at 599 FLOP/B."""
    b, h1, h2, k, experts = 128, 4096, 14336, 2, 8
    intensity = 6 * b * h1 * h2 * k / (2 * b * h1 + 2 * b * h2 + 6 * h1 * h2 * experts)
    _, p2 = turning_points(L4, gpu_intensity=intensity, cpu_intensity=1)
    assert p2 == pytest.approx(599, abs=0.5)


def test_p2_by_our_count() -> None:
    """Our FFN operator, which also counts each routed copy's activations, lies within 1 % of the paper's P2."""
    _, p2 = turning_points(L4, gpu_intensity=expert_ffn(MIXTRAL, 128).intensity, cpu_intensity=1)
    assert p2 == pytest.approx(599, rel=0.01)


@pytest.mark.parametrize("kv_bytes", [2.0, 0.5])
def test_attention_belongs_on_the_cpu(kv_bytes: float) -> None:
    """Fig. 4: attention's intensity lies left of P1 in fp16 and int4, so the CPU attains more than the link."""
    op = attention_core(MIXTRAL, 64, 512, count="paper", kv_dtype_bytes=kv_bytes)
    point = roofline_point(L4, op, batch=64)
    assert point.intensity["cpu"] < point.p1
    assert point.bound_by.startswith("CPU")
    assert point.attainable_flops == pytest.approx(min(1.3e12, 100e9 * point.intensity["cpu"]))


@pytest.mark.parametrize(("batch", "bound"), [(1024, "link"), (16384, "GPU memory")])
def test_a_large_batch_leaves_the_link(batch: int, bound: str) -> None:
    """Fig. 5: with kernels of 128 tokens the FFN is bound by the link below P2 and by GPU memory above."""
    point = roofline_point(L4, expert_ffn(MIXTRAL, batch), batch=batch, kernel_op=expert_ffn(MIXTRAL, 128))
    assert point.bound_by == bound
    assert (point.intensity["cpu"] < point.p2) == (bound == "link")


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_attainable_is_the_lower_roof(low: float, high: float) -> None:
    """Eq. 8 rises with intensity up to the ridge and never passes either roof."""
    low, high = sorted((low, high))
    assert attainable(1e12, 1e9, low) <= attainable(1e12, 1e9, high) <= 1e12
    assert attainable(1e12, 1e9, low) <= 1e9 * low
    assert attainable(1e12, 1e9, 1000.0) == 1e12


def test_attainable_of_arrays() -> None:
    """Roofs are computed for a whole axis at once."""
    assert attainable(10.0, 2.0, np.array([1.0, 5.0, 9.0])).tolist() == [2.0, 10.0, 10.0]


@given(st.floats(0.1, 1e5), st.floats(0.1, 1e5), st.floats(1e9, 1e12), st.floats(1.0, 10.0))
def test_turning_points_fall_with_the_link(gpu_i: float, cpu_i: float, link: float, faster: float) -> None:
    """A faster link moves both turning points left in proportion, and P1 never lies right of P2's roof."""
    slow = turning_points(L4, gpu_intensity=gpu_i, cpu_intensity=cpu_i, link_bandwidth=link)
    fast = turning_points(L4, gpu_intensity=gpu_i, cpu_intensity=cpu_i, link_bandwidth=link * faster)
    assert fast == pytest.approx((slow[0] / faster, slow[1] / faster))
    if gpu_i >= cpu_i:
        assert slow[0] <= slow[1]


def test_physical_bound_of_a_run_bound_by_the_link() -> None:
    """With everything streamed and little to compute, the bound is the weights' passes over the link."""
    bound = physical_bound(
        MIXTRAL,
        L4.rates("spec"),
        batch_size=4,
        prompt_tokens=40,
        pairs=220,
        gen_len=8,
        weights_on_gpu=0.0,
    )
    streamed = 32 * MIXTRAL.layer_expert_bytes
    assert bound == pytest.approx(4 * 8 / (8 * streamed / 16e9))


@given(
    st.integers(1, 4000),
    st.integers(1, 2000),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(["h2d_bandwidth", "d2h_bandwidth", "dram_bandwidth", "cpu_attention_flops", "gpu_bandwidth"]),
)
def test_physical_bound_never_falls_with_a_faster_machine(n, prompt, gen_len, share, rate) -> None:
    """More of any rate, or more resident weights, never lowers the ceiling."""
    rates = L4.rates("spec")
    work = {"batch_size": n, "prompt_tokens": n * prompt, "pairs": n * prompt * (prompt + 1) // 2, "gen_len": gen_len}
    bound = physical_bound(MIXTRAL, rates, **work, weights_on_gpu=share)
    faster = replace(rates, **{rate: 2 * getattr(rates, rate)})
    assert 0 < bound <= physical_bound(MIXTRAL, faster, **work, weights_on_gpu=share)
    assert bound <= physical_bound(MIXTRAL, rates, **work, weights_on_gpu=1.0)
