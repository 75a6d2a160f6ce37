"""FlexGen's schedule in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hrm import Hardware, MoEModel, Policy
from hrm.flexgen import flexgen_estimate
from hrm.hardware import Curve

OPT = MoEModel.from_catalog("opt-6.7b")
SPEC = Hardware.from_catalog("gcp-t4-1x").rates("spec")
STREAMED = Policy(batch_size=96, micro_batch_size=32, attention_on_gpu=True)


def run(rates=SPEC, policy=STREAMED, **options):
    """An estimate for prompts of 512 and 32 generated tokens."""
    return flexgen_estimate(OPT, rates, policy, prompt_len=512, gen_len=32, **options)


def test_a_link_bound_layer_takes_its_weights_and_caches() -> None:
    """With a slow link a layer takes its weights once and the KV of all micro-batches but what weights hide."""
    slow = replace(SPEC, h2d_bandwidth=1e8)
    result = run(slow, split_layers=False)
    layer = OPT.main_layer
    weights = (layer.attention.parameters + layer.ffn.experts_parameters) * 2
    cache = 32 * (512 + 16) * OPT.kv_token_bytes
    states = 32 * OPT.hidden_bytes
    assert result.layer_s == pytest.approx((weights + 3 * (cache + states)) / 1e8, rel=0.01)
    assert result.bottleneck == "link (CPU to GPU)"


def test_resident_weights_and_cache_leave_the_link_idle() -> None:
    """With everything on the GPU nothing crosses the link."""
    everything = Policy(batch_size=2, micro_batch_size=2, attention_on_gpu=True, weights_on_gpu=1.0, kv_on_gpu=1.0)
    result = run(policy=everything, overlap=False, activations_on_gpu=True)
    assert result.needs["link (CPU to GPU)"] == 0
    assert result.bottleneck == "GPU"
    # Each step reads all weights once: 13.3 GB at 300 GB/s.
    assert result.decode_s == pytest.approx(31 * OPT.weight_bytes / 300e9, rel=0.05)


def test_cpu_attention_converts_the_cache() -> None:
    """Attention on the CPU reads, writes and reads again: five times the bytes of a float16 cache."""
    on_cpu = replace(STREAMED, attention_on_gpu=False)
    slow = replace(SPEC, cpu_attention=Curve.constant(1e9), cpu_attention_flops=1e15)
    result = run(slow, on_cpu)
    assert result.terms["CPU attention"] == pytest.approx(5 * 96 * 528 * OPT.kv_token_bytes / 1e9, rel=0.01)
    assert result.bottleneck == "CPU attention"


def test_overlap_never_costs() -> None:
    """Overlapping copies with computation is never slower than not."""
    assert run().throughput >= run(overlap=False).throughput


@pytest.mark.parametrize("rate", ["h2d_bandwidth", "d2h_bandwidth", "gpu_bandwidth"])
def test_a_faster_machine_is_never_slower(rate: str) -> None:
    """More of any rate never lowers throughput."""
    faster = replace(SPEC, **{rate: 2 * getattr(SPEC, rate)})
    assert run(faster).throughput >= run().throughput


def test_throughput_counts_prefill() -> None:
    """Throughput is all generated tokens over prefill and decode."""
    result = run()
    assert result.throughput == pytest.approx(96 * 32 / (result.prefill_s + result.decode_s))
