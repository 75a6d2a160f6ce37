"""Choosing the next token: greedy, or drawn with temperature and top-p from numbers that belong to the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from executor.kv_cache import Request
from hrm.errors import InvalidValue

__all__ = ["Sampling", "choose"]

_COLDEST = 1e-30
"""Temperature, in float32's range, below which draws are the most likely token anyway."""
_ROWS = 16
"""Rows that are sorted at a time; bounds temporary memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    A request's random numbers follow from the seed and its name alone, so that its answer depends neither on the
    batch that it runs in nor on an interruption.
    """

    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise InvalidValue(f"'temperature' must be >= 0: {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidValue(f"'top_p' must be > 0 and <= 1: {self.top_p}")
        if self.seed < 0:
            raise InvalidValue(f"'seed' must be >= 0: {self.seed}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    def numbers(self, name: str | int, count: int) -> np.ndarray | None:
        """Uniform random numbers of a request, one per token; None where nothing is drawn."""
        if self.greedy:
            return None
        key = list(str(name).encode(errors="surrogatepass"))
        return np.random.default_rng([self.seed, len(key), *key]).random(count)

    def draws(self, requests: Sequence[Request], count: int) -> torch.Tensor | None:
        """The number of each request for the token after `count` more; past its last, any."""
        if self.greedy:
            return None
        values = []
        for request in requests:
            assert request.draws is not None
            values.append(request.draws[min(len(request.output) + count, len(request.draws) - 1)])
        return torch.tensor(values, dtype=torch.float32)


def choose(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor | None) -> torch.Tensor:
    """Token ids, [n].

    Parameters
    ----------
    logits : Tensor, [n, vocab]
    draws : Tensor, [n], or None
        Uniform random numbers; None where `sampling` is greedy.
    """
    if draws is None:
        return logits.argmax(dim=-1)
    chosen = []
    for rows, numbers in zip(logits.split(_ROWS), draws.to(logits.device).split(_ROWS), strict=True):
        # Shifted first, so that a temperature close to zero divides nothing into infinity.
        shifted = rows.float() - rows.float().amax(dim=-1, keepdim=True)
        p, ids = (
            (shifted / max(sampling.temperature, _COLDEST)).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        )
        before = p.cumsum(dim=-1) - p
        p = p.masked_fill(before >= sampling.top_p, 0.0)  # the first token always stays
        total = p.cumsum(dim=-1)
        at = torch.searchsorted(total, numbers[:, None] * total[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
        last = (p > 0).sum(dim=-1, keepdim=True) - 1
        chosen.append(ids.gather(1, torch.minimum(at, last)).squeeze(1))
    return torch.cat(chosen)
