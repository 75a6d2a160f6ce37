"""What `benchmarks/gpu.py` leaves behind: tables, figures and a summary, from the records of its parts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof import Proof, without_result
from experiments.records import say
from experiments.reproduce.published_rows import system_label, throughput_rows
from experiments.rooflines import measured_points
from experiments.validation_report import judged, roofs, write
from hrm import Hardware
from hrm.errors import InvalidValue
from hrm.units import format_bandwidth, format_bytes, format_flops
from simulator import Timeline

__all__ = ["failures", "report", "system_ratios"]

_PUBLISHED = {"S1": "T4", "S2": "L4"}
_FILES = ("*.json.gz", "gantt-*.png", "machine.json", "peers.json")
_OTHERS = ("exact", "sanitizer", "peers", "upper")
_LARGEST = 8 * 2**20
"""Bytes of a file that is still copied to the results: timelines of long runs stay where they are."""


def report(proof: Proof) -> Path:
    """Collect all records into the folder of results.

    Raises
    ------
    InvalidValue
        If no case has ended yet.
    """
    out = proof.options.results
    runs = proof.latest("run")
    rows = [_row(record) for record in runs if "row" in record]
    if not rows:
        raise InvalidValue(f"no case has ended in {str(proof.options.out)!r}; run --part validate first.")
    out.mkdir(parents=True, exist_ok=True)
    machine = Hardware.from_file(proof.options.out / "machine.json")
    result = {
        "cases": rows,
        **judged(rows),
        "machine": {**machine.facts, "roofline": roofs(machine)},
        "model": {
            "catalog": proof.options.model,
            "layers": proof.model.num_layers,
            "parameters": proof.model.num_parameters,
            "dtype": proof.model.dtype,
        },
        "ratios": system_ratios(rows),
        "failed": {_name(r): r["failed"] for r in (*proof.latest("cases"), *runs) if "failed" in r},
        "left_out": _left_out(proof),
    }
    for kind in _OTHERS:
        result[kind] = proof.latest(kind)
    made = [record for kind in ("run", *_OTHERS) for record in proof.latest(kind) if without_result(record) is None]
    result["commits"] = dict(Counter(str(record.get("commit") or "unknown") for record in made))
    for pattern in _FILES:
        for file in proof.options.out.glob(pattern):
            if file.stat().st_size <= _LARGEST:
                shutil.copy(file, out / file.name)
            else:
                say(f"{file} is {format_bytes(file.stat().st_size)} and stays there.")
    (out / "config.json").write_text(json.dumps(proof.model_config, indent=2) + "\n")
    write(result, out)
    _bound_figure(rows, out / "decode_and_bound.png")
    _roofline_figure(machine, proof.options.out, out / "roofline.png")
    (out / "summary.md").write_text("\n".join(_summary(result)) + "\n", encoding="utf-8")
    say(f"results are in {out}")
    return out


def failures(proof: Proof, parts: Sequence[str], caps: Sequence[str]) -> list[str]:
    """What failed of these parts and caps, in a few words each: also answers that differ and a program's exit code.

    In the part ``upper`` the largest batches may fail: that is what it finds out.
    """
    failed = [
        _name(row) for row in (*proof.latest("cases"), *proof.latest("run")) if "failed" in row and row["cap"] in caps
    ]
    found = {"validate": failed, "exact": [], "sanitizer": [], "peers": []}
    for row in proof.latest("exact"):
        if "failed" in row or row["equal"] < row["requests"]:
            found["exact"].append(f"exact: {row['family']}, {row['system']}, {row['policy']}")
    for row in (*proof.latest("sanitizer"), *proof.latest("peers")):
        if "failed" in row or row.get("exit_code"):
            found[row["kind"]].append(f"{row['kind']}: {row['tool']}" if "tool" in row else row["kind"])
    return [name for part in parts for name in found.get(part, [])]


def _name(record: dict[str, Any]) -> str:
    """Of a case, or of a cap for which there are none."""
    return f"{record['cap']}, {record['case']}" if "case" in record else f"cap {record['cap']}"


def _left_out(proof: Proof) -> dict[str, dict[str, str]]:
    """By cap, what was not run and why; what ran before the limits were narrowed has a result all the same."""
    runs = proof.latest("run")
    found = {row["cap"]: dict(row.get("left_out", {})) for row in proof.latest("cases")}
    for row in runs:
        if "no_time" in row:
            found.setdefault(row["cap"], {})[row["case"]] = row["no_time"]
        else:
            found.get(row["cap"], {}).pop(row["case"], None)
    return found


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """A case's row under a name and a setting that other caps do not have."""
    row, cap = record["row"], record["cap"]
    ffn = {f"ffn_{key}": value for key, value in row["ffn"].items()}
    own = {"name": f"{cap}: {row['name']}", "setting": f"{cap}: {row['setting']}", "commit": record.get("commit")}
    return {**row, **ffn, **own}


