"""How much better than `next-use` a cache policy could guess from what was: a guess fitted in hindsight to a trace.

    python benchmarks/cache_headroom.py --trace FILE [--minutes 4] [--seed 0] [--out FILE.json]

What leaves a cache is, among the residents that the batch needs no more, the expert that is least likely to be used
soon. Here that likelihood is a weighted sum of many guesses: `next-use` itself; how often recent batches used an
expert, over six spans; votes of past batches like this one, alike in this layer or in all layers, in several forms;
products of these. The weights are those that miss least on the very trace, batches and slots that are judged, found
by random search from `next-use` on, for so many minutes. No policy could know them beforehand. What the search
reaches is neither a policy nor a bound on all of them, but says what weighing such guesses better could bring. Prints
miss rates as shares of inactive-first LIFO's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).resolve().parents[1]
# Python puts this file's folder first, where another benchmark's name hides a package.
sys.path[0] = str(_ROOT)

from executor.machine import machine_facts  # noqa: E402
from experiments.records import commit  # noqa: E402
from simulator.experts.cache import DEFAULT_POLICY, Min, NextUse  # noqa: E402
from simulator.experts.replay import layer_accesses, replay  # noqa: E402
from simulator.experts.trace import RoutingTrace  # noqa: E402
from simulator.kernels import compiled  # noqa: E402

_BATCHES, _SLOTS = (1, 4, 8), (8, 16, 32)
_SPANS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
_LOOK_BACK = 128
_STEP = 0.2


@compiled
def _misses(active, worth, slots):  # type: ignore[no-untyped-def]
    """Misses of all layers; `active` and `worth` are [layers, batches, experts]."""
    layers, batches, experts = active.shape
    missed = 0
    for layer in range(layers):
        there = np.zeros(experts, np.bool_)
        used = 0
        for b in range(batches):
            for wanted in range(experts):
                if not active[layer, b, wanted] or there[wanted]:
                    continue
                missed += 1
                if used < slots:
                    used += 1
                    there[wanted] = True
                    continue
                leaves, least = -1, 0.0
                for e in range(experts):
                    # Of experts that are needed yet the highest leaves, but only if there is no other.
                    if not there[e] or (e > wanted and active[layer, b, e]):
                        continue
                    if leaves < 0 or worth[layer, b, e] <= least:
                        leaves, least = e, worth[layer, b, e]
                if leaves < 0:
                    for e in range(experts):
                        leaves = e if there[e] else leaves
                there[leaves] = False
                there[wanted] = True
    return missed


def _next_use(active: np.ndarray) -> np.ndarray:
    """What `next-use` holds of every expert after each batch, at most 1."""
    layers, batches, experts = active.shape
    worth = np.zeros(active.shape)
    for layer in range(layers):
        policy = NextUse(1, experts)
        for b in range(batches):
            policy.start(np.flatnonzero(active[layer, b]).tolist())
            ranks = np.array([policy.rank(e, experts)[1] for e in range(experts)])
            worth[layer, b] = -ranks / max(1, -ranks.min())
    return worth


def _recent(active: np.ndarray, forget: float) -> np.ndarray:
    share, found = np.zeros(active.shape[::2]), np.zeros(active.shape)
    for b in range(active.shape[1]):
        share += (active[:, b] - share) * forget
        found[:, b] = share
    return found


def _votes(active: np.ndarray, alike: np.ndarray, power: int, passed_on: float) -> np.ndarray:
    """Of the batches after those like this one, the share that used each expert.

    `alike` is [layers, batches, batches]; its `power` is what a past batch gives to the batch after it, and
    `passed_on` of what a batch is given it gives to the one after itself.
    """
    found = np.zeros(active.shape)
    for layer in range(active.shape[0]):
        for b in range(1, active.shape[1]):
            first = max(0, b - _LOOK_BACK)
            given = (alike[layer, b, first:b] / max(1e-9, alike[layer, b, first:b].max())) ** power
            for i in range(1, len(given)):
                given[i] += passed_on * given[i - 1]
            found[layer, b] = given @ active[layer, first + 1 : b + 1] / max(1e-9, given.sum())
    return found


def _guesses(active: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Guesses of how soon every expert is used again, by name; none looks past the batch and layer it is made in."""
    used = active.astype(float)
    ours = _next_use(active)
    yield "next-use", ours
    yield "this batch", used
    recent = {forget: _recent(used, forget) for forget in _SPANS}
    for forget, share in recent.items():
        yield f"recent, 1/{1 / forget:.0f}", share
    common = np.einsum("lbe,lce->lbc", used, used)
    here = 2 * common
    here[:, 1:, 1:] += common[:, :-1, :-1]
    # Layers up to this one have seen this batch, those behind it the batch before.
    everywhere = common.cumsum(axis=0)
    everywhere[:, 1:, 1:] += (common.sum(axis=0) - everywhere)[:, :-1, :-1]
    votes = {}
    for where, alike in (("layer", here), ("all layers", everywhere)):
        for power, passed_on in ((4, 0.5), (8, 0.5), (8, 0.0), (16, 0.5), (24, 0.5), (48, 0.0)):
            name = f"like it in {where}, {power}, {passed_on:g}"
            votes[name] = _votes(used, alike, power, passed_on)
            yield name, votes[name]
    alike = votes["like it in layer, 8, 0.5"]
    yield "this batch x recent", used * recent[1 / 4]
    yield "alike x recent", alike * recent[1 / 16]
    yield "alike squared", alike**2
    yield "next-use squared", ours**2
    yield "next-use x alike", ours * alike


