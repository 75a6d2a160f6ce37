"""Static gating: every expert takes C·S rows, whoever chose it; masks and products of matrices move the tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from executor.gating.base import Experts, Gating, GatingStats, RunExperts, slots
from hrm.gating import capacity_of, check_capacity_factor

__all__ = ["StaticGating"]


class StaticGating(Gating):
    """As fairseq and GShard do it: dispatch and combine are products with a mask of E·C·S·S entries.

    Tokens beyond an expert's capacity are dropped, first choices of the first tokens win; slots that no token takes
    are zeros, which experts compute like any other row. The mask of dispatch is freed as soon as it has been used.

    Parameters
    ----------
    capacity_factor : float
        C: the share of a batch's S tokens that one expert takes.

    References
    ----------
    arXiv 2303.06182, section III; GShard, arXiv 2006.16668, algorithm 1; ``top2gate.py`` and ``moe_layer.py`` of
    https://github.com/facebookresearch/fairseq/tree/moe/fairseq/modules/moe.
    """

    name: ClassVar[str] = "static"
    capacity_factor: float

    def __init__(self, capacity_factor: float) -> None:
        self.capacity_factor = check_capacity_factor(capacity_factor)

    def __call__(
        self,
        x: torch.Tensor,
        expert_index: torch.Tensor,
        expert_weight: torch.Tensor,
        experts: RunExperts,
        num_experts: int,
    ) -> tuple[torch.Tensor, GatingStats]:
        """See `Gating`."""
        tokens = len(x)
        capacity = capacity_of(self.capacity_factor, tokens)
        if isinstance(experts, Experts):
            capacity = experts.agree(capacity)
        slot, counts = slots(expert_index, num_experts)
        here = expert_index < num_experts
        dropped = here & (slot >= capacity)
        masks = self._masks(expert_index, expert_weight, slot, num_experts, capacity, x.dtype)
        combine, dispatch = masks.pop(), masks.pop()
        size = num_experts * capacity
        rows = dispatch.view(tokens, size).t() @ x  # [E·capacity, H]
        held = dispatch.nbytes + combine.nbytes + rows.nbytes
        del dispatch
        rows = experts(rows, [capacity] * num_experts)
        out = combine.view(tokens, size) @ rows
        elsewhere = int(counts[num_experts])
        return out, GatingStats(
            gating=self.name,
            tokens=tokens,
            choices=expert_index.numel() - elsewhere,
            dropped=int(dropped.sum()),
            lost_tokens=int(dropped.all(dim=1).sum()),
            elsewhere=elsewhere,
            rows=size,
            capacity=capacity,
            buffer_bytes=held,
        )

    @staticmethod
    def _masks(
        index: torch.Tensor,
        weight: torch.Tensor,
        slot: torch.Tensor,
        num_experts: int,
        capacity: int,
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        """Masks of dispatch and combine, both ``[S, E, capacity]``; the second holds weights instead of ones."""
        numbers = torch.arange(max(num_experts, capacity), device=index.device)
        # Experts elsewhere and slots beyond the capacity have no column, so that their rows of the masks are zeros.
        of_slot = (slot[..., None] == numbers[:capacity]).to(dtype)  # [S, k, capacity]
        of_expert = (index[..., None] == numbers[:num_experts]).to(dtype)  # [S, k, E]
        dispatch = torch.bmm(of_expert.transpose(1, 2), of_slot)
        combine = torch.bmm(of_expert.mul_(weight[..., None].to(dtype)).transpose(1, 2), of_slot)
        return [dispatch, combine]

    def __repr__(self) -> str:
        return f"<static gating, capacity {self.capacity_factor:g} of the tokens>"
