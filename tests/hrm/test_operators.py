"""FLOPs and bytes of operators."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm import MoEModel, catalog
from hrm.errors import InvalidConfig, InvalidValue
from hrm.layers import Attention, FeedForward, Layer
from hrm.operators import (
    Operator,
    active_experts,
    after_attention,
    attention_core,
    causal_pairs,
    cross_attention_keys,
    cross_attention_queries,
    distinct_experts,
    encoder_layer,
    expert_ffn,
    post_attention,
    pre_attention,
    prefill_layer,
    sampling,
    seen_tokens,
    sharded,
)

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")


def test_papers_attention_intensity() -> None:
    """Grouped-query attention at context 512 has intensity 2.0 in fp16 and 8.0 in int4, as in Fig. 4."""
    half = attention_core(MIXTRAL, 1, 512, count="paper")
    quarter = attention_core(MIXTRAL, 1, 512, count="paper", kv_dtype_bytes=0.5)
    assert half.intensity == pytest.approx(2.0, abs=0.05)
    assert quarter.intensity == pytest.approx(8.0, abs=0.2)
    assert quarter.intensity == pytest.approx(4 * half.intensity)


def test_papers_attention_count() -> None:
    """The paper's count is b·c·n_q·(2d+2) FLOPs on dtype·(2·b·n_q·d + 2·b·c·n_kv·d) bytes."""
    op = attention_core(MIXTRAL, 3, 512, count="paper")
    assert op.flops == 3 * 512 * 32 * (2 * 128 + 2)
    assert op.bytes == 2 * (2 * 3 * 32 * 128 + 2 * 3 * 512 * 8 * 128)


def test_exact_attention_count() -> None:
    """The exact count has both products, QKᵀ and PV: 4d FLOPs per query head and token of context."""
    op = attention_core(MIXTRAL, 3, 512)
    assert op.flops == 3 * 512 * 32 * 4 * 128
    assert op.kv_bytes == 3 * 512 * MIXTRAL.kv_token_bytes


@given(st.floats(1, 1e4), st.floats(1, 1e4))
def test_attention_intensity_does_not_depend_on_the_batch(sequences: float, context: float) -> None:
    """More sequences bring more KV cache: attention's intensity stays where it is."""
    one = attention_core(MIXTRAL, 1, context).intensity
    assert attention_core(MIXTRAL, sequences, context).intensity == pytest.approx(one)


@pytest.mark.parametrize("name", catalog.names("models"))
def test_distinct_experts_limits(name: str) -> None:
    """No token touches no expert, one token top_k of them, many tokens all."""
    model = catalog.load_model(name)
    assert distinct_experts(model, 0) == 0
    assert distinct_experts(model, 1) == pytest.approx(model.top_k)
    assert distinct_experts(model, 10_000) == pytest.approx(model.num_experts)


@given(st.integers(1, 500))
def test_distinct_experts_grow_and_are_bounded(tokens: int) -> None:
    """Another token never touches fewer experts, and never more than top_k more."""
    now, after = distinct_experts(MIXTRAL, tokens), distinct_experts(MIXTRAL, tokens + 1)
    assert now <= after <= min(8, now + MIXTRAL.top_k)


def test_distinct_experts_with_every_expert_active() -> None:
    """A model whose tokens use all experts touches all of them with the first token."""
    assert active_experts(replace(MIXTRAL.main_layer.ffn, top_k=8), 1) == 8


def test_experts_charge_only_what_is_touched() -> None:
    """Four tokens read 5.47 of Mixtral's eight experts, and each of their two experts computes 6·h1·h2."""
    op = expert_ffn(MIXTRAL, 4)
    assert op.weight_bytes == pytest.approx(8 * (1 - 0.75**4) * MIXTRAL.expert_bytes)
    assert op.flops == 6 * 4 * 2 * 4096 * 14336
    assert op.rows == pytest.approx(8 / 5.46875)


