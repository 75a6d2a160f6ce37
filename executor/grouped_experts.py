"""Expert FFNs by grouped GEMM: one kernel for all experts of a group, and no look at token counts by the host.

Dynamic gating as in `executor.kernels.moe_ffn`, which calls one GEMM per expert and has to know how many tokens each
expert got. On a GPU that question waits for all work issued so far; here the counts stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hrm.pipeline import FFN_CHUNK_ROWS

__all__ = ["ExpertGroup", "grouped_ffn", "has_grouped_mm"]

_CAPABILITIES = (9, 10)
"""Major compute capabilities for which torch has a grouped kernel."""
_ALIGNMENT = 16
"""Bytes that strides of a grouped product's operands must be multiples of."""


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Consecutive experts whose weights lie at equal distances.

    The expert that the border between resident and streamed weights cuts is a group of its own, its matrices in two
    blocks of rows.
    """

    first: int
    """Number of the first expert."""
    gate_up: Sequence[torch.Tensor]
    """[n, rows, H]; rows of all blocks together are 2I."""
    down: Sequence[torch.Tensor]
    """[n, rows, I]"""
    gate_up_bias: torch.Tensor | None = None
    """[n, 2I]"""
    down_bias: torch.Tensor | None = None
    """[n, H]"""

    @property
    def count(self) -> int:
        """Experts of the group."""
        return self.gate_up[0].shape[0]


def has_grouped_mm(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether products of these widths run as one kernel: bfloat16 with aligned rows, on a GPU that has it.

    On GPUs before Hopper torch loops over the groups and asks for their sizes, which is what this is to avoid.
    """
    aligned = all(width * dtype.itemsize % _ALIGNMENT == 0 for width in widths)
    if device.type != "cuda" or dtype != torch.bfloat16 or not aligned or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] in _CAPABILITIES


def grouped_ffn(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weight: torch.Tensor,
    groups: Sequence[ExpertGroup],
    num_experts: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """As `executor.kernels.moe_ffn`; experts in no group add nothing.

    Parameters
    ----------
    x : Tensor, [tokens, H]
    expert_index, expert_weight : Tensor, [tokens, k]
    groups : sequence of ExpertGroup
    num_experts : int
        E.
    activation : callable
        ``[rows, 2I]`` to ``[rows, I]``.

    Returns
    -------
    Tensor, [tokens, H]
    """
    top_k = expert_index.shape[1]
    step = max(1, FFN_CHUNK_ROWS // top_k)
    parts = [
        _chunk(
            x[i : i + step], expert_index[i : i + step], expert_weight[i : i + step], groups, num_experts, activation
        )
        for i in range(0, x.shape[0], step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunk(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    groups: Sequence[ExpertGroup],
    num_experts: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    tokens, top_k = index.shape
    flat = index.reshape(-1)
    routed = x.new_zeros(tokens * top_k, x.shape[1])
    numbers = torch.arange(flat.numel(), device=x.device)
    for group in groups:
        # The group's tokens first, sorted by expert; the rest lies behind and is not computed.
        order = ((flat - group.first) % num_experts).argsort(stable=True)
        mine = torch.arange(group.first, group.first + group.count, device=x.device)
        ends = (flat[None] == mine[:, None]).sum(dim=1).cumsum(0)
        offsets = ends.to(torch.int32)
        expert = torch.searchsorted(ends, numbers, right=True).clamp(max=group.count - 1)
        hidden = activation(_product(x[order // top_k], group.gate_up, offsets, group.gate_up_bias, expert))
        y = _product(hidden, group.down, offsets, group.down_bias, expert)
        # Every row has one target; what was not computed holds anything.
        routed.index_add_(0, order, y.masked_fill_((numbers >= ends[-1])[:, None], 0.0))
    return torch.einsum("tkh,tk->th", routed.view(tokens, top_k, -1), weight.to(x.dtype))


def _product(
    x: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    expert: torch.Tensor,
) -> torch.Tensor:
    parts = [F.grouped_mm(x, block.transpose(1, 2), offs=offsets) for block in blocks]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if bias is None else y.add_(bias[expert])
