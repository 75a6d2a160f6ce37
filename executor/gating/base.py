"""What all gates share: the interface, what they count, and who gets which slot of an expert's capacity."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hrm.errors import InvalidValue
from hrm.gating import GATINGS, Gate

__all__ = [
    "Experts",
    "Gating",
    "GatingStats",
    "RunExperts",
    "count_choices",
    "slots",
]

RunExperts = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Runs experts on rows ``[n, H]``, which come sorted by expert, so many of each as the second argument says. Returns
``[n, H]``, in a tensor of its own or in `rows`, which it may overwrite."""


class Experts:
    """Experts that want to know more of a call than its rows, because other processes run some of them.

    A gate calls either `agree` (all experts get the same number of rows) or `announce` (each gets its own), and then
    the experts themselves.
    """

    def agree(self, capacity: int) -> int:
        """The capacity that all processes use, when this one needs `capacity`."""
        return capacity

    def announce(self, counts: Sequence[int]) -> None:
        """Every expert's number of rows, before they are gathered."""

    def __call__(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See `RunExperts`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class GatingStats:
    """What a gate did with the tokens of one call, or, added up, of several.

    Examples
    --------
    >>> stats = GatingStats(gating="static", tokens=4, choices=8, dropped=2, rows=12, buffer_bytes=96)
    >>> stats.padded, stats.waste_factor
    (6, 1.5)
    >>> (stats + stats).dropped, (stats + stats).buffer_bytes
    (4, 96)
    """

    gating: str
    """Name of the gate."""
    tokens: int
    """S."""
    choices: int
    """Pairs of a token and an expert here: k·S, but for those whose expert is elsewhere."""
    dropped: int = 0
    """Choices that found the expert's capacity used up; they add nothing."""
    lost_tokens: int = 0
    """Tokens all of whose choices were dropped: only the residual is left of them."""
    elsewhere: int = 0
    """Choices of experts that are not here."""
    rows: int
    """Rows that experts computed."""
    capacity: int | None = None
    """Rows of every expert where all have the same number; of several calls the largest."""
    buffer_bytes: int
    """Bytes of masks, buffers and copies of rows that the gate holds while experts are fed, at its fullest; what
    the experts themselves need is not in it. Of several calls the largest."""

    @property
    def padded(self) -> int:
        """Rows computed that carry no token."""
        return self.rows - self.choices + self.dropped

    @property
    def waste_factor(self) -> float:
        """Rows computed over rows needed: E·C/k with a static capacity of C·S (arXiv 2303.06182, section III)."""
        return self.rows / self.choices if self.choices else math.nan

    def __add__(self, other: GatingStats) -> GatingStats:
        if not isinstance(other, GatingStats):
            return NotImplemented
        capacities = [c for c in (self.capacity, other.capacity) if c is not None]
        return GatingStats(
            gating=self.gating,
            tokens=self.tokens + other.tokens,
            choices=self.choices + other.choices,
            dropped=self.dropped + other.dropped,
            lost_tokens=self.lost_tokens + other.lost_tokens,
            elsewhere=self.elsewhere + other.elsewhere,
            rows=self.rows + other.rows,
            capacity=max(capacities, default=None),
            buffer_bytes=max(self.buffer_bytes, other.buffer_bytes),
        )


class Gating(ABC):
    """A way to bring tokens to the experts that a router chose for them, and what experts make of them back."""

    name: ClassVar[str]
    capacity_factor: float | None = None
    """C, where every expert gets the same number of rows and the gate was told how many."""

    @property
    def planned(self) -> Gate | None:
        """What planning counts its memory by; None for gates that it does not know."""
        return Gate(self.name, self.capacity_factor) if self.name in GATINGS else None

    @abstractmethod
    def __call__(
        self,
        x: torch.Tensor,
        expert_index: torch.Tensor,
        expert_weight: torch.Tensor,
        experts: RunExperts,
        num_experts: int,
    ) -> tuple[torch.Tensor, GatingStats]:
        """Run the chosen experts on every token and add up their answers by weight.

        Parameters
        ----------
        x : Tensor, [S, H]
        expert_index : Tensor, [S, k]
            Different experts for each token, in 0..E-1; E stands for an expert that is not here and adds nothing.
        expert_weight : Tensor, [S, k]
        experts : RunExperts
        num_experts : int
            E.

        Returns
        -------
        Tensor, [S, H]
            Without the residual.
        GatingStats
        """

    def __repr__(self) -> str:
        return f"<{self.name} gating>"


def slots(expert_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many choices of the same expert come before each, and how many each expert has in all.

    First choices of all tokens come before second ones, and tokens in their order, as in fairseq and GShard.

    Parameters
    ----------
    expert_index : Tensor, [S, k]
    num_experts : int
        E.

    Returns
    -------
    Tensor, [S, k]
    Tensor, [E + 1]
        Choices of every expert, then those of experts that are elsewhere.

    Examples
    --------
    >>> slots(torch.tensor([[0, 1], [1, 0], [1, 0]]), 2)[0].tolist()
    [[0, 2], [0, 1], [1, 2]]
    """
    flat = expert_index.t().reshape(-1)
    counts = count_choices(flat, num_experts)
    order = flat.argsort(stable=True)
    before = counts.cumsum(0) - counts
    place = torch.empty_like(flat)
    place[order] = torch.arange(flat.numel(), device=flat.device) - before[flat[order]]
    return place.view(expert_index.shape[1], -1).t(), counts


def count_choices(flat: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Choices of experts 0..E-1, and of those elsewhere, [E + 1]; raises `InvalidValue` for other ids."""
    counts = torch.bincount(flat, minlength=num_experts + 1)
    if counts.numel() > num_experts + 1:
        raise InvalidValue(f"'expert_index' names expert {counts.numel() - 1}; there are 0..{num_experts - 1}.")
    return counts
