"""Configs of every supported architecture, against the model classes of transformers."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from hrm import MoEModel, catalog
from hrm.architectures import SUPPORTED_ARCHITECTURES
from hrm.architectures.gpt_oss import MXFP4_BYTES
from hrm.errors import InvalidConfig

OWN_TYPES = {"fairseq_moe_lm"}
SWITCH = {
    "model_type": "switch_transformers", "d_ff": 96, "d_kv": 8, "d_model": 32, "num_decoder_layers": 6,
    "num_experts": 4, "num_heads": 2, "num_layers": 4, "num_sparse_decoder_layers": 2, "num_sparse_encoder_layers": 2,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": True, "vocab_size": 64,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 32, "intermediate_size": 48,
    "max_position_embeddings": 64, "mlp_only_layers": [1], "moe_intermediate_size": 16, "num_attention_heads": 4,
    "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_key_value_heads": 2, "qkv_bias": True,
    "shared_expert_intermediate_size": 24, "vocab_size": 64,
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """Content of a catalog file."""
    return json.loads(Path(str(resources.files("hrm.catalog") / "models" / f"{name}.json")).read_text())


def read(config: dict[str, Any]) -> MoEModel:
    """The model of a config."""
    return MoEModel.from_config(config, name="some-model")


def library_config(config: dict[str, Any]) -> Any:
    """The config object of transformers, of the text model and without quantisation."""
    transformers = pytest.importorskip("transformers")
    config = {**config.get("text_config", config)}
    config.pop("quantization_config", None)
    return transformers.AutoConfig.for_model(config.pop("model_type"), **config)


def library_model(config: dict[str, Any]) -> Any:
    """The model of transformers on the meta device."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    made = library_config(config)
    auto = transformers.AutoModelForSeq2SeqLM if made.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(made)


def library_count(config: dict[str, Any]) -> int:
    """Parameters of the model of transformers; tied ones count once."""
    return sum(parameter.numel() for parameter in library_model(config).parameters())


def known_to_transformers() -> list[str]:
    """Catalog models whose type transformers has."""
    return [name for name in catalog.names("models") if config_of(name)["model_type"] not in OWN_TYPES]


