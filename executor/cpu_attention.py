"""Decode attention on the CPU over a KV arena, by a C++ kernel with torch as the fallback.

The kernel reads every row of the arena once for all the query heads that share it. It is built on first use (see
`native_build`); where that is not possible, and with ``MOE_HRM_NATIVE=0``, torch's operators compute the same.
``MOE_HRM_NATIVE_ISA`` (``baseline``, ``avx2``, ``avx512`` or ``avx512_bf16``) caps the instruction set that it uses.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings

import torch
from torch import Tensor

from executor.native_build import NativeUnavailable, load_native
from hrm.errors import InvalidValue

__all__ = ["decode_attention", "decode_attention_torch", "native_kernel"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VARIANTS = ("baseline", "avx2", "avx512", "avx512_bf16")
_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_tried = False


def native_kernel() -> str | None:
    """Which variant of the kernel runs here, or None if torch computes instead.

    Returns
    -------
    str or None
        ``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` or ``"baseline"``. Builds the kernel if that has not happened yet.

    Raises
    ------
    InvalidValue
        ``MOE_HRM_NATIVE_ISA`` names no variant.
    """
    library = _load()
    return None if library is None else _VARIANTS[min(_cap(), library.hrm_attention_variant())]


def decode_attention(
    q: Tensor,
    kv: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    value_offset: int,
    scale: float,
    sinks: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """One query token per sequence over that sequence's rows of a KV arena.

    A row of the arena is one token's cache of one layer: the keys of all heads, then the values of all heads. For
    latent attention there is one key head, and the values are the first elements of the keys (`value_offset` 0).
    Query head h uses key head ``h // (n_q // num_kv_heads)``. Sums are kept in float32; of
    bfloat16 calls ``avx512_bf16`` rounds the softmax's weights to bfloat16. The kernel does not hold the
    interpreter's lock and may be called from several threads at once. There is no gradient.

    Parameters
    ----------
    q : Tensor, [n, n_q * key_dim]
        float32, bfloat16 or float16; its rows may be strided.
    kv : Tensor, [capacity, row]
        Same type; its rows may be strided.
    starts : Tensor of int64, [n]
        First row of each sequence in the arena.
    lengths : Tensor of int64, [n]
        Rows that the query sees. With 0 the output is zero.
    out : Tensor, [n, n_q * value_dim]
        Same type; written. Must not overlap with `q` or `kv`.
    num_kv_heads, key_dim, value_dim : int
    value_offset : int
        Index in the row of the first value element.
    scale : float
        Factor of the scores, usually ``key_dim ** -0.5``.
    sinks : Tensor of float32, [n_q], optional
        One more logit per head in the softmax's denominator, as in gpt-oss; not scaled.
    threads : int, optional
        Threads to use, the calling one among them; by default ``torch.get_num_threads()``. The others sleep between
        calls; after a fork the child makes its own. torch's fallback takes torch's threads.

    Raises
    ------
    InvalidValue
        A shape, type, device or row number does not fit.
    """
    library = _load()
    if library is None:
        decode_attention_torch(
            q,
            kv,
            starts,
            lengths,
            out,
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            value_offset=value_offset,
            scale=scale,
            sinks=sinks,
            threads=threads,
        )
        return
    heads = _check(q, kv, starts, lengths, out, num_kv_heads, key_dim, value_dim, value_offset, sinks, threads)
    sizes = (ctypes.c_int64 * 13)(
        q.shape[0],
        heads,
        num_kv_heads,
        key_dim,
        value_dim,
        value_offset,
        q.stride(0),
        kv.stride(0),
        out.stride(0),
        kv.shape[0],
        _TYPES[q.dtype],
        _cap(),
        torch.get_num_threads() if threads is None else threads,
    )
    status = library.hrm_decode_attention(
        q.data_ptr(),
        kv.data_ptr(),
        out.data_ptr(),
        starts.data_ptr(),
        lengths.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        sizes,
        scale,
    )
    if status == 1:
        raise InvalidValue(_outside(kv))
    if status == 2:
        raise MemoryError("no memory for the buffers of decode attention")


def decode_attention_torch(
    q: Tensor,
    kv: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    value_offset: int,
    scale: float,
    sinks: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """The same as `decode_attention` by torch's operators, sequence by sequence in float32.

    Takes the same parameters; the number of threads is torch's own.
    """
    heads = _check(q, kv, starts, lengths, out, num_kv_heads, key_dim, value_dim, value_offset, sinks, threads)
    group = heads // num_kv_heads
    keys_end, values_end = num_kv_heads * key_dim, value_offset + num_kv_heads * value_dim
    spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    if any(start < 0 or length < 0 or start + length > kv.shape[0] for start, length in spans):
        raise InvalidValue(_outside(kv))
    for query, (start, length), target in zip(q, spans, out, strict=True):
        if length == 0:
            target.zero_()
            continue
        rows = kv[start : start + length]
        keys = rows[:, :keys_end].float().view(length, num_kv_heads, key_dim)
        values = rows[:, value_offset:values_end].float().view(length, num_kv_heads, value_dim)
        folded = query.float().view(num_kv_heads, group, key_dim)
        scores = torch.matmul(folded, keys.permute(1, 2, 0)).mul_(scale)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(num_kv_heads, group, 1)], dim=-1)
        weights = scores.softmax(-1)[..., :length]
        target.copy_(torch.matmul(weights, values.transpose(0, 1)).view(-1))


def _load() -> ctypes.CDLL | None:
    """The kernel's library, or None; tries once per process and warns once."""
    global _library, _tried
    if os.environ.get("MOE_HRM_NATIVE") == "0":
        return None
    if not _tried:
        with _lock:
            if not _tried:
                _library = _build()
                _tried = True
    return _library


def _build() -> ctypes.CDLL | None:
    try:
        library = load_native("decode_attention.cpp")
        library.hrm_attention_variant.restype = ctypes.c_int
        library.hrm_attention_variant.argtypes = []
        library.hrm_decode_attention.restype = ctypes.c_int
        library.hrm_decode_attention.argtypes = [
            *[ctypes.c_void_p] * 6,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_float,
        ]
    except (NativeUnavailable, AttributeError) as error:
        warnings.warn(f"decode attention on the CPU goes through torch, which is slower: {error}", stacklevel=4)
        return None
    return library


def _cap() -> int:
    """Index of the greatest variant that is allowed."""
    name = os.environ.get("MOE_HRM_NATIVE_ISA")
    if not name:
        return len(_VARIANTS) - 1
    if name not in _VARIANTS:
        raise InvalidValue(f"MOE_HRM_NATIVE_ISA must be one of {', '.join(_VARIANTS)}: {name!r}")
    return _VARIANTS.index(name)


def _outside(kv: Tensor) -> str:
    return f"starts and lengths must be >= 0 and lie within the {kv.shape[0]} rows of kv."


def _check(
    q: Tensor,
    kv: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    value_offset: int,
    sinks: Tensor | None,
    threads: int | None,
) -> int:
    """Number of query heads, once everything is known to fit; row numbers are checked where they are read."""
    if min(num_kv_heads, key_dim, value_dim) < 1 or value_offset < 0:
        raise InvalidValue("num_kv_heads, key_dim and value_dim must be >= 1 and value_offset >= 0.")
    if threads is not None and threads < 1:
        raise InvalidValue(f"threads must be >= 1: {threads}")
    if q.dtype not in _TYPES or kv.dtype != q.dtype or out.dtype != q.dtype:
        raise InvalidValue(
            f"q, kv and out must all be float32, bfloat16 or float16: {q.dtype}, {kv.dtype}, {out.dtype}."
        )
    if not (q.is_cpu and kv.is_cpu and out.is_cpu and starts.is_cpu and lengths.is_cpu):
        raise InvalidValue("q, kv, starts, lengths and out must be in host memory.")
    if q.ndim != 2 or kv.ndim != 2 or out.ndim != 2:
        raise InvalidValue(f"q, kv and out must have two dimensions: {q.ndim}, {kv.ndim}, {out.ndim}.")
    n, width = q.shape
    heads = width // key_dim
    if heads * key_dim != width or heads < 1 or heads % num_kv_heads:
        raise InvalidValue(
            f"q must have a multiple of num_kv_heads * key_dim = {num_kv_heads * key_dim} columns: {width}."
        )
    if out.shape[0] != n or out.shape[1] != heads * value_dim:
        raise InvalidValue(f"out must be [{n}, {heads * value_dim}]: {list(out.shape)}.")
    need = max(num_kv_heads * key_dim, value_offset + num_kv_heads * value_dim)
    if kv.shape[1] < need:
        raise InvalidValue(f"a row of kv must have at least {need} elements: {kv.shape[1]}.")
    if q.stride(1) != 1 or kv.stride(1) != 1 or out.stride(1) != 1:
        raise InvalidValue("q, kv and out must be contiguous in their last dimension.")
    for name, rows in (("starts", starts), ("lengths", lengths)):
        if rows.dtype != torch.int64 or rows.ndim != 1 or rows.shape[0] != n or not rows.is_contiguous():
            raise InvalidValue(f"{name} must be a contiguous int64 tensor of {n} elements.")
    if sinks is not None and (
        sinks.dtype != torch.float32 or sinks.shape != (heads,) or not sinks.is_contiguous() or not sinks.is_cpu
    ):
        raise InvalidValue(f"sinks must be a contiguous float32 tensor of {heads} elements in host memory.")
    return heads
