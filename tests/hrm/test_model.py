"""Reading a Mixture-of-Experts config, strictly."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from hrm import MoEModel, catalog
from hrm.errors import HrmError, InvalidConfig, UnknownName
from hrm.model import DTYPE_BYTES, SUPPORTED_ARCHITECTURES


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
    per_layer = model.dense_layer_parameters + model.num_experts * model.expert_parameters
    assert model.num_layers * per_layer + model.embedding_parameters == model.num_parameters
    assert model.dense_bytes + model.num_layers * model.layer_expert_bytes == pytest.approx(
        model.num_parameters * model.dtype_bytes
    )


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


def test_all_missing_keys_are_named(config: dict[str, Any]) -> None:
    """Two missing keys are both named at once."""
    del config["hidden_size"], config["num_local_experts"]
    with pytest.raises(InvalidConfig, match="'hidden_size', 'num_local_experts'"):
        read(config)


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


@pytest.mark.parametrize("value", [0, -1, 1.5, 4096.0, True, "8", None])
@pytest.mark.parametrize("key", ["num_hidden_layers", "intermediate_size", "num_local_experts", "vocab_size"])
def test_sizes_must_be_positive_integers(config: dict[str, Any], key: str, value: Any) -> None:
    """Zero, negative, fractional, boolean and text sizes are refused with the value."""
    with pytest.raises(InvalidConfig, match=f"must be an integer >= 1: {value!r}"):
        read(config, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 0), ("num_attention_heads", "32"), ("hidden_size", "4096"), ("hidden_size", None)],
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
    assert model.attention_parameters == 4096 * (2 * 2048 + 2 * 512)
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
    with pytest.raises(InvalidConfig, match=r"'dtype' must be one of float32, .*: 'float8'"):
        read(config, torch_dtype="float8")


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