# -- against transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_to_transformers())
def test_parameters_equal_those_of_transformers(name: str) -> None:
    """Every catalog model has exactly the parameters that transformers builds from the same file."""
    pytest.importorskip("torch")
    assert catalog.load_model(name).num_parameters == library_count(config_of(name))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("mixtral-8x7b", {"tie_word_embeddings": True, "head_dim": 64}),
        ("dbrx", {"n_layers": 2, "d_model": 96, "n_heads": 8, "num_key_value_heads": 8}),
        ("qwen3-30b-a3b", {"attention_bias": True}),
        ("qwen3-30b-a3b", {"mlp_only_layers": [0, 3], "decoder_sparse_step": 2}),
        ("olmoe-1b-7b", {"attention_bias": True, "num_key_value_heads": 4}),
        ("phi-3.5-moe", {"attention_bias": False, "lm_head_bias": False}),
        ("gpt-oss-20b", {"attention_bias": False}),
        ("deepseek-v2-lite", {"attention_bias": True, "q_lora_rank": 96}),
        ("deepseek-v3", {"attention_bias": True, "q_lora_rank": None, "n_shared_experts": 2}),
        ("nllb-moe-54b", {"encoder_sparse_step": 0, "decoder_sparse_step": 2, "router_bias": True}),
        ("nllb-moe-54b", {"decoder_ffn_dim": 512, "decoder_attention_heads": 8, "decoder_layers": 3}),
        ("opt-6.7b", {"word_embed_proj_dim": 512, "do_layer_norm_before": False}),
        ("opt-6.7b", {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False}),
        ("opt-6.7b", {"_remove_final_layer_norm": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_changed_configs_equal_those_of_transformers(name: str, changed: dict[str, Any]) -> None:
    """Keys that the catalog's files do not vary count as in transformers too."""
    pytest.importorskip("torch")
    config = {**config_of(name), **changed}
    for key in ("num_hidden_layers", "layer_types", "max_window_layers"):
        if key in config and "encoder_layers" not in config:
            config[key] = config[key][:4] if isinstance(config[key], list) else 4
    assert read(config).num_parameters == library_count(config)


@pytest.mark.parametrize(
    "changed",
    [
        {"interleave_moe_layer_step": 2},
        {"moe_layers": [0]},
        {"attention_bias": True, "tie_word_embeddings": True},
        {"no_rope_layers": [1, 0, 1, 0]},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_llama4_text_configs_equal_those_of_transformers(changed: dict[str, Any]) -> None:
    """A bare text config is read, with dense layers between those with experts."""
    pytest.importorskip("torch")
    config = {**config_of("llama-4-scout")["text_config"], "num_hidden_layers": 4, **changed}
    assert read(config).num_parameters == library_count(config)


@pytest.mark.parametrize(
    "config",
    [
        SWITCH,
        {**SWITCH, "router_bias": True, "num_sparse_encoder_layers": 4},
        QWEN2,
        {**QWEN2, "qkv_bias": False, "decoder_sparse_step": 2},
    ],
    ids=["switch", "switch-router-bias", "qwen2", "qwen2-no-bias"],
)
def test_types_without_catalog_entry_equal_those_of_transformers(config: dict[str, Any]) -> None:
    """Switch Transformers and Qwen2-MoE count as in transformers."""
    pytest.importorskip("torch")
    assert read(config).num_parameters == library_count(config)


@pytest.mark.parametrize("name", known_to_transformers())
def test_what_transformers_saves_reads_the_same(name: str) -> None:
    """A config that transformers reads and writes again gives the same layers."""
    pytest.importorskip("torch")
    config = config_of(name)
    saved = json.loads(library_config(config).to_json_string(use_diff=False))
    if "quantization_config" in config:
        saved["quantization_config"] = config["quantization_config"]
    ours, again = read(config), read(saved)
    assert (again.kinds, again.order, again.encoder_order) == (ours.kinds, ours.order, ours.encoder_order)
    assert again.num_parameters == ours.num_parameters


def test_deepseek_v3_leaves_out_the_correction_bias() -> None:
    """The one buffer beside the parameters is the routers' bias: one number per expert and layer."""
    pytest.importorskip("torch")
    buffers = library_model(config_of("deepseek-v3")).named_buffers()
    assert sum(b.numel() for key, b in buffers if key.endswith("e_score_correction_bias")) == 58 * 256


# -- against published numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dbrx", 131_596_523_520),
        ("deepseek-v2-lite", 15_706_484_224),
        ("deepseek-v3", 671_026_404_352),
        ("fairseq-moe-52b", 51_831_371_776),
        ("gpt-oss-120b", 116_829_156_672),
        ("gpt-oss-20b", 20_914_757_184),
        ("llama-4-scout", 107_769_861_120),
        ("mixtral-8x22b", 140_620_634_112),
        ("mixtral-8x7b", 46_702_792_704),
        ("nllb-moe-54b", 54_500_569_088),
        ("olmoe-1b-7b", 6_919_161_856),
        ("opt-175b", 174_604_468_224),
        ("opt-30b", 29_974_540_288),
        ("opt-6.7b", 6_658_473_984),
        ("phi-3.5-moe", 41_873_153_344),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_all_parameters(name: str, parameters: int) -> None:
    """The totals hold where transformers is not installed."""
    assert catalog.load_model(name).num_parameters == parameters


@pytest.mark.parametrize(
    ("name", "billions", "without_input_embedding"),
    [
        ("dbrx", 36, False),
        ("deepseek-v3", 37, False),
        ("gpt-oss-120b", 5.13, True),
        ("gpt-oss-20b", 3.61, True),
        ("llama-4-scout", 17, False),
        ("mixtral-8x22b", 39, False),
        ("mixtral-8x7b", 12.9, False),
        ("olmoe-1b-7b", 1.3, False),
        ("phi-3.5-moe", 6.6, False),
        ("qwen3-235b-a22b", 22, False),
        ("qwen3-30b-a3b", 3.3, False),
    ],
)
def test_active_parameters_are_near_the_published_ones(
    name: str, billions: float, without_input_embedding: bool
) -> None:
    """Active parameters are within 5 % of what the makers say; OpenAI leaves out the input embedding."""
    model = catalog.load_model(name)
    left_out = model.vocab_size * model.hidden_size if without_input_embedding else 0
    assert (model.active_parameters - left_out) / 1e9 == pytest.approx(billions, rel=0.05)


def test_active_parameters_of_a_model_with_shared_experts() -> None:
    """A token of DeepSeek-V3 meets 8 of 256 experts in 58 layers and everything else."""
    model = catalog.load_model("deepseek-v3")
    assert model.num_parameters - model.active_parameters == 58 * 248 * 3 * 7168 * 2048
    assert model.main_layer.ffn.shared_parameters == 3 * 7168 * 2048


def test_fairseq_expert() -> None:
    """One expert of the 52B language model has two matrices and biases: 8.394 M parameters."""
    ffn = catalog.load_model("fairseq-moe-52b").main_layer.ffn
    assert ffn.expert_parameters == 2 * 1024 * 4096 + 4096 + 1024 == 8_393_728
    assert (ffn.num_experts, ffn.top_k, ffn.matrices) == (512, 2, 2)


# -- layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("mixtral-8x7b", 2048),
        ("deepseek-v3", 576),
        ("deepseek-v2-lite", 576),
        ("gpt-oss-120b", 1024),
        ("opt-175b", 24576),
    ],
)
def test_kv_elements_per_token_and_layer(name: str, elements: int) -> None:
    """A token leaves its keys and values in the cache, with MLA its latent vector and one rotary key."""
    model = catalog.load_model(name)
    assert model.main_layer.attention.kv_elements == elements
    assert model.kv_token_bytes == elements * 2


def experts_by_layer(model: MoEModel) -> list[int]:
    """Number of experts of each layer that generates."""
    return [layer.ffn.num_experts for layer in model.layers]


def windows(model: MoEModel) -> Counter[int | None]:
    """How many layers have which window."""
    return Counter(layer.attention.window for layer in model.layers)


def test_dense_layers_come_first_in_deepseek() -> None:
    """DeepSeek-V3 starts with three dense layers, V2-Lite with one."""
    assert experts_by_layer(catalog.load_model("deepseek-v3")) == [1] * 3 + [256] * 58
    lite = catalog.load_model("deepseek-v2-lite")
    assert experts_by_layer(lite) == [1] + [64] * 26
    assert [lite.layers[i].ffn.intermediate_size for i in (0, 1)] == [10944, 1408]
    assert lite.main_layer.attention.q_rank is None


def test_every_second_layer_of_fairseq_has_experts() -> None:
    """The language model of fairseq alternates dense layers and layers with experts."""
    assert experts_by_layer(catalog.load_model("fairseq-moe-52b")) == [1, 512] * 12


def test_nllb_has_two_stacks() -> None:
    """Every fourth layer of encoder and decoder has experts; only the decoder attends to the encoder."""
    model = catalog.load_model("nllb-moe-54b")
    encoder = [model.kinds[kind] for kind in model.encoder_order]
    assert experts_by_layer(model) == [layer.ffn.num_experts for layer in encoder] == [1, 1, 1, 128] * 6
    assert all(layer.cross_attention is None for layer in encoder)
    assert all(layer.cross_attention == layer.attention for layer in model.layers)
    assert model.num_layers == 24


def test_gpt_oss_alternates_windows() -> None:
    """Every other layer of gpt-oss sees 128 tokens, the first one among them, listed or not."""
    model = catalog.load_model("gpt-oss-120b")
    assert windows(model) == {128: 18, None: 18}
    assert model.layers[0].attention.window == 128
    config = config_of("gpt-oss-120b")
    del config["layer_types"]
    assert read(config).order == model.order


def test_llama4_attends_in_chunks_on_three_of_four_layers() -> None:
    """Layers without rotary angles see all tokens; every layer has 16 experts and a shared one."""
    model = catalog.load_model("llama-4-scout")
    assert windows(model) == {8192: 36, None: 12}
    assert model.layers[3].attention.window is None
    assert experts_by_layer(model) == [16] * 48
    assert model.main_layer.ffn.shared_size == 8192
    assert model.architecture == "llama4_text"


def test_llama4_layer_types_win() -> None:
    """Explicit layer types are taken as they stand."""
    config = {**config_of("llama-4-scout")["text_config"], "num_hidden_layers": 2}
    assert windows(read({**config, "layer_types": ["full_attention", "chunked_attention"]})) == {None: 1, 8192: 1}
    assert windows(read({**config, "attention_chunk_size": None})) == {None: 2}


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "phi-3.5-moe", "mixtral-8x22b", "olmoe-1b-7b", "dbrx", "opt-30b"])
def test_no_window(name: str) -> None:
    """A window that is switched off, absent, or as long as the longest sequence is none."""
    assert set(windows(catalog.load_model(name))) == {None}


