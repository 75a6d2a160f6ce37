"""Llama 4: a shared expert beside routed ones, attention in chunks except on layers without rotary angles."""

from __future__ import annotations

from hrm.architectures.parts import attention_biases, causal_lm
from hrm.architectures.reader import ConfigReader
from hrm.errors import InvalidConfig
from hrm.layers import Attention, FeedForward, Layer
from hrm.model import MoEModel

__all__ = ["read_llama4", "read_llama4_text"]


def read_llama4(config: ConfigReader) -> MoEModel:
    """Read a ``llama4`` config: its text model only, the image encoder is not counted."""
    # vision_config describes the image encoder; the token indices mark where its output goes.
    config.ignore(["vision_config", "boi_token_index", "eoi_token_index", "image_token_index"])
    # transformers reads tied embeddings from the text config.
    config.expect("tie_word_embeddings", False)
    text = config.nested("text_config")
    text.expect("model_type", "llama4_text")
    return read_llama4_text(text)


def _chunked(config: ConfigReader, num_layers: int) -> list[bool]:
    """Which layers attend in chunks: those with rotary angles, unless ``layer_types`` says otherwise."""
    interval, rope = config.size("no_rope_layer_interval", 4), config.indices("no_rope_layers")
    types = config.layer_types(num_layers, "chunked_attention", "full_attention")
    if types is not None:
        return [kind == "chunked_attention" for kind in types]
    if not rope:
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(rope) != num_layers:
        raise InvalidConfig(f"'no_rope_layers' of {config.name!r} must have {num_layers} numbers: {len(rope)}")
    return [value == 1 for value in rope]


def read_llama4_text(config: ConfigReader) -> MoEModel:
    """Read a ``llama4_text`` config.

    A query of a chunked layer sees the keys of its own chunk, ``attention_chunk_size`` at most; that counts as a
    window. ``no_rope_layers`` holds 1 for layers that do have rotary angles.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads, head_dim = config.size("num_key_value_heads"), config.size("head_dim")
    intermediate, experts = config.size("intermediate_size"), config.size("num_local_experts")
    num_layers = config.size("num_hidden_layers")
    config.expect("hidden_act", "silu")
    # The norm of queries and keys has no parameters; temperature only scales queries; the rest is bookkeeping.
    config.ignore(["use_qk_norm", "attn_temperature_tuning", "floor_scale", "attn_scale"])
    config.ignore(["_attn_implementation_autoset", "cache_implementation", "for_llm_compressor"])

    biases = attention_biases(hidden, heads * head_dim, kv_heads * head_dim) if config.flag("attention_bias") else 0
    moe = FeedForward(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=experts,
        top_k=config.size("num_experts_per_tok"),
        shared_size=intermediate,
        router_parameters=experts * hidden,
    )
    dense = FeedForward(hidden_size=hidden, intermediate_size=config.size("intermediate_size_mlp"))
    step, given = config.size("interleave_moe_layer_step", 1), config.get("moe_layers")
    moe_layers = range(step - 1, num_layers, step) if given is None else config.indices("moe_layers")
    chunk = config.nullable_size("attention_chunk_size")
    layers = [
        Layer(
            attention=Attention(
                hidden_size=hidden,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                value_dim=head_dim,
                window=chunk if chunked else None,
                other_parameters=biases,
            ),
            ffn=moe if i in moe_layers else dense,
            norm_parameters=2 * hidden,
        )
        for i, chunked in enumerate(_chunked(config, num_layers))
    ]
    positions = config.size("max_position_embeddings")
    return causal_lm(config, layers, hidden=hidden, max_positions=positions, final_norm=hidden)
