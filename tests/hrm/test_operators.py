"""FLOPs and bytes of operators."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm import MoEModel, catalog
from hrm.operators import (
    attention_core,
    distinct_experts,
    expert_ffn,
    post_attention,
    pre_attention,
    prefill_layer,
    sampling,
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
    assert distinct_experts(replace(MIXTRAL, top_k=8), 1) == 8


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
    """The weight bytes of a layer's operators add up to the layer's parameters when all experts are active."""
    model = catalog.load_model(name)
    operators = [*pre_attention(model, 100_000), *post_attention(model, 100_000)]
    parameters = model.dense_layer_parameters + model.num_experts * model.expert_parameters
    assert sum(op.weight_bytes for op in operators) == pytest.approx(parameters * model.dtype_bytes)


def test_sampling_reads_the_head() -> None:
    """Choosing a token reads the LM head and the final norm once."""
    assert sum(op.weight_bytes for op in sampling(MIXTRAL, 10)) == (32000 * 4096 + 4096) * 2


def test_dense_flops_are_two_per_parameter_and_token() -> None:
    """Projections, router and active experts compute 2 FLOPs per parameter and token."""
    operators = [*pre_attention(MIXTRAL, 10), *post_attention(MIXTRAL, 10)]
    gemms = sum(op.flops for op in operators if op.kind in ("gemm", "experts"))
    active = MIXTRAL.attention_parameters + 8 * 4096 + 2 * MIXTRAL.expert_parameters
    assert gemms == 2 * 10 * active


def test_prefill_layer_is_the_layer_and_causal_attention() -> None:
    """Prefill has the layer's operators and one causal attention of 4·d FLOPs per head and pair."""
    names = [op.name for op in prefill_layer(MIXTRAL, 100, 5050, 100)]
    expected = [op.name for op in [*pre_attention(MIXTRAL, 1), *post_attention(MIXTRAL, 1)]]
    assert [n for n in names if n != "causal_attention"] == expected
    (attention,) = [op for op in prefill_layer(MIXTRAL, 100, 5050, 100) if op.name == "causal_attention"]
    assert attention.flops == 4 * 5050 * 4096
