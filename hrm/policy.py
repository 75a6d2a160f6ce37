"""What the planner decides and the executor obeys."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hrm.errors import InvalidValue
from hrm.units import MAX_SIZE, brief

__all__ = ["Policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy (N, μ, A_g, F_g, r_w, r_c) of MoE-Lightning, section 4.2.

    Examples
    --------
    >>> Policy(batch_size=100, micro_batch_size=32).num_micro_batches
    4
    """

    batch_size: int
    """N: sequences per pass of the whole model."""
    micro_batch_size: int
    """μ: sequences that one kernel handles."""
    attention_on_gpu: bool = False
    """A_g: where decode attention runs."""
    ffn_on_gpu: bool = True
    """F_g: all experts run on the GPU, streamed there if need be; otherwise each runs where it lies."""
    weights_on_gpu: float = 0.0
    """r_w: fraction of each layer's expert weights that stays on the GPU."""
    kv_on_gpu: float = 0.0
    """r_c: fraction of the KV cache that stays on the GPU."""
    expert_slots: int | None = None
    """K: experts of each MoE layer that a cache on the GPU holds; a miss brings one whole expert there ("Towards MoE
    Deployment", section V). None: no cache, a layer's weights travel whether they are used or not."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidValue(f"{name!r} must be an integer >= 1: {brief(value)}")
            if value > MAX_SIZE:
                raise InvalidValue(f"{name!r} must be <= {MAX_SIZE}: {brief(value)}")
        if self.micro_batch_size > self.batch_size:
            raise InvalidValue(f"'micro_batch_size' must be <= batch_size={self.batch_size}: {self.micro_batch_size}")
        for name in ("weights_on_gpu", "kv_on_gpu"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InvalidValue(f"{name!r} must be between 0 and 1: {value}")
        slots = self.expert_slots
        if slots is None:
            return
        if not isinstance(slots, int) or isinstance(slots, bool) or not 1 <= slots <= MAX_SIZE:
            raise InvalidValue(f"'expert_slots' must be an integer >= 1: {brief(slots)}")
        if not self.ffn_on_gpu or self.weights_on_gpu > 0:
            raise InvalidValue(
                "with 'expert_slots' the slots say what is on the GPU: leave ffn_on_gpu 1, weights_on_gpu 0"
            )

    @property
    def num_micro_batches(self) -> int:
        """G = ceil(N / μ)."""
        return -(-self.batch_size // self.micro_batch_size)

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain values, with the number of micro-batches."""
        return asdict(self) | {"num_micro_batches": self.num_micro_batches}

    @property
    def experts_on(self) -> str:
        """Where experts are computed: the GPU, the CPU, or both (each where it lies, the resident ones on the GPU)."""
        if self.ffn_on_gpu:
            return "GPU"
        return "CPU" if self.weights_on_gpu == 0 else "GPU+CPU"

    def __str__(self) -> str:
        return (
            f"N={self.batch_size} mu={self.micro_batch_size} G={self.num_micro_batches} "
            f"r_w={self.weights_on_gpu:.3f} r_c={self.kv_on_gpu:.2f} "
            f"attention={'GPU' if self.attention_on_gpu else 'CPU'} experts={self.experts_on}"
            + (f" slots={self.expert_slots}" if self.expert_slots is not None else "")
        )
