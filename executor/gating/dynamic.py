"""Dynamic gating: tokens sorted by expert, each expert on exactly its own."""

from __future__ import annotations

from typing import ClassVar

import torch

from executor.gating.base import Experts, Gating, GatingStats, RunExperts, count_choices

__all__ = ["DynamicGating"]


class DynamicGating(Gating):
    """Sort the choices, count them, gather the tokens by index; nothing is dropped and nothing padded.

    Where other processes run some of the experts, they are told the sizes before the tokens are gathered, so that the
    two go on at once.

    References
    ----------
    arXiv 2303.06182, section IV.
    """

    name: ClassVar[str] = "dynamic"

    def __call__(
        self,
        x: torch.Tensor,
        expert_index: torch.Tensor,
        expert_weight: torch.Tensor,
        experts: RunExperts,
        num_experts: int,
    ) -> tuple[torch.Tensor, GatingStats]:
        """See `Gating`."""
        tokens, top_k = expert_index.shape
        flat = expert_index.reshape(-1)
        *counts, elsewhere = count_choices(flat, num_experts).tolist()
        if isinstance(experts, Experts):
            experts.announce(counts)
        order = flat.argsort(stable=True)[: flat.numel() - elsewhere]
        token = order // top_k
        rows = x[token]
        held = rows.nbytes
        answers = experts(rows, counts)
        answers.mul_(expert_weight.reshape(-1)[order, None].to(x.dtype))
        out = torch.zeros_like(x).index_add_(0, token, answers)
        return out, GatingStats(
            gating=self.name,
            tokens=tokens,
            choices=len(order),
            elsewhere=elsewhere,
            rows=len(order),
            buffer_bytes=held,
        )
