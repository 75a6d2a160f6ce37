"""Decode attention in GPU memory, through torch's attention operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["device_attention"]


def device_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    value_offset: int,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> None:
    """One query per sequence over its rows of an arena; arguments as those of `cpu_attention.decode_attention`.

    The query group that shares a key is folded into the query length, so that keys and values are read once for all
    of it. Where runs lie at equal distances they are read in place, else they are gathered first.

    Parameters
    ----------
    starts, lengths : Tensor, [n]
        On the host.
    """
    n, heads = q.shape[0], q.shape[1] // key_dim
    longest = int(lengths.max())
    rows = _rows(kv, starts, longest)
    keys = rows[..., : num_kv_heads * key_dim].unflatten(2, (num_kv_heads, key_dim)).transpose(1, 2)
    values = rows[..., value_offset : value_offset + num_kv_heads * value_dim]
    values = values.unflatten(2, (num_kv_heads, value_dim)).transpose(1, 2)
    folded = q.view(n, num_kv_heads, heads // num_kv_heads, key_dim)
    mask = None
    if int(lengths.min()) < longest:
        hidden = torch.arange(longest) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
        mask = mask.to(q.device, non_blocking=True)
    if sinks is None:
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = (folded @ keys.transpose(2, 3)).mul_(scale).float()
        if mask is not None:
            scores += mask
        sink = sinks.view(1, num_kv_heads, -1, 1).expand(n, -1, -1, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        attended = weights.to(values.dtype) @ values
    out.view(n, num_kv_heads, heads // num_kv_heads, value_dim).copy_(attended)


def _rows(kv: torch.Tensor, starts: torch.Tensor, longest: int) -> torch.Tensor:
    """Rows of every sequence, ``[n, longest, row]``; what lies behind a shorter sequence's end is not its own."""
    first, n = int(starts[0]), len(starts)
    apart = int(starts[1] - starts[0]) if n > 1 else longest
    last = first + (n - 1) * apart + longest
    if apart >= longest and last <= kv.shape[0] and bool((starts.diff() == apart).all()):
        offset = kv.storage_offset() + first * kv.stride(0)
        return kv.as_strided((n, longest, kv.shape[1]), (apart * kv.stride(0), kv.stride(0), 1), offset)
    index = (starts[:, None] + torch.arange(longest)).clamp(max=kv.shape[0] - 1)
    return kv[index.to(kv.device)]
