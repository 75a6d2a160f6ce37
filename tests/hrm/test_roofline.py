"""The hierarchical roofline of the paper's case study."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm import Hardware, MoEModel, Policy, catalog
from hrm.bound import physical_bound
from hrm.errors import InvalidValue
from hrm.hardware import Curve
from hrm.latency import estimate
from hrm.operators import active_experts, attention_core, expert_ffn
from hrm.roofline import (
    attainable,
    balance_point,
    link_path,
    performance,
    roofline_point,
    roofs,
    turning_points,
)

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
    assert expert_ffn(MIXTRAL, 128, count="paper").intensity == pytest.approx(intensity)


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


# -- any number of levels ------------------------------------------------------------------------------


def machine_with_a_disk() -> Hardware:
    """The L4 box with a third level behind CPU memory."""
    data = L4.to_dict()

    def say(value: str) -> dict[str, str]:
        return {"value": value, "source": "made up"}

    data["levels"]["disk"] = {
        "processor": "none", "capacity": say("2 TB"), "bandwidth": say("6 GB/s"), "peak_flops": say("1 FLOP/s")
    }  # fmt: skip
    data["links"] += [
        {"source": "disk", "target": "cpu", "bandwidth": say("4 GB/s")},
        {"source": "cpu", "target": "disk", "bandwidth": say("2 GB/s")},
    ]
    return Hardware.from_dict(data, name="with-disk")


def test_data_on_a_third_level_crosses_every_link() -> None:
    """From disk to GPU there are four roofs: the GPU's two and both links, at the intensity on disk."""
    machine = machine_with_a_disk()
    intensity = {"gpu": 1000.0, "cpu": 77.0, "disk": 50.0}
    assert roofs(machine, intensity, run_on="gpu", data_on="disk") == {
        "gpu compute": 242e12,
        "gpu memory": 300e9 * 1000,
        "link disk->cpu": 4e9 * 50,
        "link cpu->gpu": 16e9 * 50,
    }
    assert performance(machine, intensity, run_on="gpu", data_on="disk") == (200e9, "link disk->cpu")
    assert performance(machine, intensity, run_on="cpu", data_on="disk") == (200e9, "link disk->cpu")
    assert performance(machine, intensity, run_on="cpu") == (1.3e12, "cpu compute")
    assert [(x.source, x.target) for x in link_path(machine, "disk", "gpu")] == [("disk", "cpu"), ("cpu", "gpu")]
    assert [(x.source, x.target) for x in link_path(machine, "gpu", "disk")] == [("gpu", "cpu"), ("cpu", "disk")]


def test_turning_points_between_other_levels() -> None:
    """P1, P2 and balance of a pair of levels take the slowest link between them."""
    machine = machine_with_a_disk()
    p1, p2 = turning_points(machine, gpu_intensity=100, cpu_intensity=2, upper="cpu", lower="disk")
    assert (p1, p2) == pytest.approx((1 / 4e9, 1.3e12 / 4e9))
    _, far = turning_points(machine, gpu_intensity=100, cpu_intensity=2, upper="gpu", lower="disk")
    assert far == pytest.approx(300e9 * 100 / 4e9)
    assert balance_point(machine, gpu_intensity=100, lower="disk") == pytest.approx(300e9 * 100 / 4e9)
    assert turning_points(machine, gpu_intensity=9, cpu_intensity=2) == turning_points(
        L4, gpu_intensity=9, cpu_intensity=2
    )


def test_levels_that_nothing_connects_are_refused() -> None:
    """A missing link and a missing intensity are refused by level; an unknown level is no level."""
    machine = machine_with_a_disk()
    cut = replace(machine, links=tuple(x for x in machine.links if x.source != "disk"))
    with pytest.raises(InvalidValue, match="no link from 'disk' to 'gpu'"):
        roofs(cut, {"gpu": 1.0, "disk": 1.0}, run_on="gpu", data_on="disk")
    with pytest.raises(InvalidValue, match="level 'disk' is needed; given: gpu, cpu"):
        roofs(machine, {"gpu": 1.0, "cpu": 1.0}, run_on="gpu", data_on="disk")