def builders():
    """Every operator builder as a function of a number of tokens."""
    return {
        "pre_attention": lambda n: pre_attention(MIXTRAL, n),
        "post_attention": lambda n: post_attention(MIXTRAL, n),
        "sampling": lambda n: sampling(MIXTRAL, n),
        "prefill_layer": lambda n: prefill_layer(MIXTRAL, n, n * 5, 77),
        "attention_core": lambda n: [attention_core(MIXTRAL, n, 100)],
    }


@pytest.mark.parametrize("name", builders())
def test_arrays_equal_scalars(name: str) -> None:
    """A grid of token counts gives the same numbers as one count at a time."""
    build, tokens = builders()[name], np.array([1.0, 7.0, 128.0, 4096.0])
    together = build(tokens)
    for index, count in enumerate(tokens):
        for whole, single in zip(together, build(float(count)), strict=True):
            for field in ("flops", "weight_bytes", "activation_bytes", "kv_bytes", "rows", "launches"):
                column = np.broadcast_to(getattr(whole, field), tokens.shape)
                assert column[index] == pytest.approx(getattr(single, field)), (whole.name, field)


@pytest.mark.parametrize("name", catalog.names("models"))
def test_a_big_batch_reads_every_parameter_of_the_layer_once(name: str) -> None:
    """The weight bytes of each kind of layer add up to its matrices and norms when all experts are active."""
    model = catalog.load_model(name)
    for layer in model.kinds:
        operators = [*pre_attention(model, 100_000, layer), *post_attention(model, 100_000, layer)]
        ffn = layer.ffn
        router = model.hidden_size * ffn.num_experts if ffn.routed else 0
        shared = ffn.matrices * model.hidden_size * ffn.shared_size
        dense = layer.attention.projection_parameters + shared + router
        expected = dense * model.dense_element_bytes + 2 * model.hidden_size * model.dtype_bytes
        expected += ffn.experts_parameters * model.expert_element_bytes
        assert sum(op.weight_bytes for op in operators) == pytest.approx(expected)
        # What the operators leave out (biases, gates, further norms) is a sliver of the layer.
        cross = layer.cross_attention.parameters if layer.cross_attention else 0
        counted = dense + 2 * model.hidden_size + ffn.experts_parameters
        assert 0 <= layer.parameters - cross - counted <= 0.001 * layer.parameters + 64 * model.hidden_size


def test_sampling_reads_the_head() -> None:
    """Choosing a token reads the LM head and the final norm once."""
    assert sum(op.weight_bytes for op in sampling(MIXTRAL, 10)) == (32000 * 4096 + 4096) * 2


def test_dense_flops_are_two_per_parameter_and_token() -> None:
    """Projections, router and active experts compute 2 FLOPs per parameter and token."""
    operators = [*pre_attention(MIXTRAL, 10), *post_attention(MIXTRAL, 10)]
    gemms = sum(op.flops for op in operators if op.kind in ("gemm", "experts"))
    active = MIXTRAL.main_layer.attention.parameters + 8 * 4096 + 2 * MIXTRAL.expert_parameters
    assert gemms == 2 * 10 * active


def test_prefill_layer_is_the_layer_and_causal_attention() -> None:
    """Prefill has the layer's operators and one causal attention of 4·d FLOPs per head and pair."""
    names = [op.name for op in prefill_layer(MIXTRAL, 100, 5050, 100)]
    expected = [op.name for op in [*pre_attention(MIXTRAL, 1), *post_attention(MIXTRAL, 1)]]
    assert [n for n in names if n != "causal_attention"] == expected
    (attention,) = [op for op in prefill_layer(MIXTRAL, 100, 5050, 100) if op.name == "causal_attention"]
    assert attention.flops == 4 * 5050 * 4096


# -- layers of other kinds, counted by hand ------------------------------------------------------------


