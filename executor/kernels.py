"""The kernels that tasks run, through torch's own operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hrm.pipeline import FFN_CHUNK_ROWS

__all__ = ["ExpertWeights", "causal_attention", "decode_attention", "moe_ffn"]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's matrices as blocks of rows.

    A matrix is in one block, but for the one that the border between resident and streamed weights cuts.
    """

    gate_up: Sequence[torch.Tensor]
    """Rows of ``[2I, H]``: gate, then up."""
    down: Sequence[torch.Tensor]
    """Rows of ``[H, I]``."""


def _linear(x: torch.Tensor, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(blocks) == 1:
        return F.linear(x, blocks[0])
    return torch.cat([F.linear(x, block) for block in blocks], dim=-1)


def moe_ffn(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weight: torch.Tensor,
    experts: Sequence[ExpertWeights],
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Expert FFNs by dynamic gating: tokens sorted by expert, no capacity, nothing dropped or padded.

    Parameters
    ----------
    x : Tensor, [tokens, H]
    expert_index, expert_weight : Tensor, [tokens, k]
        The router's choice.
    experts : sequence of ExpertWeights, length E
    activation : callable
        Of the gate, e.g. SiLU.

    Returns
    -------
    Tensor, [tokens, H]

    References
    ----------
    "Towards MoE Deployment", arXiv 2303.06182, section IV (dynamic gating).
    """
    top_k = expert_index.shape[-1]
    flat = expert_index.reshape(-1)
    order = flat.argsort(stable=True)
    token = order // top_k
    weight = expert_weight.reshape(-1)[order].to(x.dtype)
    counts = torch.bincount(flat, minlength=len(experts)).tolist()
    out = torch.zeros_like(x)
    start = 0
    for expert, count in zip(experts, counts, strict=True):
        for first in range(start, start + count, FFN_CHUNK_ROWS):
            last = min(first + FFN_CHUNK_ROWS, start + count)
            rows = token[first:last]
            gate, up = _linear(x[rows], expert.gate_up).chunk(2, dim=-1)
            hidden = activation(gate).mul_(up)
            del gate, up
            y = _linear(hidden, expert.down).mul_(weight[first:last, None])
            out.index_add_(0, rows, y)
        start += count
    return out


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Prefill attention of packed sequences.

    Parameters
    ----------
    q : Tensor, [tokens, n_q, d]
    k, v : Tensor, [tokens, n_kv, d]
    lengths : sequence of int
        Prompt length of each sequence, in the order in which they are packed.

    Returns
    -------
    Tensor, [tokens, n_q * d]
    """
    tokens, heads, dim = q.shape
    out = torch.empty_like(q)
    start = index = 0
    while index < len(lengths):
        # Runs of equal length go through one call.
        s, same = lengths[index], 1
        while index + same < len(lengths) and lengths[index + same] == s:
            same += 1
        stop = start + same * s
        qs, ks, vs = (t[start:stop].view(same, s, -1, dim).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=heads != k.shape[1])
        out[start:stop].view(same, s, heads, dim).copy_(attended.transpose(1, 2))
        start, index = stop, index + same
    return out.view(tokens, heads * dim)


def decode_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """One query token per sequence over its KV cache, grouped-query heads folded into the query length.

    Folding lets every key and value be read once for all the heads that share it.

    Parameters
    ----------
    q : Tensor, [n, n_q, d]
    key_cache, value_cache : Tensor, [n, n_kv, context, d]
    mask : Tensor or None, [n, 1, 1, context]
        Additive; hides what lies behind a shorter sequence's end.
    out : Tensor, [n, n_q, d]
    """
    n, heads, dim = q.shape
    groups = key_cache.shape[1]
    folded = q.view(n, groups, heads // groups, dim)
    out.view_as(folded).copy_(F.scaled_dot_product_attention(folded, key_cache, value_cache, attn_mask=mask))
