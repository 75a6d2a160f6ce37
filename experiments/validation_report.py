"""What a validation leaves behind: tables, pictures, and the text that a person reads."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from hrm import Hardware
from hrm.units import format_bandwidth, format_bytes, format_flops, format_seconds

__all__ = ["judged", "ranking", "render", "roofs", "write"]

_APART = 0.05
"""Two systems that differ by less are not ranked."""


def ranking(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Pairs of systems in one setting whose measured throughput differs by more than 5 %, and how many of them the
    prediction has in the right order."""
    right, wrong = 0, []
    for i, one in enumerate(cases):
        for other in cases[i + 1 :]:
            ratio = one["measured_tok_s"] / other["measured_tok_s"]
            if one["setting"] != other["setting"] or max(ratio, 1 / ratio) <= 1 + _APART:
                continue
            if (ratio > 1) == (one["predicted_tok_s"] > other["predicted_tok_s"]):
                right += 1
            else:
                wrong.append([one["name"], other["name"]])
    pairs = right + len(wrong)
    return {"pairs": pairs, "right": right, "share": right / pairs if pairs else None, "wrong": wrong}


def judged(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """How far predictions were off, over all cases and over the undisturbed ones, and the ranking of systems."""
    errors = [abs(row["error"]) for row in cases]
    quiet = [abs(row["error"]) for row in cases if not row["disturbed"]]
    return {
        "mean_abs_error": statistics.fmean(errors),
        "worst_abs_error": max(errors),
        "ranking": ranking(cases),
        "undisturbed": {
            "cases": len(quiet),
            "mean_abs_error": statistics.fmean(quiet) if quiet else None,
            "worst_abs_error": max(quiet, default=None),
        },
    }


def roofs(machine: Hardware) -> dict[str, float]:
    rates = machine.rates("measured")
    return {
        "device_gemm_flops": rates.gpu_gemm.peak,
        "device_expert_flops": rates.gpu_experts.peak,
        "device_read_bytes_per_s": float(machine.gpu.bandwidth),
        "cpu_attention_bytes_per_s": rates.cpu_attention.peak,
        "copy_bytes_per_s": rates.h2d_bandwidth,
        "staging_bytes_per_s": rates.staging_bandwidth,
        "task_hand_over_s": rates.task_s,
        "lanes_at_once": rates.cores.points[-1][1] if rates.cores else 0.0,
    }


def write(result: dict[str, Any], out: Path) -> None:
    import matplotlib.pyplot as plt
    import pandas as pd

    (out / "validation.json").write_text(json.dumps(result, indent=1) + "\n")
    flat = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in result["cases"]]
    pd.DataFrame(flat).to_csv(out / "cases.csv", index=False)
    figure, ax = plt.subplots(figsize=(5, 4.6), layout="constrained")
    measured = [row["measured_tok_s"] for row in result["cases"]]
    predicted = [row["predicted_tok_s"] for row in result["cases"]]
    top = 1.1 * max(measured + predicted)
    ax.plot([0, top], [0, top], color="black", linewidth=0.8)
    ax.fill_between([0, top], [0, 0.88 * top], [0, 1.12 * top], color="#54a24b", alpha=0.15, label="± 12 %")
    ax.scatter(measured, predicted, color="#1f4e79", zorder=3)
    for row in result["cases"]:
        ax.annotate(
            row["name"],
            (row["measured_tok_s"], row["predicted_tok_s"]),
            xytext=(4, -8),
            textcoords="offset points",
            fontsize=7,
        )
    ax.set(xlim=(0, top), ylim=(0, top), xlabel="measured tokens/s", ylabel="predicted tokens/s")
    ax.legend(frameon=False)
    figure.savefig(out / "predicted_vs_measured.png", dpi=130)
    plt.close(figure)


