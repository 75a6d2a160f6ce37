"""The cost of gating and of expert buffering: exact identities, and what must hold on any machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.errors import DoesNotFit, InvalidValue, UnknownName
from hrm.gating import GATINGS, GatingName, capacity_of
from hrm.hardware import Hardware
from hrm.layers import FeedForward
from hrm.model import MoEModel
from simulator.experts.buffering_memory import buffering_memory, waste_factor
from simulator.experts.gating_cost import Buffering, Cluster, Program, gating_cost
from simulator.experts.gating_model import Pass, dense_twin, largest_batch, pass_cost, weight_bytes

NODE = Hardware.from_catalog("v100-node-8x")
LM = MoEModel.from_catalog("fairseq-moe-52b")
MT = MoEModel.from_catalog("nllb-moe-54b").with_dtype("float16")
GIB = 2**30


# -- exact ---------------------------------------------------------------------------------------------


def test_waste_factors_of_the_paper() -> None:
    """E·C/k is 12.8 for the language model and 64 for translation (arXiv 2303.06182)."""
    assert waste_factor(512, 2, 0.05) == pytest.approx(12.8)
    assert waste_factor(128, 2, 1) == 64


@pytest.mark.parametrize(("model", "capacity_factor", "waste"), [(LM, 0.05, 12.8), (MT, 1.0, 64.0)])
@pytest.mark.parametrize("gating", ["static", "tutel"])
def test_rows_computed_over_rows_needed_are_the_waste_factor(
    model: MoEModel, capacity_factor: float, waste: float, gating: GatingName
) -> None:
    """The cost model charges exactly as many rows; dynamic gating with even load none too many."""
    ffn = model.main_layer.ffn
    cost = gating_cost(ffn, Cluster.of(NODE), 4000, gating, capacity_factor=capacity_factor)
    assert cost.waste == pytest.approx(waste)
    assert gating_cost(ffn, Cluster.of(NODE), 4000, "dynamic").waste == 1


def test_memory_that_buffering_saves() -> None:
    """K slots per GPU, 6 decoder layers, 16 experts per GPU and layer: the paper's figures."""
    ten, one, all_of_them = (buffering_memory(MT, 8, slots) for slots in (10, 1, 16))
    assert ten.saved_bytes == 6 * 6 * 33_564_672 * 2
    assert ten.saved_bytes / GIB == pytest.approx(2.25, abs=0.005)
    assert one.saved_share == pytest.approx(0.322, abs=0.0005)
    assert one.factor == pytest.approx(1.47, abs=0.005)
    assert all_of_them.saved_bytes == 0


def test_parameters_of_the_paper() -> None:
    """52B and 54.5B, and dense twins of 355M and 3.3B (Table I)."""
    assert LM.num_parameters == 51_831_371_776
    assert MT.num_parameters == 54_500_569_088
    assert dense_twin(LM).num_parameters == pytest.approx(355e6, rel=0.01)
    assert dense_twin(MT).num_parameters == pytest.approx(3.3e9, rel=0.02)


def test_weights_on_one_gpu() -> None:
    """Everything dense, and an eighth of the experts; all GPUs together hold the experts once."""
    for model in (LM, MT):
        experts = sum(
            model.kinds[kind].ffn.experts_parameters * 2
            for kind in (*model.order, *model.encoder_order)
            if model.kinds[kind].ffn.routed
        )
        assert weight_bytes(model, 8) == pytest.approx(model.weight_bytes - experts * 7 / 8)
        assert weight_bytes(model, 1) == pytest.approx(model.weight_bytes)


def test_static_activations_of_the_language_model_are_its_mask() -> None:
    """512 experts of 205 slots for 4,096 tokens, 15 bytes per entry at the peak."""
    cost = gating_cost(LM.main_layer.ffn, Cluster.of(NODE), 4096, "static", capacity_factor=0.05)
    mask = 15 * 512 * 205 * 4096
    assert mask < cost.activation_bytes < 1.05 * mask


def test_capacity_is_rounded_up() -> None:
    """C·S slots, and rounding errors do not add one."""
    assert capacity_of(4096, 0.05) == 205
    assert capacity_of(100, 0.05) == 5
    assert capacity_of(3, 1.0) == 3


# -- the exchange --------------------------------------------------------------------------------------