def test_gpus_work_together() -> None:
    """Several GPUs raise their compute and memory roofs together; the link of the node is one number."""
    name = "gcp-t4-2x"
    two = Hardware.from_catalog(name)
    one = replace(two, num_gpus=1)
    intensity = {"gpu": 10.0, "cpu": 10.0}
    both, single = (roofs(x, intensity, run_on="gpu", data_on="cpu") for x in (two, one))
    assert both["gpu compute"] == 2 * single["gpu compute"] == 2 * 65e12
    assert both["gpu memory"] == 2 * single["gpu memory"]
    assert both["link cpu->gpu"] == single["link cpu->gpu"]
    assert roofs(two, intensity, run_on="cpu") == roofs(one, intensity, run_on="cpu")
    assert balance_point(two, gpu_intensity=10.0) == 2 * balance_point(one, gpu_intensity=10.0)
    assert turning_points(two, gpu_intensity=1e9, cpu_intensity=1.0)[1] == 130e12 / float(two.h2d.bandwidth)


@pytest.mark.parametrize("name", catalog.names("hardware"))
def test_the_balance_point_is_where_two_roofs_meet(name: str) -> None:
    """At the balance point link and GPU memory attain the same (Eq. 11), on every machine."""
    machine = Hardware.from_catalog(name)
    balance = balance_point(machine, gpu_intensity=3.0)
    found = roofs(machine, {"gpu": 3.0, "cpu": balance}, run_on="gpu", data_on="cpu")
    assert found["gpu memory"] == pytest.approx(found["link cpu->gpu"])


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "gpt-oss-20b", "nllb-moe-54b", "opt-6.7b"])
def test_operators_of_other_layers_have_a_place(name: str) -> None:
    """Attention and experts of latent, windowed, encoded and dense layers lie under a roof that is named."""
    model = MoEModel.from_catalog(name)
    for layer in model.kinds:
        for op in (attention_core(model, 8, 512, layer=layer), expert_ffn(model, 64, layer)):
            point = roofline_point(L4, op, batch=8)
            assert point.bound_by in ("GPU compute", "GPU memory", "link", "CPU compute", "CPU memory")
            assert point.attainable_flops == max(point.on_cpu_flops, point.on_gpu_flops) > 0


# -- the bound of a policy -----------------------------------------------------------------------------

PLACES = [(attention, ffn) for attention in (False, True) for ffn in (True, False)]


def policy(n: int, attention: bool = False, ffn: bool = True, **shares: float) -> Policy:
    """A policy of one micro-batch."""
    return Policy(batch_size=n, micro_batch_size=n, attention_on_gpu=attention, ffn_on_gpu=ffn, **shares)


def test_decode_of_one_token_has_no_bound() -> None:
    """Without prefill and without a decode step there is nothing to bound, which is said."""
    with pytest.raises(InvalidValue, match="count prefill"):
        physical_bound(MIXTRAL, L4.rates("spec"), policy(4), prompt_len=10, gen_len=1, prefill=False)


def test_physical_bound_of_a_run_bound_by_the_link() -> None:
    """With everything streamed and little to compute, the bound is the active experts' passes over the link."""
    bound = physical_bound(MIXTRAL, L4.rates("spec"), policy(4), prompt_len=10, gen_len=8)
    ffn = MIXTRAL.main_layer.ffn
    passes = float(active_experts(ffn, 40)) + 7 * float(active_experts(ffn, 4))
    moved = 32 * (passes * MIXTRAL.expert_bytes + 7 * 4 * 4096 * 2)
    assert bound.resource == "link (CPU to GPU)"
    assert bound.tok_s == pytest.approx(4 * 8 / (moved / 16e9))
    assert bound.seconds["link (GPU to CPU)"] == pytest.approx(32 * (40 * 4096 + 7 * 4 * 6144 * 2) / 16e9)


def test_physical_bound_of_kv_on_the_link() -> None:
    """With attention on the GPU and the KV cache on the host, all but the newest token's crosses the link."""
    shares = {"weights_on_gpu": 1.0, "kv_on_gpu": 0.25}
    bound = physical_bound(MIXTRAL, L4.rates("spec"), policy(100, True, **shares), prompt_len=1000, gen_len=3)
    read = 0.75 * 100 * (1000 + 1001) * 4096 * 32
    assert bound.seconds["link (CPU to GPU)"] == pytest.approx(read / 16e9)
    assert bound.seconds["link (GPU to CPU)"] == pytest.approx(0.75 * 100 * (1000 + 2) * 4096 * 32 / 16e9)
    assert bound.seconds["CPU"] == 0


