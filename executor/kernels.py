"""Kernels of the device's tasks, through torch's own operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hrm.pipeline import FFN_CHUNK_ROWS

__all__ = ["ExpertWeights", "Run", "add_expert", "add_runs", "causal_attention", "moe_ffn", "run_expert", "run_experts"]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's matrices as blocks of rows.

    A matrix is in one block, but for the one that the border between resident and streamed weights cuts.
    """

    gate_up: Sequence[torch.Tensor]
    """Rows of ``[2I, H]``: gate, then up."""
    down: Sequence[torch.Tensor]
    """Rows of ``[H, I]``."""
    gate_up_bias: torch.Tensor | None = None
    """[2I]"""
    down_bias: torch.Tensor | None = None
    """[H]"""


def _linear(x: torch.Tensor, blocks: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    if len(blocks) == 1:
        return F.linear(x, blocks[0], bias)
    y = torch.cat([F.linear(x, block) for block in blocks], dim=-1)
    return y if bias is None else y.add_(bias)


def moe_ffn(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weight: torch.Tensor,
    experts: Sequence[ExpertWeights | None],
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Expert FFNs by dynamic gating: tokens sorted by expert, no capacity, nothing dropped or padded.

    Parameters
    ----------
    x : Tensor, [tokens, H]
    expert_index, expert_weight : Tensor, [tokens, k]
        The router's choice.
    experts : sequence of ExpertWeights, length E
        None for experts that are computed elsewhere; they add nothing.
    activation : callable
        ``[rows, 2I]`` to ``[rows, I]``.

    Returns
    -------
    Tensor, [tokens, H]

    References
    ----------
    "Towards MoE Deployment", arXiv 2303.06182, section IV (dynamic gating).
    """
    out = torch.zeros_like(x)
    if len(experts) == 1:
        expert = experts[0]
        for first in range(0, x.shape[0] if expert else 0, FFN_CHUNK_ROWS):
            assert expert is not None
            chunk = slice(first, first + FFN_CHUNK_ROWS)
            out[chunk] = run_expert(x[chunk], expert, activation)
        return out
    top_k = expert_index.shape[-1]
    flat = expert_index.reshape(-1)
    order = flat.argsort(stable=True)
    token = order // top_k
    weight = expert_weight.reshape(-1)[order].to(x.dtype)
    counts = torch.bincount(flat, minlength=len(experts)).tolist()
    start = 0
    for expert, count in zip(experts, counts, strict=True):
        if expert:
            span = slice(start, start + count)
            add_expert(out, x, token[span], weight[span], expert, activation)
        start += count
    return out


def add_expert(
    out: torch.Tensor,
    x: torch.Tensor,
    token: torch.Tensor,
    weight: torch.Tensor,
    expert: ExpertWeights,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Add to `out`, [tokens, H], what one expert makes of rows `token` of `x`, times their `weight`."""
    for first in range(0, len(token), FFN_CHUNK_ROWS):
        rows = token[first : first + FFN_CHUNK_ROWS]
        y = run_expert(x[rows], expert, activation)
        out.index_add_(0, rows, y.mul_(weight[first : first + FFN_CHUNK_ROWS, None].to(y.dtype)))


def run_expert(
    x: torch.Tensor, expert: ExpertWeights, activation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """One expert on rows ``[n, H]``."""
    hidden = activation(_linear(x, expert.gate_up, expert.gate_up_bias))
    return _linear(hidden, expert.down, expert.down_bias)


Run = tuple[ExpertWeights, int, int]
"""An expert, and where its choices start and stop among those that are sorted by expert."""


def add_runs(
    out: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    expert_weight: torch.Tensor,
    runs: Sequence[Run],
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Add to `out`, [tokens, H], what some experts make of `x`, wherever their weights lie.

    Parameters
    ----------
    out, x : Tensor, [tokens, H]
    order : Tensor, [tokens * k]
        Choices sorted by expert.
    expert_weight : Tensor, [tokens, k]
    runs : sequence of Run
        At least one, none empty.
    activation : callable
    """
    choices = torch.cat([order[start:stop] for _, start, stop in runs])
    token = choices // expert_weight.shape[1]
    y = run_experts(x[token], [stop - start for _, start, stop in runs], [expert for expert, _, _ in runs], activation)
    out.index_add_(0, token, y.mul_(expert_weight.reshape(-1)[choices, None].to(y.dtype)))


def run_experts(
    x: torch.Tensor,
    counts: Sequence[int],
    experts: Sequence[ExpertWeights],
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Several experts, each on its run of rows.

    A product per matrix, and everything else for all rows at once: between two operators another lane may take the
    interpreter, so that fewer of them wait less.

    Parameters
    ----------
    x : Tensor, [n, H]
        Rows of the first expert, then those of the second, and so on.
    counts : sequence of int
        Rows of each expert.
    experts : sequence of ExpertWeights
    activation : callable
        ``[rows, 2I]`` to ``[rows, I]``.

    Returns
    -------
    Tensor, [n, H]
    """
    if len(experts) == 1:
        return run_expert(x, experts[0], activation)
    gate_up = _products(x, counts, [(expert.gate_up, expert.gate_up_bias) for expert in experts])
    return _products(activation(gate_up), counts, [(expert.down, expert.down_bias) for expert in experts])


def _products(
    x: torch.Tensor, counts: Sequence[int], matrices: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor | None]]
) -> torch.Tensor:
    out = x.new_empty(x.shape[0], sum(block.shape[0] for block in matrices[0][0]))
    runs = zip(x.split(list(counts)), out.split(list(counts)), matrices, strict=True)
    for rows, target, (blocks, bias) in runs:
        if len(blocks) == 1 and bias is None:
            torch.mm(rows, blocks[0].T, out=target)
        else:
            target.copy_(_linear(rows, blocks, bias))
    return out


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prefill attention of packed sequences.

    Parameters
    ----------
    q : Tensor, [tokens, n_q, d]
    k : Tensor, [tokens, n_kv, d]
    v : Tensor, [tokens, n_kv, d_v]
    lengths : sequence of int
        Prompt length of each sequence, in the order in which they are packed.
    scale : float, optional
        Of the scores; 1/sqrt(d) by default.
    window : int, optional
        Keys that a query sees at most, itself included.
    sinks : Tensor, [n_q], optional
        One more logit per head in the softmax, which attends to nothing.

    Returns
    -------
    Tensor, [tokens, n_q * d_v]
    """
    tokens, heads, dim = q.shape
    wide = v.shape[2]
    scale = dim**-0.5 if scale is None else scale
    out = q.new_empty(tokens, heads, wide)
    start = index = 0
    while index < len(lengths):
        # Runs of equal length go through one call.
        s, same = lengths[index], 1
        while index + same < len(lengths) and lengths[index + same] == s:
            same += 1
        stop = start + same * s
        qs, ks, vs = (t[start:stop].view(same, s, -1, t.shape[2]).transpose(1, 2) for t in (q, k, v))
        if sinks is not None:
            qs, ks, vs = _with_sinks(qs, ks, vs, sinks, scale)
        elif wide < dim:
            # Kernels that keep no scores take values as wide as keys only.
            vs = F.pad(vs, (0, dim - wide))
        lead = 0 if sinks is None else 1
        target = out[start:stop].view(same, s, heads, wide).transpose(1, 2)
        if window is None or s <= window:
            attended = _attention(qs, ks, vs, None, scale)
            target.copy_(attended[:, :, lead:, :wide])
        else:
            _windowed(qs, ks, vs, target, window, lead, scale)
        start, index = stop, index + same
    return out.view(tokens, heads * wide)


def _with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[n, heads, s + 1, d + 8]`` that give each query one more logit, and nothing for it.

    The first key is the sink: it is zero but in a dimension where other keys are zero, and there each query has its
    head's logit. A first query, whose answer is dropped, keeps the causal mask in place. Eight dimensions instead of
    one keep rows aligned.
    """
    dim = q.shape[3]
    q, k, v = F.pad(q, (0, 8, 1, 0)), F.pad(k, (0, 8, 1, 0)), F.pad(v, (0, dim + 8 - v.shape[3], 1, 0))
    q[..., dim] = (sinks.float() / scale).to(q.dtype)[:, None]
    k[:, :, 0, dim] = 1
    return q, k, v


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Torch's attention, causal without a mask, by a kernel that does not keep the scores."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda and (mask is not None or not _flash_runs(q)):
        # Only the flash kernel takes grouped heads; the other one that keeps no scores wants all of them.
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        groups = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
    )


def _flash_runs(q: torch.Tensor) -> bool:
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device)[0] >= 8


def _windowed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    window: int,
    lead: int,
    scale: float,
) -> None:
    """Fill `out`, ``[n, heads, s, d_v]``, by blocks of queries and the keys that they see, and the sink if `lead`."""
    s = out.shape[2]
    block = max(window, 256)
    for first in range(0, s, block):
        last, begin = min(first + block, s), max(0, first - window + 1)
        ahead = first - begin
        seen = torch.ones(last - first, last - begin, dtype=torch.bool, device=q.device)
        mask = F.pad(seen.tril_(ahead).triu_(ahead - window + 1), (lead, 0), value=True)
        keys, values = (torch.cat([t[:, :, :lead], t[:, :, lead + begin : lead + last]], dim=2) for t in (k, v))
        attended = _attention(q[:, :, lead + first : lead + last], keys, values, mask, scale)
        out[:, :, first:last] = attended[..., : out.shape[3]]
