"""Reading a Mixture-of-Experts config, strictly."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from hrm import MoEModel, catalog
from hrm.architectures import SUPPORTED_ARCHITECTURES
from hrm.errors import HrmError, InvalidConfig, UnknownName
from hrm.layers import Attention, FeedForward, Layer
from hrm.model import DTYPE_BYTES


@pytest.fixture
def config() -> dict[str, Any]:
    """The config of Mixtral 8x7B as it stands in the catalog."""
    return json.loads(Path(str(resources.files("hrm.catalog") / "models" / "mixtral-8x7b.json")).read_text())


def read(config: dict[str, Any], **changed: Any) -> MoEModel:
    """The model of a config with some keys changed."""
    return MoEModel.from_config({**config, **changed}, name="some-model")


def test_mixtral_8x7b_parameters() -> None:
    """Mixtral 8x7B has 46,702,792,704 parameters, 45,097,156,608 of them in experts."""
    model = MoEModel.from_catalog("mixtral-8x7b")
    assert model.num_parameters == 46_702_792_704
    assert model.num_expert_parameters == 45_097_156_608


def test_mixtral_8x7b_shapes() -> None:
    """The shapes that the formulas use follow from the published config."""
    model = MoEModel.from_catalog("mixtral-8x7b")
    assert (model.head_dim, model.q_size, model.kv_size) == (128, 4096, 1024)
    assert model.expert_parameters == 3 * 4096 * 14336
    assert model.layer_expert_bytes == 8 * 3 * 4096 * 14336 * 2
    assert model.kv_token_bytes == 2 * 8 * 128 * 2
    assert model.hidden_bytes == 8192
    assert model.dense_bytes == 2 * (46_702_792_704 - 45_097_156_608)
    assert model.dtype == "bfloat16"


@pytest.mark.parametrize("name", catalog.names("models"))
def test_parameters_add_up(name: str) -> None:
    """Layers, experts and embedding together are all parameters, for every catalog model."""
    model = catalog.load_model(name)
    kinds = [model.kinds[kind] for kind in (*model.order, *model.encoder_order)]
    dense = sum(kind.dense_parameters for kind in kinds)
    assert dense + model.num_expert_parameters + model.embedding_parameters == model.num_parameters
    assert model.weight_bytes == pytest.approx(
        dense * model.dense_element_bytes
        + model.num_expert_parameters * model.expert_element_bytes
        + model.embedding_parameters * model.dtype_bytes
    )
    assert model.streamed_bytes == sum(model.kind_expert_bytes(kind) for kind in (*model.order, *model.encoder_order))


def small_model(**changed: Any) -> MoEModel:
    """Three decoder layers of two kinds: one dense, two with four experts each."""
    attention = Attention(hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, value_dim=4)
    dense = Layer(attention=attention, ffn=FeedForward(hidden_size=8, intermediate_size=32), norm_parameters=16)
    moe = FeedForward(hidden_size=8, intermediate_size=16, num_experts=4, top_k=1, router_parameters=32)
    fields: dict[str, Any] = {
        "name": "small", "architecture": "none", "hidden_size": 8, "vocab_size": 10, "max_positions": 64,
        "kinds": (dense, Layer(attention=attention, ffn=moe, norm_parameters=16)), "order": (0, 1, 1),
        "embedding_parameters": 160,
    }  # fmt: skip
    return MoEModel(**{**fields, **changed})


def test_layers_that_differ_are_counted_by_kind() -> None:
    """A dense layer before two with experts: counts, neighbours and the layer that names the sizes."""
    model = small_model()
    assert (model.num_layers, model.layer_counts) == (3, {0: 1, 1: 2})
    assert model.layer_pairs == {(0, 1): 1, (1, 1): 1, (1, 0): 1}
    assert model.main_layer is model.kinds[1]
    assert (model.num_experts, model.intermediate_size) == (4, 16)
    assert not model.uniform
    attention = 8 * 8 * 2 + 8 * 4 * 2
    assert model.num_parameters == 160 + 3 * (attention + 16) + 3 * 8 * 32 + 2 * (32 + 4 * 3 * 8 * 16)
    assert model.num_parameters - model.active_parameters == 2 * 3 * 3 * 8 * 16


def test_an_encoder_counts_but_does_not_generate() -> None:
    """Encoder layers add parameters and streamed bytes, and leave the layers that generate alone."""
    model, both = small_model(), small_model(encoder_order=(1, 1))
    assert both.num_layers == 3
    assert both.num_parameters - model.num_parameters == 2 * model.kinds[1].parameters
    assert both.streamed_bytes - model.streamed_bytes == 2 * model.kind_expert_bytes(1)
    assert both.encoder_pairs == {(1, 1): 2}
    assert "2 + 3 layers" in str(both)


def test_stored_types_of_weights() -> None:
    """Experts, other weights of a layer and embeddings have their own bytes per weight."""
    model = small_model(dense_weight_bytes=1.0, expert_weight_bytes=0.5, kv_dtype="float8")
    dense = sum(layer.dense_parameters for layer in model.layers)
    assert model.weight_bytes == dense + model.num_expert_parameters / 2 + 160 * 2
    assert model.kv_token_bytes == 8
    assert model.hidden_bytes == 16


@pytest.mark.parametrize("changed", [{"order": ()}, {"order": (0, 2)}, {"encoder_order": (2,)}])
def test_layers_must_be_of_a_known_kind(changed: dict[str, Any]) -> None:
    """A model without layers, or with a layer of no kind, is refused."""
    with pytest.raises(InvalidConfig, match="needs layers, each one of its 2 kinds"):
        small_model(**changed)


def test_with_layers_repeats_from_the_start() -> None:
    """Fewer layers are the first ones; more repeat the order."""
    model = small_model()
    assert model.with_layers(2).order == (0, 1)
    assert model.with_layers(5).order == (0, 1, 1, 0, 1)
    with pytest.raises(InvalidConfig, match="'num_layers'"):
        model.with_layers(0)


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(config: dict[str, Any], key: str) -> None:
    """A config without one of the shape keys is refused by that key's name."""
    del config[key]
    with pytest.raises(InvalidConfig, match=f"'some-model' lacks '{key}'"):
        read(config)