def test_physical_bound_of_experts_on_the_cpu() -> None:
    """With the experts on the CPU no weight crosses the link in decode; the CPU computes and reads its share."""
    shares = {"weights_on_gpu": 0.25}
    bound = physical_bound(MIXTRAL, L4.rates("spec"), policy(64, ffn=False, **shares), prompt_len=10, gen_len=5)
    flops = 4 * 64 * (0.75 * 2 * 2 * MIXTRAL.expert_parameters + 12.5 * 4 * 4096) * 32
    assert bound.seconds["CPU"] == pytest.approx(flops / 1.3e12)
    reads = 0.75 * 32 * 4 * float(active_experts(MIXTRAL.main_layer.ffn, 64)) * MIXTRAL.expert_bytes
    assert bound.seconds["CPU memory"] >= reads / 100e9
    assert bound.seconds["link (CPU to GPU)"] == pytest.approx(32 * 4 * 64 * 8192 / 16e9)


@given(
    st.integers(1, 4000),
    st.integers(1, 2000),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(PLACES),
    st.sampled_from(
        ["h2d_bandwidth", "d2h_bandwidth", "dram_bandwidth", "cpu_attention_flops", "gpu_bandwidth", "cpu_experts"]
    ),
)
@settings(deadline=None, max_examples=60)
def test_physical_bound_never_falls_with_a_faster_machine(n, prompt, gen_len, share, place, rate) -> None:
    """More of any rate never lowers the ceiling, nor do more resident weights where the experts are on the GPU."""
    rates = L4.rates("spec")
    work = {"prompt_len": float(prompt), "gen_len": gen_len}
    bound = physical_bound(MIXTRAL, rates, policy(n, *place, weights_on_gpu=share), **work).tok_s
    value = getattr(rates, rate)
    faster = replace(rates, **{rate: value.scaled(2) if isinstance(value, Curve) else 2 * value})
    assert 0 < bound <= physical_bound(MIXTRAL, faster, policy(n, *place, weights_on_gpu=share), **work).tok_s
    if place[1]:
        assert bound <= physical_bound(MIXTRAL, rates, policy(n, *place, weights_on_gpu=1.0), **work).tok_s
    if place[0]:
        resident = policy(n, *place, weights_on_gpu=share, kv_on_gpu=0.5)
        assert bound <= physical_bound(MIXTRAL, rates, resident, **work).tok_s


def test_the_bound_of_several_gpus() -> None:
    """Two GPUs need half as long for the same work, and the link and the host as long as before."""
    rates = L4.rates("spec")
    one, two = (
        physical_bound(MIXTRAL, rates, policy(64), prompt_len=100, gen_len=8, num_gpus=count).seconds
        for count in (1, 2)
    )
    for name in one:
        assert two[name] == pytest.approx(one[name] / (2 if name.startswith("GPU") else 1)), name


def test_a_dense_ffn_is_bound_by_its_own_kernel() -> None:
    """An FFN without a router runs as a plain product: a slow expert kernel does not lower its ceiling."""
    opt = MoEModel.from_catalog("opt-6.7b")
    spec = Hardware.from_catalog("a100-80g-1x").rates("spec")
    slow = replace(spec, gpu_experts=Curve.constant(spec.gpu_experts.peak / 10))
    resident = policy(64, True, weights_on_gpu=1.0, kv_on_gpu=1.0)
    known, slower = (physical_bound(opt, rates, resident, prompt_len=1024, gen_len=8) for rates in (spec, slow))
    assert known.tok_s == slower.tok_s
    predicted = estimate(opt, slow, resident, prompt_len=1024, gen_len=8)
    assert predicted.throughput <= slower.tok_s


def test_a_bound_of_decode_alone() -> None:
    """Without prefill a run needs less of everything that prefill uses."""
    whole, decode = (
        physical_bound(MIXTRAL, L4.rates("spec"), policy(64), prompt_len=100, gen_len=8, prefill=prefill)
        for prefill in (True, False)
    )
    assert decode.tok_s > whole.tok_s
    assert all(decode.seconds[name] <= whole.seconds[name] for name in whole.seconds)
