"""FLOPs and bytes of every operator of a layer, per memory level.

Counts are for one layer, by default the model's layer with the most experts, and accept numbers or numpy
arrays (a planner evaluates a whole grid at once). Token counts follow MoE-Lightning, section 3: in decode a
micro-batch of μ sequences is μ tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hrm.layers import Attention, FeedForward, Layer, Projection
from hrm.model import MoEModel

__all__ = [
    "Operator",
    "active_experts",
    "after_attention",
    "attention_core",
    "causal_pairs",
    "cross_attention_keys",
    "cross_attention_queries",
    "distinct_experts",
    "encoder_layer",
    "expert_ffn",
    "kv_shards",
    "post_attention",
    "pre_attention",
    "prefill_layer",
    "sampling",
    "seen_tokens",
    "sharded",
]

Kind = Literal["gemm", "experts", "elementwise", "attention", "causal_attention"]
Number = Any  # float or numpy array; the formulas are the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Work of one operator on one batch of tokens."""

    name: str
    kind: Kind
    flops: Number
    weight_bytes: Number = 0.0
    """Bytes of parameters read."""
    activation_bytes: Number = 0.0
    """Bytes of activations read and written."""
    kv_bytes: Number = 0.0
    """Bytes of KV cache read and written."""
    rows: Number = 1
    """Size that the kernel's efficiency depends on: rows of a GEMM, tokens per expert, prompt or context length."""
    launches: Number = 1
    """Kernels launched (operators dispatched)."""
    replicated: bool = False
    """True where tensor parallelism gives every GPU the whole work (norms, residuals)."""

    @property
    def bytes(self) -> Number:
        """All bytes the operator touches."""
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    @property
    def intensity(self) -> Number:
        """I_x: FLOPs per byte touched (general operational intensity)."""
        return self.flops / self.bytes


def active_experts(ffn: FeedForward, tokens: Number) -> Number:
    """Expected number of distinct experts that `tokens` tokens activate.

    E·(1 - (1 - k/E)^tokens) under uniform routing, Σ(1 - (1 - p_e)^tokens) with a routing histogram.
    """
    if ffn.routing is None:
        return ffn.num_experts * (1.0 - (1.0 - ffn.top_k / ffn.num_experts) ** tokens)
    return sum(1.0 - (1.0 - share) ** tokens for share in ffn.routing)


def distinct_experts(model: MoEModel, tokens: Number) -> Number:
    """Expected number of distinct experts of a layer that `tokens` tokens activate, see `active_experts`.

    Examples
    --------
    >>> round(distinct_experts(MoEModel.from_catalog("mixtral-8x7b"), 4), 3)
    5.469
    """
    return active_experts(model.main_layer.ffn, tokens)


def seen_tokens(attention: Attention, context: Number) -> Number:
    """Tokens of a `context` that a query sees through the layer's window."""
    return context if attention.window is None else np.minimum(context, attention.window)


def causal_pairs(length: Number, window: int | None = None) -> Number:
    """Query-key pairs of a causal prompt of `length` tokens, each query seeing at most `window` keys.

    Examples
    --------
    >>> float(causal_pairs(4)), float(causal_pairs(4, window=2))
    (10.0, 7.0)
    """
    whole = length * (length + 1) / 2
    if window is None:
        return whole
    beyond = np.maximum(length - window, 0)
    return whole - beyond * (beyond + 1) / 2


def kv_shards(attention: Attention, num_gpus: int) -> int:
    """Parts that tensor parallelism cuts a KV cache into: one per KV head at most, one alone for a latent."""
    return 1 if attention.kv_rank is not None else min(num_gpus, attention.num_kv_heads)


def sharded(op: Operator, num_gpus: int, attention: Attention | None = None) -> Operator:
    """The part of an operator that each of `num_gpus` GPUs does under tensor parallelism.

    Parameters
    ----------
    attention : Attention, optional
        Whose KV cache the operator reads; heads that are fewer than GPUs are kept more than once.
    """
    if num_gpus == 1 or op.replicated:
        return op
    parts = num_gpus if attention is None else kv_shards(attention, num_gpus)
    return replace(
        op,
        flops=op.flops / num_gpus,
        weight_bytes=op.weight_bytes / num_gpus,
        activation_bytes=op.activation_bytes / num_gpus,
        kv_bytes=op.kv_bytes / parts,
    )


def _norm(model: MoEModel, tokens: Number, name: str) -> Operator:
    h, b = model.hidden_size, model.dtype_bytes
    return Operator(
        name=name,
        kind="elementwise",
        flops=4 * tokens * h,
        weight_bytes=h * b,
        activation_bytes=2 * tokens * h * b,
        rows=tokens,
        launches=6,
        replicated=True,
    )