class Search:
    """Miss rates of weighted sums of guesses on one trace."""

    def __init__(self, trace: RoutingTrace) -> None:
        self._active, self._guesses, self._reference, self._best = {}, {}, {}, {}
        for batch in _BATCHES:
            layers = [layer_accesses(trace, layer=layer, batch=batch) for layer in range(trace.num_layers)]
            active = np.zeros((trace.num_layers, len(layers[0].offsets) - 1, trace.num_experts), bool)
            for layer, accesses in enumerate(layers):
                for b, experts in enumerate(accesses.batches()):
                    active[layer, b, experts] = True
            guesses = dict(_guesses(active))
            self.names = list(guesses)
            self._active[batch], self._guesses[batch] = active, np.stack(list(guesses.values()))
            for slots in _SLOTS:
                for kept, policy in ((self._reference, DEFAULT_POLICY), (self._best, Min.name)):
                    missed = sum(int(replay(policy, accesses, slots).sum(dtype=int)) for accesses in layers)
                    kept[batch, slots] = missed / active.sum()

    def rates(self, weights: np.ndarray) -> dict[tuple[int, int], float]:
        """Misses per access by batch and slots."""
        found = {}
        for batch, active in self._active.items():
            worth = np.tensordot(weights, self._guesses[batch], 1)
            for slots in _SLOTS:
                found[batch, slots] = _misses(active, worth, slots) / active.sum()
        return found

    def ratio(self, weights: np.ndarray) -> float:
        """Mean miss rate over inactive-first LIFO's."""
        return sum(self.rates(weights).values()) / sum(self._reference.values())

    def row(self, rates: dict[tuple[int, int], float] | None) -> dict[str, Any]:
        """Miss rates beside inactive-first LIFO's; MIN's for None."""
        ratios = {key: rate / self._reference[key] for key, rate in (rates or self._best).items()}
        return {
            "ratio_of_means": sum((rates or self._best).values()) / sum(self._reference.values()),
            "mean_of_ratios": float(np.mean(list(ratios.values()))),
            "ratios": [{"batch": b, "slots": k, "ratio": ratio} for (b, k), ratio in ratios.items()],
        }


def fitted(search: Search, seconds: float, seed: int) -> tuple[np.ndarray, int]:
    """The weights that miss least of those tried, and how many were."""
    numbers = np.random.default_rng(seed)
    weights = np.eye(len(search.names))[0]
    least, tried = search.ratio(weights), 1
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        changed = weights.copy()
        for i in numbers.choice(len(weights), numbers.integers(1, 3), replace=False):
            changed[i] += numbers.normal() * _STEP * max(0.2, abs(changed[i]))
        ratio = search.ratio(changed)
        tried += 1
        if ratio < least:
            weights, least = changed, ratio
            print(f"\r{tried:6} tried: {least:.4f}", end="", flush=True)
    print()
    return weights, tried


def main() -> None:
    """Search and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    search = Search(RoutingTrace.load(options.trace))
    weights, tried = fitted(search, 60 * options.minutes, options.seed)
    rows = {
        NextUse.name: search.row(search.rates(np.eye(len(weights))[0])),
        "fitted in hindsight": search.row(search.rates(weights)),
        Min.name: search.row(None),
    }
    print(f"misses as a share of those of {DEFAULT_POLICY}; batches of {_BATCHES} tokens, {_SLOTS} slots")
    for name, row in rows.items():
        each = " ".join(f"{cell['ratio']:.3f}" for cell in row["ratios"])
        print(
            f"{name:20} ratio of means {row['ratio_of_means']:.4f}, mean of ratios {row['mean_of_ratios']:.4f}: {each}"
        )
    if options.out:
        command = " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)])
        result = {
            "command": command,
            "machine": machine_facts(),
            "commit": commit(),
            "tried": tried,
            "rows": rows,
        }
        result["weights"] = dict(zip(search.names, weights.tolist(), strict=True))
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
