"""Decode attention in GPU memory, through torch's attention operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from hrm.pipeline import ATTENTION_CHUNK_BYTES, attention_bytes_per_token

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
    of it. Where runs lie at equal distances and torch has a fused kernel, they are read in place; else as many
    sequences at a time are gathered as `hrm.pipeline.ATTENTION_CHUNK_BYTES` allows.

    Parameters
    ----------
    starts, lengths : Tensor, [n]
        On the host.
    """
    n, heads, row = q.shape[0], q.shape[1] // key_dim, kv.shape[1]
    latent = value_offset == 0
    grid = (num_kv_heads, heads // num_kv_heads)
    queries, outputs = q.view(n, *grid, key_dim), out.view(n, *grid, value_dim)
    sink = None if sinks is None else sinks.view(1, *grid, 1)
    per_token = attention_bytes_per_token(row, heads, q.dtype.itemsize, latent=latent)
    in_place = sinks is None and not latent and _apart(kv, starts, int(lengths.max())) is not None
    room = None if in_place else ATTENTION_CHUNK_BYTES / per_token
    for some in _parts(lengths.tolist(), room):
        longest = int(lengths[some].max())
        rows = _rows(kv, starts[some], longest)
        keys = rows[..., : num_kv_heads * key_dim].unflatten(2, (num_kv_heads, key_dim)).transpose(1, 2)
        values = rows[..., value_offset : value_offset + num_kv_heads * value_dim]
        values = values.unflatten(2, (num_kv_heads, value_dim)).transpose(1, 2)
        mask = _end_mask(lengths[some], longest, q)
        outputs[some] = _attended(queries[some], keys, values, mask, scale, sink)


def _parts(lengths: list[int], room: float | None) -> Iterator[slice]:
    """Sequences in order, so many at a time that all of them as long as the longest have no more tokens than `room`."""
    first, longest = 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if room is not None and i > first and (i + 1 - first) * longest > room:
            yield slice(first, i)
            first, longest = i, length
    yield slice(first, len(lengths))


def _end_mask(lengths: torch.Tensor, longest: int, like: torch.Tensor) -> torch.Tensor | None:
    """What is added to scores, [n, 1, 1, longest], so that no sequence sees past its end; None where none would."""
    if int(lengths.min()) == longest:
        return None
    beyond = torch.arange(longest) >= lengths[:, None]
    mask = torch.zeros(beyond.shape, dtype=like.dtype).masked_fill_(beyond, float("-inf"))[:, None, None]
    return mask.to(like.device, non_blocking=True)


def _attended(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """``[n, kv heads, group, value_dim]``"""
    if sink is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    scores = (queries @ keys.transpose(2, 3)).mul_(scale).float()
    if mask is not None:
        scores += mask
    weights = torch.cat([scores, sink.expand(len(queries), -1, -1, 1)], dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(values.dtype) @ values


def _apart(kv: torch.Tensor, starts: torch.Tensor, longest: int) -> int | None:
    """Rows from one run to the next, if they are always as many and each run has room for `longest`; None if not."""
    n = len(starts)
    apart = int(starts[1] - starts[0]) if n > 1 else longest
    last = int(starts[0]) + (n - 1) * apart + longest
    alike = apart >= longest and last <= kv.shape[0] and bool((starts.diff() == apart).all())
    return apart if alike else None


def _rows(kv: torch.Tensor, starts: torch.Tensor, longest: int) -> torch.Tensor:
    """Rows of every sequence, ``[n, longest, row]``; what lies behind a shorter sequence's end is not its own."""
    apart = _apart(kv, starts, longest)
    if apart is None:
        index = (starts[:, None] + torch.arange(longest)).clamp(max=kv.shape[0] - 1)
        return kv[index.to(kv.device)]
    offset = kv.storage_offset() + int(starts[0]) * kv.stride(0)
    return kv.as_strided((len(starts), longest, kv.shape[1]), (apart * kv.stride(0), kv.stride(0), 1), offset)