def test_phimoe_window() -> None:
    """A window shorter than the longest sequence counts."""
    assert set(windows(read({**config_of("phi-3.5-moe"), "sliding_window": 2048}))) == {2048}


# -- stored types -----------------------------------------------------------------------------------------


def test_gpt_oss_experts_are_mxfp4() -> None:
    """MXFP4 weights take 4.25 bits; gpt-oss-120b with the rest in bfloat16 is 60.8 GiB (arXiv 2508.10925, table 1)."""
    model = catalog.load_model("gpt-oss-120b")
    assert model.expert_element_bytes == MXFP4_BYTES == 0.53125
    assert model.dense_element_bytes == 2
    assert model.weight_bytes / 2**30 == pytest.approx(60.8, rel=0.01)
    config = config_of("gpt-oss-120b")
    del config["quantization_config"]
    assert read(config).expert_element_bytes == 2


def test_deepseek_v3_is_fp8() -> None:
    """Weights take one byte and a float32 scale per block of 128·128; activations and cache stay bfloat16."""
    model = catalog.load_model("deepseek-v3")
    assert model.expert_element_bytes == model.dense_element_bytes == 1 + 4 / 128**2
    assert (model.dtype_bytes, model.kv_dtype_bytes) == (2, 2)


@pytest.mark.parametrize(
    ("name", "quantization", "key"),
    [
        ("gpt-oss-20b", {"quant_method": "gptq"}, "quant_method"),
        ("deepseek-v3", {"quant_method": "fp8", "fmt": "e5m2"}, "fmt"),
        ("deepseek-v3", {"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ("deepseek-v3", {"quant_method": "fp8", "weight_block_size": [128, 128], "bits": 4}, "bits"),
        ("deepseek-v3", "fp8", "quantization_config"),
        ("qwen3-30b-a3b", {"quant_method": "fp8"}, "quantization_config"),
    ],
)
def test_other_quantisations_are_refused(name: str, quantization: Any, key: str) -> None:
    """A quantisation whose bytes are not known here is refused by the key that says so."""
    with pytest.raises(InvalidConfig, match=f"'{key}'"):
        read({**config_of(name), "quantization_config": quantization})


# -- strictness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalog.names("models"))
def test_an_unknown_key_is_named(name: str) -> None:
    """A key that could change the shape without our knowing is refused by name, in every architecture."""
    with pytest.raises(InvalidConfig, match=r"'some-model' has keys that .* models do not have here: 'surprise'"):
        read({**config_of(name), "surprise": 1})


@pytest.mark.parametrize(
    ("name", "outer"), [("dbrx", "attn_config"), ("dbrx", "ffn_config"), ("llama-4-scout", "text_config")]
)
def test_an_unknown_nested_key_is_named(name: str, outer: str) -> None:
    """Nested configs are as strict as the outer one."""
    config = config_of(name)
    config[outer] = {**config[outer], "surprise": 1}
    with pytest.raises(InvalidConfig, match="'surprise'"):
        read(config)


REQUIRED = [
    ("dbrx", "d_model"), ("dbrx", "attn_config"), ("deepseek-v3", "kv_lora_rank"), ("deepseek-v3", "v_head_dim"),
    ("fairseq-moe-52b", "moe_freq"), ("gpt-oss-20b", "num_local_experts"), ("gpt-oss-20b", "sliding_window"),
    ("llama-4-scout", "text_config"), ("nllb-moe-54b", "decoder_ffn_dim"), ("nllb-moe-54b", "encoder_sparse_step"),
    ("olmoe-1b-7b", "num_experts"), ("opt-6.7b", "ffn_dim"), ("phi-3.5-moe", "num_local_experts"),
    ("qwen3-30b-a3b", "moe_intermediate_size"), ("qwen3-30b-a3b", "num_key_value_heads"),
]  # fmt: skip


# The library has a default for these that another model's file must not fall back to.
NEEDED_THOUGH_DEFAULTED = [
    ("deepseek-v2-lite", "q_lora_rank"), ("deepseek-v3", "first_k_dense_replace"),
    ("deepseek-v3", "n_shared_experts"), ("gpt-oss-20b", "head_dim"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), REQUIRED + NEEDED_THOUGH_DEFAULTED)
def test_a_missing_key_is_named(name: str, key: str) -> None:
    """A config without a key that its shape needs is refused by that key's name."""
    config = config_of(name)
    del config[key]
    with pytest.raises(InvalidConfig, match=f"'some-model' lacks '{key}'"):
        read(config)


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "attention_chunk_size", "intermediate_size_mlp"])
def test_a_missing_nested_key_is_named(key: str) -> None:
    """A key that the text config of Llama 4 lacks is named."""
    config = config_of("llama-4-scout")
    del config["text_config"][key]
    with pytest.raises(InvalidConfig, match=f"'some-model' lacks '{key}'"):
        read(config)


