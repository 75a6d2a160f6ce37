"""FLOPs and bytes of every operator of a decoder layer, per memory level.

Counts are for one layer and accept numbers or numpy arrays (a planner evaluates a whole grid at once).
Token counts follow MoE-Lightning, section 3: in decode a micro-batch of μ sequences is μ tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hrm.model import MoEModel

__all__ = [
    "Operator",
    "attention_core",
    "distinct_experts",
    "expert_ffn",
    "post_attention",
    "pre_attention",
    "prefill_layer",
    "sampling",
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

    @property
    def bytes(self) -> Number:
        """All bytes the operator touches."""
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    @property
    def intensity(self) -> Number:
        """I_x: FLOPs per byte touched (general operational intensity)."""
        return self.flops / self.bytes


def distinct_experts(model: MoEModel, tokens: Number) -> Number:
    """Expected number of distinct experts that `tokens` tokens activate under uniform routing.

    E·(1 - (1 - k/E)^tokens).

    Examples
    --------
    >>> round(distinct_experts(MoEModel.from_catalog("mixtral-8x7b"), 4), 3)
    5.469
    """
    e = model.num_experts
    return e * (1.0 - (1.0 - model.top_k / e) ** tokens)


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
    )


def _gemm(model: MoEModel, tokens: Number, width_in: int, width_out: int, name: str, launches: int = 1) -> Operator:
    b = model.dtype_bytes
    return Operator(
        name=name,
        kind="gemm",
        flops=2 * tokens * width_in * width_out,
        weight_bytes=width_in * width_out * b,
        activation_bytes=tokens * (width_in + width_out) * b,
        rows=tokens,
        launches=launches,
    )


def pre_attention(model: MoEModel, tokens: Number) -> list[Operator]:
    """PreAttn: norm, Q/K/V projections, rotary embedding of `tokens` tokens, laid out for offloading."""
    b = model.dtype_bytes
    rotated = model.q_size + model.kv_size
    return [
        _norm(model, tokens, "input_norm"),
        _gemm(model, tokens, model.hidden_size, model.q_size + 2 * model.kv_size, "qkv_proj", launches=3),
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
            activation_bytes=2 * tokens * (rotated + model.kv_size) * b,
            rows=tokens,
            launches=10,
        ),
    ]


def attention_core(
    model: MoEModel,
    sequences: Number,
    context: Number,
    *,
    query_len: Number = 1,
    kv_dtype_bytes: float | None = None,
    count: Literal["exact", "paper"] = "exact",
) -> Operator:
    """softmax(QKᵀ)V over a KV cache of `context` tokens per sequence.

    Parameters
    ----------
    count : {"exact", "paper"}
        ``exact`` counts 4d FLOPs per query head and context token; ``paper`` counts 2d + 2, as the
        authors' Fig. 4 does (it leaves out the product with V), and gives queries the KV cache's type.

    References
    ----------
    MoE-Lightning, Fig. 4 and section 3.

    Examples
    --------
    >>> mixtral = MoEModel.from_catalog("mixtral-8x7b")
    >>> round(attention_core(mixtral, 1, 512, count="paper").intensity, 1)
    2.0
    """
    b = model.dtype_bytes
    kv_b = b if kv_dtype_bytes is None else kv_dtype_bytes
    per_pair = 4 * model.head_dim if count == "exact" else 2 * model.head_dim + 2
    return Operator(
        name="attention",
        kind="attention",
        flops=sequences * query_len * context * model.num_heads * per_pair,
        activation_bytes=2 * sequences * query_len * model.q_size * (b if count == "exact" else kv_b),
        kv_bytes=2 * sequences * context * model.kv_size * kv_b,
        rows=context,
        launches=3,
    )


def expert_ffn(model: MoEModel, tokens: Number) -> Operator:
    """The expert FFNs of one layer on `tokens` tokens, only the experts that are expected to be active."""
    h, i, b = model.hidden_size, model.intermediate_size, model.dtype_bytes
    active = distinct_experts(model, tokens)
    routed = tokens * model.top_k
    return Operator(
        name="experts",
        kind="experts",
        flops=6 * routed * h * i,
        weight_bytes=active * model.expert_bytes,
        activation_bytes=2 * routed * (h + i) * b,
        rows=routed / active,
        launches=8 * active + 8,
    )


def post_attention(model: MoEModel, tokens: Number) -> list[Operator]:
    """PostAttn: O projection, residual, norm, router, experts of `tokens` tokens."""
    h, b = model.hidden_size, model.dtype_bytes
    residual = Operator(
        name="residual",
        kind="elementwise",
        flops=2 * tokens * h,
        activation_bytes=6 * tokens * h * b,
        rows=tokens,
        launches=2,
    )
    return [
        _gemm(model, tokens, model.q_size, h, "o_proj"),
        residual,
        _norm(model, tokens, "post_norm"),
        _gemm(model, tokens, h, model.num_experts, "router", launches=5),
        expert_ffn(model, tokens),
    ]


def prefill_layer(model: MoEModel, tokens: Number, pairs: Number, longest: Number) -> list[Operator]:
    """A whole layer on `tokens` prompt tokens with `pairs` causal query-key pairs."""
    attention = Operator(
        name="causal_attention",
        kind="causal_attention",
        flops=4 * pairs * model.q_size,
        activation_bytes=tokens * (2 * model.q_size + 2 * model.kv_size) * model.dtype_bytes,
        rows=longest,
        launches=4,
    )
    return [*pre_attention(model, tokens), attention, *post_attention(model, tokens)]


def sampling(model: MoEModel, tokens: Number) -> list[Operator]:
    """Final norm, LM head and arg-max of `tokens` sequences."""
    return [
        _norm(model, tokens, "final_norm"),
        _gemm(model, tokens, model.hidden_size, model.vocab_size, "lm_head"),
        Operator(
            name="argmax",
            kind="elementwise",
            flops=tokens * model.vocab_size,
            activation_bytes=tokens * model.vocab_size * model.dtype_bytes,
            rows=tokens,
            launches=2,
        ),
    ]
