"""Gates measured on a layer with random weights: seconds, peak of activations, and the largest batch of a budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from executor.gating.base import Gating, GatingStats
from executor.gating.ffn import gated_ffn
from executor.gating.live_bytes import peak_bytes
from executor.gating.make import make_gating
from executor.gating.sizes import LayerShape, gating_sizes
from executor.kernels import ExpertWeights
from executor.machine import OtherLoad
from hrm.errors import DoesNotFit, InvalidValue
from hrm.gating import GATING_VARIANTS
from hrm.units import format_bytes

__all__ = ["Layer", "draw_choices", "largest_batch", "measure", "variants"]

_DRAW = 256
"""Tokens whose choices are drawn at a time, so that a smaller batch is the beginning of a larger one."""


def variants(shape: LayerShape, names: Sequence[str] = GATING_VARIANTS) -> dict[str, Gating]:
    """Gates by name, at a layer's capacity factor."""
    known = {
        "static": make_gating("static", capacity_factor=shape.capacity_factor),
        "tutel": make_gating("tutel", capacity_factor=shape.capacity_factor),
        "tutel-adaptive": make_gating("tutel"),
        "dynamic": make_gating("dynamic"),
    }
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class Layer:
    """A layer's experts with random weights.

    Where memory is short, experts share weights: expert e has those of number ``e % distinct``. Every expert is still
    computed by itself, in order of ids, so that its weights come from memory as they would if they were its own, as
    long as all distinct ones together are larger than the caches.
    """

    shape: LayerShape
    experts: list[ExpertWeights]
    distinct: int
    """Sets of weights that there are."""
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def random(
        cls,
        shape: LayerShape,
        *,
        max_bytes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Layer:
        """As many distinct experts as `max_bytes` hold.

        Raises
        ------
        DoesNotFit
            If not even one does.
        """
        each = shape.expert_parameters * dtype.itemsize
        distinct = min(shape.num_experts, max_bytes // each)
        if not distinct:
            raise DoesNotFit(
                f"one expert takes {format_bytes(each)}, and its weights may take {format_bytes(max_bytes)}."
            )
        h, i = shape.hidden, shape.intermediate
        generator = torch.Generator().manual_seed(seed)
        # Repeated blocks of random numbers: fresh ones would take longer than what is measured.
        block = torch.randn(min(each // dtype.itemsize, 2**20 + 7), generator=generator)

        def noise(*size: int) -> torch.Tensor:
            count = 1
            for n in size:
                count *= n
            whole = block.repeat(-(-count // block.numel()))[:count].view(size) * size[-1] ** -0.5
            return whole.to(device, dtype)

        sets = [ExpertWeights([noise(i, h)], [noise(h, i)], noise(i), noise(h)) for _ in range(distinct)]
        experts = [sets[e % distinct] for e in range(shape.num_experts)]
        return cls(shape, experts, distinct, dtype, torch.device(device))

    @property
    def weight_bytes(self) -> int:
        """Of the distinct sets of weights."""
        return self.distinct * self.shape.expert_parameters * self.dtype.itemsize

    def inputs(
        self, tokens: int, *, skew: float = 0.0, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states ``[S, H]`` and the choices of `draw_choices`."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, self.shape.hidden, generator=generator).to(self.device, self.dtype)
        index, weight = draw_choices(self.shape, tokens, skew=skew, seed=seed)
        return x, index.to(self.device), weight.to(self.device, self.dtype)

    def run(
        self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gating: Gating
    ) -> tuple[torch.Tensor, GatingStats]:
        """One pass."""
        return gated_ffn(x, index, weight, self.experts, torch.relu_, gating)


def draw_choices(
    shape: LayerShape, tokens: int, *, skew: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random choices ``[S, k]`` and their weights; the same seed gives smaller batches the first tokens of larger ones.

    Parameters
    ----------
    skew : float
        0: every expert is as likely as any other. Else the r-th expert in a random order has the odds of 1/r^skew
        (Zipf), drawn without replacement.
    """
    if skew < 0:
        raise InvalidValue(f"'skew' must be >= 0: {skew}")
    order = torch.randperm(shape.num_experts, generator=torch.Generator().manual_seed(seed))
    log_odds = -skew * torch.log1p(order.float())
    parts = []
    for first in range(0, tokens, _DRAW):
        generator = torch.Generator().manual_seed(seed + 1 + first)
        # The largest of Gumbel noise plus log odds are draws without replacement.
        noise = -torch.log(-torch.log(torch.rand(_DRAW, shape.num_experts, generator=generator).clamp_(1e-9, 1 - 1e-6)))
        parts.append((log_odds + noise).topk(shape.top_k))
    if not parts:
        return torch.empty(0, shape.top_k, dtype=torch.int64), torch.empty(0, shape.top_k)
    score, index = (torch.cat([part[i] for part in parts])[:tokens] for i in (0, 1))
    return index, score.softmax(dim=-1)


def measure(
    layer: Layer,
    tokens: int,
    gates: Mapping[str, Gating],
    *,
    rounds: int = 3,
    skew: float = 0.0,
    seed: int = 0,
    note: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Every gate on the same tokens, taking turns; one row per gate.

    The first pass of each, under `LiveBytes`, gives the peak of activations and is not timed.

    Returns
    -------
    list of dict
        ``seconds`` is the median over the rounds, ``samples`` all of them in order, ``other_load`` the share of the
        machine that others used. Computed columns: ``computed_bytes`` and what `GatingSizes` holds.
    """
    if tokens < 1:
        raise InvalidValue(f"'tokens' must be >= 1: {tokens}")
    x, index, weight = layer.inputs(tokens, skew=skew, seed=seed)
    fullest = int(torch.bincount(index.flatten(), minlength=layer.shape.num_experts).max())
    peaks: dict[str, int] = {}
    stats: dict[str, GatingStats] = {}
    samples: dict[str, list[float]] = {name: [] for name in gates}
    loads: dict[str, list[float]] = {name: [] for name in gates}
    with torch.no_grad():
        for name, gating in gates.items():
            _say(note, f"{tokens} tokens, {name}")
            peaks[name], stats[name] = _peak(layer, (x, index, weight), gating)
        for turn in range(rounds):
            for name, gating in gates.items():
                _say(note, f"{tokens} tokens, {name}, round {turn + 1}")
                with OtherLoad() as load:
                    started = _now(layer.device)
                    layer.run(x, index, weight, gating)
                    samples[name].append(_now(layer.device) - started)
                loads[name].append(load.share)
    rows = []
    for name, gating in gates.items():
        did = stats[name]
        sizes = gating_sizes(
            gating, layer.shape, tokens, fullest=fullest, dropped=did.dropped, itemsize=layer.dtype.itemsize
        )
        seconds = statistics.median(samples[name]) if rounds else None
        computed = asdict(sizes)
        rows.append(
            {
                "gating": name,
                "shape": layer.shape.name,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_s": tokens / seconds if seconds else None,
                "peak_bytes": peaks[name],
                "computed_bytes": computed.pop("peak_bytes"),
                "waste_factor": did.waste_factor,
                "dropped": did.dropped,
                "lost_tokens": did.lost_tokens,
                "padded": did.padded,
                **{key: value for key, value in computed.items() if key != "waste_factor"},
                "fullest_expert": fullest,
                "samples": samples[name],
                "other_load": statistics.median(loads[name]) if rounds else None,
            }
        )
    return rows


def largest_batch(
    layer: Layer, gating: Gating, budget: int, *, skew: float = 0.0, seed: int = 0, limit: int = 1 << 17
) -> dict[str, int]:
    """The most tokens whose measured peak of activations is within `budget` bytes, by bisection.

    Arithmetic says where to begin; what counts are passes under `LiveBytes` at the answer and one token above it.

    Returns
    -------
    dict
        ``tokens``, ``peak_bytes`` there, ``next_peak_bytes`` one token above (0 at the limit), ``passes``.
    """
    measured: dict[int, int] = {0: 0}

    def peak(tokens: int) -> int:
        if tokens not in measured:
            with torch.no_grad():
                measured[tokens] = _peak(layer, layer.inputs(tokens, skew=skew, seed=seed), gating)[0]
        return measured[tokens]

    index, _ = draw_choices(layer.shape, limit, skew=skew, seed=seed)

    def computed(tokens: int) -> int:
        fullest = int(torch.bincount(index[:tokens].flatten(), minlength=layer.shape.num_experts).max())
        return gating_sizes(gating, layer.shape, tokens, fullest=fullest, itemsize=layer.dtype.itemsize).peak_bytes

    low = _bisect(lambda n: computed(n) <= budget, 0, limit + 1)
    high, step = low + 1, 1
    while low > 0 and peak(low) > budget:
        low, high, step = max(0, low - step), low, 2 * step
    while high <= limit and peak(high) <= budget:
        low, high, step = high, min(limit + 1, high + step), 2 * step
    found = _bisect(lambda n: peak(n) <= budget, low, high)
    return {
        "tokens": found,
        "peak_bytes": peak(found),
        "next_peak_bytes": peak(found + 1) if found < limit else 0,
        "passes": len(measured) - 1,
    }


def _bisect(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number that fits, where `low` does and `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _peak(
    layer: Layer, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], gating: Gating
) -> tuple[int, GatingStats]:
    found: list[GatingStats] = []
    peak = peak_bytes(lambda: found.append(layer.run(*inputs, gating)[1]))
    return peak, found[0]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _say(note: Callable[[str], None] | None, what: str) -> None:
    if note:
        note(what)
