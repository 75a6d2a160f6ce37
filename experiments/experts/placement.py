"""``hrm experts placement``: which device holds which expert, by several methods, judged on what comes later."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from experiments.options import json_option
from experiments.output import emit, make_folder, progress_bar, table
from hrm.errors import InvalidValue, UnknownName
from simulator.experts.load import device_loads, judge
from simulator.experts.placement import PLACEMENT_METHODS, Placement, check_devices, place
from simulator.experts.trace import RoutingTrace

__all__ = ["draw_loads", "placement_command"]

_FAST = ("even", "greedy", "anti-correlation", "refined", "greedy-replicated")


def _trace(path: Path | None, synthetic: str | None, batches: int, seed: int) -> RoutingTrace:
    if (path is None) == (synthetic is None):
        raise InvalidValue("give either '--trace FILE' or '--synthetic NAME'.")
    if path is not None:
        return RoutingTrace.load(path)
    from simulator.experts.synthesis import synthetic_trace

    return synthetic_trace(str(synthetic), batches=batches, seed=seed)


def _methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return list(PLACEMENT_METHODS)
    for name in names:
        if name not in PLACEMENT_METHODS:
            raise UnknownName.of("placement method", name, [*PLACEMENT_METHODS, "all"])
    if not names:
        raise InvalidValue(f"'--method' names no method; known: {', '.join(PLACEMENT_METHODS)}, all.")
    return list(dict.fromkeys(names))


def _place(
    history: RoutingTrace, method: str, devices: int, batch: int | None, slots: int | None, time_limit: float
) -> tuple[Placement, dict[str, Any]]:
    """A placement with what is worth telling of it."""
    if method == "optimal":
        from simulator.experts.optimal import optimal_placement

        with progress_bar(history.num_layers, "optimal placement", "layer") as bar:
            best = optimal_placement(
                history, devices, batch=batch, time_limit=time_limit,
                progress=lambda done, total: bar.update(done - bar.n),
            )  # fmt: skip
        return best.placement, {"gap": float(best.gap.max()), "proven": bool(best.proven.all())}
    if method == "greedy-replicated":
        from simulator.experts.replication import replicated_placement

        return replicated_placement(history, devices, batch=batch, slots=slots), {}
    return place(history, devices, method, batch=batch), {}


def draw_loads(
    figure: Any, trace: RoutingTrace, placements: Sequence[Placement], *, batch: int | None, cut: int, layer: int = 0
) -> Any:
    """Load of every device over batches, a panel per placement; the dashed line is where history ends.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    trace : RoutingTrace
        History and what came after it.
    placements : sequence of Placement
    batch : int or None
        Tokens per batch.
    cut : int
        First batch after the history.
    layer : int
        Counts MoE layers.

    Returns
    -------
    ndarray of matplotlib.axes.Axes
    """
    axes = figure.subplots(len(placements), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, placement in zip(axes, placements, strict=True):
        loads = device_loads(trace, placement, batch=batch)[:, layer]
        ax.plot(loads, color="tab:blue", alpha=0.35, linewidth=0.8)
        ax.plot(loads.max(axis=1), color="tab:red", linewidth=1.2, label="largest")
        ax.axhline(1 / placement.num_devices, color="black", linewidth=0.8, label="ideal")
        ax.axvline(cut - 0.5, color="gray", linestyle="--", linewidth=0.8)
        ax.set_title(f"{placement.method}, layer {placement.layers[layer]}", fontsize=9)
        ax.set_ylabel("share of batch", fontsize=8)
        ax.set_ylim(0, None)
    axes[0].legend(fontsize=8, loc="upper right")
    axes[-1].set_xlabel("batch")
    return axes


def _write(
    out: Path, trace: RoutingTrace, placements: list[Placement], rows: list[dict[str, Any]], batch: int | None, cut: int
) -> list[Path]:
    import pandas as pd
    from matplotlib.figure import Figure

    files = [placement.save(out / f"placement-{placement.method}.json") for placement in placements]
    files.append(out / "placement.csv")
    pd.DataFrame(rows).to_csv(files[-1], index=False)
    figure = Figure(figsize=(9.0, 1.2 + 1.8 * len(placements)), layout="constrained")
    draw_loads(figure, trace, placements, batch=batch, cut=cut)
    files.append(out / "placement.png")
    figure.savefig(files[-1], dpi=150)
    return files


@click.command("placement")
@click.option(
    "--trace", "path", type=click.Path(dir_okay=False, path_type=Path), default=None, metavar="FILE",
    help="A routing trace: a file of RoutingTrace.save, or JSON lines.",
)  # fmt: skip
@click.option(
    "--synthetic", default=None, metavar="NAME", help="A synthetic trace instead: lm, mt-encoder, mt-decoder, ..."
)
@click.option(
    "--batches", type=click.IntRange(min=2), default=200, show_default=True, help="Batches of a synthetic trace."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of a synthetic trace.")
@click.option("--devices", type=int, required=True, metavar="D", help="Devices that share the experts of every layer.")
@click.option(
    "--batch",
    default=None,
    metavar="B|recorded",
    help="Tokens per batch; by default as recorded, else 1 % of the trace.",
)
@click.option(
    "--method", "methods", default=",".join(_FAST), show_default=True, metavar="M[,M...]|all",
    help=f"Any of {', '.join(PLACEMENT_METHODS)}.",
)  # fmt: skip
@click.option("--train-share", type=float, default=0.5, show_default=True, help="Part of the trace that is history.")
@click.option("--slots", type=int, default=None, help="Experts and replicas in all, for greedy-replicated.")
@click.option(
    "--time-limit", type=float, default=30.0, show_default=True, help="Seconds of the MILP per layer, for optimal."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=None, metavar="DIR")
@json_option
def placement_command(
    devices: int,
    batch: str | None,
    methods: str,
    train_share: float,
    slots: int | None,
    time_limit: float,
    out: Path | None,
    as_json: bool,
    path: Path | None,
    synthetic: str | None,
    batches: int,
    seed: int,
) -> None:
    """Place the experts of every layer on devices by a trace's first part, and judge by the rest.

    Max Load is the largest share of a batch that one device gets, worst over batches; Avg Max Load its mean. Both are
    means over layers.
    """
    chosen = _methods(methods)
    trace = _trace(path, synthetic, batches, seed)
    if not 0 < train_share < 1:
        raise InvalidValue(f"'--train-share' must lie between 0 and 1: {train_share}")
    size = _batch(batch, trace)
    if any(method != "greedy-replicated" for method in chosen):
        check_devices(trace.num_experts, devices)
    # Batches of the whole trace and of its parts must be the same ones.
    whole = trace if size is None else _with_batches(trace, size)
    history, later = whole.split(train_share)
    if out is not None:
        make_folder(out)
    rows: list[dict[str, Any]] = []
    placements = []
    for method in chosen:
        began = time.perf_counter()
        placement, told = _place(history, method, devices, None, slots, time_limit)
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {"method": method, "devices": devices, "slots_per_device": placement.slots_per_device}
        for name, part in (("history", history), ("later", later)):
            found = judge(part, placement).summary()
            row |= {f"{name}_{key}": found[key] for key in ("max_load", "avg_max_load", "mean_load")}
        row |= {"ideal": 1.0 / devices, "seconds": seconds, "gap": None, "proven": None} | told
        rows.append(row)
        placements.append(placement)
    files = []
    if out is not None:
        files = _write(out, whole, placements, rows, None, len(history.starts()))
    result = {
        "rows": rows,
        "trace": {
            "name": trace.name, "tokens": trace.num_tokens, "layers": trace.num_layers, "experts": trace.num_experts,
            "top_k": trace.top_k, "batches": len(whole.starts()), "history_batches": len(history.starts()),
        },
        "files": [str(path) for path in files],
    }  # fmt: skip
    emit(result, lambda: _text(whole, history, rows, files), as_json=as_json)


def _batch(text: str | None, trace: RoutingTrace) -> int | None:
    if text is None and trace.batch_starts is None:
        return max(1, trace.num_tokens // 100)
    if text is None or text == "recorded":
        trace.starts()  # one line if it does not know them
        return None
    try:
        size = int(text)
    except ValueError:
        raise InvalidValue(f"'--batch' must be a number of tokens or 'recorded': {text!r}") from None
    if not 1 <= size <= trace.num_tokens // 2:
        raise InvalidValue(f"'--batch' must be between 1 and half of the trace's {trace.num_tokens} tokens: {size}")
    return size


def _with_batches(trace: RoutingTrace, size: int) -> RoutingTrace:
    """The same tokens in batches of `size`; a rest that fills none is left out."""
    whole = trace.num_tokens // size * size
    return RoutingTrace(
        experts=trace.experts[:whole], num_experts=trace.num_experts, batch_starts=np.arange(0, whole, size),
        layers=trace.layers, name=trace.name,
    )  # fmt: skip


def _text(trace: RoutingTrace, history: RoutingTrace, rows: list[dict[str, Any]], files: list[Path]) -> str:
    headers = ["method", "slots", "Max Load", "Avg Max Load", "later: Max Load", "Avg Max Load", "ideal", "seconds"]
    gaps = any(row["gap"] is not None for row in rows)
    cells = []
    for row in rows:
        line = [
            row["method"], row["slots_per_device"],
            *(f"{row[f'{part}_{key}']:.4f}" for part in ("history", "later") for key in ("max_load", "avg_max_load")),
            f"{row['ideal']:.4f}", f"{row['seconds']:.3g}",
        ]  # fmt: skip
        if gaps:
            line.append("" if row["gap"] is None else f"{row['gap']:.2%}")
        cells.append(line)
    lines = [
        f"{trace}; history: the first {len(history.starts())} batches.",
        table([*headers, "gap"] if gaps else headers, cells),
    ]
    if files:
        lines.append("wrote " + ", ".join(map(str, files)))
    return "\n".join(lines)
