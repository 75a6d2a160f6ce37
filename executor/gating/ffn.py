"""The executor's expert weights as experts of a gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from executor.gating.base import Gating, GatingStats
from executor.kernels import ExpertWeights, moe_ffn, run_expert
from hrm.pipeline import FFN_CHUNK_ROWS

__all__ = ["Activation", "ExpertLoop", "gated_ffn"]

Activation = Callable[[torch.Tensor], torch.Tensor]
"""``[rows, 2I]`` to ``[rows, I]``; for experts of two matrices ``[rows, I]`` to ``[rows, I]``."""


@dataclass(frozen=True, slots=True)
class ExpertLoop:
    """Experts one after the other, each on its run of rows, whose place the answers take."""

    experts: Sequence[ExpertWeights]
    activation: Activation

    def __call__(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See `executor.gating.base.RunExperts`."""
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            for chunk in rows[start : start + count].split(FFN_CHUNK_ROWS) if count else ():
                chunk.copy_(run_expert(chunk, expert, self.activation))
            start += count
        return rows


def gated_ffn(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weight: torch.Tensor,
    experts: Sequence[ExpertWeights | None],
    activation: Activation,
    gating: Gating,
) -> tuple[torch.Tensor, GatingStats]:
    """As `executor.kernels.moe_ffn`, with any gate.

    Parameters
    ----------
    x : Tensor, [S, H]
    expert_index, expert_weight : Tensor, [S, k]
        The router's choice.
    experts : sequence of ExpertWeights, length E
        None for experts that are computed elsewhere; they add nothing and take no rows here. An only expert is a
        dense layer: it gets every token, and there is nothing to gate.
    activation : Activation
    gating : Gating

    Returns
    -------
    Tensor, [S, H]
    GatingStats
    """
    tokens = len(x)
    if len(experts) == 1:
        out = moe_ffn(x, expert_index, expert_weight, experts, activation)
        here = tokens if experts[0] else 0
        return out, GatingStats(
            gating=gating.name, tokens=tokens, choices=here, elsewhere=tokens - here, rows=here, buffer_bytes=0
        )
    present = [e for e, expert in enumerate(experts) if expert is not None]
    if not present:
        nothing = GatingStats(
            gating=gating.name, tokens=tokens, choices=0, elsewhere=expert_index.numel(), rows=0, buffer_bytes=0
        )
        return torch.zeros_like(x), nothing
    if len(present) < len(experts):
        # The others get the number after the last one, which stands for an expert that is not here.
        number = torch.full((len(experts) + 1,), len(present), device=expert_index.device)
        number[present] = torch.arange(len(present), device=expert_index.device)
        expert_index = number[expert_index]
    here_only = [expert for expert in experts if expert is not None]
    return gating(x, expert_index, expert_weight, ExpertLoop(here_only, activation), len(present))