def test_exchange_by_hand() -> None:
    """In a node seven eighths of the bytes cross NVLink; on two nodes half of them cross the fabric."""
    one = Cluster.of(NODE)
    assert one.all_to_all(8e9) == pytest.approx(7e9 / 150e9)
    two = Cluster.of(NODE, 2, fabric_bandwidth=40e9)
    assert two.all_to_all(16e9) == pytest.approx(8e9 / 5e9)  # 40 GB/s for eight GPUs
    assert Cluster.of(NODE, peers_over_nvlink=4).all_to_all(8e9) == pytest.approx(3e9 / 12e9)


def test_a_busy_gpu_shares_its_nodes_ports() -> None:
    """The busiest GPU slows its node's ports by less than its own links."""
    two = Cluster.of(NODE, 2, fabric_bandwidth=1e9)
    slower = two.all_to_all(1e9, busiest=4.0) / two.all_to_all(1e9)
    assert 1 < slower < 2
    assert slower == pytest.approx((4 + 7 * (16 - 4) / 15) / 8)


# -- properties ----------------------------------------------------------------------------------------

SHAPES = st.builds(
    FeedForward,
    hidden_size=st.sampled_from([64, 1024]),
    intermediate_size=st.sampled_from([128, 4096]),
    num_experts=st.sampled_from([32, 128]),
    top_k=st.sampled_from([1, 2, 4]),
    matrices=st.sampled_from([2, 3]),
)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 4000), st.sampled_from(GATINGS), st.sampled_from([1, 2, 4]))
def test_more_tokens_never_cost_less(ffn: FeedForward, tokens: int, gating: GatingName, nodes: int) -> None:
    """Seconds and bytes grow with tokens, and no term is negative."""
    few, many = (gating_cost(ffn, Cluster.of(NODE, nodes), n, gating) for n in (tokens, 2 * tokens))
    assert many.total >= few.total > 0
    assert many.activation_bytes >= few.activation_bytes > 0
    assert min(few.seconds.values()) >= 0


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(64, 4000), st.floats(1.0, 8.0))
def test_dynamic_gating_never_needs_more_than_padding_to_the_busiest(
    ffn: FeedForward, tokens: int, busiest: float
) -> None:
    """With far fewer rows than C·S slots dynamic gating is no slower than Tutel's, and that no slower than static."""
    cluster = Cluster.of(NODE)
    tutel, static = (gating_cost(ffn, cluster, tokens, gating) for gating in ("tutel", "static"))
    dynamic = gating_cost(ffn, cluster, tokens, "dynamic", busiest=busiest)
    assert tutel.total <= static.total
    if dynamic.rows <= tutel.rows / 4:
        assert dynamic.total <= tutel.total + 20 * Program().launch_s
    assert dynamic.rows == pytest.approx(busiest * ffn.top_k * tokens)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 4000), st.sampled_from(GATINGS), st.floats(1.0, 8.0))
def test_a_faster_machine_never_hurts(ffn: FeedForward, tokens: int, gating: GatingName, factor: float) -> None:
    """More bandwidth anywhere, or more FLOP/s, never makes a layer slower."""
    slow = Cluster.of(NODE, 2)
    before = gating_cost(ffn, slow, tokens, gating).total
    for fields in (
        {"gpu_bandwidth": factor},
        {"gpu_gemm": factor},
        {"gpu_experts": factor},
        {"peer_bandwidth": factor},
    ):
        fast = replace(slow, rates=slow.rates.scaled(fields))
        assert gating_cost(ffn, fast, tokens, gating).total <= before * (1 + 1e-12)
    assert gating_cost(ffn, replace(slow, fabric_bandwidth=factor * 50e9), tokens, gating).total <= before * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 15), st.integers(1, 500))
def test_more_slots_never_hurt(slots: int, tokens: int) -> None:
    """Fewer misses, fewer copies; with a slot for every expert buffering costs nothing."""
    ffn, cluster = MT.main_layer.ffn, Cluster.of(NODE)

    def seconds(buffering: Buffering | None) -> float:
        return gating_cost(ffn, cluster, tokens, "dynamic", active_share=0.25, buffering=buffering).total

    assert seconds(Buffering(slots=slots + 1)) <= seconds(Buffering(slots=slots))
    assert seconds(Buffering(slots=16)) == pytest.approx(seconds(None))


def test_misses_are_copied_beside_the_exchange() -> None:
    """Four active experts, half of them missing, 67 MB each at 12 GB/s, less what the exchange hides."""
    ffn, cluster = MT.main_layer.ffn, Cluster.of(NODE)
    cost = gating_cost(ffn, cluster, 96, "dynamic", active_share=0.25, buffering=Buffering(slots=10, miss_rate=0.5))
    copied = 2 * ffn.expert_parameters * 2 / 12e9
    assert cost.seconds["waiting for experts"] == pytest.approx(copied - cost.seconds["exchange"] / 2)
    assert copied / 2 == pytest.approx(5.6e-3, rel=0.01)  # the paper's time of one expert


