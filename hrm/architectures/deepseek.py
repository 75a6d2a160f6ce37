"""DeepSeek-V2 and V3: latent attention (MLA), shared experts, dense layers first.

arXiv 2405.04434 (V2) and 2412.19437 (V3).
"""

from __future__ import annotations

from hrm.architectures.parts import causal_lm
from hrm.architectures.reader import ConfigReader
from hrm.errors import InvalidConfig
from hrm.layers import Attention, FeedForward, Layer
from hrm.model import MoEModel

__all__ = ["read_deepseek"]


def _attention(config: ConfigReader, hidden: int) -> Attention:
    heads, nope, rope = (
        config.size("num_attention_heads"),
        config.size("qk_nope_head_dim"),
        config.size("qk_rope_head_dim"),
    )
    kv_rank, q_rank = config.size("kv_lora_rank"), config.nullable_size("q_lora_rank")
    config.expect("num_key_value_heads", heads)
    # Newer transformers write these two, which follow from the others.
    config.expect("head_dim", rope)
    config.expect("qk_head_dim", nope + rope)
    norms = kv_rank + (q_rank or 0)
    biases = (q_rank or 0) + kv_rank + rope + hidden if config.flag("attention_bias") else 0
    return Attention(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=nope + rope,
        value_dim=config.size("v_head_dim"),
        kv_rank=kv_rank,
        rope_dim=rope,
        q_rank=q_rank,
        other_parameters=norms + biases,
    )


def _stored_bytes(config: ConfigReader) -> float | None:
    """Bytes of one fp8 weight with its share of the block's float32 scale; None where not quantised."""
    quantization = config.optional_nested("quantization_config")
    if quantization is None:
        return None
    quantization.expect("quant_method", "fp8")
    quantization.expect("fmt", "e4m3")
    quantization.ignore(["activation_scheme"])
    block = quantization.indices("weight_block_size")
    if len(block) != 2 or min(block) < 1:
        raise InvalidConfig(f"'weight_block_size' of {config.name!r} must be two integers >= 1: {block!r}")
    return 1 + 4 / (block[0] * block[1])


def read_deepseek(config: ConfigReader) -> MoEModel:
    """Read a ``deepseek_v2`` or ``deepseek_v3`` config.

    The multi-token-prediction layer that V3 checkpoints carry (``num_nextn_predict_layers``) is not counted: plain
    decoding does not run it. Nor is ``e_score_correction_bias``, one number per expert that transformers keeps as
    a buffer. An fp8 checkpoint stores norms and router in wider types; here every weight of a layer counts as fp8.
    """
    hidden = config.size("hidden_size")
    config.expect("hidden_act", "silu")
    config.expect("moe_layer_freq", 1)
    config.expect("mlp_bias", False)
    # How experts are chosen and weighted, and losses; none has parameters that are counted.
    config.ignore(["n_group", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "topk_group", "topk_method"])
    config.ignore(["aux_loss_alpha", "seq_aux"])
    # Bookkeeping of training and of other runtimes.
    config.ignore(["ep_size", "num_nextn_predict_layers", "pretraining_tp", "rope_interleave"])

    attention = _attention(config, hidden)
    intermediate, experts = (
        config.size("moe_intermediate_size"),
        config.size_of("n_routed_experts", "num_local_experts"),
    )
    moe = FeedForward(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=experts,
        top_k=config.size("num_experts_per_tok"),
        shared_size=config.count("n_shared_experts") * intermediate,
        router_parameters=experts * hidden,
    )
    dense = FeedForward(hidden_size=hidden, intermediate_size=config.size("intermediate_size"))
    first = config.count("first_k_dense_replace")
    layers = [
        Layer(attention=attention, ffn=dense if i < first else moe, norm_parameters=2 * hidden)
        for i in range(config.size("num_hidden_layers"))
    ]
    stored = _stored_bytes(config)
    return causal_lm(
        config,
        layers,
        hidden=hidden,
        max_positions=config.size("max_position_embeddings"),
        final_norm=hidden,
        dense_weight_bytes=stored,
        expert_weight_bytes=stored,
    )
