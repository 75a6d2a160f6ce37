"""``hrm experts cache``: miss rates of expert caches, by policy, slots and batch, on one device or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.options import json_option
from experiments.output import emit, make_folder, progress_bar, table
from hrm.errors import InvalidValue

if TYPE_CHECKING:
    from simulator.experts.placement import Placement
    from simulator.experts.study import MissRates
    from simulator.experts.trace import RoutingTrace

__all__ = ["cache_command", "draw_miss_rates"]

_RECORDED = "recorded"
_MOST = 65536


@click.command("cache")
@click.option("--trace", "path", type=click.Path(path_type=Path), metavar="FILE", help="A trace: npz or JSON lines.")
@click.option("--synthetic", metavar="NAME", help="Make a trace instead: lm, mt-encoder, mt-decoder, mixtral, uniform.")
@click.option("--synthetic-batches", type=click.IntRange(1), default=200, show_default=True, metavar="N")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the synthetic trace.")
@click.option("--num-experts", type=click.IntRange(1, _MOST), metavar="E", help="Experts per layer, for JSON lines.")
@click.option("--batch", "sizes", metavar="B[,B...]", help="Tokens per batch, or 'recorded' (default).")
@click.option("--slots", required=True, metavar="K[,K...]", help="Experts per layer on a device; '1-16': all between.")
@click.option("--policy", "policies", default="inactive-first-lifo", show_default=True, metavar="P[,P...]|all")
@click.option("--devices", type=click.IntRange(1), metavar="D", help="Devices that share the experts of every layer.")
@click.option("--placement", "placed", type=click.Path(path_type=Path), metavar="FILE", help="Default: even, in order.")
@click.option("--balance", metavar="METHOD", help="Also place by the first half; judge on the second. E.g. greedy.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write CSV and a picture.")
@json_option
def cache_command(
    path: Path | None,
    synthetic: str | None,
    synthetic_batches: int,
    seed: int,
    num_experts: int | None,
    sizes: str | None,
    slots: str,
    policies: str,
    devices: int | None,
    placed: Path | None,
    balance: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Replay a routing trace through caches of experts and tell how often an expert was not there."""
    from simulator.experts.trace import RoutingTrace

    batches = _batches(sizes)
    counts = _numbers(slots, "--slots")
    names = _policies(policies)
    if (path is None) == (synthetic is None):
        raise click.UsageError("give either --trace FILE or --synthetic NAME.")
    if balance is not None and (placed is not None or devices is None):
        raise click.UsageError("--balance needs --devices, and makes a placement of its own.")
    if path is not None:
        trace = RoutingTrace.load(path, num_experts=num_experts)
    else:
        from simulator.experts.synthesis import synthetic_trace

        trace = synthetic_trace(str(synthetic), batches=synthetic_batches, seed=seed)
    for batch in batches:
        trace.starts(batch)
    if out is not None:
        make_folder(out)
    judged, placements = _placements(trace, devices, placed, balance, batches[0])
    found = _replay(judged, batches, counts, names, placements)
    rows = [
        rates.row() | {"batch": _RECORDED if rates.batch is None else rates.batch, "placement": label}
        for label, several in found
        for rates in several
    ]
    files = [] if out is None else _write(out, rows, judged)
    result = {
        "rows": rows,
        "trace": {
            "name": trace.name, "tokens": judged.num_tokens, "layers": trace.num_layers, "experts": trace.num_experts,
            "top_k": trace.top_k,
        },
        "devices": placements[0][1].num_devices if placements[0][1] is not None else 1,
        "files": [str(file) for file in files],
    }  # fmt: skip
    emit(result, lambda: _text(judged, rows, files), as_json=as_json)