def system_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how much MoE-Lightning's schedule is faster than every other system, padded: measured, predicted, published.

    Published are MoE-Lightning(p)'s on MTBench with Mixtral 8x7B on one T4 and one L4 at the same generation length.
    """
    found = []
    for ours in rows:
        if ours["system"] != "moe-lightning" or not ours["setting"].endswith(": padded"):
            continue
        for other in rows:
            if other["setting"] == ours["setting"] and other["system"] != "moe-lightning":
                ratios = {
                    "measured": ours["measured_tok_s"] / other["measured_tok_s"],
                    "predicted": ours["predicted_tok_s"] / other["predicted_tok_s"],
                }
                published = _published(other["system"], ours["gen_len"])
                found.append({"cap": ours["cap"], "system": other["system"], **ratios, **published})
    return found


def _published(system: str, gen_len: int) -> dict[str, float]:
    """The paper's ratios by machine."""
    by_setting: dict[str, dict[str, float]] = {}
    for row in throughput_rows():
        if row.setting in _PUBLISHED and row.gen_len == gen_len and row.split == "calibration" and row.padded:
            by_setting.setdefault(row.setting, {})[row.system] = row.throughput_tok_s
    return {
        _PUBLISHED[setting]: systems["moe-lightning"] / systems[system]
        for setting, systems in by_setting.items()
        if system in systems and "moe-lightning" in systems
    }


# -- figures -------------------------------------------------------------------------------------------


def _decode(row: dict[str, Any], side: str) -> float:
    return float(row["batch_size"] * (row["gen_len"] - 1) / row[f"{side}_decode_s"])


