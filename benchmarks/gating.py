"""Static, Tutel-like and dynamic gating on the MoE layers of "Towards MoE Deployment" (arXiv 2303.06182, table I).

    python benchmarks/gating.py [--quick] [--shape lm|mt] [--threads N] [--out FILE.json] [--figure FILE.png]

Layers have the paper's sizes: LM with 512 experts, top-2, H 1024, FFN 4096, capacity 0.05; MT with 128 experts, top-2,
H 2048, FFN 8192, capacity 1; two matrices with biases and ReLU. Three things are scaled to a machine without a GPU:

- Batches are some hundred tokens at most.
- Weights are float32, and all experts of a layer would take 17 GB. There are as many distinct ones as --weights-memory
  holds; expert e has the weights of number e modulo that. Each expert is still computed by itself in order of ids, and
  the distinct ones are far larger than the caches, so that its weights come from memory every time.
- One process has all experts: no exchange between GPUs is in it.

Every gate runs the same loop over experts, so that what differs is how tokens get to them and how many rows there are:
"tutel" has the static gate's capacity, "tutel-adaptive" that of the fullest expert. All take their turn in every round,
on the same tokens; choices are uniform. Medians over the rounds are reported; ratios are medians of the rounds' ratios.

Peak activations are what tensors made during a pass take at its fullest, counted operator by operator while they are
held (executor.gating.live_bytes; a pass of its own that is not timed), beside what arithmetic says. Inputs, weights and
scratch memory inside operators are not in it. The largest batch is the one whose counted peak is within --budget while
that of one more token is not: by bisection, no memory is exhausted.

Prints tables and writes one JSON object with machine, versions, date, commit, command, and the share of the machine
that others used.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Python puts this file's folder first, where its own name could hide what is measured.
    sys.path[0] = str(_ROOT)

import torch  # noqa: E402

from executor.gating import Gating  # noqa: E402
from executor.gating.bench import Layer, largest_batch, measure, variants  # noqa: E402
from executor.gating.sizes import LM, MT  # noqa: E402
from executor.machine import OtherLoad, machine_facts  # noqa: E402
from experiments.experts.gating_report import draw_rows, measured_cells  # noqa: E402
from experiments.output import plain, table  # noqa: E402
from experiments.records import commit  # noqa: E402
from hrm.gating import GATING_VARIANTS  # noqa: E402
from hrm.units import format_bytes, parse_bytes  # noqa: E402

_SHAPES = {"lm": LM, "mt": MT}
_BATCHES = {"lm": (16, 64, 256, 512), "mt": (4, 16, 48)}
_QUICK = {"lm": (16, 64), "mt": (4, 16)}


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Dynamic gating against each other gate, by batch: time as the median of the rounds' ratios, and peaks."""
    found = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        by_gate = {row["gating"]: row for row in rows if row["tokens"] == tokens}
        dynamic = by_gate.pop("dynamic")
        for name, row in by_gate.items():
            each = [other / own for other, own in zip(row["samples"], dynamic["samples"], strict=True)]
            found.append(
                {
                    "tokens": tokens,
                    "against": name,
                    "speedup": statistics.median(each),
                    "speedup_min": min(each),
                    "speedup_max": max(each),
                    "memory": row["peak_bytes"] / dynamic["peak_bytes"],
                }
            )
    return found


def one_shape(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one layer."""
    shape = _SHAPES[name]
    layer = Layer.random(shape, max_bytes=options.weights_memory)
    print(f"\n{name}: {layer.distinct} distinct of {shape.num_experts} experts, {format_bytes(layer.weight_bytes)}")
    gates = variants(shape)
    rows: list[dict[str, Any]] = []
    for tokens in options.batch or (_QUICK if options.quick else _BATCHES)[name]:
        new = measure(layer, tokens, gates, rounds=options.rounds)
        rows += new
        _print_rows(new)
    found = ratios(rows)
    cells = [[r["tokens"], r["against"], f"{r['speedup']:.2f}", f"{r['memory']:.2f}"] for r in found]
    print(table(["tokens", "dynamic against", "speed", "memory"], cells), flush=True)
    result = {
        "shape": asdict(shape),
        "distinct_experts": layer.distinct,
        "weight_bytes": layer.weight_bytes,
        "rows": rows,
        "ratios": found,
    }
    if not options.no_largest:
        result["largest_batch"] = {
            "budget_bytes": options.budget,
            "gatings": {gate: _largest(layer, gating, gate, options.budget) for gate, gating in gates.items()},
        }
    return result


def _largest(layer: Layer, gating: Gating, name: str, budget: int) -> dict[str, int]:
    found = largest_batch(layer, gating, budget)
    print(f"largest batch within {format_bytes(budget)}, {name}: {found['tokens']} tokens", flush=True)
    return found


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [measured_cells(row) | {"others": f"{row['other_load']:.0%}"} for row in rows]
    titles = ["gating", "tokens", "time", "tokens/s", "peak", "computed", "waste", "dropped", "others"]
    print(table(titles, [[row[title] for title in titles] for row in shown]), flush=True)


def save_figure(path: Path, shapes: Mapping[str, Any]) -> None:
    """Throughput and memory against batch, a line of panels per layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.0 * len(shapes)), layout="constrained")
    panels = figure.subplots(len(shapes), 2, squeeze=False)
    for (speed, memory), (name, result) in zip(panels, shapes.items(), strict=True):
        draw_rows(result["rows"], speed, memory)
        shape = result["shape"]
        speed.set_title(f"{name}: {shape['num_experts']} experts, H {shape['hidden']}, C {shape['capacity_factor']:g}")
    figure.savefig(path, dpi=130)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(_SHAPES), action="append", help="default: both")
    parser.add_argument("--batch", type=int, action="append", help="tokens; default: some for each layer")
    parser.add_argument("--quick", action="store_true", help="two rounds, fewer batches, a budget of 16 MiB")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--weights-memory", type=parse_bytes, default=parse_bytes("2GiB"))
    parser.add_argument("--budget", type=parse_bytes, help="of activations, for the largest batch (default: 64 MiB)")
    parser.add_argument("--no-largest", action="store_true", help="leave the largest batch out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and report."""
    options = _options(arguments)
    options.rounds = options.rounds or (2 if options.quick else 3)
    if options.budget is None:
        options.budget = parse_bytes("16MiB" if options.quick else "64MiB")
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    result: dict[str, Any] = {
        "command": shlex.join(["python", *(sys.argv if arguments is None else ["benchmarks/gating.py", *arguments])]),
        "machine": machine_facts(),
        "commit": commit(),
        "threads": options.threads,
        "rounds": options.rounds,
        "gatings": list(GATING_VARIANTS),
        "shapes": {},
    }
    with OtherLoad() as load:
        for name in dict.fromkeys(options.shape or _SHAPES):
            result["shapes"][name] = one_shape(name, options)
            gc.collect()
    result["other_load"], result["seconds"] = load.share, time.monotonic() - started
    print(f"\n{result['seconds']:.0f} s; others used {load.share:.0%} of the machine")
    if options.out:
        options.out.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    if options.figure:
        save_figure(options.figure, result["shapes"])


if __name__ == "__main__":
    main()