def render(result: dict[str, Any]) -> str:
    """The result as a person reads it: machine, plan, table of cases, errors."""
    machine, roofs = result["machine"], result["machine"]["roofline"]
    policy = result["plan"]["policy"]
    lines = [
        f"machine     {machine['cpu']}, {machine['cores']} cores, {format_bytes(machine['memory_bytes'])}"
        + (f", {machine['gpu']}" if "gpu" in machine else ", no GPU: device and host are two heaps"),
        f"versions    Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['date']}",
        f"measured    device GEMM {format_flops(roofs['device_gemm_flops'])}, "
        f"experts {format_flops(roofs['device_expert_flops'])}, "
        f"memory read {format_bandwidth(roofs['device_read_bytes_per_s'])}",
        f"            CPU attention {format_bandwidth(roofs['cpu_attention_bytes_per_s'])} of KV, "
        f"copies {format_bandwidth(roofs['copy_bytes_per_s'])}, "
        f"hand-over {format_seconds(roofs['task_hand_over_s'])}"
        + (f", {roofs['lanes_at_once']:.2f} lanes' worth at once" if roofs["lanes_at_once"] else ""),
        f"plan        N={policy['batch_size']} mu={policy['micro_batch_size']} G={policy['num_micro_batches']} "
        f"r_w={policy['weights_on_gpu']:.3f}: bound by the {result['plan']['predicted']['bottleneck']}",
        "",
    ]
    head = (
        f"{'case':<27}{'N':>4}{'mu':>4}{'G':>3}{'r_w':>6}{'gen':>5}{'link':>10} |{'predicted':>10}{'measured':>10}"
        f"{'error':>8} |{'prefill s':>13}{'decode s':>13} |{'link busy':>10}{'of bound':>9}{'others':>8}  most off"
    )
    lines += [head, "-" * len(head)]
    for row in result["cases"]:
        link = "none" if row["link_bandwidth"] is None else format_bandwidth(row["link_bandwidth"])
        prefill = f"{row['predicted_prefill_s']:.2f} {row['measured_prefill_s']:.2f}"
        decode = f"{row['predicted_decode_s']:.2f} {row['measured_decode_s']:.2f}"
        busy = f"{row['measured_utilization']['h2d']:.0%}"
        share = row["share_of_bound"]
        near = f"{share:.0%}" if share is not None else "-"
        lines.append(
            f"{row['name']:<27}{row['batch_size']:>4}{row['micro_batch_size']:>4}{row['num_micro_batches']:>3}"
            f"{row['weights_on_gpu']:>6.2f}{row['gen_len']:>5}{link:>10} |{row['predicted_tok_s']:>10.1f}"
            f"{row['measured_tok_s']:>10.1f}{row['error']:>+8.1%} |{prefill:>13}{decode:>13} |{busy:>10}{near:>9}"
            f"{row['cpu_taken_by_others']:>8.1%}  {row['most_off']} {row['most_off_s']:+.2f} s"
            + (" (disturbed)" if row["disturbed"] else "")
        )
    lines += [
        "-" * len(head),
        f"tokens/s: mean absolute error {result['mean_abs_error']:.1%}, worst {result['worst_abs_error']:.1%} over "
        f"{len(result['cases'])} cases; prefill and decode columns: predicted, measured",
    ]
    order = result["ranking"]
    if order["pairs"]:
        wrong = "; wrong: " + ", ".join(" / ".join(pair) for pair in order["wrong"]) if order["wrong"] else ""
        lines.append(
            f"ranking: {order['right']} of {order['pairs']} pairs of systems that differ by more than 5 % in one "
            f"setting predicted in the right order{wrong}"
        )
    quiet = result["undisturbed"]
    if 0 < quiet["cases"] < len(result["cases"]):
        lines.append(
            f"undisturbed cases alone ({quiet['cases']}): mean {quiet['mean_abs_error']:.1%}, "
            f"worst {quiet['worst_abs_error']:.1%}; in the others somebody else used the processor"
        )
    elif not quiet["cases"]:
        lines.append("every case was disturbed: others used the processor; repeat on a quiet machine")
    return "\n".join(lines)