def small_attention(**changed) -> Attention:
    """Grouped-query attention of 4 heads over 2 KV heads of 4 dimensions on a hidden size of 8."""
    return Attention(**{"hidden_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "value_dim": 4, **changed})


def small_ffn(**changed) -> FeedForward:
    """Four gated experts of 16, one per token."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_experts": 4, "top_k": 1, "router_parameters": 32}
    return FeedForward(**{**sizes, **changed})


def small(attention: Attention | None = None, ffn: FeedForward | None = None, **changed) -> MoEModel:
    """One layer in bfloat16; parts can be exchanged."""
    layer = Layer(attention=attention or small_attention(), ffn=ffn or small_ffn(), **changed)
    return MoEModel(
        name="small", architecture="none", hidden_size=8, vocab_size=10, max_positions=64,
        kinds=(layer,), order=(0,), embedding_parameters=160,
    )  # fmt: skip


def by_name(operators: list[Operator]) -> dict[str, Operator]:
    """Operators by their names, which are all different."""
    result = {op.name: op for op in operators}
    assert len(result) == len(operators)
    return result


MLA = small_attention(num_kv_heads=4, head_dim=6, value_dim=5, kv_rank=3, rope_dim=2, q_rank=7)


def test_grouped_query_projections_by_hand() -> None:
    """Q, K and V project 8 to 16, 8 and 8; they read their input once and write Q, K and V."""
    ops = by_name(pre_attention(small(), 5))
    assert ops["qkv_proj"].flops == 2 * 5 * 8 * (16 + 8 + 8)
    assert ops["qkv_proj"].weight_bytes == 2 * 8 * (16 + 8 + 8)
    assert ops["qkv_proj"].activation_bytes == 2 * 5 * (8 + 16 + 8 + 8)
    assert ops["pack_qkv"].activation_bytes == 2 * 2 * 5 * (16 + 16)
    assert ops["input_norm"].weight_bytes == 2 * 8
    assert by_name(after_attention(small(), 5))["o_proj"].flops == 2 * 5 * 16 * 8


def test_mla_by_hand() -> None:
    """MLA caches latent and rotary key, absorbs W_UK and W_UV, and computes in the latent space in decode."""
    model = small(MLA)
    assert (MLA.kv_elements, MLA.query_size, MLA.attended_size) == (3 + 2, 4 * (3 + 2), 4 * 3)
    ops = by_name(pre_attention(model, 5))
    weights = 8 * 7 + 7 * 4 * 6 + 4 * 4 * 3 + 8 * 5  # q_a, q_b, W_UK per head, kv_a
    assert ops["qkv_proj"].weight_bytes == 2 * weights
    assert ops["qkv_proj"].flops == 2 * 5 * weights
    read = 8 + 7 + 4 * 4  # hidden states once for q_a and kv_a, the low-rank query, the part without rotary
    written = 7 + 4 * 6 + 4 * 3 + 5
    assert ops["qkv_proj"].activation_bytes == 2 * 5 * (read + written)
    assert by_name(after_attention(model, 5))["o_proj"].weight_bytes == 2 * (4 * 3 * 5 + 4 * 5 * 8)
    core = attention_core(model, 3, 11)
    assert core.kv_bytes == 3 * 11 * 5 * 2
    assert core.flops == 3 * 11 * 4 * 2 * ((3 + 2) + 3)
    assert core.activation_bytes == 3 * 2 * (20 + 12)


def test_mla_expands_its_heads_in_prefill() -> None:
    """In prefill a query-key pair costs 2·(d_qk + d_v) FLOPs per head, and keys and values of every head move."""
    core = by_name(prefill_layer(small(MLA), 5, 15, 5))["causal_attention"]
    assert core.flops == 15 * 4 * 2 * (6 + 5)
    assert core.activation_bytes == 2 * 5 * (4 + 4) * (6 + 5)


def test_mla_without_a_low_rank_query() -> None:
    """Without q_rank the query is one product, then absorbed."""
    names = [p.name for p in replace(MLA, q_rank=None).query_projections]
    assert names == ["q_proj", "absorb_k"]
    assert replace(MLA, q_rank=None).query_projections[0].weights == 8 * 4 * 6


def test_a_window_cuts_the_context_of_decode() -> None:
    """A query sees the whole context up to the window and no more, in FLOPs and in KV bytes."""
    windowed = small(small_attention(window=10))
    assert attention_core(windowed, 3, 7) == attention_core(small(), 3, 7)
    assert attention_core(windowed, 3, 100) == attention_core(windowed, 3, 10)
    assert attention_core(windowed, 3, 100).kv_bytes == 3 * 10 * (2 * 2 * 4) * 2
    assert seen_tokens(small_attention(window=10), np.array([3, 10, 30])).tolist() == [3, 10, 10]


@given(st.integers(1, 60), st.integers(1, 80))
def test_causal_pairs_are_counted_one_by_one(length: int, window: int) -> None:
    """Query i of a prompt sees i keys, at most the window's."""
    assert causal_pairs(length) == sum(range(1, length + 1))
    assert causal_pairs(length, window) == sum(min(i, window) for i in range(1, length + 1))


def test_a_window_cuts_the_pairs_of_prefill() -> None:
    """Two prompts of 20 tokens have as many pairs as the window leaves of each."""
    windowed = small(small_attention(window=6))
    pairs = 2 * float(causal_pairs(20))
    core = by_name(prefill_layer(windowed, 40, pairs, 20))["causal_attention"]
    seen = sum(min(i, 6) for i in range(1, 21))
    assert core.flops == pytest.approx(2 * seen * 4 * 2 * (4 + 4))


def test_shared_experts_by_hand() -> None:
    """Shared experts see every token, are stored like dense weights, and routed experts cost what they did."""
    model = replace(small(ffn=small_ffn(shared_size=12)), dense_weight_bytes=1.0)
    ops = by_name(post_attention(model, 5))
    assert ops["shared_experts"].flops == 2 * 5 * 3 * 8 * 12
    assert ops["shared_experts"].weight_bytes == 3 * 8 * 12
    assert ops["experts"] == by_name(post_attention(small(), 5))["experts"]
    assert "shared_experts" not in by_name(post_attention(small(), 5))


def test_a_dense_layer_is_one_expert_without_a_router() -> None:
    """A dense FFN takes every token, reads all its weights, is a plain GEMM and routes nothing."""
    dense = small(ffn=small_ffn(num_experts=1, router_parameters=0, matrices=2))
    ops = by_name(post_attention(dense, 5))
    assert "router" not in ops
    assert ops["ffn"].kind == "gemm"
    assert ops["ffn"].rows == 5
    assert ops["ffn"].flops == 2 * 5 * 2 * 8 * 16
    assert ops["ffn"].weight_bytes == 2 * 2 * 8 * 16
    assert expert_ffn(dense, np.array([1.0, 9.0])).weight_bytes.tolist() == [512.0, 512.0]


def test_experts_of_another_stored_type_by_hand() -> None:
    """Weights of experts move at their stored size, activations at the model's."""
    model = replace(small(ffn=small_ffn(expert_other_parameters=16)), expert_weight_bytes=0.5)
    op = expert_ffn(model, 1)
    assert op.weight_bytes == pytest.approx((3 * 8 * 16 + 16) * 0.5)
    assert op.activation_bytes == 2 * 1 * (8 + 16) * 2
    assert op.flops == 2 * 3 * 8 * 16


def test_cross_attention_by_hand() -> None:
    """Per decoded token only a query and an output are projected; keys and values once per encoder token."""
    cross = small_attention(num_kv_heads=4)
    model = small(cross_attention=cross)
    layer = model.main_layer
    ops = by_name(cross_attention_queries(model, 3, layer))
    assert ops["cross_q_proj"].weight_bytes == ops["cross_o_proj"].weight_bytes == 2 * 8 * 16
    assert ops["cross_q_proj"].flops == 2 * 3 * 8 * 16
    (keys,) = cross_attention_keys(model, 20, layer)
    assert keys.flops == 2 * 20 * 8 * (16 + 16)
    core = attention_core(model, 3, 20, cross=True)
    assert core.kv_bytes == 3 * 20 * (16 + 16) * 2
    assert attention_core(model, 3, 20).kv_bytes == core.kv_bytes / 2
    assert cross_attention_queries(small(), 3, small().main_layer) == []
    assert cross_attention_keys(small(), 3, small().main_layer) == []


def test_an_encoder_layer_attends_in_both_directions() -> None:
    """An encoder layer has the operators of prefill, and all pairs instead of the causal half."""
    model = small()
    both = by_name(encoder_layer(model, 10, 100, 10, model.main_layer))
    causal = by_name(prefill_layer(model, 10, 55, 10))
    assert both["causal_attention"].flops == 100 * 4 * 2 * 8
    assert {**both, "causal_attention": 0} == {**causal, "causal_attention": 0}


@given(st.integers(1, 300))
def test_a_uniform_histogram_is_the_formula(tokens: int) -> None:
    """Experts equally popular by measurement are those of E·(1 - (1 - k/E)^n)."""
    even = MIXTRAL.with_routing([7] * 8)
    assert distinct_experts(even, tokens) == pytest.approx(distinct_experts(MIXTRAL, tokens))


@given(st.lists(st.integers(0, 100), min_size=4, max_size=4).filter(any), st.integers(1, 50))
def test_a_skewed_histogram_activates_fewer(counts: list[int], tokens: int) -> None:
    """Experts that are not equally popular never activate more than equally popular ones."""
    model = small()
    skewed = distinct_experts(model.with_routing(counts), tokens)
    assert skewed <= distinct_experts(model, tokens) + 1e-9
    assert skewed == pytest.approx(sum(1 - (1 - x / sum(counts)) ** tokens for x in counts))


def test_routing_changes_only_layers_with_as_many_experts() -> None:
    """A dense layer of a model keeps its one expert when the others are given a histogram."""
    model = small()
    dense = Layer(attention=small_attention(), ffn=small_ffn(num_experts=1, router_parameters=0))
    mixed = replace(model, kinds=(dense, *model.kinds), order=(0, 1)).with_routing([3, 1, 0, 0])
    assert mixed.kinds[0] == dense
    assert mixed.kinds[1].ffn.routing == (0.75, 0.25, 0.0, 0.0)


@pytest.mark.parametrize("counts", [[1, 1], [0, 0, 0, 0], [1, 1, 1, -1]])
def test_a_bad_histogram_is_refused(counts: list[float]) -> None:
    """A histogram of another length, of nothing, or with negative counts is refused."""
    with pytest.raises(InvalidValue, match="needs 4 counts"):
        small().with_routing(counts)
    with pytest.raises(InvalidConfig, match="'routing'"):
        small_ffn(routing=(2.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_sharding_divides_what_is_not_replicated(count: int) -> None:
    """Each of n GPUs has an n-th of matrices and caches, and the whole of norms and residuals."""
    for op in [*pre_attention(MIXTRAL, 10), *post_attention(MIXTRAL, 10), attention_core(MIXTRAL, 10, 100)]:
        part = sharded(op, count)
        share = 1 if re.search("norm|residual", op.name) else count
        for field in ("flops", "weight_bytes", "activation_bytes", "kv_bytes"):
            assert getattr(part, field) == pytest.approx(getattr(op, field) / share), (op.name, field)
        assert (part.rows, part.launches) == (op.rows, op.launches)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"window": 0}, "'window'"),
        ({"kv_rank": 3}, "'rope_dim'"),
        ({"kv_rank": 3, "rope_dim": 4}, "'rope_dim'"),
        ({"head_dim": 0}, "'head_dim'"),
    ],
)
def test_impossible_attentions_are_refused(changed: dict[str, int], message: str) -> None:
    """Heads that do not divide, an empty window, and a rotary part that fills the head are refused by name."""
    with pytest.raises(InvalidConfig, match=message):
        small_attention(**changed)