def test_a_null_size_is_missing(config: dict[str, Any]) -> None:
    """A size that is null is as good as absent."""
    with pytest.raises(InvalidConfig, match="'some-model' lacks 'hidden_size'"):
        read(config, hidden_size=None)


def test_an_unknown_key_is_named(config: dict[str, Any]) -> None:
    """A key that could change the shape without our knowing is refused by name."""
    with pytest.raises(InvalidConfig, match="'shared_expert_intermediate_size'"):
        read(config, shared_expert_intermediate_size=512)


@pytest.mark.parametrize("model_type", ["llama", None, "Mixtral"])
def test_an_unknown_architecture_lists_the_supported_ones(config: dict[str, Any], model_type: Any) -> None:
    """Another architecture is refused with the list of those that are supported."""
    with pytest.raises(InvalidConfig, match=f"{model_type!r}.*supported: {', '.join(SUPPORTED_ARCHITECTURES)}"):
        read(config, model_type=model_type)


def test_a_config_without_architecture_is_refused(config: dict[str, Any]) -> None:
    """A config that does not say its model_type is not guessed."""
    del config["model_type"]
    with pytest.raises(InvalidConfig, match="architecture None"):
        read(config)


def test_more_active_experts_than_experts_is_refused(config: dict[str, Any]) -> None:
    """top_k above the number of experts is refused with both numbers."""
    with pytest.raises(InvalidConfig, match=r"'top_k' must be <= num_experts=8: 9"):
        read(config, num_experts_per_tok=9)


def test_heads_must_be_a_multiple_of_kv_heads(config: dict[str, Any]) -> None:
    """Query heads that do not divide over the KV heads are refused with both numbers."""
    with pytest.raises(InvalidConfig, match=r"'num_heads' must be a multiple of num_kv_heads=7: 32"):
        read(config, num_key_value_heads=7)


@pytest.mark.parametrize("value", [0, -1, 1.5, 4096.0, True, "8"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "intermediate_size", "num_local_experts", "vocab_size"])
def test_sizes_must_be_positive_integers(config: dict[str, Any], key: str, value: Any) -> None:
    """Zero, negative, fractional, boolean and text sizes are refused with the value."""
    with pytest.raises(InvalidConfig, match=f"must be an integer >= 1: {value!r}"):
        read(config, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 0), ("num_attention_heads", "32"), ("hidden_size", "4096"), ("hidden_size", 0)],
)
def test_sizes_that_give_the_head_are_checked_first(config: dict[str, Any], key: str, value: Any) -> None:
    """A bad hidden size or number of heads is refused as any other size is."""
    with pytest.raises(InvalidConfig, match="must be an integer >= 1"):
        read(config, **{key: value})


