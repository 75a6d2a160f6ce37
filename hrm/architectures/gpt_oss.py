"""gpt-oss: biases everywhere, attention sinks, every other layer with a sliding window, experts in MXFP4."""

from __future__ import annotations

from hrm.architectures.parts import attention_biases, causal_lm
from hrm.architectures.reader import ConfigReader
from hrm.layers import Attention, FeedForward, Layer
from hrm.model import MoEModel

__all__ = ["MXFP4_BYTES", "read_gpt_oss"]

MXFP4_BYTES = (4 + 8 / 32) / 8
"""Bytes of one MXFP4 weight: 4 bits, and one 8-bit scale per 32 weights (OCP Microscaling Formats 1.0)."""


def read_gpt_oss(config: ConfigReader) -> MoEModel:
    """Read a ``gpt_oss`` config (model card: arXiv 2508.10925).

    Checkpoints keep the biases of MXFP4 experts in bfloat16; they are 0.03 % of an expert and count as MXFP4 here.
    """
    hidden, heads, kv_heads = (
        config.size(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    head_dim, intermediate = config.size("head_dim"), config.size("intermediate_size")
    experts, num_layers = config.size_of("num_local_experts", "num_experts"), config.size("num_hidden_layers")
    config.expect("hidden_act", "silu")
    # Bounds of the activation, and the context that the rotary angles are scaled from.
    config.ignore(["swiglu_alpha", "swiglu_limit", "initial_context_length"])
    quantization = config.optional_nested("quantization_config")
    if quantization is not None:
        quantization.expect("quant_method", "mxfp4")
        # Always the modules beside the experts.
        quantization.ignore(["modules_to_not_convert"])

    biases = attention_biases(hidden, heads * head_dim, kv_heads * head_dim)
    ffn = FeedForward(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=experts,
        top_k=config.size_of("num_experts_per_tok", "experts_per_token"),
        expert_other_parameters=2 * intermediate + hidden,
        router_parameters=experts * (hidden + 1),
    )
    other = heads + (biases if config.flag("attention_bias", True) else 0)
    window = config.size("sliding_window")
    types = config.layer_types(num_layers, "sliding_attention", "full_attention")
    if types is None:
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    layers = [
        Layer(
            attention=Attention(
                hidden_size=hidden,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                value_dim=head_dim,
                window=window if kind == "sliding_attention" else None,
                other_parameters=other,
            ),
            ffn=ffn,
            norm_parameters=2 * hidden,
        )
        for kind in types
    ]
    return causal_lm(
        config,
        layers,
        hidden=hidden,
        max_positions=config.size("max_position_embeddings"),
        final_norm=hidden,
        expert_weight_bytes=None if quantization is None else MXFP4_BYTES,
    )