@pytest.mark.parametrize(
    "model", [LM, MT, MoEModel.from_catalog("qwen3-30b-a3b"), MoEModel.from_catalog("deepseek-v3")]
)
def test_any_model_on_any_cluster(model: MoEModel) -> None:
    """Models with three matrices and many experts run through the same functions, dense layers included."""
    cluster = Cluster.of(Hardware.from_catalog("a100-80g-2x"), 4)
    found = pass_cost(model, cluster, Pass(tokens=256, context=128), "dynamic", busiest=2.0)
    assert found.total > 0
    assert found.memory_bytes > found.weight_bytes > 0
    assert set(found.seconds) >= {"attention", "ffn", "gate", "exchange", "experts", "head"}


def test_the_dense_twin_has_no_gate() -> None:
    """Neither exchange nor gate, and fewer seconds than any gating."""
    cluster, work = Cluster.of(NODE), Pass(tokens=2048, context=512)
    dense = pass_cost(dense_twin(LM), cluster, work, "dynamic")
    assert set(dense.seconds) == {"attention", "ffn", "head"}
    assert dense.gating is None
    for gating in GATINGS:
        assert dense.total < pass_cost(LM, cluster, work, gating, capacity_factor=0.05).total


def test_largest_batch_is_the_last_that_fits() -> None:
    """One more does not fit; on a ladder the next rung does not."""

    def bytes_of(batch: int) -> float:
        return 3.0 * batch**2 + 10

    exact = largest_batch(bytes_of, 1000.0)
    assert bytes_of(exact) <= 1000 < bytes_of(exact + 1)
    assert largest_batch(bytes_of, 1000.0, ladder=2, start=3) == 12
    with pytest.raises(DoesNotFit, match="a batch of 1 needs"):
        largest_batch(bytes_of, 5.0)


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gating": "dynamc"}, "Did you mean 'dynamic'"),
        ({"tokens": 0}, "'tokens' must be >= 1"),
        ({"capacity_factor": 0.0}, "'capacity_factor'"),
        ({"capacity_factor": 1.5}, "'capacity_factor'"),
        ({"busiest": 0.5}, "'busiest'"),
        ({"busiest": 9.0}, "'busiest'"),
        ({"active_share": 0.0}, "'active_share'"),
        ({"gating": "tutel", "adaptive_capacity": 2.0}, "'adaptive_capacity'"),
        ({"buffering": Buffering(slots=4)}, "needs to know the active experts"),
    ],
)
def test_bad_input_is_named(options: dict[str, object], message: str) -> None:
    """Every refusal names the field."""
    arguments: dict[str, object] = {"tokens": 64, "gating": "static"} | options
    with pytest.raises((InvalidValue, UnknownName), match=message):
        gating_cost(MT.main_layer.ffn, Cluster.of(NODE), **arguments)  # type: ignore[arg-type]


def test_experts_must_divide_over_the_devices() -> None:
    """128 experts on 24 GPUs do not."""
    with pytest.raises(InvalidValue, match="128 experts do not divide evenly over 24 devices"):
        gating_cost(MT.main_layer.ffn, Cluster.of(NODE, 3), 64, "dynamic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "'nodes'"),
        ({"fabric_bandwidth": 0.0}, "'fabric_bandwidth'"),
        ({"peers_over_nvlink": 8}, "'peers"),
    ],
)
def test_a_cluster_must_make_sense(options: dict[str, object], message: str) -> None:
    """Nodes, bandwidths and peers within their ranges."""
    with pytest.raises(InvalidValue, match=message):
        Cluster.of(NODE, **options)  # type: ignore[arg-type]


def test_only_a_model_with_an_encoder_has_one() -> None:
    """A decoder-only model has no encoder pass."""
    with pytest.raises(InvalidValue, match="'stack' is 'encoder'"):
        pass_cost(LM, Cluster.of(NODE), Pass(tokens=8, context=8, stack="encoder"), "dynamic")
    with pytest.raises(InvalidValue, match="'slots' must be >= 1"):
        Buffering(slots=0)
    with pytest.raises(InvalidValue, match="'devices' must divide"):
        buffering_memory(MT, 7, 1)
