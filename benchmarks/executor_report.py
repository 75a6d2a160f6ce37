"""What `benchmarks/executor.py` says of its runs: medians and ratios, a table, and a bar chart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.executor_cases import Case
from executor.checkpoint import Checkpoint

__all__ = ["report", "save_figure", "table"]

_REFERENCE = "moe-lightning"
_MIB = 2**20


def report(case: Case, checkpoint: Checkpoint, rows: Sequence[dict[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """A case's results, by link and entry, from the rows of its plans and runs."""
    links: dict[str, dict[str, Any]] = {}
    plans = {(r["link"], r["entry"]): r for r in rows if r["kind"] == "plan"}
    runs = [r for r in rows if r["kind"] == "run"]
    answers: list[int] = next(
        (r["answers"] for name in order for r in runs if r["entry"] == name and "answers" in r), []
    )
    for link in dict.fromkeys(link for link, _ in plans):
        entries = {}
        for name in order:
            if (link, name) in plans:
                mine = [r for r in runs if (r["link"], r["entry"]) == (link, name)]
                entries[name] = _entry(plans[link, name], mine, answers)
        fastest = entries.get(_REFERENCE, {}).get("median_tok_s")
        for entry in entries.values():
            if fastest and "median_tok_s" in entry:
                entry["moe_lightning_times_faster"] = fastest / entry["median_tok_s"]
        links[link] = entries
    probed = next((r["facts"] for r in rows if r["kind"] == "probe"), None)
    model = checkpoint.model
    return {
        "about": case.about,
        "model": {
            "catalog": None if case.checkpoint else case.model,
            "changes": case.changes,
            "dtype": model.dtype,
            "layers": model.num_layers,
            "parameters": model.num_parameters,
            "bytes": checkpoint.size_bytes,
        },
        "prompts": case.num_requests,
        "prompt_lens": list(case.prompt_lens),
        "gen_len": case.gen_len,
        "device_memory": case.device_memory,
        "link_bandwidth": case.link_bandwidth,
        "probe": probed,
        "links": links,
    }


def _entry(plan: dict[str, Any], runs: Sequence[dict[str, Any]], answers: Sequence[int]) -> dict[str, Any]:
    if "skipped" in plan:
        return {"skipped": plan["skipped"]}
    kept = ("policy", "described", "batch_size", "requests", "predicted_tok_s")
    entry = {key: plan[key] for key in kept if key in plan}
    failures = [r["failed"] for r in runs if "failed" in r]
    if failures:
        entry["failed"] = failures[0]
    done = [r for r in runs if "tok_s" in r]
    if not done:
        return entry
    entry["tok_s"] = [r["tok_s"] for r in done]
    entry["median_tok_s"] = statistics.median(entry["tok_s"])
    if "predicted_tok_s" in entry:
        entry["prediction_error"] = entry["predicted_tok_s"] / entry["median_tok_s"] - 1
    entry["prefill_s"] = statistics.median(r["prefill_s"] for r in done)
    entry["decode_s"] = statistics.median(r["seconds"] - r["prefill_s"] for r in done)
    for key in ("peak_device_bytes", "peak_host_bytes", "fetched_bytes", "batch_size"):
        if key in done[-1]:
            entry[key] = done[-1][key]
    entry["cpu_taken_by_others"] = [r["cpu_taken_by_others"] for r in done]
    same = [a == b for r in done for a, b in zip(answers, r["answers"], strict=False)]
    entry["same_answers"] = sum(same) / len(same)
    return entry


def table(name: str, case: dict[str, Any]) -> str:
    """A case's results as text; "others": most of the processor that others took during any of the runs."""
    size, (shortest, longest) = case["model"]["bytes"] / _MIB, case["prompt_lens"]
    lines = [
        f"{name}: {case['about']}",
        f"  {size:.0f} MiB of {case['model']['dtype']} weights, {case['prompts']} prompts of {shortest} to {longest} "
        f"tokens, {case['gen_len']} generated, {case['device_memory'] / _MIB:.0f} MiB on the device",
    ]
    for link, entries in case["links"].items():
        pace = f" at {case['link_bandwidth'] / 1e9:g} GB/s" if link == "paced" else ""
        lines.append(
            f"  {link + pace:16} {'predicted':>9} {'measured':>9} {'lowest':>8} {'highest':>8} {'slower':>7} "
            f"{'device':>9} {'answers':>8} {'others':>6}  policy"
        )
        for entry, found in entries.items():
            if "tok_s" not in found:
                why = found.get("skipped") or found.get("failed") or "not run yet"
                lines.append(f"  {entry:16} {why}")
                continue
            predicted = f"{found['predicted_tok_s']:9.2f}" if "predicted_tok_s" in found else f"{'':9}"
            ratio = found.get("moe_lightning_times_faster")
            lines.append(
                f"  {entry:16} {predicted} {found['median_tok_s']:9.2f} {min(found['tok_s']):8.2f} "
                f"{max(found['tok_s']):8.2f} {f'{ratio:.2f}x' if ratio else '':>7} "
                f"{found['peak_device_bytes'] / _MIB:5.0f} MiB {found['same_answers']:8.1%} "
                f"{max(found['cpu_taken_by_others']):6.0%}  {found['described']}"
            )
    return "\n".join(lines)


def save_figure(result: dict[str, Any], path: Path) -> None:
    """Bars of measured medians with the range of the rounds; a mark where the simulator predicted one."""
    from matplotlib.figure import Figure

    panels = [(name, link) for name, case in result["cases"].items() for link in case["links"]]
    columns = max(1, max((len(case["links"]) for case in result["cases"].values()), default=1))
    figure = Figure(figsize=(5.2 * columns, 3.2 * max(1, -(-len(panels) // columns))), layout="constrained")
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, link) in zip(axes, panels, strict=False):
        case = result["cases"][name]
        done = {entry: found for entry, found in case["links"][link].items() if "tok_s" in found}
        names = list(done)
        medians = [found["median_tok_s"] for found in done.values()]
        below = [m - min(found["tok_s"]) for m, found in zip(medians, done.values(), strict=True)]
        above = [max(found["tok_s"]) - m for m, found in zip(medians, done.values(), strict=True)]
        colours = ["C7" if entry.startswith("accelerate") else "C0" for entry in names]
        axis.barh(names, medians, xerr=[below, above], color=colours, capsize=3)
        marks = [(found["predicted_tok_s"], entry) for entry, found in done.items() if "predicted_tok_s" in found]
        if marks:
            axis.plot(*zip(*marks, strict=True), "D", color="C1", markersize=6, label="predicted")
            axis.legend(loc="lower right")
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel("generated tokens per second")
        pace = f" at {case['link_bandwidth'] / 1e9:g} GB/s" if link == "paced" else ""
        title = f"{name}: {case['device_memory'] / _MIB:.0f} MiB on the device, link {link}{pace}"
        axis.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=130)
