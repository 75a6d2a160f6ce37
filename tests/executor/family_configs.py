"""Tiny configs of every family that runs: each feature of a family is used, and sizes that could be mixed up differ."""

from __future__ import annotations

from typing import Any

__all__ = ["CONFIGS", "SPLITTABLE"]

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MLA: dict[str, Any] = _COMMON | {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "kv_lora_rank": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
}
_YARN = {
    "type": "yarn",
    "factor": 4,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON
    | {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "sliding_window": 9,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": _COMMON
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": _COMMON
    | {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "olmoe": _COMMON
    | {
        "model_type": "olmoe",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "clip_qkv": 0.9,
        "norm_topk_prob": False,
    },
    "phimoe": _COMMON
    | {
        "model_type": "phimoe",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.01,
    },
    "dbrx": {
        "model_type": "dbrx",
        "d_model": 64,
        "n_heads": 8,
        "n_layers": 2,
        "max_seq_len": 128,
        "vocab_size": 160,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.9, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 6, "moe_top_k": 3},
        "initializer_range": 0.08,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    },
    "gpt_oss": _COMMON
    | {
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 6,
        "swiglu_limit": 0.6,
        "initializer_range": 0.12,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
    },
    "deepseek_v2": _MLA
    | {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "rope_theta": 10000,
        "rope_scaling": _YARN,
    },
    "deepseek_v2-groups": _MLA
    | {
        "model_type": "deepseek_v2",
        "q_lora_rank": 28,
        "n_shared_experts": 1,
        "routed_scaling_factor": 4.0,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    },
    "deepseek_v3": _MLA
    | {
        "model_type": "deepseek_v3",
        "q_lora_rank": 28,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "attention_bias": True,
        "rope_theta": 10000,
        "rope_scaling": _YARN,
    },
    "deepseek_v3-halves": _MLA
    | {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "rope_interleave": False,
        "norm_topk_prob": False,
        "n_group": 2,
        "topk_group": 1,
    },
}
"""By name: the ``model_type``, and what is special about it where a type is there twice."""

SPLITTABLE = [name for name in CONFIGS if name != "olmoe"]
"""Those that run on several processes."""