@pytest.mark.parametrize("name", ["dbrx", "fairseq-moe-52b", "nllb-moe-54b", "olmoe-1b-7b", "opt-6.7b"])
def test_types_without_head_dim_refuse_one(name: str) -> None:
    """Where the head is always the width over the heads, a head_dim is an unknown key."""
    with pytest.raises(InvalidConfig, match="'head_dim'"):
        read({**config_of(name), "head_dim": 32})


@pytest.mark.parametrize(("name", "key"), REQUIRED)
def test_a_wrong_type_is_named(name: str, key: str) -> None:
    """Text where a number or an object belongs is refused by the key's name."""
    with pytest.raises(InvalidConfig, match=f"'{key}' of .*'some-model' must be an .*: 'many'"):
        read({**config_of(name), key: "many"})


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("deepseek-v3", {"num_key_value_heads": 8}, "'num_key_value_heads'"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "'moe_layer_freq'"),
        ("gpt-oss-20b", {"experts_per_token": 2}, "'num_experts_per_tok' and 'experts_per_token' .* differ: 4 and 2"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "'layer_types' .* must be 24 of"),
        ("gpt-oss-20b", {"layer_types": ["linear_attention"] * 24}, "'layer_types'"),
        ("nllb-moe-54b", {"tie_word_embeddings": False}, "'tie_word_embeddings'"),
        ("nllb-moe-54b", {"num_hidden_layers": 12}, "'num_hidden_layers'"),
        ("opt-6.7b", {"activation_function": "gelu"}, "'activation_function'"),
        ("phi-3.5-moe", {"lm_head_bias": "yes"}, "'lm_head_bias'"),
        ("qwen3-30b-a3b", {"use_sliding_window": True}, "'use_sliding_window'"),
        ("qwen3-30b-a3b", {"mlp_only_layers": "none"}, "'mlp_only_layers' .* must be a list of integers"),
    ],
)
def test_values_that_are_not_understood_are_refused(name: str, changed: dict[str, Any], message: str) -> None:
    """A value that would need another formula is refused by its key."""
    with pytest.raises(InvalidConfig, match=message):
        read({**config_of(name), **changed})


