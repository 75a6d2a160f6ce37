"""Whole models under expert parallelism: seconds of a pass, bytes on one GPU, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from hrm.errors import DoesNotFit, InvalidValue
from hrm.gating import GatingName
from hrm.layers import Attention, Layer
from hrm.model import MoEModel
from simulator.experts.gating_cost import Buffering, Cluster, GatingCost, Program, gating_cost

__all__ = ["DenseProgram", "Pass", "PassCost", "dense_twin", "largest_batch", "pass_cost", "weight_bytes"]


@dataclass(frozen=True, kw_only=True)
class DenseProgram:
    """How everything beside the experts is programmed: fairseq's eager kernels, counted in its transformer layers.

    References
    ----------
    https://github.com/facebookresearch/fairseq, fairseq/modules: transformer_layer.py, multihead_attention.py;
    fairseq/utils.py, log_softmax in float32.
    """

    launch_s: float = 10e-6
    """As in `Program`."""
    attention_kernels: int = 18
    """Projections with biases, scaling, transposes, two batched products, softmax and its casts, residual, norm."""
    ffn_kernels: int = 6
    layer_passes: float = 24.0
    """Reads and writes of a [tokens, hidden] activation in a layer, outside its products."""
    score_bytes: float = 16.0
    """Bytes moved per attention score: written in 2-byte floats, softmax in float32 (2 + 4), cast (4 + 2), and
    read (2)."""
    score_peak_bytes: float = 8.0
    """Bytes alive per attention score: in float32 once, in 2-byte floats twice."""
    cache_passes: float = 3.0
    """Reads and writes of the KV cache in a decode step: a new copy with one more token (2), and attention (1)."""
    logit_bytes: float = 12.0
    """Bytes moved per logit: written, read for log-softmax, written and read in float32."""
    logit_peak_bytes: float = 6.0
    """Bytes alive per logit: a 2-byte float and its logarithm in float32."""
    hidden_copies: float = 6.0
    """Activations of [tokens, hidden] alive at once: input, residual, queries, keys, values, output."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of every GPU over its own tokens."""

    tokens: int
    """S of each GPU."""
    context: int
    """Tokens that a token attends to: in a pass over whole sequences their length, in a decode step the cache."""
    stack: Literal["decoder", "encoder"] = "decoder"
    source: int = 0
    """Tokens of the encoder's output that a decoder token attends to."""
    cached: bool = False
    """A decode step: keys and values come from caches."""
    head_rows: int | None = None
    """Tokens whose logits are computed; None: all, in a decoder."""

    def __post_init__(self) -> None:
        for name in ("tokens", "context"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name!r} must be >= 1: {getattr(self, name)}")
        if self.stack not in ("decoder", "encoder"):
            raise InvalidValue(f"'stack' must be 'decoder' or 'encoder': {self.stack!r}")

    def logits(self) -> int:
        """Rows of the LM head."""
        if self.head_rows is not None:
            return self.head_rows
        return self.tokens if self.stack == "decoder" else 0


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Seconds and bytes of a pass on one GPU."""

    seconds: dict[str, float]
    """By term: those of `GatingCost`, summed over MoE layers, and attention, ffn, head."""
    weight_bytes: float
    activation_bytes: float
    """Peak of what lives beside the weights, KV caches included."""
    cache_bytes: float
    """KV caches, part of the activations."""
    gating: GatingCost | None
    """One of the MoE layers."""

    @property
    def total(self) -> float:
        """Seconds of the pass."""
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> float:
        """Weights and activations."""
        return self.weight_bytes + self.activation_bytes


def dense_twin(model: MoEModel) -> MoEModel:
    """The model with one expert, without router, in place of every MoE layer: the dense model it was made from."""
    kinds = []
    for layer in model.kinds:
        if layer.ffn.routed:
            layer = replace(layer, ffn=replace(layer.ffn, num_experts=1, top_k=1, router_parameters=0, routing=None))
        kinds.append(layer)
    return replace(model, name=f"{model.name} (dense twin)", kinds=tuple(kinds))


def weight_bytes(model: MoEModel, devices: int, *, slots: float | None = None) -> float:
    """Bytes of weights on one GPU: all that is dense, and its part of every layer's experts.

    Parameters
    ----------
    slots : float, optional
        With expert buffering, K: at most so many experts per MoE layer of the decoder stay on the GPU.
    """
    total = model.dense_bytes
    for stack, order in (("decoder", model.order), ("encoder", model.encoder_order)):
        for kind in order:
            ffn = model.kinds[kind].ffn
            if not ffn.routed:
                total += ffn.experts_parameters * model.expert_element_bytes
                continue
            held = ffn.num_experts / devices
            if slots is not None and stack == "decoder":
                held = min(held, slots)
            total += held * ffn.expert_parameters * model.expert_element_bytes
    return total


def pass_cost(
    model: MoEModel,
    cluster: Cluster,
    work: Pass,
    gating: GatingName,
    *,
    capacity_factor: float = 1.0,
    adaptive_capacity: float | None = None,
    busiest: float = 1.0,
    active_share: float = 1.0,
    program: Program | None = None,
    dense_program: DenseProgram | None = None,
    buffering: Buffering | None = None,
) -> PassCost:
    """Seconds and bytes of one pass; parameters as for `gating_cost`. A dense model has no use for them."""
    order = model.order if work.stack == "decoder" else model.encoder_order
    if not order:
        raise InvalidValue(f"'stack' is 'encoder', but {model.name} has none.")
    dense = _Dense(model, cluster, work, dense_program or DenseProgram())
    seconds = {"attention": 0.0, "ffn": 0.0}
    peak, gate = 0.0, None
    costs: dict[int, GatingCost] = {}
    for kind in order:
        layer = model.kinds[kind]
        seconds["attention"] += dense.attention(layer)
        peak = max(peak, dense.attention_bytes(layer))
        if not layer.ffn.routed:
            seconds["ffn"] += dense.ffn(layer)
            peak = max(peak, dense.ffn_bytes(layer))
            continue
        if kind not in costs:
            costs[kind] = gating_cost(
                layer.ffn, cluster, work.tokens, gating, capacity_factor=capacity_factor,
                adaptive_capacity=adaptive_capacity, busiest=busiest, active_share=active_share,
                element_bytes=model.expert_element_bytes, program=program, buffering=buffering,
            )  # fmt: skip
        gate = costs[kind]
        for term, value in gate.seconds.items():
            seconds[term] = seconds.get(term, 0.0) + value
        peak = max(peak, gate.activation_bytes)
    if work.logits():
        seconds["head"] = dense.head()
        peak = max(peak, dense.head_bytes())
    cache = dense.cache_bytes()
    base = dense.program.hidden_copies * work.tokens * model.hidden_bytes
    return PassCost(
        seconds=seconds,
        weight_bytes=weight_bytes(model, cluster.devices, slots=buffering.slots if buffering else None),
        activation_bytes=base + peak + cache,
        cache_bytes=cache,
        gating=gate,
    )


@dataclass(frozen=True)
class _Dense:
    model: MoEModel
    cluster: Cluster
    work: Pass
    program: DenseProgram

    def product(self, rows: float, weights: float) -> float:
        rates = self.cluster.rates
        moved = weights * self.model.dense_element_bytes
        return max(2 * rows * weights / float(rates.gpu_gemm.at(rows)), moved / rates.gpu_bandwidth)

    def attention(self, layer: Layer) -> float:
        s, p, h = self.work.tokens, self.program, self.model.hidden_bytes
        seconds = self.product(s, layer.attention.projection_parameters) + self._scores(
            layer.attention, self.work.context
        )
        kernels = p.attention_kernels
        if layer.cross_attention is not None:
            cross = layer.cross_attention
            asked = sum(x.weights for x in (*cross.query_projections, *cross.output_projections))
            seconds += self.product(s, asked) + self._scores(cross, self.work.source)
            kernels *= 2
        seconds += p.layer_passes * s * h / self.cluster.rates.gpu_bandwidth
        return max(seconds, kernels * p.launch_s)

    def _scores(self, attention: Attention, context: int) -> float:
        rates, p = self.cluster.rates, self.program
        pairs = float(self.work.tokens) * context
        compute = pairs * attention.prefill_pair_flops / float(rates.gpu_attention.at(context))
        moved = pairs * attention.num_heads * p.score_bytes
        if self.work.cached:
            moved += p.cache_passes * pairs * attention.kv_elements * self.model.kv_dtype_bytes
        return max(compute, moved / rates.gpu_bandwidth)

    def ffn(self, layer: Layer) -> float:
        s, ffn, p = self.work.tokens, layer.ffn, self.program
        wide = (ffn.matrices - 1) * ffn.intermediate_size
        seconds = self.product(s, ffn.expert_matrix_parameters)
        seconds += 2 * s * wide * self.model.dtype_bytes / self.cluster.rates.gpu_bandwidth
        return max(seconds, p.ffn_kernels * p.launch_s)

    def head(self) -> float:
        rows, model = self.work.logits(), self.model
        moved = self.program.logit_bytes * rows * model.vocab_size / self.cluster.rates.gpu_bandwidth
        return self.product(rows, model.vocab_size * model.hidden_size) + moved

    # -- bytes ------------------------------------------------------------------------------------

    def attention_bytes(self, layer: Layer) -> float:
        pairs = float(self.work.tokens) * max(self.work.context, self.work.source)
        return self.program.score_peak_bytes * pairs * layer.attention.num_heads

    def ffn_bytes(self, layer: Layer) -> float:
        wide = (layer.ffn.matrices - 1) * layer.ffn.intermediate_size
        return 2.0 * self.work.tokens * wide * self.model.dtype_bytes

    def head_bytes(self) -> float:
        return self.program.logit_peak_bytes * self.work.logits() * self.model.vocab_size

    def cache_bytes(self) -> float:
        if not self.work.cached:
            return 0.0
        total = 0.0
        for layer in self.model.layers:
            total += layer.attention.kv_elements * self.work.context
            if layer.cross_attention is not None:
                total += layer.cross_attention.kv_elements * self.work.source
        return total * self.work.tokens * self.model.kv_dtype_bytes


def largest_batch(
    memory_of: Callable[[int], float], limit: float, *, ladder: float | None = None, start: int = 1, most: int = 1 << 20
) -> int:
    """The largest batch whose bytes stay within `limit`.

    Parameters
    ----------
    memory_of : callable
        Bytes of a batch; never less for a larger one.
    limit : float
        Bytes.
    ladder : float, optional
        Consider only `start` times powers of this; None: every whole number.
    start : int
        Smallest batch.

    Raises
    ------
    DoesNotFit
        Not even `start` does.

    Examples
    --------
    >>> largest_batch(lambda n: 10.0 * n, 95.0), largest_batch(lambda n: 10.0 * n, 95.0, ladder=2)
    (9, 8)
    """
    if memory_of(start) > limit:
        raise DoesNotFit(
            f"a batch of {start} needs {memory_of(start) / 2**30:.1f} GiB of the GPU's {limit / 2**30:.1f} GiB; take "
            "more nodes or fewer tokens."
        )
    batch = start
    if ladder is not None:
        while batch * ladder <= most and memory_of(round(batch * ladder)) <= limit:
            batch = round(batch * ladder)
        return batch
    step = 1
    while batch + step <= most and memory_of(batch + step) <= limit:
        batch, step = batch + step, 2 * step
    while step:
        if batch + step <= most and memory_of(batch + step) <= limit:
            batch += step
        step //= 2
    return batch
