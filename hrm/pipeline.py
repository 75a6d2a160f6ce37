"""Facts about CGOPipe that the planner, the simulator and the executor must agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hrm.errors import InvalidValue
from hrm.layers import Attention
from hrm.model import MoEModel

__all__ = [
    "ACTIVATION_SLOTS",
    "ATTENTION_CHUNK_BYTES",
    "EXPERT_PIECES",
    "FFN_CHUNK_ROWS",
    "LOOKAHEAD",
    "PIECES_IN_FLIGHT",
    "PINNED_PAGES",
    "BatchShape",
    "expert_pieces",
]

LOOKAHEAD = 2
"""Micro-batches that PreAttn runs ahead of PostAttn (MoE-Lightning, Algorithm 1)."""

ACTIVATION_SLOTS = LOOKAHEAD + 1
"""Micro-batches whose Q, K, V and attention output are in flight at once."""

PINNED_PAGES = LOOKAHEAD + 2
"""Pages of the pinned ring: two staged ahead, one in transfer, one being filled."""

EXPERT_PIECES = 8
"""With an expert cache, the most pieces in which the experts that a micro-batch misses come and are computed."""

PIECES_IN_FLIGHT = 2
"""Pieces whose experts must lie on the device at once: one is computed while the next one comes."""


def expert_pieces(num_experts: int) -> tuple[int, int]:
    """Pieces of a layer's active experts, and the most experts that come with one.

    The first piece has the experts that are there, the others those that are missing.
    """
    pieces = min(EXPERT_PIECES, num_experts)
    return 1 + pieces, -(-num_experts // pieces)


FFN_CHUNK_ROWS = 2048
"""Most choices of experts that are computed at a time; bounds the workspace of prefill."""

ATTENTION_CHUNK_BYTES = 2**25
"""Decode attention on a GPU takes as many sequences at a time as keep its temporaries within this; one at least."""


@dataclass(frozen=True)
class BatchShape:
    """Prompt lengths of one batch, micro-batch by micro-batch, longest first within each."""

    micro_batches: tuple[tuple[int, ...], ...]
    gen_len: int
    output_lens: tuple[tuple[int, ...], ...] | None = None
    """Tokens that each request generates before it ends by itself, in the same order; None: all `gen_len`."""

    def __post_init__(self) -> None:
        if self.output_lens is not None:
            if [len(x) for x in self.output_lens] != [len(x) for x in self.micro_batches]:
                raise InvalidValue("'output_lens' must have one length per request.")
            if not all(1 <= n <= self.gen_len for x in self.output_lens for n in x):
                raise InvalidValue(f"'output_lens' must be between 1 and gen_len={self.gen_len}.")
        if not self.micro_batches or not all(self.micro_batches):
            raise InvalidValue("a batch needs at least one request in every micro-batch.")
        if self.gen_len < 1:
            raise InvalidValue(f"'gen_len' must be >= 1: {self.gen_len}")
        for lengths in self.micro_batches:
            if min(lengths) < 1 or list(lengths) != sorted(lengths, reverse=True):
                raise InvalidValue(f"prompt lengths must be >= 1 and longest first: {list(lengths)}")

    @classmethod
    def uniform(cls, batch_size: int, micro_batch_size: int, prompt_len: int, gen_len: int) -> BatchShape:
        """N prompts of one length in micro-batches of μ (the last may be smaller)."""
        if batch_size < 1 or micro_batch_size < 1:
            raise InvalidValue(f"batch and micro-batch size must be >= 1: {batch_size}, {micro_batch_size}")
        full, rest = divmod(batch_size, micro_batch_size)
        sizes = [micro_batch_size] * full + ([rest] if rest else [])
        return cls(tuple((prompt_len,) * n for n in sizes), gen_len)

    @cached_property
    def sequences(self) -> list[int]:
        """Sequences of each micro-batch."""
        return [len(x) for x in self.micro_batches]

    @cached_property
    def prompt_tokens(self) -> list[int]:
        """Prompt tokens of each micro-batch."""
        return [sum(x) for x in self.micro_batches]

    @cached_property
    def pairs(self) -> list[int]:
        """Causal query-key pairs of each micro-batch's prompts."""
        return [sum(s * (s + 1) // 2 for s in x) for x in self.micro_batches]

    @cached_property
    def longest(self) -> list[int]:
        """Longest prompt of each micro-batch."""
        return [x[0] for x in self.micro_batches]

    @property
    def batch_size(self) -> int:
        """N."""
        return sum(self.sequences)

    @property
    def generated_tokens(self) -> int:
        """Tokens that all requests generate."""
        if self.output_lens is None:
            return self.batch_size * self.gen_len
        return sum(map(sum, self.output_lens))

    def alive(self, step: int) -> tuple[BatchShape, tuple[bool, ...]]:
        """The batch without requests that have ended before decode step `step`, and which micro-batches remain.

        A micro-batch without requests keeps one of a single token, so that numbers stay as they are.
        """
        if self.output_lens is None:
            return self, (True,) * self.num_micro_batches
        parts = [
            tuple(n for n, out in zip(lengths, outs, strict=True) if out > step)
            for lengths, outs in zip(self.micro_batches, self.output_lens, strict=True)
        ]
        return BatchShape(tuple(x or (1,) for x in parts), self.gen_len), tuple(bool(x) for x in parts)

    @property
    def num_micro_batches(self) -> int:
        """G."""
        return len(self.micro_batches)


def page_bytes(streamed_bytes: Any, pages: Any) -> Any:
    """Size of a weight page when a layer's streamed part travels as `pages` pages."""
    return streamed_bytes / pages


def activation_bytes(model: MoEModel, tokens: Any) -> Any:
    """Device bytes of one decode slot: Q, K, V and attention output of `tokens` sequences."""
    widths = [(a.query_size + a.kv_elements + a.attended_size) for a in _attentions(model)]
    return tokens * max(widths) * model.dtype_bytes


def prefill_slot_bytes(model: MoEModel, tokens: Any) -> Any:
    """Device bytes of one prefill slot: hidden states, keys and values of `tokens` tokens."""
    return tokens * (model.hidden_size + max(a.kv_elements for a in _attentions(model))) * model.dtype_bytes


def _attentions(model: MoEModel) -> list[Attention]:
    return [layer.attention for layer in model.kinds]


def attention_bytes_per_token(row: int, heads: int, dtype_bytes: float, *, latent: bool) -> float:
    """Device bytes of temporaries per cached token that decode attention on a GPU reads.

    Rows that are gathered, every head's scores in several forms, and keys and values laid side by side; latent ones,
    which are too wide for torch's fused kernels, in float32 and scaled.

    Parameters
    ----------
    row : int
        Elements of a token's KV cache in one layer.
    heads : int
        Query heads.
    """
    return row * (dtype_bytes + (12 if latent else dtype_bytes)) + heads * (12 + 2 * dtype_bytes)


def workspace_bytes(model: MoEModel, tokens: Any, sequences: Any, context: Any = 0) -> Any:
    """Device bytes that kernels need at most for temporaries.

    Parameters
    ----------
    tokens : int
        Most tokens a prefill kernel handles.
    sequences : int
        Most sequences a decode kernel handles.
    context : int
        Most tokens a sequence has where the GPU computes decode attention; 0 where the CPU does.
    """
    import numpy as np

    b, h = model.dtype_bytes, model.hidden_size
    wide = model.q_size + 2 * model.kv_size
    # Prefill holds projections and their rotated, head-expanded and attended copies.
    attention = tokens * (b * (2 * h + wide + 6 * model.q_size) + 12 * h + 8 * model.head_dim)
    chunk = np.minimum(tokens * model.top_k, FFN_CHUNK_ROWS)
    routing = tokens * (16.0 * model.num_experts + 48 * model.top_k)
    inner = max(max(layer.ffn.intermediate_size, layer.ffn.shared_size) for layer in model.kinds)
    ffn = b * (3 * tokens * h + chunk * (2 * h + 4 * inner)) + 12 * tokens * h + routing
    head = sequences * (model.vocab_size * b + 4 * h * b + 12 * h)
    one = context * max(
        attention_bytes_per_token(a.kv_elements, a.num_heads, b, latent=a.kv_rank is not None)
        for a in _attentions(model)
    )
    decode = np.minimum(sequences * one, np.maximum(one, ATTENTION_CHUNK_BYTES))
    return np.maximum(np.maximum(attention, ffn), np.maximum(head, decode)) + math.ldexp(1, 16)
