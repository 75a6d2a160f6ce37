"""What it costs to bring tokens to experts and back: static, Tutel's and dynamic gating, one MoE layer on a cluster.

Every term is bytes over a bandwidth, FLOPs over a rate, or launches, so that the model takes any layer sizes and any
machine. Data parallel GPUs with S tokens each share the experts of a layer (expert parallelism); the layer ends when
the busiest of them does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hrm.errors import InvalidValue
from hrm.gating import GatingName, capacity_of, check_capacity_factor, check_gating
from hrm.layers import FeedForward
from simulator.experts.cluster import Cluster

__all__ = ["Buffering", "Cluster", "GatingCost", "Program", "gating_cost"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """How the layer is programmed: kernels and copies of fairseq's MoE branch, counted in its source.

    References
    ----------
    https://github.com/facebookresearch/fairseq, branch moe, fairseq/modules/moe: moe_layer.py, top2gate.py.
    """

    launch_s: float = 10e-6
    """Seconds that the host takes to issue a kernel from PyTorch; assumed, as for FlexGen's launches here."""
    gate_kernels: int = 70
    """Kernels of softmax, top-2, one-hot masks, cumulative sums and the statistics that the gate logs."""
    gate_passes: int = 24
    """Reads and writes of a [S, E] mask of 8-byte integers."""
    mask_kernels: int = 10
    mask_build_bytes: float = 34.0
    """Bytes moved per entry of the [S, E, capacity] mask. The gate computes in float32: two outer products are written
    (8), added (8 + 4), compared (4 + 1), rounded to the model's type (4 + 2), and the mask is converted (1 + 2)."""
    mask_peak_bytes: float = 15.0
    """Bytes alive per entry at the end of the gate: three float32 tensors, the mask as bytes, 2-byte weights."""
    mask_kept_bytes: float = 4.0
    """Bytes alive per entry while experts run: mask and weights in 2-byte floats."""
    buffers: float = 4.0
    """Copies of the expert buffer alive at once: sent, received, outputs before and after they are joined."""
    buffer_copies: float = 4.0
    """Reads and writes of the buffer to take it apart by expert and to join it again."""


@dataclass(frozen=True, kw_only=True)
class Buffering:
    """Expert buffering: all experts in host memory, a few slots per MoE layer on each GPU.

    References
    ----------
    arXiv 2303.06182, the section on expert buffering.
    """

    slots: float
    """K per GPU and MoE layer; a mean over GPUs need not be whole."""
    miss_rate: float | None = None
    """Share of a GPU's active experts that are not in a slot. None: that of experts asked for without any pattern,
    1 - K / (E/D)."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise InvalidValue(f"'slots' must be >= 1: {self.slots}")
        if self.miss_rate is not None and not 0 <= self.miss_rate <= 1:
            raise InvalidValue(f"'miss_rate' must be between 0 and 1: {self.miss_rate}")

    def misses(self, local_experts: float, active: float) -> float:
        """Experts that a GPU copies in for one batch."""
        if self.slots >= local_experts:
            return 0.0
        rate = 1 - self.slots / local_experts if self.miss_rate is None else self.miss_rate
        return rate * active


@dataclass(frozen=True, kw_only=True)
class GatingCost:
    """One MoE layer."""

    gating: GatingName
    seconds: dict[str, float] = field(default_factory=dict)
    """By term: gate, mask, dispatch, exchange, experts, combine, copies."""
    activation_bytes: float = 0.0
    """Alive at once on one GPU, beside the layer's input and output."""
    rows: float = 0.0
    """Rows that the busiest GPU's experts compute."""
    needed_rows: float = 0.0
    """Rows that carry a token, mean over GPUs: k·S."""

    @property
    def total(self) -> float:
        """Seconds of the layer."""
        return sum(self.seconds.values())

    @property
    def waste(self) -> float:
        """Rows computed over rows needed."""
        return self.rows / self.needed_rows


