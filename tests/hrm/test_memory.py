"""Footprints and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm import BatchShape, Hardware, MoEModel, Policy, catalog
from hrm.errors import DoesNotFit
from hrm.memory import Footprint, batch_footprint, check_fits, footprint, usable_bytes
from hrm.pipeline import ACTIVATION_SLOTS, activation_bytes, prefill_slot_bytes

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")
L4 = Hardware.from_catalog("gcp-l4-1x")


def need(n: int = 64, mu: int = 16, r_w: float = 0.1, prompt: int = 100, gen_len: int = 8) -> Footprint:
    """The footprint of a batch of equal prompts."""
    policy = Policy(batch_size=n, micro_batch_size=mu, weights_on_gpu=r_w)
    return batch_footprint(MIXTRAL, BatchShape.uniform(n, mu, prompt, gen_len), policy)


def test_weights_lie_somewhere() -> None:
    """Dense weights, resident experts and streamed experts together are the model, whatever r_w."""
    for r_w in (0.0, 0.3, 1.0):
        memory = need(r_w=r_w)
        total = memory.gpu["dense_weights"] + memory.gpu["resident_experts"] + memory.cpu["streamed_experts"]
        assert total == pytest.approx(MIXTRAL.num_parameters * 2)


def test_buffers_follow_what_is_streamed() -> None:
    """Two layers' streamed part is buffered on the GPU; nothing is when all is resident."""
    assert need(r_w=0.25).gpu["weight_buffers"] == pytest.approx(2 * 0.75 * MIXTRAL.layer_expert_bytes)
    assert need(r_w=1.0).gpu["weight_buffers"] == 0
    assert need(r_w=1.0).cpu["pinned_pages"] == 0


def test_kv_cache_holds_prompts_and_generated_tokens() -> None:
    """The KV cache is 2·h_kv per token and layer of prompt and generation."""
    assert need(n=64, prompt=100, gen_len=8).cpu["kv_cache"] == 64 * 108 * 4096 * 32


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0, 1),
    st.integers(1, 500),
    st.integers(1, 100),
    st.integers(1, 9),
)
def test_a_larger_batch_never_needs_less(n, mu, r_w, prompt, gen_len, more) -> None:
    """More sequences, longer prompts and longer generation never need less of either memory."""
    mu = min(mu, n)
    base = need(n, mu, r_w, prompt, gen_len)
    for other in (
        need(n + more * mu, mu, r_w, prompt, gen_len),
        need(n, mu, r_w, prompt + more, gen_len),
        need(n, mu, r_w, prompt, gen_len + more),
    ):
        assert other.gpu_bytes >= base.gpu_bytes * (1 - 1e-12)
        assert other.cpu_bytes - other.cpu["pinned_pages"] >= (base.cpu_bytes - base.cpu["pinned_pages"]) * (1 - 1e-12)


def test_grid_equals_single_points() -> None:
    """Arrays over a grid give the footprint of each point, for each point's share."""
    mu, r_w = np.array([1.0, 8.0, 64.0]), np.array([0.0, 0.5, 1.0])
    together = footprint(
        MIXTRAL,
        batch_size=mu * 2,
        micro_batch_size=mu,
        num_micro_batches=2,
        micro_batch_tokens=mu * 10,
        batch_tokens=mu * 20,
        longest_prompt=10,
        gen_len=4,
    ).at(r_w)
    for i in range(3):
        single = need(n=int(2 * mu[i]), mu=int(mu[i]), r_w=float(r_w[i]), prompt=10, gen_len=4)
        assert together.gpu_bytes[i] == pytest.approx(single.gpu_bytes)
        assert together.cpu_bytes[i] == pytest.approx(single.cpu_bytes)


def placed(model: MoEModel = MIXTRAL, *, r_w: float = 0.1, r_c: float = 0.0, **options) -> Footprint:
    """The footprint of 64 prompts of 100 tokens, 8 generated, in micro-batches of 16, anywhere."""
    sizes = {"batch_size": 64, "micro_batch_size": 16, "num_micro_batches": 4, "micro_batch_tokens": 1600}
    sizes |= {"batch_tokens": 6400, "longest_prompt": 100, "gen_len": 8}
    return footprint(model, **sizes, **options).at(r_w, r_c)