def _bound_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Decode of every case: measured, predicted, and what no schedule can pass."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["gen_len"] > 1]
    figure, ax = plt.subplots(figsize=(8, 1.8 + 0.27 * len(rows)), layout="constrained")
    places = range(len(rows))
    ax.barh(places, [_decode(row, "measured") for row in rows], color="#9ecae1", label="measured")
    ax.plot([_decode(row, "predicted") for row in rows], places, "D", color="#1f4e79", label="predicted")
    bounds = [(row["bound_decode_tok_s"], place) for place, row in enumerate(rows) if row["bound_decode_tok_s"]]
    if bounds:
        ax.plot(*zip(*bounds, strict=True), "|", color="#d62728", markersize=12, label="no schedule can pass")
    ax.set_yticks(list(places), [row["name"] for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("tokens per second in decode")
    ax.set_xscale("log")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _roofline_figure(machine: Hardware, folder: Path, path: Path) -> None:
    """The machine's measured roofs, and what the planned runs' tasks achieved under them."""
    import matplotlib.pyplot as plt
    import pandas as pd

    from hrm.plots import roofline

    frames = []
    for file in sorted(folder.glob("measured-*.json.gz")):
        points = measured_points(Timeline.load(file), machine)
        cap = file.name.removeprefix("measured-").removesuffix(".json.gz")
        frames.append(points.assign(name=points["name"] + f", {cap}"))
    if frames:
        ax = roofline(machine, measured=pd.concat(frames, ignore_index=True), title="measured roofs, planned runs")
        ax.figure.savefig(path, dpi=130)
        plt.close(ax.figure)


# -- summary -------------------------------------------------------------------------------------------


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[str]:
    rows = [list(map(str, head)), ["---"] * len(head), *([str(cell) for cell in line] for line in lines)]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _summary(result: dict[str, Any]) -> Iterator[str]:
    machine, model, best = result["machine"], result["model"], result["machine"]["roofline"]
    yield f"# Predicted and measured: {machine.get('gpu') or 'rehearsal without a GPU'}"
    yield ""
    commits = result["commits"]
    if len(commits) > 1:
        counted = ", ".join(f"{commit} ({count})" for commit, count in commits.items())
        yield f"**Results of {len(commits)} versions of the code stand side by side here: {counted}.**"
        yield ""
    yield (
        f"{model['catalog']}, {model['layers']} layers, {model['dtype']}, random weights (near uniform routing), "
        f"{model['parameters'] / 1e9:.1f} B parameters. {machine['cpu']}, {machine['cores']} cores, "
        f"{format_bytes(machine['memory_bytes'])}. Python {machine['python']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, {machine['date']}, commit {', '.join(commits)}."
    )
    yield ""
    yield (
        f"Probe: GEMM {format_flops(best['device_gemm_flops'])}, experts {format_flops(best['device_expert_flops'])}, "
        f"memory read {format_bandwidth(best['device_read_bytes_per_s'])}, link "
        f"{format_bandwidth(best['copy_bytes_per_s'])}, CPU attention "
        f"{format_bandwidth(best['cpu_attention_bytes_per_s'])}. Every prediction was made from probe constants, "
        "before its run."
    )
    yield ""
    yield (
        f"tokens/s: mean absolute error {result['mean_abs_error']:.1%}, worst {result['worst_abs_error']:.1%} over "
        f"{len(result['cases'])} cases; {_undisturbed(result)}. {result['ranking']['right']} of "
        f"{result['ranking']['pairs']} pairs of systems that differ by more than 5 % in one setting predicted in "
        "the right order."
    )
    yield ""
    yield from _cases(result["cases"])
    yield from _systems(result["ratios"])
    yield from _rest(result)


def _undisturbed(result: dict[str, Any]) -> str:
    quiet, all_cases = result["undisturbed"], len(result["cases"])
    if quiet["cases"] == all_cases:
        return "others disturbed none of them"
    if not quiet["cases"]:
        return "others disturbed all of them"
    return (
        f"without the {all_cases - quiet['cases']} that others disturbed {quiet['mean_abs_error']:.1%}, worst "
        f"{quiet['worst_abs_error']:.1%}"
    )


def _cases(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Cases"
    yield ""
    head = ("case", "system", "N", "μ", "r_w", "prompts", "gen", "predicted", "measured", "error", "link busy",
            "of bound", "experts: of GEMM, of read", "peak of cap")  # fmt: skip
    lines = []
    for row in rows:
        ffn = row["ffn"]
        near = f"{ffn['of_gemm']:.0%}, {ffn['of_read']:.0%} ({ffn['near']})" if ffn else ""
        prompts = f"{min(row['prompt_lens'])}-{max(row['prompt_lens'])}"
        sizes = (row["batch_size"], row["micro_batch_size"], f"{row['weights_on_gpu']:.2f}", prompts, row["gen_len"])
        speeds = (f"{row['predicted_tok_s']:.1f}", f"{row['measured_tok_s']:.1f}", f"{row['error']:+.1%}")
        shares = (_share(row["h2d_busy_in_decode"]), _share(row["share_of_bound"]), near, _share(row["peak_of_cap"]))
        name = row["name"] + (" (disturbed)" if row["disturbed"] else "")
        lines.append((name, row["system"], *sizes, *speeds, *shares))
    yield from _table(head, lines)
    yield "Where the time of a decode step went:"
    yield ""
    for row in rows:
        yield f"- {row['name']}: {row['loss']}"
    yield ""


def _systems(ratios: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not ratios:
        return
    yield "## MoE-Lightning's tokens/s over each system's, all prompts padded"
    yield ""
    machines = list(_PUBLISHED.values())
    lines = [
        (
            r["cap"],
            system_label(r["system"], False) if r["system"] != "fastdecode" else "FastDecode-like",
            f"{r['measured']:.2f}",
            f"{r['predicted']:.2f}",
            *(f"{r[name]:.2f}" if name in r else "" for name in machines),
        )
        for r in ratios
    ]
    head = ("cap", "system", "measured", "predicted", *(f"published, {name}" for name in machines))
    yield from _table(head, lines)


def _rest(result: dict[str, Any]) -> Iterator[str]:
    if result["exact"]:
        yield "## Tokens beside transformers' own, float32"
        yield ""
        lines = [
            (
                r["family"],
                r["system"],
                r["policy"],
                without_result(r) or f"{r['equal']} of {r['requests']}" + (" DIFFER" * (r["equal"] < r["requests"])),
            )
            for r in result["exact"]
        ]
        yield from _table(("family", "system", "policy", "equal answers"), lines)
    for r in result["sanitizer"]:
        ended = without_result(r) or f"exit code {r['exit_code']}: {r['last_lines'][-1:]}"
        yield f"compute-sanitizer, {r['tool']}: {ended}"
        yield ""
    yield from _upper(result["upper"], result["model"]["layers"])
    for r in result["peers"]:
        ended = without_result(r) or f"exit code {r['exit_code']}; its table is in peers.json"
        yield f"Beside Hugging Face Accelerate (`benchmarks/executor.py`): {ended}"
        yield ""
    for what in ("failed", "left_out"):
        if any(result[what].values()):
            yield f"## {what.replace('_', ' ').capitalize()}"
            yield ""
            yield from (f"- {name}: {_reasons(why)}" for name, why in result[what].items() if why)
            yield ""


def _reasons(why: str | dict[str, str]) -> str:
    return why if isinstance(why, str) else "; ".join(f"{name}: {reason}" for name, reason in why.items())


def _upper(records: Sequence[dict[str, Any]], whole: int) -> Iterator[str]:
    done = {(r["who"], r["batch_size"]): r for r in records if "decode_tok_s" in r}
    if not done:
        return
    layers = next(iter(done.values()))["layers"]
    yield f"## Everything on the device, {layers} layers: decode tokens/s"
    yield ""
    lines = []
    for batch in sorted({batch for _, batch in done}):
        theirs, ours = (done.get((who, batch), {}).get("decode_tok_s") for who in ("transformers", "executor"))
        ratio = f"{ours / theirs:.2f}" if ours and theirs else ""
        cells = [f"{x:.1f}" if x else "did not run" for x in (theirs, ours)]
        lines.append((batch, *cells, ratio))
    yield from _table(("batch", "transformers", "executor", "ratio"), lines)
    if layers < whole:
        longer = f"{whole / layers:.2f} times as long"
        yield f"On a device that held all {whole} layers a step would take about {longer}, layer by layer."
        yield ""
