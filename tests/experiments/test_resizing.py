"""Sizes of a checkpoint's config: every family's own keys follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from executor.checkpoint import Checkpoint, make_checkpoint
from experiments.resizing import resized
from hrm import MoEModel
from hrm.catalog import model_config
from hrm.errors import InvalidConfig

SIZES: dict[str, int | None] = dict.fromkeys(
    ["layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "experts", "top_k", "vocab"]
)
MODELS = [
    "dbrx",
    "deepseek-v2-lite",
    "deepseek-v3",
    "gpt-oss-20b",
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "phi-3.5-moe",
    "qwen3-30b-a3b",
]


@pytest.mark.parametrize("name", MODELS)
def test_published_models_shrink(name: str, tmp_path: Path) -> None:
    """Every size of every published model can be made small, and what comes out is a whole checkpoint."""
    sizes = {"layers": 3, "hidden": 64, "intermediate": 32, "heads": 4, "experts": 6, "top_k": 2, "vocab": 160}
    latent = name.startswith("deepseek")
    small = resized(model_config(name), SIZES | sizes | {"kv_heads": None if latent else 2})
    model = Checkpoint.open(make_checkpoint(small, tmp_path / name, dtype="float32")).model
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (3, 64, 160)
    assert (model.intermediate_size, model.num_experts, model.top_k) == (32, 6, 2)
    assert (model.num_heads, model.num_kv_heads) == (4, 4 if latent else 2)
    assert any(layer.ffn.routed for layer in model.layers)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_by_itself(name: str) -> None:
    """Without sizes the config stays as it is, and with fewer layers only their number changes."""
    assert resized(model_config(name), SIZES) == model_config(name)
    whole, short = (
        MoEModel.from_config(c, name=name)
        for c in (model_config(name), resized(model_config(name), SIZES | {"layers": 4}))
    )
    assert short.num_layers == 4
    assert short.main_layer == whole.main_layer


def test_groups_of_experts_follow() -> None:
    """Groups divide the experts, and enough of them are open for a token's experts."""
    config = resized(model_config("deepseek-v3"), SIZES | {"experts": 12, "top_k": 8})
    assert (config["n_group"], config["topk_group"]) == (6, 4)
    assert config["first_k_dense_replace"] == 3


def test_dense_layers_and_heads_follow() -> None:
    """Dense layers stay as many times wider than experts; a head size means keys and values of latent attention."""
    config = resized(model_config("deepseek-v3"), SIZES | {"intermediate": 64, "layers": 2, "head_dim": 32, "heads": 8})
    assert (config["intermediate_size"], config["first_k_dense_replace"]) == (576, 1)
    assert (config["qk_nope_head_dim"], config["v_head_dim"], config["num_key_value_heads"]) == (32, 32, 8)


def test_tokens_beyond_the_vocabulary_go() -> None:
    """Ids of special tokens that a small vocabulary does not have are taken out."""
    config = resized(model_config("deepseek-v2-lite"), SIZES | {"vocab": 256})
    assert config["eos_token_id"] is None and config["bos_token_id"] is None
    assert resized(model_config("mixtral-8x7b"), SIZES | {"vocab": 256})["eos_token_id"] == 2


def test_a_size_that_a_config_does_not_have_is_refused() -> None:
    """The option and the keys that were looked for are named."""
    with pytest.raises(InvalidConfig, match=r"none of .*moe_num_experts, so --experts has nothing to change"):
        resized(model_config("opt-30b"), SIZES | {"experts": 4})