def gating_cost(
    ffn: FeedForward,
    cluster: Cluster,
    tokens: int,
    gating: GatingName,
    *,
    capacity_factor: float = 1.0,
    adaptive_capacity: float | None = None,
    busiest: float = 1.0,
    active_share: float = 1.0,
    element_bytes: float = 2.0,
    program: Program | None = None,
    buffering: Buffering | None = None,
) -> GatingCost:
    """Seconds and bytes of one MoE layer.

    Parameters
    ----------
    ffn : FeedForward
        The layer's experts.
    cluster : Cluster
    tokens : int
        S of each GPU.
    gating : {"static", "tutel", "dynamic"}
    capacity_factor : float
        C: slots per expert as a fraction of S; static and Tutel's.
    adaptive_capacity : float, optional
        Tutel's capacity follows the fullest expert, which gets this share of a GPU's k·S choices; None: C·S.
    busiest : float
        Load of the busiest GPU in multiples of the mean; dynamic gating waits for it. Padded gating is always even.
    active_share : float
        Share of experts that a batch uses at all; the weights of others are not read under dynamic gating.
    element_bytes : float
        Of weights and activations.
    program : Program, optional
    buffering : Buffering, optional
        With dynamic gating: misses are copied from the host while tokens are exchanged.

    References
    ----------
    arXiv 2303.06182, the sections on dynamic gating and expert buffering.
    """
    check_gating(gating)
    if tokens < 1:
        raise InvalidValue(f"'tokens' must be >= 1: {tokens}")
    if not 1 <= busiest <= cluster.devices:
        raise InvalidValue(f"'busiest' must be between 1 and the {cluster.devices} devices: {busiest}")
    if not 0 < active_share <= 1:
        raise InvalidValue(f"'active_share' must lie above 0 and be at most 1: {active_share}")
    if ffn.num_experts % cluster.devices:
        raise InvalidValue(
            f"{ffn.num_experts} experts do not divide evenly over {cluster.devices} devices; take other nodes."
        )
    if buffering is not None and gating != "dynamic":
        raise InvalidValue(f"expert buffering needs to know the active experts first: gating 'dynamic', not {gating!r}")
    layer = _Layer(ffn, cluster, tokens, element_bytes, program or Program())
    if gating == "dynamic":
        return layer.dynamic(busiest, active_share, buffering)
    capacity = capacity_of(check_capacity_factor(capacity_factor), tokens)
    if gating == "static":
        return layer.static(capacity)
    if adaptive_capacity is not None:
        if not 0 < adaptive_capacity <= 1:
            raise InvalidValue(f"'adaptive_capacity' is a share above 0 and at most 1: {adaptive_capacity}")
        capacity = min(tokens, math.ceil(adaptive_capacity * ffn.top_k * tokens))
    return layer.tutel(capacity)


