"""What `benchmarks/executor.py` runs: models, prompts and budgets, and the random-weight checkpoints they need."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from executor.checkpoint import TORCH_DTYPES, Checkpoint, described, make_checkpoint
from executor.machine import ram_bytes
from executor.random_checkpoint import draw_normal
from hrm.catalog import model_config
from hrm.errors import DoesNotFit
from hrm.model import MoEModel

__all__ = ["CPU_CASES", "Case", "cuda_cases", "open_checkpoint"]

_HOST_SHARE, _DISK_SHARE = 0.6, 0.8
_RESIZED = {"num_hidden_layers": 4, "num_key_value_heads": 8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a set of prompts, and what the machine lends to them."""

    name: str
    about: str
    num_requests: int
    prompt_lens: tuple[int, int]
    """Shortest and longest prompt; lengths between are equally likely."""
    gen_len: int
    device_memory: int
    link_bandwidth: float | None
    """Bytes/s of the paced link where there is no GPU."""
    model: str = "mixtral-demo"
    changes: dict[str, Any] = field(default_factory=dict)
    """Entries of the config in place of the catalog's."""
    checkpoint: Path | None = None
    """A checkpoint folder in place of `model`."""

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Token ids, the same ones each time."""
        numbers = random.Random(0)
        lengths = [numbers.randint(*self.prompt_lens) for _ in range(self.num_requests)]
        return [[numbers.randrange(1, vocabulary) for _ in range(n)] for n in lengths]

    def config(self) -> dict[str, Any]:
        """The content of its config.json."""
        return model_config(self.model) | self.changes


CPU_CASES = {
    case.name: case
    for case in (
        Case(
            name="demo",
            about="the catalog's demonstration model",
            num_requests=96,
            prompt_lens=(24, 40),
            gen_len=16,
            device_memory=288 * 2**20,
            link_bandwidth=2e9,
        ),
        Case(
            name="tight",
            about="memory for hardly more than the double buffer, so that nearly all experts travel in every step; "
            "as many KV heads as query heads",
            num_requests=64,
            prompt_lens=(24, 40),
            gen_len=32,
            device_memory=256 * 2**20,
            link_bandwidth=1e9,
            changes=_RESIZED,
        ),
        Case(
            name="roomy",
            about="the same model with memory to spare, and a slow link: what a system keeps on the device counts",
            num_requests=128,
            prompt_lens=(24, 40),
            gen_len=16,
            device_memory=440 * 2**20,
            link_bandwidth=0.5e9,
            changes=_RESIZED,
        ),
    )
}


def cuda_cases(folder: Path, layers: int | None = None) -> dict[str, Case]:
    """Mixtral 8x7B in bfloat16 on 16 and 24 GiB of a GPU, with as many of its layers as host memory and disk hold.

    Parameters
    ----------
    folder : Path
        Where the checkpoint will lie.
    layers : int, optional
        That many instead.
    """
    config = model_config("mixtral-8x7b")
    model = MoEModel.from_config(config, name="mixtral-8x7b")
    if layers is None:
        each = model.num_parameters * 2 / model.num_layers
        made = folder / "checkpoint-mixtral-8x7b"
        here = sum(file.stat().st_size for file in made.glob("*.safetensors")) if made.exists() else 0
        disk = _DISK_SHARE * (shutil.disk_usage(folder).free + here)
        layers = min(model.num_layers, math.floor(min(_HOST_SHARE * ram_bytes(), disk) / each))
    if layers < 1:
        raise DoesNotFit("neither host memory nor disk holds one layer of Mixtral 8x7B; give a --checkpoint.")
    shared: dict[str, Any] = {
        "num_requests": 1024,
        "prompt_lens": (40, 114),
        "gen_len": 16,
        "link_bandwidth": None,
        "model": "mixtral-8x7b",
        "changes": {"num_hidden_layers": layers, "dtype": "bfloat16"},
    }
    return {
        f"{size}gib": Case(
            name=f"{size}gib",
            about=f"Mixtral 8x7B, {layers} of 32 layers, prompts as long as those of MTBench, {size} GiB of GPU memory",
            device_memory=size * 2**30,
            **shared,
        )
        for size in (16, 24)
    }


def open_checkpoint(case: Case, folder: Path, say: Callable[[str], None], *, quick: bool) -> Checkpoint:
    """The checkpoint of a case, made under `folder` if it is not there.

    Parameters
    ----------
    quick : bool
        Draw the experts of one layer only and store them for every layer: for models so large that random numbers
        for all layers would take minutes. Every layer has a router of its own, so that routing differs.
    """
    if case.checkpoint is not None:
        return Checkpoint.open(case.checkpoint)
    config = case.config()
    changed = "-".join(f"{value}" for value in case.changes.values())
    path = folder / ("-".join(filter(None, ("checkpoint", case.model, "" if quick else changed))))
    if (path / "config.json").exists():
        found = Checkpoint.open(path)
        if found.model.num_layers == config["num_hidden_layers"]:
            return found
        shutil.rmtree(path)
    say(f"making a random-weight checkpoint of {case.model} with {config['num_hidden_layers']} layers in {path}")
    if quick:
        _make_quickly(config, path)
    else:
        make_checkpoint(config, path)
    return Checkpoint.open(path)


def _make_quickly(config: dict[str, Any], out: Path) -> None:
    """A checkpoint with stacked experts, as modules hold them, in which all layers have the same ones."""
    older = ("torch_dtype",) if "dtype" in config else ()
    config, model, family = described({k: v for k, v in config.items() if k not in older}, name=out.name)
    family.stacked = True
    dtype, scale = TORCH_DTYPES[model.dtype], float(config.get("initializer_range", 0.02))
    draw = partial(draw_normal, dtype=dtype, scale=scale, generator=torch.Generator().manual_seed(0))
    work = out.with_name(f".{out.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    experts: dict[str, torch.Tensor] = {}
    for layer in [None, *range(model.num_layers)]:
        tensors = {
            name: torch.ones(shape, dtype=dtype) if "norm" in name else draw(shape)
            for name, shape in family.dense_shapes(layer).items()
        }
        if layer is not None:
            for tensor in family.expert_tensors(layer):
                kind = tensor.name.rsplit(".", 1)[1]
                if kind not in experts:
                    experts[kind] = draw(tensor.shape)
                tensors[tensor.name] = experts[kind]
        file = "model-dense.safetensors" if layer is None else f"model-layer-{layer:05d}.safetensors"
        save_file(tensors, str(work / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (work / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    work.rename(out)
