"""Decoders with grouped-query attention and gated experts: Qwen, OLMoE, Phi-MoE, DBRX.

Shapes follow the model classes of Hugging Face transformers.
"""

from __future__ import annotations

from hrm.architectures.parts import attention_biases, causal_lm
from hrm.architectures.reader import GENERATION_DEFAULTS, ConfigReader
from hrm.layers import Attention, FeedForward, Layer
from hrm.model import MoEModel

__all__ = ["read_dbrx", "read_olmoe", "read_phimoe", "read_qwen2_moe", "read_qwen3_moe"]


def _heads(config: ConfigReader, hidden: int) -> tuple[int, int, int]:
    heads = config.size("num_attention_heads")
    return heads, config.size("num_key_value_heads"), config.head_dim(hidden, heads)


def _experts(
    hidden: int, intermediate: int, num_experts: int, top_k: int, *, shared_size: int = 0, shared_gate: bool = False
) -> FeedForward:
    return FeedForward(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=num_experts,
        top_k=top_k,
        shared_size=shared_size,
        shared_other_parameters=hidden if shared_gate else 0,
        router_parameters=num_experts * hidden,
    )


def _read_qwen(config: ConfigReader, *, qk_norm: bool, shared: bool) -> MoEModel:
    hidden = config.size("hidden_size")
    heads, kv_heads, head_dim = _heads(config, hidden)
    config.expect("hidden_act", "silu")
    # Without use_sliding_window the two window keys have no effect.
    config.expect("use_sliding_window", False)
    config.ignore(["sliding_window", "max_window_layers", "norm_topk_prob"])
    num_layers = config.size("num_hidden_layers")
    config.layer_types(num_layers, "full_attention")

    other = 2 * head_dim if qk_norm else 0
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    if not qk_norm and config.flag("qkv_bias", True):
        other += q_size + 2 * kv_size
    if qk_norm and config.flag("attention_bias"):
        other += attention_biases(hidden, q_size, kv_size)
    attention = Attention(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        other_parameters=other,
    )
    moe = _experts(
        hidden,
        config.size("moe_intermediate_size"),
        config.size_of("num_experts", "num_local_experts"),
        config.size("num_experts_per_tok"),
        shared_size=config.size("shared_expert_intermediate_size") if shared else 0,
        shared_gate=shared,
    )
    dense = FeedForward(hidden_size=hidden, intermediate_size=config.size("intermediate_size"))
    step, dense_layers = config.size("decoder_sparse_step", 1), set(config.indices("mlp_only_layers"))
    layers = [
        Layer(
            attention=attention,
            ffn=moe if i not in dense_layers and (i + 1) % step == 0 else dense,
            norm_parameters=2 * hidden,
        )
        for i in range(num_layers)
    ]
    positions = config.size("max_position_embeddings")
    return causal_lm(config, layers, hidden=hidden, max_positions=positions, final_norm=hidden)


def read_qwen3_moe(config: ConfigReader) -> MoEModel:
    """Read a ``qwen3_moe`` config: queries and keys are normed per head."""
    return _read_qwen(config, qk_norm=True, shared=False)


def read_qwen2_moe(config: ConfigReader) -> MoEModel:
    """Read a ``qwen2_moe`` config: biases on queries, keys and values, and a gated shared expert."""
    return _read_qwen(config, qk_norm=False, shared=True)


def read_olmoe(config: ConfigReader) -> MoEModel:
    """Read an ``olmoe`` config: queries and keys are normed over their full width (arXiv 2409.02060)."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads, head_dim = config.size("num_key_value_heads"), config.per_head(hidden, heads)
    config.expect("hidden_act", "silu")
    # clip_qkv bounds values, norm_topk_prob scales the router's weights.
    config.ignore(["clip_qkv", "norm_topk_prob"])
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    biases = attention_biases(hidden, q_size, kv_size) if config.flag("attention_bias") else 0
    layer = Layer(
        attention=Attention(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            other_parameters=q_size + kv_size + biases,
        ),
        ffn=_experts(
            hidden,
            config.size("intermediate_size"),
            config.size_of("num_experts", "num_local_experts"),
            config.size("num_experts_per_tok"),
        ),
        norm_parameters=2 * hidden,
    )
    positions = config.size("max_position_embeddings")
    layers = [layer] * config.size("num_hidden_layers")
    return causal_lm(config, layers, hidden=hidden, max_positions=positions, final_norm=hidden)


def read_phimoe(config: ConfigReader) -> MoEModel:
    """Read a ``phimoe`` config: LayerNorms with biases, optional biases in attention and LM head."""
    hidden = config.size("hidden_size")
    heads, kv_heads, head_dim = _heads(config, hidden)
    config.expect("hidden_act", "silu")
    # Jitter and dropout act in training, original_max_position_embeddings only scales the rotary angles.
    config.ignore(["hidden_dropout", "input_jitter_noise", "original_max_position_embeddings"])
    positions, window = config.size("max_position_embeddings"), config.optional_size("sliding_window")
    biases = attention_biases(hidden, heads * head_dim, kv_heads * head_dim) if config.flag("attention_bias") else 0
    layer = Layer(
        attention=Attention(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            window=window if window is not None and window < positions else None,
            other_parameters=biases,
        ),
        ffn=_experts(
            hidden,
            config.size("intermediate_size"),
            config.size("num_local_experts"),
            config.size("num_experts_per_tok"),
        ),
        norm_parameters=4 * hidden,
    )
    return causal_lm(
        config,
        [layer] * config.size("num_hidden_layers"),
        hidden=hidden,
        max_positions=positions,
        final_norm=2 * hidden,
        head_bias=config.flag("lm_head_bias"),
    )


def read_dbrx(config: ConfigReader) -> MoEModel:
    """Read a ``dbrx`` config, which keeps attention and experts in nested configs."""
    hidden, heads = config.size("d_model"), config.size("n_heads")
    attn, ffn = config.nested("attn_config"), config.nested("ffn_config")
    config.ignore(["emb_pdrop", "resid_pdrop"])
    # transformers has no DBRX with tied embeddings either.
    config.expect("tie_word_embeddings", False)
    for nested in (attn, ffn):
        nested.ignore(GENERATION_DEFAULTS)
    attn.ignore(["attn_pdrop", "clip_qkv"])
    # How routed weights are scaled, and how the router is trained.
    ffn.ignore(["moe_jitter_eps", "moe_loss_weight", "moe_normalize_expert_weights"])
    ffn.expect("ffn_act_fn", {"name": "silu"})
    ffn.expect("uniform_expert_assignment", False)
    kv_heads, head_dim = attn.size("kv_n_heads"), config.per_head(hidden, heads, key="n_heads")
    # transformers 5 writes these two beside the published keys.
    config.expect("num_key_value_heads", kv_heads)
    ffn.expect("hidden_size", hidden)
    layer = Layer(
        attention=Attention(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
        ),
        ffn=_experts(hidden, ffn.size("ffn_hidden_size"), ffn.size("moe_num_experts"), ffn.size("moe_top_k")),
        norm_parameters=2 * hidden,
    )
    layers, positions = [layer] * config.size("n_layers"), config.size("max_seq_len")
    return causal_lm(config, layers, hidden=hidden, max_positions=positions, final_norm=hidden)