@dataclass(frozen=True)
class _Layer:
    ffn: FeedForward
    cluster: Cluster
    tokens: int
    element: float
    program: Program

    # -- kernels ----------------------------------------------------------------------------------

    def gemm(self, rows: float, width_in: float, width_out: float) -> float:
        """Seconds of one matrix product."""
        rates, b = self.cluster.rates, self.element
        flops = 2 * rows * width_in * width_out
        moved = b * (rows * width_in + width_in * width_out + rows * width_out)
        return max(flops / float(rates.gpu_gemm.at(rows)), moved / rates.gpu_bandwidth, self.program.launch_s)

    def move(self, moved: float, kernels: float = 1) -> float:
        """Seconds of element-wise kernels."""
        return max(moved / self.cluster.rates.gpu_bandwidth, kernels * self.program.launch_s)

    def gate(self) -> float:
        """Router, softmax, top-k and positions."""
        s, e = self.tokens, self.ffn.num_experts
        return self.gemm(s, self.ffn.hidden_size, e) + self.move(
            8.0 * self.program.gate_passes * s * e, self.program.gate_kernels
        )

    def exchange(self, rows: float, busiest: float = 1.0) -> float:
        """All-to-all of rows."""
        sent = rows * self.ffn.hidden_size * self.element
        return self.cluster.all_to_all(sent, busiest=busiest) + self.program.launch_s

    def experts(self, rows: float, experts: float) -> float:
        """FFN of `rows` rows spread over `experts` local experts, one after the other."""
        ffn, rates, b = self.ffn, self.cluster.rates, self.element
        flops = 2.0 * ffn.expert_matrix_parameters * rows
        compute = flops / float(rates.gpu_experts.at(rows / max(experts, 1e-9)))
        wide = (ffn.matrices - 1) * ffn.intermediate_size
        weights = experts * ffn.expert_parameters * b
        memory = (weights + rows * b * (2 * ffn.hidden_size + 2 * wide)) / rates.gpu_bandwidth
        activation = 2 * rows * wide * b / rates.gpu_bandwidth
        launches = experts * (ffn.matrices + 2) * self.program.launch_s
        return max(max(compute, memory) + activation, launches)

    # -- variants ---------------------------------------------------------------------------------

    @property
    def local_experts(self) -> int:
        return self.ffn.num_experts // self.cluster.devices

    def static(self, capacity: int) -> GatingCost:
        s, p = self.tokens, self.program
        slots = self.ffn.num_experts * capacity  # E·C·S rows, on every GPU before and after the exchange
        entries = float(s) * slots
        row_bytes = self.ffn.hidden_size * self.element
        seconds = {
            "gate": self.gate(),
            "mask": self.move(p.mask_build_bytes * entries, p.mask_kernels),
            "dispatch": self.gemm(slots, s, self.ffn.hidden_size),
            "exchange": 2 * self.exchange(slots),
            "experts": self.experts(slots, self.local_experts),
            "combine": self.gemm(s, slots, self.ffn.hidden_size),
            "copies": self.move(p.buffer_copies * slots * row_bytes, 4),
        }
        buffer = slots * row_bytes + self.hidden(slots)
        activation = max(
            p.mask_peak_bytes * entries, p.mask_kept_bytes * entries + (p.buffers - 1) * slots * row_bytes + buffer
        )
        return self._cost("static", seconds, activation + self.gate_bytes(), slots)

    def tutel(self, capacity: int) -> GatingCost:
        s, p = self.tokens, self.program
        slots = self.ffn.num_experts * capacity
        row_bytes = self.ffn.hidden_size * self.element
        chosen = s * self.ffn.top_k * row_bytes
        seconds = {
            "gate": self.gate(),
            "dispatch": self.move(slots * row_bytes + 2 * chosen, 2),
            "exchange": 2 * self.exchange(slots),
            "experts": self.experts(slots, self.local_experts),
            "combine": self.move(2 * chosen, 2),
            "copies": self.move(p.buffer_copies * slots * row_bytes, 4),
        }
        activation = p.buffers * slots * row_bytes + self.hidden(slots)
        return self._cost("tutel", seconds, activation + self.gate_bytes(), slots)

    def dynamic(self, busiest: float, active_share: float, buffering: Buffering | None) -> GatingCost:
        s, k = self.tokens, self.ffn.top_k
        row_bytes = self.ffn.hidden_size * self.element
        chosen = float(s * k)
        rows = busiest * chosen
        active = max(1.0, active_share * self.local_experts)
        # The busiest GPU has no fewer rows than experts that it runs.
        active = min(active, max(1.0, rows))
        exchange = self.exchange(chosen, busiest)
        seconds = {
            "gate": self.gate(),
            # argsort, bincount and their ids of 8 bytes, a few passes; then rows by index
            "dispatch": self.move(8 * 8 * chosen, 6) + self.exchange(0) + self.move(2 * chosen * row_bytes),
            "exchange": 2 * exchange,
            "experts": self.experts(rows, active),
            "combine": self.move((2 * chosen + chosen + s) * row_bytes, 3),
        }
        if buffering is not None:
            missing = buffering.misses(self.local_experts, active)
            copied = missing * self.ffn.expert_parameters * self.element / self.cluster.host_bandwidth
            seconds["waiting for experts"] = max(0.0, copied - exchange)
        activation = (2 * chosen + 2 * rows) * row_bytes + self.hidden(rows / active * self.local_experts)
        return self._cost("dynamic", seconds, activation + self.gate_bytes(), rows)

    def hidden(self, rows: float) -> float:
        """Bytes inside one expert's FFN, when `rows` are shared evenly by the local experts."""
        wide = (self.ffn.matrices - 1) * self.ffn.intermediate_size
        return rows / self.local_experts * (2 * wide + self.ffn.hidden_size) * self.element

    def gate_bytes(self) -> float:
        """Masks of 8-byte integers that the gate holds."""
        return 8.0 * 8 * self.tokens * self.ffn.num_experts

    def _cost(self, gating: GatingName, seconds: dict[str, float], activation: float, rows: float) -> GatingCost:
        return GatingCost(
            gating=gating, seconds=seconds, activation_bytes=activation, rows=float(rows),
            needed_rows=float(self.tokens * self.ffn.top_k),
        )  # fmt: skip