def draw_miss_rates(figure: Any, rows: Sequence[dict[str, Any]], *, title: str = "") -> Any:
    """Miss rate against slots, a line per policy: mean of all layers to the left, worst layer to the right.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    rows : sequence of dict
        As ``hrm experts cache --json`` prints them. Every batch size has panels of its own; a second placement is
        dashed.
    title : str, optional

    Returns
    -------
    ndarray of matplotlib.axes.Axes
        [batch sizes, 2].
    """
    batches, policies, placements = (list(dict.fromkeys(row[key] for row in rows)) for key in _KEYS)
    axes = figure.subplots(len(batches), 2, sharex=True, sharey=True, squeeze=False)
    for line, batch in zip(axes, batches, strict=True):
        for ax, key, what in zip(
            line, ("miss_rate", "worst_layer_miss_rate"), ("all layers", "worst layer"), strict=True
        ):
            for p, policy in enumerate(policies):
                for s, placement in enumerate(placements):
                    mine = [r for r in rows if (r["batch"], r["policy"], r["placement"]) == (batch, policy, placement)]
                    mine.sort(key=lambda row: row["slots"])
                    label = policy if len(placements) == 1 else f"{policy}, {placement}"
                    ax.plot(
                        [row["slots"] for row in mine], [row[key] for row in mine], color=f"C{p}", marker=_MARKS[p % 7],
                        markersize=4, linestyle=("-", "--", ":", "-.")[s % 4], label=label,
                    )  # fmt: skip
            ax.set_title(f"{what}, batch {batch}", fontsize=10)
            ax.set_ylim(0, 1.02)
            ax.grid(alpha=0.3)
        line[0].set_ylabel("miss rate")
    for ax in axes[-1]:
        ax.set_xlabel("slots per layer and device")
    axes[0, 1].legend(fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return axes


_KEYS = ("batch", "policy", "placement")
_MARKS = "osD^vP*"


def _numbers(text: str, option: str) -> list[int]:
    """Whole numbers >= 1 with commas between them, and ranges."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first, last] if dash else [first]
        if not all(end.isdecimal() and len(end) <= 9 and int(end) >= 1 for end in ends):
            raise InvalidValue(f"'{option}' must be whole numbers >= 1 with commas between them: {text!r}")
        if dash and (int(last) < int(first) or int(last) - int(first) >= _MOST):
            raise InvalidValue(f"'{option}' has a range that does not rise, or is too long: {part.strip()!r}")
        numbers += range(int(first), int(ends[-1]) + 1)
    return list(dict.fromkeys(numbers))


def _batches(text: str | None) -> list[int | None]:
    sizes: list[int | None] = []
    for part in (text or _RECORDED).split(","):
        sizes += [None] if part.strip() == _RECORDED else _numbers(part, "--batch")
    return list(dict.fromkeys(sizes))


def _policies(text: str) -> list[str]:
    from simulator.experts.cache import CACHE_POLICIES, cache_policy

    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return list(CACHE_POLICIES)
    if not names:
        raise InvalidValue(f"'--policy' names no policy; known: {', '.join(CACHE_POLICIES)}, all.")
    for name in names:
        cache_policy(name)
    return list(dict.fromkeys(names))


def _placements(
    trace: RoutingTrace, devices: int | None, path: Path | None, balance: str | None, batch: int | None
) -> tuple[RoutingTrace, list[tuple[str, Placement | None]]]:
    """What is replayed, and the placements to replay it on."""
    from simulator.experts.placement import Placement, even_placement, place

    if path is not None:
        placement = Placement.load(path)
        placement.check_trace(trace)
        if devices is not None and devices != placement.num_devices:
            raise InvalidValue(
                f"'--devices' is {devices}, but the placement has {placement.num_devices}; leave it out."
            )
        return trace, [(placement.method, placement)]
    if devices is None:
        return trace, [("one device", None)]
    even = even_placement(trace, devices)
    if balance is None:
        return trace, [("even", even)]
    history, later = trace.split()
    return later, [("even", even), (balance, place(history, devices, balance, batch=batch))]


def _replay(
    trace: RoutingTrace,
    batches: list[int | None],
    slots: list[int],
    policies: list[str],
    placements: list[tuple[str, Placement | None]],
) -> list[tuple[str, list[MissRates]]]:
    from simulator.experts.study import miss_rates

    devices = sum(1 if placement is None else placement.num_devices for _, placement in placements)
    replays = len(batches) * len(slots) * len(policies) * trace.num_layers * devices
    found = []
    with progress_bar(replays, "cache", " replays") as bar:
        for label, placement in placements:
            several = miss_rates(
                trace, batches=batches, slots=slots, policies=policies, placement=placement,
                progress=lambda _: bar.update(),
            )  # fmt: skip
            found.append((label, several))
    return found


def _write(out: Path, rows: list[dict[str, Any]], trace: RoutingTrace) -> list[Path]:
    import pandas as pd
    from matplotlib.figure import Figure

    files = [out / "cache.csv", out / "cache.png"]
    pd.DataFrame(rows).to_csv(files[0], index=False)
    panels = len({row["batch"] for row in rows})
    figure = Figure(figsize=(10.0, 1.0 + 3.6 * panels), layout="constrained")
    draw_miss_rates(figure, rows, title=repr(trace).strip("<>"))
    figure.savefig(files[1], dpi=150)
    return files


def _text(trace: RoutingTrace, rows: list[dict[str, Any]], files: list[Path]) -> str:
    headers = ["policy", "placement", "batch", "slots", "miss rate", "worst layer", "worst device", "accesses",
               "loads/batch", "seconds"]  # fmt: skip
    cells = [
        [row["policy"], row["placement"], row["batch"], row["slots"], f"{row['miss_rate']:.4f}",
         f"{row['worst_layer_miss_rate']:.4f}", f"{row['worst_device_miss_rate']:.4f}", row["accesses"],
         f"{row['loads_per_batch']:.4g}", f"{row['seconds']:.3g}"]
        for row in rows
    ]  # fmt: skip
    lines = [repr(trace), table(headers, cells)]
    if files:
        lines.append("wrote " + ", ".join(map(str, files)))
    return "\n".join(lines)
