"""Checkpoints: both layouts, strict checks, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint import Checkpoint, make_checkpoint
from hrm.catalog import model_config
from hrm.errors import CheckpointError, InvalidConfig, InvalidValue


@pytest.fixture
def broken(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_path, tmp_path / "broken"))


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def layer_of(checkpoint: Checkpoint, layer: int) -> torch.Tensor:
    m = checkpoint.model
    out = torch.empty(m.num_experts * m.expert_parameters, dtype=checkpoint.dtype)
    checkpoint.read_experts(layer, out)
    return out


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tiny: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint saved again by transformers has the same experts for us."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny.path), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = Checkpoint.open(tmp_path / "saved")
    for layer in range(tiny.model.num_layers):
        assert torch.equal(layer_of(again, layer), layer_of(tiny, layer))


def test_stacked_layout_is_read_like_the_per_expert_one(tiny: Checkpoint, tmp_path: Path) -> None:
    """Experts stored stacked give the same flat layer as one tensor per expert and matrix."""
    m = tiny.model
    tensors = all_tensors(tiny.path)
    stacked: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            stacked[name.replace("block_sparse_moe", "mlp")] = tensor
    for layer in range(m.num_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts."
        ids = range(m.num_experts)
        gate_up = [torch.cat([tensors[f"{prefix}{e}.w1.weight"], tensors[f"{prefix}{e}.w3.weight"]]) for e in ids]
        down = [tensors[f"{prefix}{e}.w2.weight"] for e in ids]
        stacked[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        stacked[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
    (tmp_path / "stacked").mkdir()
    save_file(stacked, tmp_path / "stacked" / "model.safetensors")
    shutil.copy(tiny.path / "config.json", tmp_path / "stacked")
    other = Checkpoint.open(tmp_path / "stacked")
    assert other.family.stacked and not tiny.family.stacked
    for layer in range(m.num_layers):
        assert torch.equal(layer_of(other, layer), layer_of(tiny, layer))


def test_same_seed_same_weights(tmp_path: Path) -> None:
    """A checkpoint is a function of its config and seed."""
    config = model_config("mixtral-tiny")
    first, second, third = (make_checkpoint(config, tmp_path / str(i), seed=i // 2) for i in range(3))
    a, b, c = all_tensors(first), all_tensors(second), all_tensors(third)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(tmp_path: Path, dtype: str) -> None:
    """The asked-for type is what lies on disk and what the config says."""
    path = make_checkpoint(model_config("mixtral-tiny"), tmp_path / dtype, dtype=dtype)
    assert Checkpoint.open(path).model.dtype == dtype


def test_an_existing_folder_is_not_overwritten(tiny_path: Path, tmp_path: Path) -> None:
    """A folder with something in it is refused and left as it was."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(InvalidValue, match="not an empty folder"):
        make_checkpoint(model_config("mixtral-tiny"), tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    """A write that fails half-way leaves neither the folder nor its scratch."""

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        make_checkpoint(model_config("mixtral-tiny"), tmp_path / "new", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_files(tmp_path: Path, broken: Path) -> None:
    """What is missing is named."""
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    shard = broken / "model-layer-00001.safetensors"
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-layer-00001\.safetensors' is missing"):
        Checkpoint.open(broken)
    (broken / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(broken)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_file(broken: Path, keep: int) -> None:
    """A shard cut short, in its header or in its data, is refused and named."""
    shard = broken / "model-layer-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"layer-00002.* is truncated"):
        Checkpoint.open(broken)


def test_not_safetensors(broken: Path) -> None:
    """A file with another content is refused."""
    shard = broken / "model-dense.safetensors"
    shard.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json at all!" + bytes(100))
    with pytest.raises(CheckpointError, match="is not safetensors"):
        Checkpoint.open(broken)


def test_damaged_index(broken: Path) -> None:
    """An index without a weight map is refused."""
    (broken / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint.open(broken)


def test_missing_tensor_wrong_shape_wrong_type(broken: Path) -> None:
    """A tensor that is missing, has another shape or another type than the config says is named."""
    shard = broken / "model-layer-00000.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, shard)
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{name}'"):
        Checkpoint.open(broken)
    save_file(tensors | {name: tensors[name][:3].contiguous()}, shard)
    with pytest.raises(CheckpointError, match=r"has shape \[3, 64\], the config says \[32, 64\]"):
        Checkpoint.open(broken)
    save_file(tensors | {name: tensors[name].half()}, shard)
    with pytest.raises(CheckpointError, match="float16, float32"):
        Checkpoint.open(broken)


def test_config_says_another_type(broken: Path) -> None:
    """Weights of one type under a config of another are refused."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}))
    with pytest.raises(CheckpointError, match="float32 tensors, and its config says bfloat16"):
        Checkpoint.open(broken)


def test_what_is_planned_but_not_run_is_refused(tmp_path: Path) -> None:
    """A model that the planner knows and the executor does not is refused by name, and nothing is written."""
    with pytest.raises(
        InvalidConfig, match=r"'llama4_text' .* can be planned but not run; this version runs: dbrx, .*qwen3_moe"
    ):
        make_checkpoint(model_config("llama-4-scout"), tmp_path / "llama")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "architecture 'llama'.*supported: .*mixtral"),
        ({"num_expert_groups": 4}, "'num_expert_groups'"),
    ],
)
def test_configs_that_are_not_run(broken: Path, change: dict[str, object], message: str) -> None:
    """Another architecture or an unknown key is refused by name."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InvalidConfig, match=message):
        Checkpoint.open(broken)
