"""Configs with other sizes: what ``hrm make-checkpoint`` makes of its options."""

from __future__ import annotations

from typing import Any

from hrm.errors import InvalidConfig

__all__ = ["resized"]

_CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layers"),
    "hidden": ("hidden_size", "d_model"),
    "intermediate": ("moe_intermediate_size", "ffn_config.ffn_hidden_size", "intermediate_size"),
    "heads": ("num_attention_heads", "n_heads"),
    "kv_heads": ("attn_config.kv_n_heads", "num_key_value_heads"),
    "head_dim": ("head_dim",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "ffn_config.moe_num_experts"),
    "top_k": ("num_experts_per_tok", "experts_per_token", "ffn_config.moe_top_k"),
    "vocab": ("vocab_size",),
}
"""The config keys of each option, a dot before those of a nested config."""

_ONE_OF = ("intermediate",)
"""Options whose keys mean different things, so that only the first that the config has is changed."""


def resized(config: dict[str, Any], sizes: dict[str, int | None]) -> dict[str, Any]:
    """The config with other sizes; what was derived from a size that changes follows it, or goes.

    Widths of dense layers and of shared experts keep their ratio to those of the experts. The ranks of latent
    attention stay, and a head size there means that of keys (without their rotary part) and of values.

    Parameters
    ----------
    config : dict
        Content of a ``config.json``.
    sizes : dict
        One integer or None for each of layers, hidden, intermediate, heads, kv_heads, head_dim, experts, top_k, vocab.

    Raises
    ------
    InvalidConfig
        If the config has no key for a size.
    """
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    before = dict(config)
    if sizes["hidden"] is not None or sizes["heads"] is not None:
        config.pop("head_dim", None)
    for option, value in sizes.items():
        if value is None:
            continue
        known = [key for key in _CONFIG_KEYS[option] if _holder(config, key) is not None]
        if not known and option != "head_dim":
            names = ", ".join(_CONFIG_KEYS[option])
            raise InvalidConfig(f"the config has none of {names}, so --{option} has nothing to change.")
        for key in known[:1] if option in _ONE_OF else known or [option]:
            (_holder(config, key) or config)[key.split(".")[-1]] = value
    _follow(config, before, sizes)
    return config


def _holder(config: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The dictionary that holds a key, if there is one."""
    outer, _, inner = key.rpartition(".")
    holder = config.get(outer) if outer else config
    return holder if isinstance(holder, dict) and inner in holder else None


def _follow(config: dict[str, Any], before: dict[str, Any], sizes: dict[str, int | None]) -> None:
    """Bring the keys that single families have in line with the new sizes."""
    heads = config.get("num_attention_heads")
    if "kv_lora_rank" in config:
        # Every head has keys and values of its own, and their sizes are called otherwise.
        config["num_key_value_heads"] = sizes["kv_heads"] or heads
        if (dim := config.pop("head_dim", None)) is not None:
            config["qk_nope_head_dim"] = config["v_head_dim"] = dim
    elif config.get("model_type") == "gpt_oss" and "head_dim" not in config and heads:
        config["head_dim"] = max(2, config["hidden_size"] // heads // 2 * 2)
    if sizes["intermediate"] is not None and (old := before.get("moe_intermediate_size")):
        for key in ("intermediate_size", "shared_expert_intermediate_size"):
            if key in config:  # dense layers and shared experts stay as many times wider
                config[key] = sizes["intermediate"] * -(-before[key] // old)
    if (layers := sizes["layers"]) is not None:
        if "first_k_dense_replace" in config:
            config["first_k_dense_replace"] = min(config["first_k_dense_replace"], layers - 1)
        if config.get("mlp_only_layers"):
            config["mlp_only_layers"] = [layer for layer in config["mlp_only_layers"] if layer < layers]
        if types := config.get("layer_types"):
            config["layer_types"] = (types * -(-layers // len(types)))[:layers]
    experts = config.get("n_routed_experts")
    if experts and config.get("n_group"):
        # Groups of two at least, because the best two of a group are its score.
        groups = max(n for n in range(1, config["n_group"] + 1) if experts % n == 0 and (n == 1 or experts // n > 1))
        chosen = min(config.get("topk_group") or groups, groups)
        fewest = -(-config["num_experts_per_tok"] * groups // experts)
        config["n_group"], config["topk_group"] = groups, min(groups, max(chosen, fewest))
    if (vocab := sizes["vocab"]) is not None:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = config.get(key)
            if ids is not None and max(ids if isinstance(ids, list) else [ids]) >= vocab:
                config[key] = None
