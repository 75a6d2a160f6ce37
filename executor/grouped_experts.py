"""Expert FFNs by grouped GEMM: one call for all experts of a group.

Dynamic gating as in `executor.kernels.moe_ffn`, which calls one GEMM per expert and has to know how many tokens each
expert got. On a GPU that question waits for all work issued so far; there the counts stay on the device. On the host
the counts are at hand, and torch's grouped product is a loop over the experts, but one that does not come back to the
interpreter after each: lanes that run Python at the same time wait less for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from hrm.pipeline import FFN_CHUNK_ROWS

__all__ = ["ExpertGroup", "GroupedFfn", "grouped_ffn", "grouped_kernel", "sorted_ffn"]

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


GroupedFfn = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequence[ExpertGroup], int, Callable[[torch.Tensor], torch.Tensor]],
    torch.Tensor,
]
"""`grouped_ffn` or `sorted_ffn`."""


def grouped_kernel(device: torch.device, dtype: torch.dtype, *widths: int) -> GroupedFfn | None:
    """How the experts of a group run in one call, for products of these widths; None if torch cannot.

    On GPUs before Hopper, and in other types than bfloat16 there, torch loops over the groups and asks the GPU for
    their sizes, which is what this is to avoid.
    """
    if not hasattr(F, "grouped_mm") or any(width * dtype.itemsize % _ALIGNMENT for width in widths):
        return None
    if device.type == "cpu":
        return sorted_ffn if _runs_on_host(dtype) else None
    if device.type != "cuda" or dtype != torch.bfloat16 or not torch.cuda.is_available():
        return None
    return grouped_ffn if torch.cuda.get_device_capability(device)[0] in _CAPABILITIES else None


@cache
def _runs_on_host(dtype: torch.dtype) -> bool:
    x, ends = torch.zeros(1, 16, dtype=dtype), torch.ones(1, dtype=torch.int32)
    try:
        F.grouped_mm(x, x.new_zeros(1, 16, 16), offs=ends)
    except (RuntimeError, NotImplementedError):
        return False
    return True


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


def sorted_ffn(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weight: torch.Tensor,
    groups: Sequence[ExpertGroup],
    num_experts: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """As `grouped_ffn`, in memory where token counts can be read: only the rows of `groups` are gathered at all.

    Experts are added up in the order of `executor.kernels.moe_ffn`: in float32 results are as near as two calls of BLAS
    for the same product (a block of one row is a vector to one of them and a matrix to the other). In shorter types
    what several experts make of a token is rounded once, not after each.
    """
    out = torch.zeros_like(x)
    chosen, order = expert_index.reshape(-1).sort(stable=True)
    token = order // expert_index.shape[1]
    weight = expert_weight.reshape(-1)[order].to(x.dtype)[:, None]
    ends = torch.bincount(chosen, minlength=num_experts).cumsum(0)
    bounds = [0, *ends.tolist()]
    for group in groups:
        mine = slice(group.first, group.first + group.count)
        last = bounds[mine.stop]
        for start in range(bounds[mine.start], last, FFN_CHUNK_ROWS):
            span = slice(start, min(start + FFN_CHUNK_ROWS, last))
            offsets = (ends[mine] - start).clamp_(0, span.stop - start).to(torch.int32)
            expert, rows = chosen[span] - group.first, token[span]
            hidden = activation(_product(x[rows], group.gate_up, offsets, group.gate_up_bias, expert))
            y = _product(hidden, group.down, offsets, group.down_bias, expert)
            out.index_add_(0, rows, y.mul_(weight[span]))
    return out


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
