"""Random weights that need no disk: a checkpoint whose tensors are drawn when they are read.

For models that are too large for the disk at hand, or too large to draw number by number in the time there is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from executor.checkpoint import TORCH_DTYPES, Checkpoint, described, is_norm

__all__ = ["RandomCheckpoint", "draw_normal"]

_OFFSETS = 2**22
"""Places of the block at which an expert's matrix may begin."""
_PIECE = 2**22


def draw_normal(shape: tuple[int, ...], dtype: torch.dtype, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers of standard deviation `scale`, drawn in float32 and rounded piece by piece."""
    flat = torch.empty(math.prod(shape), dtype=dtype)
    for piece in flat.split(_PIECE):
        piece.copy_(torch.empty(piece.numel()).normal_(0.0, scale, generator=generator))
    return flat.view(shape)


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """A checkpoint without files: every tensor follows from a seed and its name, and is the same at each reading.

    Experts are windows of one block of normal numbers (standard deviation: the config's ``initializer_range``), each
    matrix at an offset of its own, so that a layer is filled at the speed of memory. So their values repeat: between
    experts, shifted. Everything else, routers among it, is drawn afresh, so that every layer routes in its own way;
    norms are one. Routing is near uniform, unlike a trained model's. What is measured on such weights is how fast they
    move and multiply, which does not depend on their values.
    """

    seed: int
    scale: float
    """Standard deviation."""
    block: torch.Tensor = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    windows: frozenset[str] = field(repr=False)
    """Names of the tensors that are windows of the block."""

    @classmethod
    def of(
        cls, config: Mapping[str, Any], *, name: str = "random", dtype: str | None = None, seed: int = 0
    ) -> RandomCheckpoint:
        """Random weights for a config.

        Parameters
        ----------
        config : mapping
            Content of a ``config.json``.
        name : str
            What the model is called.
        dtype : {"float32", "bfloat16", "float16"}, optional
            By default the config's.
        seed : int

        Raises
        ------
        InvalidConfig, InvalidValue
            If the config is of a model that cannot be run, or the type is unknown.
        """
        known, model, family = described(config, name=name, dtype=dtype)
        experts = {
            tensor.name: tensor.shape for layer in range(model.num_layers) for tensor in family.expert_tensors(layer)
        }
        longest = max(math.prod(shape) for shape in experts.values())
        kind, scale = TORCH_DTYPES[model.dtype], float(known.get("initializer_range", 0.02))
        generator = torch.Generator().manual_seed(_number(seed, "block"))
        block = draw_normal((longest + _OFFSETS,), kind, scale, generator)
        shapes = dict(experts)
        for layer in [None, *range(model.num_layers)]:
            shapes |= family.dense_shapes(layer)
        return cls(Path(name), model, family.config, {}, family, seed, scale, block, shapes, frozenset(experts))

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensors would take as files."""
        return sum(math.prod(shape) * self._type(name).itemsize for name, shape in self.shapes.items())

    def _type(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(self.family.float32_names) else self.dtype

    def read(self, names: list[str], sink: Callable[[str, torch.Tensor], None]) -> None:
        """Hand each named tensor to `sink`, which must copy what it keeps and change nothing."""
        for name in names:
            sink(name, self._draw(name))

    def _draw(self, name: str) -> torch.Tensor:
        shape, number = self.shapes[name], _number(self.seed, name)
        if name in self.windows:
            first = number % (_OFFSETS + 1)
            return self.block[first : first + math.prod(shape)].view(shape)
        if is_norm(name):
            return torch.ones(shape, dtype=self._type(name))
        generator = torch.Generator().manual_seed(number)
        return draw_normal(shape, self._type(name), self.scale, generator)


def _number(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()) >> 1
