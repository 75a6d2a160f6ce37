"""Traces made to stated statistics.

A token chooses k experts without replacement, expert e with a weight exp(s ln(1/rank_e) + z_e(b)) in batch b: a
popularity that falls with its rank by a power law, and a mood of the batch. The moods are Gaussian,
z = σ (√ρ group + √(1-ρ) own), and each follows an autoregression z(b+1) = φ z(b) + √(1-φ²) new. Four knobs make four
statistics: σ the share of inactive experts, s the exponent of the popularity, φ what stays from batch to batch, ρ what
goes together. They are found by bisection on short pilot traces with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from hrm.errors import InvalidValue, UnknownName
from simulator.experts.statistics import STATISTICS, trace_statistics
from simulator.experts.trace import RoutingTrace
from simulator.kernels import compiled

__all__ = ["SYNTHETIC", "Knobs", "Routing", "draw_choices", "find_knobs", "synthesize", "synthetic_trace"]

_ROUNDS = 3
_HALVINGS = 9
_PILOT_CHOICES = 400_000
_PILOT_BATCHES = (80, 600)
_TOLERANCE = 0.05
# By statistic: the knob that makes it, and the most of it.
_KNOBS = {
    "zipf": ("skew", 5.0),
    "inactive_share": ("spread", 12.0),
    "stickiness": ("memory", 0.9),
    "group_correlation": ("together", 0.99),
}


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a synthetic trace is to look like. A statistic that is None is not asked for.

    References
    ----------
    The shapes of the presets and the inactive shares are those of "Towards MoE Deployment" (arXiv 2303.06182, Table I
    and the section on sparsity). Zipf exponents, stickiness and correlations are not published: they are assumptions.
    They are of the size that `trace_statistics` finds in a public trace of OLMoE, 64 experts, top-8
    (https://github.com/sqliteai/warp): exponent 0.68, stickiness 0.25 in batches of one token and 0.16 in batches of
    eight.
    """

    num_layers: int
    """MoE layers."""
    num_experts: int
    top_k: int
    batch_tokens: int
    """Tokens of one batch."""
    inactive_share: float | None = None
    """Share of a layer's experts that a batch does not use, mean over batches and layers."""
    zipf: float | None = None
    """Exponent of the popularity over the whole trace."""
    stickiness: float | None = None
    """0: a batch says nothing about the next; 1: the active set never changes. See `trace_statistics`."""
    group_correlation: float | None = None
    """Mean correlation over batches of the shares of two experts of one group."""
    group_size: int = 1
    """Experts with consecutive ids that go together; 1: none do."""
    about: str = ""
    """What is published, and what is assumed."""

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_experts", "top_k", "batch_tokens", "group_size"):
            if getattr(self, field) < 1:
                raise InvalidValue(f"{field!r} must be >= 1: {getattr(self, field)}")
        if self.top_k > self.num_experts:
            raise InvalidValue(f"'top_k' must be at most the {self.num_experts} experts: {self.top_k}")
        if self.num_experts % self.group_size:
            raise InvalidValue(f"'group_size' must divide the {self.num_experts} experts: {self.group_size}")
        for field in ("inactive_share", "stickiness", "group_correlation"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise InvalidValue(f"{field!r} must be at least 0 and below 1: {value}")
        if self.zipf is not None and not 0 <= self.zipf <= 4:
            raise InvalidValue(f"'zipf' must be between 0 and 4: {self.zipf}")
        if self.inactive_share is not None and round((1 - self.inactive_share) * self.num_experts) < self.top_k:
            raise InvalidValue(
                f"'inactive_share' {self.inactive_share} leaves fewer than the {self.top_k} experts of a token."
            )

    def asked(self) -> dict[str, float | None]:
        """The statistics by name, None where nothing is asked."""
        return {name: getattr(self, name) for name in STATISTICS if hasattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What the generator turns: see the module's first lines."""

    spread: float = 0.0
    """σ, standard deviation of a batch's moods."""
    skew: float = 0.0
    """s, exponent of the popularity behind the moods."""
    memory: float = 0.0
    """φ, correlation of an expert's mood with that of the batch before."""
    together: float = 0.0
    """ρ, share of a mood's variance that a group has in common."""


SYNTHETIC: dict[str, Routing] = {
    "lm": Routing(
        num_layers=12, num_experts=512, top_k=2, batch_tokens=8192, inactive_share=0.05, zipf=0.6, stickiness=0.15,
        group_correlation=0.1, group_size=8,
        about="12 MoE layers, E = 512, top-2, almost all experts active: published. 8,192 tokens (8 sequences of "
        "1,024), 5 % inactive, exponent, stickiness, groups and their correlation: assumed.",
    ),
    "mt-encoder": Routing(
        num_layers=6, num_experts=128, top_k=2, batch_tokens=2880, inactive_share=0.05, zipf=0.6, stickiness=0.15,
        group_correlation=0.1, group_size=8,
        about="6 MoE layers, E = 128, top-2, almost all experts active: published. 2,880 tokens (96 sentences of 30), "
        "5 % inactive, exponent, stickiness, groups and their correlation: assumed.",
    ),
    "mt-decoder": Routing(
        num_layers=6, num_experts=128, top_k=2, batch_tokens=96, inactive_share=0.75, zipf=0.6, stickiness=0.3,
        group_correlation=0.1, group_size=8,
        about="6 MoE layers, E = 128, top-2, 75 % inactive at batch 96 (one token of each sentence): published. "
        "Exponent, stickiness, groups and their correlation: assumed.",
    ),
    "mixtral": Routing(
        num_layers=32, num_experts=8, top_k=2, batch_tokens=1, zipf=0.2, stickiness=0.1,
        about="Mixtral 8x7B's 32 layers, E = 8, top-2: published. Decoding one token at a time, exponent and "
        "stickiness: assumed.",
    ),
    "uniform": Routing(
        num_layers=16, num_experts=64, top_k=8, batch_tokens=8,
        about="Every choice of 8 of 64 experts as likely as any other, whatever came before.",
    ),
}  # fmt: skip
"""Presets by name."""


def synthetic_trace(name: str, *, batches: int = 200, seed: int = 0, batch_tokens: int | None = None) -> RoutingTrace:
    """A trace of a preset.

    Parameters
    ----------
    name : str
        A key of `SYNTHETIC`.
    batches : int
        Batches to make.
    seed : int
        The same seed gives the same trace.
    batch_tokens : int, optional
        Other than the preset's.

    Raises
    ------
    UnknownName
        No such preset.
    """
    if name not in SYNTHETIC:
        raise UnknownName.of("synthetic trace", name, SYNTHETIC)
    routing = SYNTHETIC[name]
    if batch_tokens is not None:
        routing = replace(routing, batch_tokens=batch_tokens)
    return synthesize(routing, batches=batches, seed=seed, name=f"synthetic {name}, seed {seed}")


def synthesize(
    routing: Routing, *, batches: int, seed: int = 0, knobs: Knobs | None = None, name: str = ""
) -> RoutingTrace:
    """Make a trace.

    Parameters
    ----------
    routing : Routing
        Shape, and the statistics asked for.
    batches : int
        Batches to make, each of ``routing.batch_tokens`` tokens.
    seed : int
        Of all random numbers. Layers are independent of each other.
    knobs : Knobs, optional
        By default those that `find_knobs` finds.
    name : str, optional
        Of the trace.

    Examples
    --------
    >>> routing = Routing(num_layers=2, num_experts=16, top_k=2, batch_tokens=8)
    >>> synthesize(routing, batches=5)
    <RoutingTrace 'synthetic, seed 0': 40 tokens, 2 layers, top-2 of 16 experts, 5 batches>
    """
    if batches < 1:
        raise InvalidValue(f"'batches' must be >= 1: {batches}")
    if seed < 0:
        raise InvalidValue(f"'seed' must be >= 0: {seed}")
    knobs = find_knobs(routing, seed=seed) if knobs is None else knobs
    narrow = np.uint8 if routing.num_experts <= 256 else np.uint16
    tokens = batches * routing.batch_tokens
    experts = np.empty((tokens, routing.num_layers, routing.top_k), dtype=narrow)
    for layer in range(routing.num_layers):
        experts[:, layer] = _layer(routing, knobs, batches, np.random.default_rng([seed, layer]))
    return RoutingTrace(
        experts=experts,
        num_experts=routing.num_experts,
        batch_starts=np.arange(0, tokens, routing.batch_tokens),
        name=name or f"synthetic, seed {seed}",
    )


@lru_cache(maxsize=64)
def find_knobs(routing: Routing, *, seed: int = 0) -> Knobs:
    """Knobs that give the statistics asked for, by bisection in turn on pilots of one layer.

    Raises
    ------
    InvalidValue
        A statistic that cannot be had beside the others: it stays more than 0.05 away.
    """
    wanted = {name: value for name, value in routing.asked().items() if value is not None}
    turns = [(name, *_KNOBS[name]) for name in _KNOBS if name in wanted]
    spreads = [0.0]
    if "inactive_share" not in wanted and (wanted.get("stickiness") or wanted.get("group_correlation")):
        # Nothing fixes how strong moods are, but without any there is nothing to remember or to share.
        spreads = [1.0, 2.0, 4.0]
    batches = int(np.clip(_PILOT_CHOICES // (routing.batch_tokens * routing.top_k), *_PILOT_BATCHES))
    pilot = replace(routing, num_layers=1)

    def obtained(name: str, knobs: Knobs) -> float:
        trace = synthesize(pilot, batches=batches, seed=seed + 1, knobs=knobs)
        return float(trace_statistics(trace, group_size=routing.group_size, only=(name,))[name].mean())

    missed: dict[str, float] = {}
    for spread in spreads:
        knobs = Knobs(spread=spread)
        for _ in range(_ROUNDS if len(turns) > 1 else 1):
            for name, knob, high in turns:
                knobs = _bisect(partial(obtained, name), knobs, knob, high, wanted[name])
        found = {name: obtained(name, knobs) for name in wanted}
        missed = {name: got for name, got in found.items() if not abs(got - wanted[name]) <= _TOLERANCE}
        if not missed:
            return knobs
    name, got = next(iter(missed.items()))
    others = ", ".join(f"{other} {value}" for other, value in wanted.items() if other != name)
    raise InvalidValue(
        f"{name!r} {wanted[name]} cannot be had: {routing.batch_tokens} tokens a batch, top-{routing.top_k} of "
        f"{routing.num_experts} experts{', ' + others if others else ''} give {got:.2f}; change one of them."
    )


def _bisect(obtained: Callable[[Knobs], float], knobs: Knobs, knob: str, high: float, asked: float) -> Knobs:
    """The knob at which a statistic that grows with it is as asked, or the nearest end."""
    low = 0.0
    if obtained(replace(knobs, **{knob: low})) >= asked:
        return replace(knobs, **{knob: low})
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if obtained(replace(knobs, **{knob: middle})) < asked:
            low = middle
        else:
            high = middle
    return replace(knobs, **{knob: (low + high) / 2})


def _layer(routing: Routing, knobs: Knobs, batches: int, random: np.random.Generator) -> np.ndarray:
    """Choices of one layer, [tokens, k]."""
    count = routing.num_experts
    ranks = random.permutation(count) + 1.0
    popularity = -knobs.skew * np.log(ranks)
    groups = np.arange(count) // routing.group_size
    fresh = random.standard_normal((batches, count))
    if knobs.together and routing.group_size > 1:
        shared = random.standard_normal((batches, count // routing.group_size))[:, groups]
        fresh = np.sqrt(knobs.together) * shared + np.sqrt(1 - knobs.together) * fresh
    _remember(fresh, knobs.memory)
    logits = popularity + knobs.spread * fresh
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    # A weight of zero could leave fewer than k experts to choose from.
    cumulative = np.cumsum(np.maximum(weights, 1e-9), axis=1)
    chosen = np.empty((batches * routing.batch_tokens, routing.top_k), dtype=np.int32)
    _choose(cumulative, routing.batch_tokens, chosen, random)
    return chosen


def draw_choices(shares: np.ndarray, top_k: int, tokens: int, random: np.random.Generator) -> np.ndarray:
    """Choices of tokens that know nothing of each other, [tokens, k], distinct for every token.

    Parameters
    ----------
    shares : ndarray, [E]
        Probability that a token is sent to each expert; they add up to k. Exact where they are equal; otherwise very
        nearly met.
    top_k, tokens : int
    random : numpy.random.Generator
    """
    # As if every expert rang after a time of its own and the first k were taken: shares are those that ring by 1.
    weights = -np.log1p(-np.minimum(shares, 1 - 1e-9))
    chosen = np.empty((tokens, top_k), dtype=np.int32)
    _choose(np.cumsum(np.maximum(weights, 1e-12))[None], tokens, chosen, random)
    return chosen


@compiled
def _choose(cumulative, tokens, chosen, random):  # type: ignore[no-untyped-def]
    """k distinct experts for every token, one after the other by weight among those that are left."""
    batches, count = cumulative.shape
    k = chosen.shape[1]
    # Where to begin to look, for every 1/size of the weights.
    size = 2 * count
    guide = np.empty(size, np.int64)
    for b in range(batches):
        row = cumulative[b]
        whole = row[count - 1]
        expert = 0
        for bucket in range(size):
            while row[expert] * size < whole * bucket:
                expert += 1
            guide[bucket] = expert
        for t in range(tokens):
            at = b * tokens + t
            for choice in range(k):
                tries = 0
                while True:
                    draw = random.random()
                    expert = guide[int(draw * size)]
                    while expert < count - 1 and row[expert] <= draw * whole:
                        expert += 1
                    taken = False
                    for other in range(choice):
                        if chosen[at, other] == expert:
                            taken = True
                    if not taken:
                        break
                    tries += 1
                    if tries == 64:
                        expert = _left(row, chosen[at], choice, random.random())
                        break
                chosen[at, choice] = expert


@compiled
def _left(row, taken, count_taken, where):  # type: ignore[no-untyped-def]
    """One of the experts not yet taken, by weight, without trying again and again where a few have nearly all of it."""
    free = np.empty(len(row))
    before = 0.0
    for expert in range(len(row)):
        free[expert] = row[expert] - before
        before = row[expert]
    for i in range(count_taken):
        free[taken[i]] = 0.0
    target = where * free.sum()
    last = -1
    for expert in range(len(row)):
        if free[expert] > 0.0:
            last = expert
            target -= free[expert]
            if target <= 0.0:
                break
    return last


@compiled
def _remember(moods, memory):  # type: ignore[no-untyped-def]
    """Make white noise, [batches, E], an autoregression of the same variance, in place."""
    fresh = np.sqrt(1.0 - memory * memory)
    for b in range(1, len(moods)):
        for expert in range(moods.shape[1]):
            moods[b, expert] = memory * moods[b - 1, expert] + fresh * moods[b, expert]