def test_the_kv_cache_is_divided() -> None:
    """With attention on the GPU, r_c of the KV cache lies there and the rest on the host, plus two layers' buffers."""
    whole = placed().cpu["kv_cache"]
    assert whole == 64 * 108 * 4096 * 32
    assert "kv_cache" not in placed(r_c=0.5).gpu
    for r_c in (0.0, 0.25, 1.0):
        memory = placed(r_c=r_c, attention_on_gpu=True)
        assert memory.gpu["kv_cache"] == pytest.approx(r_c * whole)
        assert memory.cpu["kv_cache"] == pytest.approx((1 - r_c) * whole)
        assert memory.gpu["kv_buffers"] == pytest.approx((1 - r_c) * 2 * 16 * 108 * 4096)


def test_experts_on_the_cpu_need_room_to_compute() -> None:
    """With experts on the CPU the host holds a micro-batch's routed activations; weights lie where they did."""
    memory, usual = placed(ffn_on_gpu=False), placed()
    assert memory.cpu["expert_workspace"] == 16 * (4096 + 2 * 2 * (4096 + 2 * 14336)) * 2
    assert "expert_workspace" not in usual.cpu
    assert {**usual.gpu, "ffn_slots": 3 * 16 * (3 * 4096 * 2 + 12 * 2)} == memory.gpu


def test_gpus_divide_weights_and_caches() -> None:
    """Each of four GPUs holds a quarter of weights, buffers and KV; the host's bytes do not depend on them."""
    one, four = (placed(r_c=0.5, attention_on_gpu=True, num_gpus=count) for count in (1, 4))
    for item in ("dense_weights", "resident_experts", "weight_buffers", "kv_cache", "kv_buffers", "decode_slots"):
        assert four.gpu[item] == pytest.approx(one.gpu[item] / 4)
    for item in ("hidden_states", "token_ids", "workspace"):
        assert four.gpu[item] == one.gpu[item]
    assert four.cpu == one.cpu


def test_a_window_bounds_the_kv_cache() -> None:
    """A layer with a window keeps no more tokens of a sequence than the window shows."""
    layer = MIXTRAL.main_layer
    windowed = replace(layer, attention=replace(layer.attention, window=30))
    mixed = replace(MIXTRAL, kinds=(layer, windowed), order=(0,) * 8 + (1,) * 24)
    assert placed(mixed).cpu["kv_cache"] == 64 * (8 * 108 + 24 * 30) * 4096
    wide = replace(mixed, kinds=(layer, replace(layer, attention=replace(layer.attention, window=1000))))
    assert placed(wide).cpu["kv_cache"] == placed().cpu["kv_cache"]


def test_an_encoder_leaves_keys_and_values_of_the_prompt() -> None:
    """Decoder layers hold generated tokens of their own and the prompt's for attention over the encoder."""
    model = MoEModel.from_catalog("nllb-moe-54b")
    assert placed(model).cpu["kv_cache"] == 24 * (64 * 8 + 6400) * 2 * 2048 * 4  # float32


def test_weights_of_every_catalog_model_lie_somewhere() -> None:
    """Dense, resident and streamed weights together are the model, whatever its layers and types."""
    for name in catalog.names("models"):
        model = catalog.load_model(name)
        memory = placed(model, r_w=0.3)
        total = memory.gpu["dense_weights"] + memory.gpu["resident_experts"] + memory.cpu["streamed_experts"]
        assert total == pytest.approx(model.weight_bytes)
        widest = max(model.kind_expert_bytes(kind) for kind in (*model.order, *model.encoder_order))
        assert memory.gpu["weight_buffers"] == pytest.approx(2 * 0.7 * widest)


@given(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans())
def test_shares_enter_linearly(r_w: float, r_c: float, attention: bool, ffn: bool) -> None:
    """A footprint at any shares is the mean of those at the corners, weighted by the shares."""
    options = {"attention_on_gpu": attention, "ffn_on_gpu": ffn}
    for total in ("gpu_bytes", "cpu_bytes"):
        corner = {(w, c): getattr(placed(r_w=w, r_c=c, **options), total) for w in (0, 1) for c in (0, 1)}
        mean = sum((r_w if w else 1 - r_w) * (r_c if c else 1 - r_c) * value for (w, c), value in corner.items())
        assert getattr(placed(r_w=r_w, r_c=r_c, **options), total) == pytest.approx(mean)


def test_usable_bytes_are_less_than_capacity() -> None:
    """Some of both memories belongs to the driver and the system."""
    gpu, cpu = usable_bytes(L4)
    assert 0.8 * 24e9 < gpu < 24e9
    assert 0.8 * 192e9 < cpu < 192e9


