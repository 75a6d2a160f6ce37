"""What a gate costs by arithmetic: rows, masks, buffers, FLOPs and the peak of its activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from executor.gating.base import Gating
from executor.gating.static import StaticGating
from executor.gating.tutel import TutelGating
from hrm.errors import InvalidValue
from hrm.gating import capacity_of, peak_bytes

__all__ = ["LM", "MT", "GatingSizes", "LayerShape", "gating_sizes"]

_MOST_EXPERTS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """An MoE layer whose experts are two matrices with biases and ReLU between them, as fairseq has them."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    """Model dimension H."""
    intermediate: int
    """FFN dimension I."""
    capacity_factor: float
    """C: the share of a batch's tokens that an expert of a static gate takes."""

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "hidden", "intermediate"):
            if getattr(self, field) < 1:
                raise InvalidValue(f"'{field}' must be >= 1: {getattr(self, field)}")
        if self.num_experts > _MOST_EXPERTS:
            raise InvalidValue(f"'num_experts' must be at most {_MOST_EXPERTS}: {self.num_experts}")
        if self.top_k > self.num_experts:
            raise InvalidValue(f"'top_k' must be at most the {self.num_experts} experts that there are: {self.top_k}")
        if not 0 < self.capacity_factor <= 1:
            raise InvalidValue(f"'capacity_factor' must be above 0 and at most 1: {self.capacity_factor}")

    @property
    def expert_parameters(self) -> int:
        """Weights and biases of one expert."""
        return 2 * self.hidden * self.intermediate + self.hidden + self.intermediate

    @property
    def waste_factor(self) -> float:
        """E·C/k: rows that a static gate computes over rows needed."""
        return self.num_experts * self.capacity_factor / self.top_k


LM = LayerShape(name="lm", num_experts=512, top_k=2, hidden=1024, intermediate=4096, capacity_factor=0.05)
"""The language model of arXiv 2303.06182, table I."""
MT = LayerShape(name="mt", num_experts=128, top_k=2, hidden=2048, intermediate=8192, capacity_factor=1.0)
"""The translation model (NLLB-200) of arXiv 2303.06182, table I."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatingSizes:
    """Computed, not measured; bytes are those of tensors of `gating_sizes`' type."""

    capacity: int | None
    """Rows of every expert; None where each has its own number."""
    rows: int
    """Rows that experts compute."""
    waste_factor: float
    mask_bytes: int
    """Both masks of a static gate."""
    buffer_bytes: int
    """The rows that experts are fed with."""
    expert_flops: int
    dispatch_flops: int
    """Of the products with masks, there and back."""
    peak_bytes: int
    """Activations at the fullest moment, answers included, the input not."""


def gating_sizes(
    gating: Gating, shape: LayerShape, tokens: int, *, fullest: int, dropped: int = 0, itemsize: int = 4
) -> GatingSizes:
    """Costs of one call with experts that run one after the other (`executor.gating.ExpertLoop`).

    Parameters
    ----------
    gating : Gating
    shape : LayerShape
    tokens : int
        S.
    fullest : int
        Choices that fall on the expert with most of them.
    dropped : int
        Choices beyond the capacity.
    itemsize : int
        Bytes per element.
    """
    choices, h = tokens * shape.top_k, shape.hidden
    capacity: int | None = None
    if isinstance(gating, StaticGating | TutelGating):
        factor = gating.capacity_factor
        capacity = fullest if factor is None else capacity_of(factor, tokens)
    rows = choices if capacity is None else shape.num_experts * capacity
    mask = tokens * rows if isinstance(gating, StaticGating) else 0  # elements of one
    return GatingSizes(
        capacity=capacity,
        rows=rows,
        waste_factor=rows / choices if choices else math.nan,
        mask_bytes=2 * mask * itemsize,
        buffer_bytes=rows * h * itemsize,
        expert_flops=4 * rows * h * shape.intermediate,
        dispatch_flops=4 * mask * h,
        peak_bytes=int(
            peak_bytes(
                gating.name,
                tokens,
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                hidden=h,
                expert_width=shape.intermediate + h,
                fullest=fullest if capacity is None else capacity,
                dropped=dropped,
                itemsize=itemsize,
            )
        ),
    )
