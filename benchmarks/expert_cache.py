"""How fast traces are replayed through caches of experts, policy by policy, in one thread.

    python benchmarks/expert_cache.py [--quick] [--trace FILE] [--out FILE.json]

Four traces: OLMoE's shape in batches of 8 tokens, Mixtral's and that of the paper's language model (512 experts, top-2)
one token at a time, and Mixtral's shape at the size of
405 sequences x 2,048 tokens, which one policy after the other replays whole. With --trace also miss rates of all
policies on a trace of one's own, at batches of 1, 4 and 8 tokens and 8, 16 and 32 slots. Times are medians of rounds in
which every policy takes its turn; processor seconds are those of the thread itself. Prints a table and writes one JSON
object with machine, versions and command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(_ROOT)

import numba  # noqa: E402
import numpy as np  # noqa: E402

from executor.machine import OtherLoad, machine_facts  # noqa: E402
from experiments.records import commit  # noqa: E402
from simulator.experts.cache import CACHE_POLICIES, DEFAULT_POLICY, NextUse  # noqa: E402
from simulator.experts.replay import layer_accesses, replay  # noqa: E402
from simulator.experts.study import miss_rates, replay_warm_up  # noqa: E402
from simulator.experts.synthesis import Knobs, Routing, synthesize  # noqa: E402
from simulator.experts.trace import RoutingTrace  # noqa: E402

# Moods and popularity as in a public OLMoE trace: exponent about 0.7, stickiness about 0.2.
_KNOBS = Knobs(spread=1.0, skew=0.5, memory=0.6)
_OLMOE = Routing(num_layers=2, num_experts=64, top_k=8, batch_tokens=8)
_MIXTRAL = Routing(num_layers=2, num_experts=8, top_k=2, batch_tokens=1)
_LM = Routing(num_layers=2, num_experts=512, top_k=2, batch_tokens=1)
_LARGE = Routing(num_layers=32, num_experts=8, top_k=2, batch_tokens=1)


def speeds(routing: Routing, *, tokens: int, slots: int, rounds: int) -> dict[str, Any]:
    """Accesses per second of every policy, and of finding active sets; medians over `rounds`."""
    trace = synthesize(routing, batches=tokens // routing.batch_tokens, knobs=_KNOBS)
    layers = [layer_accesses(trace, layer=layer) for layer in range(trace.num_layers)]
    accesses = sum(map(len, layers))
    seconds: dict[str, list[float]] = {name: [] for name in ("active sets", *CACHE_POLICIES)}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    misses = {}
    for _ in range(rounds):
        started, busy = time.perf_counter(), time.thread_time()
        for layer in range(trace.num_layers):
            layer_accesses(trace, layer=layer)
        seconds["active sets"].append(time.perf_counter() - started)
        processor["active sets"].append(time.thread_time() - busy)
        for policy in CACHE_POLICIES:
            started, busy = time.perf_counter(), time.thread_time()
            missed = [replay(policy, layer, slots) for layer in layers]
            seconds[policy].append(time.perf_counter() - started)
            processor[policy].append(time.thread_time() - busy)
            misses[policy] = sum(int(part.sum(dtype=np.int64)) for part in missed)
    return {
        "experts": routing.num_experts, "top_k": routing.top_k, "layers": routing.num_layers,
        "tokens": trace.num_tokens, "batch": routing.batch_tokens, "slots": slots,
        "accesses": accesses, "rounds": rounds,
        "policies": {
            name: {
                "accesses_per_s": accesses / statistics.median(times), "median_s": statistics.median(times),
                "min_s": min(times), "max_s": max(times), "processor_s": statistics.median(processor[name]),
                **({"miss_rate": misses[name] / accesses} if name in misses else {}),
            }
            for name, times in seconds.items()
        },
    }  # fmt: skip


def large(tokens: int, *, slots: int) -> dict[str, Any]:
    """One whole replay of Mixtral's shape per policy, from the tokens' choices to miss rates."""
    started = time.perf_counter()
    trace = synthesize(_LARGE, batches=tokens, knobs=_KNOBS)
    result: dict[str, Any] = {
        "tokens": tokens, "layers": 32, "experts": 8, "top_k": 2, "batch": 1, "slots": slots,
        "trace_bytes": trace.experts.nbytes, "synthesis_s": time.perf_counter() - started, "policies": {},
    }  # fmt: skip
    for policy in CACHE_POLICIES:
        started = time.perf_counter()
        [found] = miss_rates(trace, batches=[1], slots=[slots], policies=[policy])
        whole = time.perf_counter() - started
        row = found.row()
        result["accesses"] = row["accesses"]
        result["policies"][policy] = {"whole_s": whole, "replay_s": row["seconds"], "miss_rate": row["miss_rate"]}
        print(f"  {policy:22} {whole:7.1f} s, of it replay {row['seconds']:7.1f} s", flush=True)
    return result


def rates(path: Path) -> dict[str, Any]:
    """Miss rates on a trace of one's own, and how our policy compares with the paper's."""
    trace = RoutingTrace.load(path)
    parts: dict[str, Any] = {}
    for label, part in zip(("whole", "first half", "second half"), (trace, *trace.split()), strict=True):
        found = miss_rates(part, batches=[1, 4, 8], slots=[8, 16, 32], policies=list(CACHE_POLICIES))
        by = {(r.policy, r.batch, r.slots): r.miss_rate for r in found}
        cells = [(b, k) for b in (1, 4, 8) for k in (8, 16, 32)]
        ours, theirs = ([by[policy, *cell] for cell in cells] for policy in (NextUse.name, DEFAULT_POLICY))
        parts[label] = {
            "rows": [{"policy": p, "batch": b, "slots": k, "miss_rate": rate} for (p, b, k), rate in by.items()],
            "mean_of_ratios": statistics.mean(a / b for a, b in zip(ours, theirs, strict=True)),
            "ratio_of_means": sum(ours) / sum(theirs),
        }
        print(f"{label}: {NextUse.name} / {DEFAULT_POLICY}: mean of ratios {parts[label]['mean_of_ratios']:.4f}")
    return {"trace": trace.name, "tokens": trace.num_tokens} | parts


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller traces, three rounds")
    parser.add_argument("--trace", type=Path, help="miss rates on this trace, too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds, scale = (3, 10) if options.quick else (9, 1)
    command = " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)])
    result: dict[str, Any] = {
        "command": command,
        "machine": machine_facts(),
        "commit": commit(),
        "numba": numba.__version__,
    }
    replay_warm_up()
    with OtherLoad() as load:
        for label, routing, tokens, slots in (
            ("olmoe", _OLMOE, 80_000, 16), ("mixtral", _MIXTRAL, 400_000, 4), ("lm", _LM, 100_000, 64)
        ):  # fmt: skip
            result[label] = speeds(routing, tokens=tokens // scale, slots=slots, rounds=rounds)
            print(f"{label}, batch {routing.batch_tokens}, {slots} slots, {result[label]['accesses']:,} accesses")
            for name, row in result[label]["policies"].items():
                print(f"  {name:22} {row['accesses_per_s'] / 1e6:8.2f} M accesses/s", flush=True)
        print("405 sequences x 2,048 tokens, Mixtral's shape, batch 1")
        result["large"] = large(405 * 2048 // scale, slots=4)
    result["other_load_share"] = load.share
    if options.trace:
        result["own_trace"] = rates(options.trace)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