def test_shared_memory_is_shared() -> None:
    """Where both heaps lie in the same RAM, a larger GPU budget leaves less for the host."""
    box = replace(L4, shared_memory=True)
    gpu, cpu = usable_bytes(box.with_capacity(gpu_bytes=10**9, cpu_bytes=10**10))
    assert gpu == 1e9
    assert gpu + cpu < 10**10
    gpu_more, cpu_less = usable_bytes(box.with_capacity(gpu_bytes=2 * 10**9, cpu_bytes=10**10))
    assert (gpu_more - gpu, cpu - cpu_less) == pytest.approx((1e9, 1e9))


@pytest.mark.parametrize(
    ("sizes", "tier", "item"),
    [({"gpu_bytes": 8 * 10**9}, "GPU", "resident_experts"), ({"cpu_bytes": 50 * 10**9}, "CPU", "streamed_experts")],
)
def test_what_does_not_fit_is_said_with_amounts(sizes: dict[str, int], tier: str, item: str) -> None:
    """The error names the tier, what is needed, what there is, the difference, the largest item and the way out."""
    with pytest.raises(DoesNotFit, match=f"of {tier} memory") as caught:
        check_fits(need(), L4.with_capacity(**sizes))
    message = str(caught.value)
    assert message.count("GiB") >= 4
    assert f"largest: {item}" in message
    assert "--batch-size" in message or "--micro-batch-size" in message
    assert "\n" not in message


def test_what_fits_is_silent() -> None:
    """A policy that fits raises nothing, up to rounding (some 20 bytes in 20 GB)."""
    memory = need()
    check_fits(memory, L4)
    exact = Footprint(gpu={"x": usable_bytes(L4)[0]}, cpu={"y": usable_bytes(L4)[1]})
    check_fits(exact, L4)
    with pytest.raises(DoesNotFit):
        check_fits(Footprint(gpu={"x": usable_bytes(L4)[0] + 1000}, cpu={"y": 0.0}), L4)


def test_plain_form_adds_up() -> None:
    """The plain form has both totals and every item behind them."""
    data = need().to_dict()
    assert set(data) == {"gpu_bytes", "cpu_bytes", "gpu", "cpu"}
    assert sum(data["gpu"].values()) == pytest.approx(data["gpu_bytes"])
    assert sum(data["cpu"].values()) == pytest.approx(data["cpu_bytes"])


def test_unequal_prompts_are_sized_by_the_heaviest_micro_batch() -> None:
    """Prefill slots hold the micro-batch with the most prompt tokens, decode slots the largest one."""
    batch = BatchShape(((500,), (100, 100, 50)), 4)
    gpu = batch_footprint(MIXTRAL, batch, Policy(batch_size=4, micro_batch_size=3)).gpu
    assert gpu["prefill_slots"] == ACTIVATION_SLOTS * prefill_slot_bytes(MIXTRAL, 500)
    assert gpu["decode_slots"] == ACTIVATION_SLOTS * activation_bytes(MIXTRAL, 3)


@pytest.mark.parametrize(
    ("name", "gpus", "copies"), [("deepseek-v3", 8, 8), ("qwen3-235b-a22b", 8, 2), ("mixtral-8x7b", 4, 1)]
)
def test_kv_heads_are_kept_as_often_as_gpus_need_them(name: str, gpus: int, copies: int) -> None:
    """A latent is whole on every GPU, few KV heads are kept more than once, many are shared out."""
    model = MoEModel.from_catalog(name)
    sizes = {"batch_size": 16, "micro_batch_size": 8, "num_micro_batches": 2, "micro_batch_tokens": 80}
    sizes |= {"batch_tokens": 160, "longest_prompt": 10, "gen_len": 4, "attention_on_gpu": True}
    one, many = (footprint(model, **sizes, num_gpus=count).at(0.0, 0.5) for count in (1, gpus))
    for item in ("kv_cache", "kv_buffers"):
        assert many.gpu[item] == pytest.approx(one.gpu[item] * copies / gpus)
    assert many.cpu["kv_cache"] == one.cpu["kv_cache"]


def test_a_budget_beyond_the_ram_leaves_nothing() -> None:
    """Where both heaps lie in one RAM, a device budget larger than it leaves the host nothing, not less."""
    machine = Hardware.from_catalog("cpu-2core").with_capacity(gpu_bytes=30 * 2**30)
    assert usable_bytes(machine)[1] == 0
