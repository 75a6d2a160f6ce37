"""Checkpoints on disk: transformers' safetensors files, opened strictly and read layer by layer.

Both layouts of transformers 5 are read: per-expert tensors under the hub's names (what
``save_pretrained`` writes) and stacked ``gate_up_proj`` / ``down_proj`` (what modules hold).
Where each tensor lies, the model's family knows (`executor.families`).
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

from executor.families import WHOLE, Family, Shard, family_of
from hrm.errors import CheckpointError, InvalidConfig, InvalidValue
from hrm.model import MoEModel
from hrm.units import format_bytes

__all__ = ["TORCH_DTYPES", "Checkpoint", "described", "is_norm", "make_checkpoint"]

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
    family: Family = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, *, shard: Shard = WHOLE) -> Checkpoint:
        """Open a checkpoint folder.

        Parameters
        ----------
        shard : Shard
            The part that is read, under tensor parallelism.

        Raises
        ------
        CheckpointError
            If a file or tensor is missing, truncated, or has another shape or type than its neighbours, or if
            weights are quantised.
        InvalidConfig
            If the config is of an unsupported architecture or has unknown keys.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint {str(path)!r} is not a folder.")
        if not (path / "config.json").exists():
            raise CheckpointError(f"checkpoint {str(path)!r} has no config.json.")
        model = MoEModel.from_file(path)
        if model.expert_weight_bytes is not None:
            raise _quantised(path, _quantisation(path))
        family = family_of(model, _transformers_config(path), shard)
        entries: dict[str, _Entry] = {}
        for file in cls._files(path):
            entries |= _read_header(file)
        family.stacked = family.stacked_marker() in entries
        checkpoint = cls(path, model, family.config, entries, family)
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
        dtypes: set[str] = set()
        for name, shape in self.expected().items():
            entry = self.entries.get(name)
            if entry is None:
                if f"{name}_blocks" in self.entries:
                    raise _quantised(self.path, "mxfp4")
                raise CheckpointError(f"checkpoint {str(self.path)!r} lacks the tensor {name!r}.")
            if entry.shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} of {str(self.path)!r} has shape {list(entry.shape)}, "
                    f"the config says {list(shape)}."
                )
            if not (entry.dtype == "float32" and name.endswith(self.family.float32_names)):
                dtypes.add(entry.dtype)
        if any(dtype.startswith("F8") for dtype in dtypes):
            raise _quantised(self.path, "fp8")
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
        return {name: shape for group in _groups(self.family).values() for name, shape in group.items()}

    @property
    def local(self) -> MoEModel:
        """Shapes of the part that this process reads: the whole model without tensor parallelism."""
        return self.family.local

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

    def read_dense(self, layer: int | None, sink: Callable[[str, torch.Tensor], None]) -> None:
        """Hand this process' part of every dense tensor of a layer (None: outside all layers) to `sink`."""
        names = list(self.family.dense_shapes(layer))
        self.read(names, lambda name, tensor: sink(name, self.family.take(name, tensor)))

    def read_experts(self, layer: int, out: torch.Tensor) -> None:
        """Fill `out` with a layer's experts.

        Parameters
        ----------
        out : Tensor
            Shape ``[E * expert_parameters]``, expert by expert as `ExpertTensor` says.
        """
        ffn = self.local.kinds[self.local.order[layer]].ffn
        flat = out.view(ffn.num_experts, ffn.expert_parameters)
        places = {tensor.name: tensor.put for tensor in self.family.expert_tensors(layer)}
        self.read(list(places), lambda name, tensor: places[name](tensor, flat))


def _groups(family: Family) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of all tensors by the file that they are written to: one per layer, and one for the rest."""
    groups = {"dense": family.dense_shapes(None)}
    for layer in range(family.model.num_layers):
        experts = {tensor.name: tensor.shape for tensor in family.expert_tensors(layer)}
        groups[f"layer-{layer:05d}"] = family.dense_shapes(layer) | experts
    return groups


def _quantisation(path: Path) -> str:
    """What the config calls the type of the weights."""
    return str(json.loads((path / "config.json").read_text())["quantization_config"].get("quant_method"))


def _quantised(path: Path, method: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {str(path)!r} holds {method} weights; this version runs {', '.join(TORCH_DTYPES)}: "
        f"convert it, e.g. let transformers dequantise it and save it again."
    )


def _transformers_config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidConfig(f"transformers does not read the config of {str(path)!r}: {error}") from None


def _config_object(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    values = dict(config)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidConfig(f"transformers does not read the config: {error}") from None


def described(
    config: Mapping[str, Any], *, name: str, dtype: str | None = None
) -> tuple[dict[str, Any], MoEModel, Family]:
    """What a config says of a checkpoint with unquantised weights.

    Parameters
    ----------
    config : mapping
        Content of a ``config.json``.
    name : str
        What the model is to be called.
    dtype : {"float32", "bfloat16", "float16"}, optional
        By default the config's.

    Returns
    -------
    config, model, family
        The config with that type and without quantisation; the model; its family, for the hub's layout.
    """
    config = dict(config)
    config.pop("quantization_config", None)
    if dtype is not None:
        if dtype not in TORCH_DTYPES:
            raise InvalidValue(f"'dtype' must be one of {', '.join(TORCH_DTYPES)}: {dtype!r}")
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    model = MoEModel.from_config(config, name=name)
    if "torch_dtype" not in config:
        config["dtype"] = model.dtype
    return config, model, family_of(model, _config_object(config))


def is_norm(name: str) -> bool:
    """Whether a tensor of this name scales a norm: random weights have ones there."""
    return name.endswith(".weight") and "norm" in name.split(".")[-2]


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
    trained model's; norms are one. Of a config with quantised weights the shapes are taken and weights are
    written in `dtype`. One file per layer; the folder appears under its name only when it is whole.

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
    config, model, family = described(config, name=out.name, dtype=dtype)
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
        groups = _groups(family)
        scale = float(config.get("initializer_range", 0.02))
        torch_dtype = TORCH_DTYPES[model.dtype]
        weight_map: dict[str, str] = {}
        written = 0
        for number, (group, shapes) in enumerate(sorted(groups.items())):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            tensors = {}
            for name, shape in shapes.items():
                kept = torch.float32 if name.endswith(family.float32_names) else torch_dtype
                if is_norm(name):
                    tensors[name] = torch.ones(shape, dtype=kept)
                else:
                    values = torch.empty(shape, dtype=torch.float32).normal_(0.0, scale, generator=generator)
                    tensors[name] = values.to(kept)
                written += tensors[name].nbytes
            file = f"model-{group}.safetensors"
            save_file(tensors, str(work / file), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shapes, file)
            if progress:
                progress(number + 1, len(groups))
        index = {"metadata": {"total_size": written}, "weight_map": weight_map}
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