def test_hidden_size_must_divide_over_heads_unless_head_dim_is_given(config: dict[str, Any]) -> None:
    """Without head_dim the hidden size must be a multiple of the heads; with it, it need not be."""
    with pytest.raises(InvalidConfig, match=r"num_attention_heads=24: 4096"):
        read(config, num_attention_heads=24)
    assert read(config, num_attention_heads=24, head_dim=128).q_size == 24 * 128


def test_head_dim_overrides(config: dict[str, Any]) -> None:
    """A head_dim in the config replaces hidden_size / heads and changes the attention parameters."""
    model = read(config, head_dim=64)
    assert (model.head_dim, model.q_size, model.kv_size) == (64, 2048, 512)
    assert model.main_layer.attention.parameters == 4096 * (2 * 2048 + 2 * 512)
    assert read(config, head_dim=None).head_dim == 128


def test_tied_embeddings_count_once(config: dict[str, Any]) -> None:
    """A tied LM head has one table less."""
    free, tied = read(config), read(config, tie_word_embeddings=True)
    assert free.num_parameters - tied.num_parameters == 32000 * 4096


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_dtype_sets_the_bytes(config: dict[str, Any], dtype: str) -> None:
    """The config's data type decides the bytes per parameter; the newer key `dtype` wins over `torch_dtype`."""
    model = read(config, dtype=dtype)
    assert model.dtype_bytes == DTYPE_BYTES[dtype]
    assert model.expert_bytes == model.expert_parameters * DTYPE_BYTES[dtype]


def test_a_bad_dtype_is_refused(config: dict[str, Any]) -> None:
    """An unknown data type is refused with the known ones."""
    with pytest.raises(InvalidConfig, match=r"'dtype' must be one of float32, .*: 'float7'"):
        read(config, torch_dtype="float7")


def test_another_activation_is_refused(config: dict[str, Any]) -> None:
    """The expert FFN is counted as a gated SiLU one, so another activation is refused."""
    with pytest.raises(InvalidConfig, match=r"'hidden_act' .* must be 'silu': 'gelu'"):
        read(config, hidden_act="gelu")


def test_tie_word_embeddings_must_be_a_boolean(config: dict[str, Any]) -> None:
    """The text "false" does not tie the embeddings."""
    with pytest.raises(InvalidConfig, match="tie_word_embeddings"):
        read(config, tie_word_embeddings="false")


def test_folder_and_file_give_the_same_model(config: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint folder, its config.json and a lone file are all read; the name is the folder's or file's."""
    folder = tmp_path / "my-mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "other.json").write_text(json.dumps(config))
    from_folder, from_file = MoEModel.from_file(folder), MoEModel.from_file(folder / "config.json")
    assert from_folder == from_file
    assert from_folder.name == "my-mixtral"
    assert MoEModel.from_file(tmp_path / "other.json").name == "other"
    assert MoEModel.from_catalog(str(folder)) == from_folder


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not json", "is not JSON"), (b"\xff\xfe\x00", "is not JSON"), (b"[1, 2]", "must hold a JSON object")],
)
def test_a_damaged_config_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that is not JSON, or not an object, is refused in one line that names it."""
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(InvalidConfig, match=message) as caught:
        MoEModel.from_file(path)
    assert "broken.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that is not there, and a folder without a config, are refused by path."""
    with pytest.raises(InvalidConfig, match=r"cannot read model config '.*nothing.json': No such file"):
        MoEModel.from_file(tmp_path / "nothing.json")
    with pytest.raises(InvalidConfig, match=r"cannot read model config '.*config.json'"):
        MoEModel.from_file(tmp_path)


def test_an_unknown_catalog_name_is_refused() -> None:
    """A misspelt catalog name is answered with the nearest."""
    with pytest.raises(UnknownName, match="Did you mean 'mixtral-8x7b'"):
        MoEModel.from_catalog("mixtral-8x7")


def test_prints_its_size() -> None:
    """The one-line form carries the size, the experts and the type; the notebook form its name in bold."""
    model = MoEModel.from_catalog("mixtral-8x7b")
    assert str(model) == "mixtral-8x7b: 46.70B parameters, 32 layers, 8 experts top-2, bfloat16"
    assert model._repr_html_().startswith("<b>mixtral-8x7b</b><br>46.70B")


def test_every_refusal_is_ours(config: dict[str, Any]) -> None:
    """Every strictness error derives from the project's base error."""
    for changed in ({"num_experts_per_tok": 9}, {"model_type": "gpt2"}, {"surprise": 1}, {"head_dim": -1}):
        with pytest.raises(HrmError):
            read(config, **changed)
