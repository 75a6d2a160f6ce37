"""What a transformer layer is made of: widths, parameters and the bytes a token leaves in its KV cache.

A model is a sequence of `Layer` kinds. An architecture's reader fills these in from a config; all of the
roofline model reads only these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hrm.errors import InvalidConfig

__all__ = ["Attention", "FeedForward", "Layer", "Projection", "check_size"]


def check_size(value: object, key: str, owner: str) -> None:
    """Raise `InvalidConfig` unless `value` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidConfig(f"{key!r} of {owner} must be an integer >= 1: {value!r}")


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix product on every token: `width_in` to `width_out` with `weights` parameters."""

    name: str
    width_in: int
    width_out: int
    weights: int
    """Usually width_in·width_out; fewer for products that are per head."""
    chained: bool = False
    """True where the input is another projection's output instead of the layer's hidden states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One attention of a layer: multi-head, grouped-query, or latent (MLA).

    With `kv_rank` the cache holds one latent vector and one rotary key per token for all heads, and decode
    computes in the latent space: W_UK is absorbed into the query, W_UV is applied after attention
    (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    """

    hidden_size: int
    num_heads: int
    """n_q."""
    num_kv_heads: int
    """n_kv."""
    head_dim: int
    """d of queries and keys; with MLA the expanded one, rotary part included."""
    value_dim: int
    """d of values."""
    kv_rank: int | None = None
    """Width of the latent KV vector (MLA), None otherwise."""
    rope_dim: int = 0
    """Rotary part of `head_dim` that MLA keeps beside the latent vector."""
    q_rank: int | None = None
    """Width of the low-rank query (MLA), None where queries are projected in one product."""
    window: int | None = None
    """Tokens that a query sees at most; None: all."""
    other_parameters: int = 0
    """Parameters that are no projection weight: biases, norms of queries and keys, sinks."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "value_dim"):
            check_size(getattr(self, name), name, "an attention")
        if self.num_heads % self.num_kv_heads:
            raise InvalidConfig(f"'num_heads' must be a multiple of num_kv_heads={self.num_kv_heads}: {self.num_heads}")
        if self.kv_rank is not None and not 0 < self.rope_dim < self.head_dim:
            raise InvalidConfig(f"'rope_dim' must be > 0 and < head_dim={self.head_dim}: {self.rope_dim}")
        if self.window is not None:
            check_size(self.window, "window", "an attention")

    @property
    def query_size(self) -> int:
        """Elements of one token's query as attention over the cache takes it."""
        if self.kv_rank is None:
            return self.num_heads * self.head_dim
        return self.num_heads * (self.kv_rank + self.rope_dim)

    @property
    def kv_elements(self) -> int:
        """Elements that one token leaves in the KV cache of the layer."""
        if self.kv_rank is None:
            return self.num_kv_heads * (self.head_dim + self.value_dim)
        return self.kv_rank + self.rope_dim

    @property
    def attended_size(self) -> int:
        """Elements of one token's attention output, before the output projection."""
        return self.num_heads * (self.value_dim if self.kv_rank is None else self.kv_rank)

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query token on one cached token in decode: QKᵀ and the product with V."""
        return 2 * (self.query_size + self.attended_size)

    @property
    def prefill_pair_flops(self) -> int:
        """FLOPs of one query-key pair in prefill, where MLA expands its heads."""
        return 2 * self.num_heads * (self.head_dim + self.value_dim)

    @property
    def query_projections(self) -> tuple[Projection, ...]:
        """Products that make the query."""
        h, heads = self.hidden_size, self.num_heads
        if self.kv_rank is None:
            return (_full("q_proj", h, heads * self.head_dim),)
        nope = self.head_dim - self.rope_dim
        absorb = Projection("absorb_k", heads * nope, heads * self.kv_rank, heads * nope * self.kv_rank, chained=True)
        if self.q_rank is None:
            return (_full("q_proj", h, heads * self.head_dim), absorb)
        expand = replace(_full("q_b_proj", self.q_rank, heads * self.head_dim), chained=True)
        return (_full("q_a_proj", h, self.q_rank), expand, absorb)

    @property
    def kv_projections(self) -> tuple[Projection, ...]:
        """Products that make what the cache holds."""
        if self.kv_rank is not None:
            return (_full("kv_a_proj", self.hidden_size, self.kv_elements),)
        return (
            _full("k_proj", self.hidden_size, self.num_kv_heads * self.head_dim),
            _full("v_proj", self.hidden_size, self.num_kv_heads * self.value_dim),
        )

    @property
    def output_projections(self) -> tuple[Projection, ...]:
        """Products on the attention output."""
        out = _full("o_proj", self.num_heads * self.value_dim, self.hidden_size)
        if self.kv_rank is None:
            return (out,)
        heads = self.num_heads
        absorb = Projection(
            "absorb_v", heads * self.kv_rank, heads * self.value_dim, heads * self.kv_rank * self.value_dim
        )
        return (absorb, replace(out, chained=True))

    @property
    def projection_parameters(self) -> int:
        """Weights of all projections."""
        every = (*self.query_projections, *self.kv_projections, *self.output_projections)
        return sum(projection.weights for projection in every)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.projection_parameters + self.other_parameters


def _full(name: str, width_in: int, width_out: int) -> Projection:
    return Projection(name, width_in, width_out, width_in * width_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """The FFN of a layer: routed experts, with or without shared ones; a dense FFN is one expert."""

    hidden_size: int
    intermediate_size: int
    """h2 of one routed expert."""
    num_experts: int = 1
    """n_e."""
    top_k: int = 1
    """k."""
    matrices: int = 3
    """3 for gated FFNs (gate, up, down), 2 for plain ones (in, out)."""
    shared_size: int = 0
    """h2 of all shared experts together; they see every token."""
    expert_other_parameters: int = 0
    """Parameters of one routed expert beside its matrices (biases)."""
    shared_other_parameters: int = 0
    """Parameters beside the matrices of the shared experts (their gate, biases)."""
    router_parameters: int = 0
    routing: tuple[float, ...] | None = None
    """Probability that a token is sent to each expert (they add up to k); None: uniform."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            check_size(getattr(self, name), name, "a feed-forward")
        if self.routing is not None and (
            len(self.routing) != self.num_experts or not all(0 <= share <= 1 for share in self.routing)
        ):
            raise InvalidConfig(f"'routing' needs one probability for each of {self.num_experts} experts.")
        if self.top_k > self.num_experts:
            raise InvalidConfig(f"'top_k' must be <= num_experts={self.num_experts}: {self.top_k}")

    @property
    def routed(self) -> bool:
        """True where tokens choose among experts."""
        return self.num_experts > 1

    @property
    def expert_matrix_parameters(self) -> int:
        """Weights of one routed expert's matrices."""
        return self.matrices * self.hidden_size * self.intermediate_size

    @property
    def expert_parameters(self) -> int:
        """All parameters of one routed expert."""
        return self.expert_matrix_parameters + self.expert_other_parameters

    @property
    def shared_parameters(self) -> int:
        """Parameters of the shared experts."""
        return self.matrices * self.hidden_size * self.shared_size + self.shared_other_parameters

    @property
    def experts_parameters(self) -> int:
        """Parameters of all routed experts: what offloading streams."""
        return self.num_experts * self.expert_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One kind of transformer layer."""

    attention: Attention
    ffn: FeedForward
    cross_attention: Attention | None = None
    """Attention of a decoder layer over the encoder's output; its keys and values never change."""
    norm_parameters: int = 0

    @property
    def dense_parameters(self) -> int:
        """Parameters outside the routed experts; they stay on the GPU."""
        cross = self.cross_attention.parameters if self.cross_attention else 0
        ffn = self.ffn
        return self.attention.parameters + cross + ffn.shared_parameters + ffn.router_parameters + self.norm_parameters

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.dense_parameters + self.ffn.experts_parameters
