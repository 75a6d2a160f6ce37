"""Tables, files and figures of ``hrm experts gating``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.output import plain, table
from hrm.units import format_bytes, format_seconds

__all__ = ["draw_rows", "measured_cells", "measured_text", "predicted_text", "write_files"]


def measured_text(result: Mapping[str, Any]) -> str:
    """The table of a measurement, and how much faster dynamic gating is."""
    shape, weights = result["shape"], result["weights"]
    head = (
        f"{shape['name']}: {shape['num_experts']} experts, top-{shape['top_k']}, H {shape['hidden']}, "
        f"I {shape['intermediate']}, capacity {shape['capacity_factor']:g} of the tokens; "
        f"{weights['distinct_experts']} distinct experts in {format_bytes(weights['bytes'])} of {weights['dtype']}"
    )
    shown = [measured_cells(row) for row in result["rows"]]
    text = f"{head}\n{table(list(shown[0]), [list(row.values()) for row in shown])}"
    ratios = _ratios(result["rows"])
    if ratios:
        text += "\n" + "\n".join(ratios)
    if "largest_batch" in result:
        budget = format_bytes(result["largest_batch"]["budget_bytes"])
        found = result["largest_batch"]["gatings"]
        cells = [[name, at["tokens"], format_bytes(at["peak_bytes"])] for name, at in found.items()]
        text += f"\n\n{table([f'within {budget}', 'tokens', 'peak'], cells)}"
    return text


def measured_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A measured row as it is shown, by column title."""
    return {
        "gating": row["gating"],
        "tokens": row["tokens"],
        "time": format_seconds(row["seconds"]),
        "tokens/s": f"{row['tokens_per_s']:.4g}",
        "peak": format_bytes(row["peak_bytes"]),
        "computed": format_bytes(row["computed_bytes"]),
        "masks": format_bytes(row["mask_bytes"]),
        "buffer": format_bytes(row["buffer_bytes"]),
        "waste": f"{row['waste_factor']:.3g}",
        "dropped": row["dropped"],
        "GFLOP": f"{(row['expert_flops'] + row['dispatch_flops']) / 1e9:.4g}",
    }


def predicted_text(result: Mapping[str, Any]) -> str:
    """The table of a prediction, with what its seconds are made of."""
    shape, where = result["shape"], result["hardware"]
    terms = list(dict.fromkeys(term for row in result["rows"] for term in row["terms"]))
    cells = [
        [
            row["gating"],
            row["tokens"],
            format_seconds(row["seconds"]),
            f"{row['tokens_per_s']:.4g}",
            format_bytes(row["computed_bytes"]),
            f"{row['waste_factor']:.3g}",
            *(format_seconds(row["terms"][term]) if term in row["terms"] else "-" for term in terms),
        ]
        for row in result["rows"]
    ]
    head = (
        f"predicted, one MoE layer of {shape['name']} (H {shape['hidden']}, I {shape['intermediate']}) on "
        f"{where['devices']} GPUs of {where['nodes']} x {where['name']}, tokens per GPU"
    )
    text = f"{head}\n{table(['gating', 'tokens', 'time', 'tokens/s', 'peak', 'waste', *terms], cells)}"
    return "\n".join([text, *_ratios(result["rows"])])


def _ratios(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dynamic gating's throughput over the others', a line per batch."""
    lines = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        speed = {row["gating"]: row["tokens_per_s"] for row in rows if row["tokens"] == tokens}
        others = [name for name in speed if "dynamic" in speed and name != "dynamic"]
        if others:
            found = ", ".join(f"{speed['dynamic'] / speed[name]:.2f}x {name}" for name in others)
            lines.append(f"{tokens} tokens: dynamic gating has {found}")
    return lines


def write_files(folder: Path, result: Mapping[str, Any]) -> str:
    """JSON, CSV and a figure; returns the line that says so."""
    import pandas as pd
    from matplotlib.figure import Figure

    where = result.get("hardware")
    name = f"gating-{result['shape']['name']}" + (f"-{where['name']}-{where['nodes']}" if where else "")
    (folder / f"{name}.json").write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    frame = pd.DataFrame([{k: v for k, v in row.items() if k not in ("samples", "terms")} for row in result["rows"]])
    frame.to_csv(folder / f"{name}.csv", index=False)
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    draw_rows(result["rows"], speed, memory)
    figure.savefig(folder / f"{name}.png", dpi=150)
    return f"\nwritten to {folder / name}.json, .csv and .png"


def draw_rows(rows: Sequence[Mapping[str, Any]], speed: Any, memory: Any) -> None:
    """Throughput on one axes and peak activations (measured: points, computed: lines) on the other, against batch."""
    for number, name in enumerate(dict.fromkeys(row["gating"] for row in rows)):
        mine = [row for row in rows if row["gating"] == name]
        tokens, color = [row["tokens"] for row in mine], f"C{number}"
        speed.plot(tokens, [row["tokens_per_s"] for row in mine], "o-", color=color, label=name)
        memory.plot(tokens, [row["computed_bytes"] / 2**20 for row in mine], "-", color=color, alpha=0.6)
        measured = [row for row in mine if "peak_bytes" in row]
        memory.plot([r["tokens"] for r in measured], [r["peak_bytes"] / 2**20 for r in measured], "o", color=color)
    batches = list(dict.fromkeys(row["tokens"] for row in rows))
    for axes, label in ((speed, "tokens/s"), (memory, "peak activations, MiB (lines: computed)")):
        axes.set(xscale="log", yscale="log", xlabel="tokens in the batch", ylabel=label)
        axes.set_xticks(batches, [str(tokens) for tokens in batches])
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
    speed.legend()