def _gemm(
    model: MoEModel, tokens: Number, projections: tuple[Projection, ...], name: str, launches: int | None = None
) -> Operator:
    """Products with one common input (or one after the other) as one operator."""
    weights = sum(p.weights for p in projections)
    # Products that share their input read it once.
    shared = {p.width_in for p in projections if not p.chained}
    moved = sum(shared) + sum(p.width_out + p.chained * p.width_in for p in projections)
    return Operator(
        name=name,
        kind="gemm",
        flops=2 * tokens * weights,
        weight_bytes=weights * model.dense_element_bytes,
        activation_bytes=tokens * moved * model.dtype_bytes,
        rows=tokens,
        launches=len(projections) if launches is None else launches,
    )


def pre_attention(model: MoEModel, tokens: Number, layer: Layer | None = None) -> list[Operator]:
    """PreAttn: norm, Q/K/V projections, rotary embedding of `tokens` tokens, laid out for offloading."""
    b = model.dtype_bytes
    attention = (layer or model.main_layer).attention
    queries, cached = attention.query_size, attention.kv_elements
    rotated = queries + cached // 2 if attention.kv_rank is None else attention.num_heads * attention.rope_dim
    return [
        _norm(model, tokens, "input_norm"),
        _gemm(model, tokens, (*attention.query_projections, *attention.kv_projections), "qkv_proj"),
        Operator(
            name="rotary",
            kind="elementwise",
            flops=3 * tokens * rotated,
            activation_bytes=2 * tokens * rotated * b,
            rows=tokens,
            launches=14,
        ),
        Operator(
            name="pack_qkv",
            kind="elementwise",
            flops=0.0 * tokens,
            activation_bytes=2 * tokens * (queries + cached) * b,
            rows=tokens,
            launches=10,
        ),
    ]


def attention_core(
    model: MoEModel,
    sequences: Number,
    context: Number,
    *,
    layer: Layer | None = None,
    cross: bool = False,
    query_len: Number = 1,
    kv_dtype_bytes: float | None = None,
    count: Literal["exact", "paper"] = "exact",
) -> Operator:
    """softmax(QKᵀ)V over a KV cache of `context` tokens per sequence.

    Parameters
    ----------
    layer : Layer, optional
        By default the model's layer with the most experts. A window cuts the context.
    cross : bool
        The layer's attention over the encoder's output instead of its own.
    count : {"exact", "paper"}
        ``exact`` counts both products (4d FLOPs per query head and context token; more with MLA);
        ``paper`` counts 2d + 2, as the authors' Fig. 4 does (it leaves out the product with V), and
        gives queries the KV cache's type.

    References
    ----------
    MoE-Lightning, Fig. 4 and section 3.

    Examples
    --------
    >>> mixtral = MoEModel.from_catalog("mixtral-8x7b")
    >>> round(attention_core(mixtral, 1, 512, count="paper").intensity, 1)
    2.0
    """
    layer = layer or model.main_layer
    attention = layer.cross_attention if cross and layer.cross_attention else layer.attention
    b = model.dtype_bytes
    kv_b = model.kv_dtype_bytes if kv_dtype_bytes is None else kv_dtype_bytes
    seen = seen_tokens(attention, context)
    pair = attention.pair_flops if count == "exact" else attention.num_heads * (2 * attention.head_dim + 2)
    return Operator(
        name="attention",
        kind="attention",
        flops=sequences * query_len * seen * pair,
        activation_bytes=sequences
        * query_len
        * (attention.query_size + attention.attended_size)
        * (b if count == "exact" else kv_b),
        kv_bytes=sequences * seen * attention.kv_elements * kv_b,
        rows=seen,
        launches=3,
    )


def expert_ffn(
    model: MoEModel, tokens: Number, layer: Layer | None = None, *, count: Literal["exact", "paper"] = "exact"
) -> Operator:
    """The routed experts of one layer on `tokens` tokens, only those that are expected to be active.

    A dense FFN counts as one expert that takes every token.

    Parameters
    ----------
    count : {"exact", "paper"}
        ``exact`` reads the experts that the tokens are expected to activate, and activations of every routed
        token; ``paper`` reads all experts, and each token's input and output once, as the authors' Fig. 5 does.

    References
    ----------
    MoE-Lightning, Fig. 5 and section 3.3.

    Examples
    --------
    >>> mixtral = MoEModel.from_catalog("mixtral-8x7b")
    >>> round(expert_ffn(mixtral, 128, count="paper").intensity, 2)
    31.95
    """
    ffn = (layer or model.main_layer).ffn
    h, i, b = model.hidden_size, ffn.intermediate_size, model.dtype_bytes
    active = active_experts(ffn, tokens)
    routed = tokens * ffn.top_k
    read = active if count == "exact" else ffn.num_experts
    return Operator(
        name="experts" if ffn.routed else "ffn",
        kind="experts" if ffn.routed else "gemm",
        flops=2 * ffn.matrices * routed * h * i,
        weight_bytes=read * ffn.expert_parameters * model.expert_element_bytes,
        activation_bytes=(2 * routed if count == "exact" else tokens) * (h + i) * b,
        rows=routed / active,
        launches=8 * active + 8 if ffn.routed else ffn.matrices + 1,
    )


