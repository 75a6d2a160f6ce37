"""Tutel's way: a buffer of equal parts for all experts, filled and read by index instead of by products."""

from __future__ import annotations

from typing import ClassVar

import torch

from executor.gating.base import Experts, Gating, GatingStats, RunExperts, slots
from hrm.gating import capacity_of, check_capacity_factor

__all__ = ["TutelGating"]


class TutelGating(Gating):
    """Tokens are scattered into a buffer of E times the capacity and their answers gathered from it.

    No mask is built, but experts still compute every slot, and processes exchange all of them.

    Parameters
    ----------
    capacity_factor : float or None
        C, as in static gating; None makes the capacity that of the fullest expert, so that nothing is dropped.

    References
    ----------
    Tutel, arXiv 2206.03382, sections 3.3 and 4.2 (https://github.com/microsoft/tutel); its fourth variant in
    arXiv 2303.06182, section V.
    """

    name: ClassVar[str] = "tutel"

    def __init__(self, capacity_factor: float | None = None) -> None:
        self.capacity_factor = None if capacity_factor is None else check_capacity_factor(capacity_factor)

    def __call__(
        self,
        x: torch.Tensor,
        expert_index: torch.Tensor,
        expert_weight: torch.Tensor,
        experts: RunExperts,
        num_experts: int,
    ) -> tuple[torch.Tensor, GatingStats]:
        """See `Gating`."""
        tokens, hidden = x.shape
        slot, counts = slots(expert_index, num_experts)
        if self.capacity_factor is None:
            capacity = int(counts[:num_experts].max())
        else:
            capacity = capacity_of(self.capacity_factor, tokens)
        if isinstance(experts, Experts):
            capacity = experts.agree(capacity)
        here = expert_index < num_experts
        kept = here & (slot < capacity)
        dropped = here & ~kept
        token, rank = kept.nonzero(as_tuple=True)
        place = expert_index[token, rank] * capacity + slot[token, rank]
        rows = x.new_zeros(num_experts * capacity, hidden)
        rows.index_copy_(0, place, x[token])
        held = rows.nbytes + len(token) * hidden * x.itemsize
        rows = experts(rows, [capacity] * num_experts)
        out = torch.zeros_like(x)
        answers = rows[place].mul_(expert_weight[token, rank, None].to(x.dtype))
        out.index_add_(0, token, answers)
        elsewhere = int(counts[num_experts])
        return out, GatingStats(
            gating=self.name,
            tokens=tokens,
            choices=expert_index.numel() - elsewhere,
            dropped=int(dropped.sum()),
            lost_tokens=int(dropped.all(dim=1).sum()),
            elsewhere=elsewhere,
            rows=num_experts * capacity,
            capacity=capacity,
            buffer_bytes=held,
        )

    def __repr__(self) -> str:
        share = self.capacity_factor
        return f"<tutel gating, capacity {'of the fullest expert' if share is None else f'{share:g} of the tokens'}>"