@pytest.mark.parametrize(
    ("name", "key", "limit"),
    [
        ("mixtral-8x7b", "num_hidden_layers", 10_000),
        ("dbrx", "n_layers", 10_000),
        ("nllb-moe-54b", "decoder_layers", 10_000),
        ("mixtral-8x7b", "hidden_size", 10**9),
        ("mixtral-8x7b", "vocab_size", 10**9),
        ("deepseek-v3", "first_k_dense_replace", 10**9),
    ],
)
@pytest.mark.parametrize("excess", [1, pytest.param(10**400, id="1e400")])
def test_absurd_sizes_are_refused(name: str, key: str, limit: int, excess: int) -> None:
    """A size beyond any model's is refused by its key in one short line, before anything is made of it."""
    with pytest.raises(InvalidConfig, match=f"'{key}' of model 'some-model' must be <= {limit}: ") as caught:
        read({**config_of(name), key: limit + excess})
    assert len(str(caught.value)) < 120


def test_no_rope_layers_must_cover_every_layer() -> None:
    """A list of layers without rotary angles that is too short is refused."""
    config = {**config_of("llama-4-scout")["text_config"], "no_rope_layers": [1, 0]}
    with pytest.raises(InvalidConfig, match="'no_rope_layers' of 'some-model' must have 48 numbers: 2"):
        read(config)


def test_an_unknown_architecture_lists_the_supported_ones() -> None:
    """Another model type is refused with the list of those that are supported."""
    with pytest.raises(InvalidConfig, match=f"'mamba'.*supported: {', '.join(SUPPORTED_ARCHITECTURES)}"):
        read({"model_type": "mamba"})


def test_dbrx_reads_the_clutter_of_older_libraries() -> None:
    """Published DBRX files repeat generation defaults in their nested configs; they change nothing."""
    config = config_of("dbrx")
    clutter = {"max_length": 20, "temperature": 1.0, "tie_word_embeddings": True, "top_k": 50, "torch_dtype": None}
    for key in ("attn_config", "ffn_config"):
        config[key] = {**clutter, **config[key]}
    assert read(config).num_parameters == catalog.load_model("dbrx").num_parameters


def test_a_nested_config_takes_the_outer_type_of_weights() -> None:
    """Llama 4's text model has the type of the whole where it names none."""
    config = config_of("llama-4-scout")
    config["torch_dtype"] = "float16"
    assert read(config).dtype == "bfloat16"
    del config["text_config"]["torch_dtype"]
    assert read(config).dtype == "float16"


def test_every_catalog_model_has_a_source() -> None:
    """SOURCES.md names where each config comes from."""
    table = Path(str(resources.files("hrm.catalog") / "models" / "SOURCES.md")).read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert set(rows) - {"name"} == set(catalog.names("models"))
