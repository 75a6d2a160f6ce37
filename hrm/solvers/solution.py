"""What a solver answers."""

from __future__ import annotations

from dataclasses import dataclass

from hrm.problem import Problem

__all__ = ["Solution"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The best point of a set of problems."""

    problem: Problem
    micro_batch_size: int
    num_micro_batches: int
    weights_on_gpu: float
    kv_on_gpu: float
    seconds_per_token: float
