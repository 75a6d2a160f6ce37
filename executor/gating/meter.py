"""A gate that runs in a job, and what it did to the job's tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from executor.gating.base import Gating, GatingStats
from executor.gating.ffn import Activation, gated_ffn
from executor.kernels import ExpertWeights

__all__ = ["GatingMeter"]


class GatingMeter:
    """Runs experts through a gate and adds up its counts; lanes may call it at once.

    Parameters
    ----------
    gating : Gating
    """

    def __init__(self, gating: Gating) -> None:
        self.gating = gating
        self.stats: GatingStats | None = None
        self._lock = threading.Lock()

    def ffn(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        experts: Sequence[ExpertWeights | None],
        activation: Activation,
    ) -> torch.Tensor:
        """As `executor.kernels.moe_ffn`."""
        out, stats = gated_ffn(x, index, weight, experts, activation, self.gating)
        with self._lock:
            self.stats = stats if self.stats is None else self.stats + stats
        return out

    def to_dict(self) -> dict[str, Any]:
        """Choices, dropped and padded rows over all calls."""
        stats = self.stats
        if stats is None:
            return {"gating": self.gating.name, "choices": 0}
        return {
            "gating": stats.gating,
            "choices": stats.choices,
            "dropped": stats.dropped,
            "rows": stats.rows,
            "padded": stats.padded,
            "waste_factor": stats.waste_factor,
            "buffer_bytes": stats.buffer_bytes,
        }