def _residual(model: MoEModel, tokens: Number) -> Operator:
    return Operator(
        name="residual",
        kind="elementwise",
        flops=2 * tokens * model.hidden_size,
        activation_bytes=6 * tokens * model.hidden_size * model.dtype_bytes,
        rows=tokens,
        launches=2,
        replicated=True,
    )


def post_attention(model: MoEModel, tokens: Number, layer: Layer | None = None) -> list[Operator]:
    """PostAttn: O projection, residual, norm, router, shared and routed experts of `tokens` tokens."""
    return [*after_attention(model, tokens, layer), expert_ffn(model, tokens, layer)]


def after_attention(model: MoEModel, tokens: Number, layer: Layer | None = None) -> list[Operator]:
    """PostAttn without the routed experts: what stays on the GPU wherever those run."""
    layer = layer or model.main_layer
    ffn, h = layer.ffn, model.hidden_size
    operators = [
        _gemm(model, tokens, layer.attention.output_projections, "o_proj"),
        _residual(model, tokens),
        _norm(model, tokens, "post_norm"),
    ]
    if ffn.routed:
        router = Projection("router", h, ffn.num_experts, h * ffn.num_experts)
        operators.append(_gemm(model, tokens, (router,), "router", launches=5))
    if ffn.shared_size:
        shared = Projection("shared", h, ffn.matrices * ffn.shared_size, ffn.matrices * h * ffn.shared_size)
        operators.append(_gemm(model, tokens, (shared,), "shared_experts", launches=ffn.matrices + 1))
    return operators


def prefill_layer(
    model: MoEModel, tokens: Number, pairs: Number, longest: Number, layer: Layer | None = None
) -> list[Operator]:
    """A whole layer on `tokens` prompt tokens with `pairs` causal query-key pairs (before any window)."""
    layer = layer or model.main_layer
    window = layer.attention.window
    if window is not None:
        pairs = pairs * causal_pairs(longest, window) / causal_pairs(longest)
    return [
        *pre_attention(model, tokens, layer),
        _prefill_attention(model, tokens, pairs, longest, layer),
        *post_attention(model, tokens, layer),
    ]


def encoder_layer(model: MoEModel, tokens: Number, pairs: Number, longest: Number, layer: Layer) -> list[Operator]:
    """A layer of an encoder on `tokens` prompt tokens; `pairs` are all pairs, in both directions."""
    return [
        *pre_attention(model, tokens, layer),
        _prefill_attention(model, tokens, pairs, longest, layer),
        *post_attention(model, tokens, layer),
    ]


def _prefill_attention(model: MoEModel, tokens: Number, pairs: Number, longest: Number, layer: Layer) -> Operator:
    attention = layer.attention
    # Heads are expanded: with MLA, keys and values of every head are made from the latent vector first.
    widths = (attention.num_heads + attention.num_kv_heads) * (attention.head_dim + attention.value_dim)
    return Operator(
        name="causal_attention",
        kind="causal_attention",
        flops=pairs * attention.prefill_pair_flops,
        activation_bytes=tokens * widths * model.dtype_bytes,
        rows=longest,
        launches=4,
    )


def cross_attention_queries(model: MoEModel, tokens: Number, layer: Layer) -> list[Operator]:
    """What a decoder layer's attention over the encoder costs the GPU per token: norm, query, output."""
    if layer.cross_attention is None:
        return []
    cross = layer.cross_attention
    return [
        _norm(model, tokens, "cross_norm"),
        _gemm(model, tokens, cross.query_projections, "cross_q_proj"),
        _gemm(model, tokens, cross.output_projections, "cross_o_proj"),
        _residual(model, tokens),
    ]


def cross_attention_keys(model: MoEModel, tokens: Number, layer: Layer) -> list[Operator]:
    """Keys and values of the encoder's `tokens` outputs for one decoder layer, made once."""
    if layer.cross_attention is None:
        return []
    return [_gemm(model, tokens, layer.cross_attention.kv_projections, "cross_kv_proj")]


def sampling(model: MoEModel, tokens: Number) -> list[Operator]:
    """Final norm, LM head and arg-max of `tokens` sequences."""
    h, vocab = model.hidden_size, model.vocab_size
    head = replace(
        _gemm(model, tokens, (Projection("lm_head", h, vocab, h * vocab),), "lm_head"),
        weight_bytes=h * vocab * model.dtype_bytes,
    )
    return [
        _norm(model, tokens, "final_norm"),
        head,
        Operator(
            name="argmax",
            kind="elementwise",
            flops=tokens * vocab,
            activation_bytes=tokens * vocab * model.dtype_bytes,
            rows=tokens,
            launches=2,
        ),
    ]
