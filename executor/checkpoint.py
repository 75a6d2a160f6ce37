"""Checkpoints on disk: transformers' safetensors files, opened strictly and read layer by layer.

Both layouts of transformers 5 are read: per-expert tensors under the hub's names (what
``save_pretrained`` writes) and stacked ``gate_up_proj`` / ``down_proj`` (what modules hold).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hrm.errors import CheckpointError, InvalidConfig, InvalidValue
from hrm.model import MoEModel
from hrm.units import format_bytes

__all__ = ["RUNNABLE_ARCHITECTURES", "TORCH_DTYPES", "Checkpoint", "make_checkpoint"]

RUNNABLE_ARCHITECTURES = ("mixtral",)
"""Values of ``model_type`` that `executor.families` has layers for."""

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]


def _read_header(path: Path) -> dict[str, _Entry]:
    """Tensors of one safetensors file; proves that the file is as long as its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise CheckpointError(f"checkpoint file {str(path)!r} is truncated: {size} bytes, no whole header.")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {str(path)!r} is missing.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint file {str(path)!r} is not safetensors: {error}.") from None
    header.pop("__metadata__", None)
    need = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if need != size:
        raise CheckpointError(
            f"checkpoint file {str(path)!r} is truncated or damaged: {size} bytes, its header says {need}."
        )
    return {
        name: _Entry(path, _FILE_DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
        for name, entry in header.items()
    }


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, checked: every tensor that the config calls for is there, whole, and in shape."""

    path: Path
    model: MoEModel
    config: Any
    """transformers' config object."""
    entries: Mapping[str, _Entry] = field(repr=False)
    stacked: bool
    """Whether experts are stored stacked (else one tensor per expert and matrix)."""

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint folder.

        Raises
        ------
        CheckpointError
            If a file or tensor is missing, truncated, or has another shape or type than its neighbours.
        InvalidConfig
            If the config is of an unsupported architecture or has unknown keys.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint {str(path)!r} is not a folder.")
        if not (path / "config.json").exists():
            raise CheckpointError(f"checkpoint {str(path)!r} has no config.json.")
        model = _runnable(MoEModel.from_file(path))
        if model.sliding_window is not None and model.sliding_window < model.max_positions:
            raise InvalidConfig(f"'sliding_window' of {model.name!r} is not run by this version; set it to null.")
        entries: dict[str, _Entry] = {}
        for file in cls._files(path):
            entries |= _read_header(file)
        stacked = "model.layers.0.mlp.experts.gate_up_proj" in entries
        checkpoint = cls(path, model, _transformers_config(path), entries, stacked)
        checkpoint._check()
        return checkpoint

    @staticmethod
    def _files(path: Path) -> list[Path]:
        if (path / _INDEX).exists():
            try:
                weight_map = json.loads((path / _INDEX).read_text())["weight_map"]
                return [path / name for name in sorted(set(weight_map.values()))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(f"checkpoint index {str(path / _INDEX)!r} is damaged.") from None
        if (path / _SINGLE).exists():
            return [path / _SINGLE]
        raise CheckpointError(f"checkpoint {str(path)!r} has neither {_SINGLE} nor {_INDEX}.")

    def _check(self) -> None:
        dtypes = set()
        for name, shape in self.expected().items():
            entry = self.entries.get(name)
            if entry is None:
                raise CheckpointError(f"checkpoint {str(self.path)!r} lacks the tensor {name!r}.")
            if entry.shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} of {str(self.path)!r} has shape {list(entry.shape)}, "
                    f"the config says {list(shape)}."
                )
            dtypes.add(entry.dtype)
        if len(dtypes) != 1 or not dtypes <= set(TORCH_DTYPES):
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} holds tensors of type {', '.join(sorted(dtypes))}; "
                f"supported: all of one of {', '.join(TORCH_DTYPES)}."
            )
        if dtypes != {self.model.dtype}:
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} holds {dtypes.pop()} tensors, and its config says {self.model.dtype}."
            )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the executor reads."""
        m = self.model
        h, i, e = m.hidden_size, m.intermediate_size, m.num_experts
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (m.vocab_size, h),
            "model.norm.weight": (h,),
        }
        if not m.tie_embeddings:
            shapes["lm_head.weight"] = (m.vocab_size, h)
        for layer in range(m.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (h,)
            shapes[prefix + "post_attention_layernorm.weight"] = (h,)
            shapes[prefix + "self_attn.q_proj.weight"] = (m.q_size, h)
            shapes[prefix + "self_attn.k_proj.weight"] = (m.kv_size, h)
            shapes[prefix + "self_attn.v_proj.weight"] = (m.kv_size, h)
            shapes[prefix + "self_attn.o_proj.weight"] = (h, m.q_size)
            shapes[self.gate_name(layer)] = (e, h)
            if self.stacked:
                shapes[prefix + "mlp.experts.gate_up_proj"] = (e, 2 * i, h)
                shapes[prefix + "mlp.experts.down_proj"] = (e, h, i)
            else:
                for expert in range(e):
                    w1, w3, w2 = self._expert_names(layer, expert)
                    shapes |= {w1: (i, h), w3: (i, h), w2: (h, i)}
        return shapes

    def gate_name(self, layer: int) -> str:
        """Name of a layer's router weight."""
        block = "mlp" if self.stacked else "block_sparse_moe"
        return f"model.layers.{layer}.{block}.gate.weight"

    @staticmethod
    def _expert_names(layer: int, expert: int) -> tuple[str, str, str]:
        """Gate, up and down matrix of one expert under the hub's names."""
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        return prefix + "w1.weight", prefix + "w3.weight", prefix + "w2.weight"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return TORCH_DTYPES[self.model.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in {entry.file for entry in self.entries.values()})

    def read(self, names: list[str], sink: Callable[[str, torch.Tensor], None]) -> None:
        """Hand each named tensor to `sink`, memory-mapped; the mapping ends with the call.

        `sink` must copy what it keeps.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        for file, members in by_file.items():
            with safe_open(str(file), framework="pt") as stream:
                for name in members:
                    sink(name, stream.get_tensor(name))

    def read_experts(self, layer: int, out: torch.Tensor) -> None:
        """Fill `out` with a layer's experts.

        Parameters
        ----------
        out : Tensor
            Shape ``[E * 3 * I * H]``: per expert, gate and up rows ``[2I, H]``, then ``down [H, I]``.
        """
        m = self.model
        half, size = m.intermediate_size * m.hidden_size, m.expert_parameters
        flat = out.view(m.num_experts, size)
        if self.stacked:
            prefix = f"model.layers.{layer}.mlp.experts."

            def put_stacked(name: str, tensor: torch.Tensor) -> None:
                part = flat[:, : 2 * half] if name.endswith("gate_up_proj") else flat[:, 2 * half :]
                part.copy_(tensor.reshape(m.num_experts, -1))

            self.read([prefix + "gate_up_proj", prefix + "down_proj"], put_stacked)
            return
        places: dict[str, torch.Tensor] = {}
        for expert in range(m.num_experts):
            for k, name in enumerate(self._expert_names(layer, expert)):
                places[name] = flat[expert, k * half : (k + 1) * half]

        def put(name: str, tensor: torch.Tensor) -> None:
            places[name].copy_(tensor.reshape(-1))

        self.read(list(places), put)


def _runnable(model: MoEModel) -> MoEModel:
    """Refuse, by name, what the planner knows and the executor does not run."""
    if model.architecture not in RUNNABLE_ARCHITECTURES:
        raise InvalidConfig(
            f"architecture {model.architecture!r} of {model.name!r} can be planned but not run; "
            f"this version runs: {', '.join(RUNNABLE_ARCHITECTURES)}."
        )
    return model


def _transformers_config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidConfig(f"transformers does not read the config of {str(path)!r}: {error}") from None


def make_checkpoint(
    config: Mapping[str, Any],
    out: str | Path,
    *,
    dtype: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a random-weight checkpoint of a real config, in the layout that the hub uses.

    Weights are normal with the config's ``initializer_range``, so routing is close to uniform, unlike a
    trained model's. One file per layer; the folder appears under its name only when it is whole.

    Parameters
    ----------
    config : mapping
        Content of a ``config.json``.
    out : path
        Folder to create; must not exist, or be empty.
    dtype : {"float32", "bfloat16", "float16"}, optional
        By default the config's.
    seed : int
    progress : callable, optional
        Called with (files done, files in all).

    Returns
    -------
    Path
        The folder.
    """
    out = Path(out)
    config = dict(config)
    if dtype is not None:
        if dtype not in TORCH_DTYPES:
            raise InvalidValue(f"'dtype' must be one of {', '.join(TORCH_DTYPES)}: {dtype!r}")
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    model = _runnable(MoEModel.from_config(config, name=out.name))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidValue(f"{str(out)!r} exists and is not an empty folder; choose another --out.")
    need = model.num_parameters * model.dtype_bytes
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise CheckpointError(
            f"a checkpoint of {model.name} takes {format_bytes(need)}, and {str(out.parent)!r} has "
            f"{format_bytes(free)} free."
        )
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        shell = Checkpoint(work, model, None, {}, stacked=False)
        shapes = shell.expected()
        groups: dict[str, list[str]] = {}
        for name in shapes:
            layer = name.split(".")[2] if name.startswith("model.layers.") else None
            groups.setdefault("dense" if layer is None else f"layer-{int(layer):05d}", []).append(name)
        scale = float(config.get("initializer_range", 0.02))
        torch_dtype = TORCH_DTYPES[model.dtype]
        weight_map: dict[str, str] = {}
        for number, (group, names) in enumerate(sorted(groups.items())):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            tensors = {}
            for name in names:
                if name.endswith("norm.weight"):
                    tensors[name] = torch.ones(shapes[name], dtype=torch_dtype)
                else:
                    values = torch.empty(shapes[name], dtype=torch.float32).normal_(0.0, scale, generator=generator)
                    tensors[name] = values.to(torch_dtype)
            file = f"model-{group}.safetensors"
            save_file(tensors, str(work / file), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
            if progress:
                progress(number + 1, len(groups))
        index = {"metadata": {"total_size": int(need)}, "weight_map": weight_map}
        (work / _INDEX).write_text(json.dumps(index, indent=1))
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if out.exists():
            out.rmdir()
        os.chmod(work, 0o755)
        work.rename(out)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint to {str(out)!r}: {error.strerror}.") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out
