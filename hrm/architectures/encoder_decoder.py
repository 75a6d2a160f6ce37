"""Encoder-decoder models: NLLB-MoE and Switch Transformers."""

from __future__ import annotations

from collections.abc import Callable

from hrm.architectures.parts import arrange, attention_biases, plain_ffn
from hrm.architectures.reader import ConfigReader
from hrm.layers import Attention, FeedForward, Layer
from hrm.model import MoEModel

__all__ = ["read_nllb_moe", "read_switch"]


def _stack(
    num_layers: int, attention: Attention, ffn: Callable[[int], FeedForward], *, norm: int, cross: bool
) -> list[Layer]:
    return [
        Layer(
            attention=attention,
            ffn=ffn(i),
            cross_attention=attention if cross else None,
            norm_parameters=(3 if cross else 2) * norm,
        )
        for i in range(num_layers)
    ]


def _model(
    config: ConfigReader, encoder: list[Layer], decoder: list[Layer], *, hidden: int, max_positions: int, other: int
) -> MoEModel:
    # Both stacks and the LM head share one table, as in the published checkpoints.
    config.expect("tie_word_embeddings", True)
    config.expect("is_encoder_decoder", True)
    vocab = config.size("vocab_size")
    kinds, order = arrange(decoder)
    kinds, encoder_order = arrange(encoder, kinds)
    return MoEModel(
        name=config.name,
        architecture=config.model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=max_positions,
        kinds=kinds,
        order=order,
        encoder_order=encoder_order,
        embedding_parameters=vocab * hidden + other,
        tie_embeddings=True,
        dtype=config.dtype,
    )


def read_nllb_moe(config: ConfigReader) -> MoEModel:
    """Read an ``nllb-moe`` config (arXiv 2207.04672): biases everywhere, sinusoidal positions, top-2 routing."""
    hidden = config.size("d_model")
    config.expect("activation_function", "relu")
    # Used in training, in the choice of experts, or as defaults of generation.
    config.ignore(["activation_dropout", "decoder_layerdrop", "dropout", "encoder_layerdrop", "init_std"])
    config.ignore(["batch_prioritized_routing", "expert_capacity", "moe_eval_capacity_token_fraction"])
    config.ignore(["moe_token_dropout", "normalize_router_prob_before_dropping", "router_dtype"])
    config.ignore(["router_ignore_padding_tokens", "router_z_loss_coef", "second_expert_policy"])
    config.ignore(["decoder_start_token_id", "max_length", "scale_embedding"])
    experts, router_bias = config.size("num_experts"), config.flag("router_bias")

    def stack(side: str, *, cross: bool) -> list[Layer]:
        heads, intermediate = config.size(f"{side}_attention_heads"), config.size(f"{side}_ffn_dim")
        head_dim = config.per_head(hidden, heads, key=f"{side}_attention_heads")
        attention = Attention(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            value_dim=head_dim,
            other_parameters=attention_biases(hidden, hidden, hidden),
        )
        dense = plain_ffn(hidden, intermediate)
        moe = plain_ffn(hidden, intermediate, num_experts=experts, top_k=2, router_bias=router_bias)
        step = config.count(f"{side}_sparse_step")
        return _stack(
            config.size(f"{side}_layers"),
            attention,
            lambda i: moe if step and (i + 1) % step == 0 else dense,
            norm=2 * hidden,
            cross=cross,
        )

    encoder, decoder = stack("encoder", cross=False), stack("decoder", cross=True)
    config.expect("num_hidden_layers", len(encoder))
    positions = config.size("max_position_embeddings")
    return _model(config, encoder, decoder, hidden=hidden, max_positions=positions, other=2 * 2 * hidden)


def read_switch(config: ConfigReader) -> MoEModel:
    """Read a ``switch_transformers`` config (arXiv 2101.03961): T5 layers, top-1 routing."""
    hidden, heads, head_dim = (config.size(key) for key in ("d_model", "num_heads", "d_kv"))
    for key in ("dense_act_fn", "feed_forward_proj"):
        config.expect(key, "relu")
    config.expect("is_gated_act", False)
    config.expect("is_decoder", False)
    config.expect("add_cross_attention", False)
    # Used in training, in the choice of experts, or as defaults of generation.
    config.ignore(["add_router_probs", "dropout_rate", "expert_capacity", "initializer_factor", "layer_norm_epsilon"])
    config.ignore(["router_dtype", "router_ignore_padding_tokens", "router_type", "router_z_loss_coef"])
    config.ignore(["batch_prioritized_routing", "decoder_start_token_id", "relative_attention_max_distance"])
    config.ignore(["output_past", "task_specific_params"])
    attention = Attention(
        hidden_size=hidden, num_heads=heads, num_kv_heads=heads, head_dim=head_dim, value_dim=head_dim
    )
    intermediate, experts = config.size("d_ff"), config.size("num_experts")
    dense = plain_ffn(hidden, intermediate, bias=False)
    moe = plain_ffn(hidden, intermediate, bias=False, num_experts=experts, router_bias=config.flag("router_bias"))

    def stack(layers_key: str, side: str, *, cross: bool) -> list[Layer]:
        num_layers = config.size(layers_key)
        step = num_layers // config.size(f"num_sparse_{side}_layers")
        config.expect(f"{side}_sparse_step", step)
        return _stack(
            num_layers,
            attention,
            lambda i: moe if step == 1 or (step and i % step == 1) else dense,
            norm=hidden,
            cross=cross,
        )

    encoder = stack("num_layers", "encoder", cross=False)
    decoder = stack("num_decoder_layers", "decoder", cross=True)
    # The first layer of each stack owns a table of relative positions that all its layers use.
    tables = 2 * config.size("relative_attention_num_buckets") * heads
    # Relative positions have no end; n_positions is the length that the model was trained on.
    positions = config.size("n_positions", 512)
    return _model(config, encoder, decoder, hidden=hidden, max_positions=positions, other=tables + 2 * hidden)
