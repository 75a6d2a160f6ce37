"""``hrm experts gating``: ways to bring tokens to experts, run side by side on this machine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.experts.gating_report import measured_text, predicted_text, write_files
from experiments.options import COUNT, Capacity, executor_needed, json_option
from experiments.output import emit, make_folder, progress_bar
from hrm.errors import DoesNotFit, InvalidValue
from hrm.gating import GATING_VARIANTS
from hrm.units import MAX_SIZE, format_bytes

if TYPE_CHECKING:
    from executor.gating.sizes import LayerShape

__all__ = ["gating_command"]

_MEASURED = (64, 256)
_PREDICTED = (512, 2048)
_SCALE = 4
_SAMPLE = 1 << 14


class _List(click.ParamType):
    """Values with commas between them."""

    name = "x[,x...]"

    def __init__(self, one: Callable[[str], Any], what: str) -> None:
        self._one, self._what = one, what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Parse, or fail in one line."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(self._one(part.strip()) for part in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} must be {self._what}, with commas between them.", param, ctx)


def _tokens(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MAX_SIZE):
        raise ValueError
    return int(text)


def _variant(text: str) -> str:
    if text not in GATING_VARIANTS:
        raise ValueError
    return text


@click.command("gating")
@click.option("--shape", type=click.Choice(["lm", "mt", "custom"]), default="lm", show_default=True)
@click.option(
    "--scale",
    type=COUNT,
    metavar="N",
    help=f"Divide H and I by N; E, k and C stay (default: {_SCALE} for lm and mt, 1 with --hardware).",
)
@click.option("--experts", "num_experts", type=COUNT, metavar="E", help="Experts of the layer.")
@click.option("--top-k", type=COUNT, metavar="K", help="Experts that every token chooses (custom: 2).")
@click.option("--hidden", type=COUNT, metavar="H", help="Model dimension.")
@click.option("--intermediate", type=COUNT, metavar="I", help="FFN dimension.")
@click.option("--capacity-factor", type=float, metavar="C", help="Share of the tokens per expert (custom: 1).")
@click.option(
    "--batch",
    "batches",
    type=_List(_tokens, f"whole numbers of tokens from 1 to {MAX_SIZE}"),
    metavar="S[,S...]",
    help="Tokens of a batch (default: 64,256; with --hardware, of each GPU: 512,2048).",
)
@click.option(
    "--gating",
    "names",
    type=_List(_variant, f"of {', '.join(GATING_VARIANTS)}"),
    default=",".join(GATING_VARIANTS),
    show_default=True,
    metavar="G[,G...]",
)
@click.option("--skew", type=float, default=0.0, show_default=True, help="Zipf exponent of the experts' popularity.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=2, show_default=True, help="Timed passes of each.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: CUDA where there is one.")
@click.option(
    "--weights-memory",
    type=Capacity(),
    default="1280MiB",
    show_default=True,
    help="For experts' weights; experts share them where it holds too few.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="Of a CPU. Several wait for each other in every short kernel where others use the machine, too.",
)
@click.option("--budget", type=Capacity(), help="Also find the largest batch with so much memory for activations.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--hardware", metavar="H", help="Predict for this machine instead, e.g. v100-node-8x.")
@click.option("--nodes", type=click.IntRange(1, 4096), default=1, show_default=True, help="Of --hardware.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="JSON, CSV and a figure.")
@json_option
def gating_command(
    shape: str,
    scale: int | None,
    batches: tuple[int, ...] | None,
    names: tuple[str, ...],
    hardware: str | None,
    nodes: int,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run static, Tutel-like and dynamic gating on one MoE layer of random weights.

    Seconds and peaks of activations are measured here; the waste factor, masks, buffers and FLOPs are computed. A
    batch counts tokens, not sequences. With --hardware nothing is run: seconds and bytes are those of the cost model,
    for the layer on all GPUs of the machine, each with so many tokens.
    """
    if not 0 <= options["skew"] < math.inf:
        raise InvalidValue(f"--skew must be a number >= 0: {options['skew']}")
    if hardware is None and nodes > 1:
        raise click.UsageError("--nodes belongs to --hardware; this machine is one node.")
    if out is not None:
        make_folder(out)
    sizes = {name: options.pop(name) for name in ("num_experts", "top_k", "hidden", "intermediate", "capacity_factor")}
    with executor_needed():
        scale = scale or (1 if hardware or shape == "custom" else _SCALE)
        found = _shape(shape, scale, sizes)
        if hardware is not None:
            result = _predict(found, batches or _PREDICTED, names, hardware, nodes, options)
        else:
            result = _measure(found, batches or _MEASURED, names, options, quiet=as_json)
    result["scale"] = scale
    written = write_files(out, result) if out else ""
    emit(result, lambda: (measured_text if hardware is None else predicted_text)(result) + written, as_json=as_json)


def _shape(name: str, scale: int, sizes: Mapping[str, Any]) -> LayerShape:
    """A layer of the paper, or what the options make of it."""
    from executor.gating.sizes import LM, MT, LayerShape

    given = {key: value for key, value in sizes.items() if value is not None}
    if name == "custom":
        for key, option in (("num_experts", "--experts"), ("hidden", "--hidden"), ("intermediate", "--intermediate")):
            if key not in given:
                raise click.UsageError(f"--shape custom needs {option}; or take --shape lm or mt and change its sizes.")
        found = LayerShape(name="custom", **({"top_k": 2, "capacity_factor": 1.0} | given))
    else:
        base = {"lm": LM, "mt": MT}[name]
        found = replace(base, name="custom", **given) if given else base
    if scale > min(found.hidden, found.intermediate):
        raise InvalidValue(
            f"--scale must be at most {min(found.hidden, found.intermediate)}, or nothing is left: {scale}"
        )
    return replace(found, hidden=found.hidden // scale, intermediate=found.intermediate // scale)


def _measure(
    shape: LayerShape, batches: Sequence[int], names: Sequence[str], options: Mapping[str, Any], *, quiet: bool
) -> dict[str, Any]:
    """Run every gate on every batch here."""
    import torch

    from executor.gating.bench import Layer, largest_batch, measure, variants
    from executor.machine import machine_facts, pick_device

    gates = variants(shape, names)
    dtype, device = getattr(torch, options["dtype"]), pick_device(options["device"])
    rounds, choices = options["rounds"], {"skew": options["skew"], "seed": options["seed"]}
    _check_memory(shape, gates, max(batches), dtype.itemsize, options["weights_memory"], device)
    layer = Layer.random(shape, max_bytes=options["weights_memory"], dtype=dtype, device=device, seed=options["seed"])
    rows: list[dict[str, Any]] = []
    passes = len(batches) * len(names) * (rounds + 1)
    bar: contextlib.AbstractContextManager[Any] = (
        contextlib.nullcontext() if quiet else progress_bar(passes, "gating", "")
    )
    with bar as shown, _threads(options["threads"]):

        def note(what: str) -> None:
            if shown is not None:
                shown.set_description_str(f"gating: {what}")
                shown.update()

        for tokens in batches:
            rows += measure(layer, tokens, gates, rounds=rounds, **choices, note=note)
    result: dict[str, Any] = {
        "rows": rows,
        "shape": asdict(shape),
        "weights": {"distinct_experts": layer.distinct, "bytes": layer.weight_bytes, "dtype": options["dtype"]},
        "choices": choices,
        "threads": options["threads"],
        "machine": machine_facts(),
    }
    budget = options["budget"]
    if budget is not None:
        with _threads(options["threads"]):
            found = {name: largest_batch(layer, gate, budget, **choices) for name, gate in gates.items()}
        result["largest_batch"] = {"budget_bytes": budget, "gatings": found}
    return result


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for torch's kernels in the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _predict(
    shape: LayerShape,
    batches: Sequence[int],
    names: Sequence[str],
    hardware: str,
    nodes: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the cost model says of the layer on a machine; weights and activations of two bytes."""
    from executor.gating.bench import draw_choices
    from hrm.catalog import load_hardware
    from hrm.layers import FeedForward
    from simulator.experts.gating_cost import Cluster, gating_cost

    ffn = FeedForward(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        matrices=2,
        expert_other_parameters=shape.hidden + shape.intermediate,
    )
    cluster = Cluster.of(load_hardware(hardware), nodes)
    choices = {"skew": options["skew"], "seed": options["seed"]}
    rows = []
    for tokens in batches:
        # Shares of experts, from a sample where there are very many tokens.
        chosen, _ = draw_choices(shape, min(tokens * cluster.devices, _SAMPLE), **choices)
        of_all, of_one = (x.flatten().bincount(minlength=shape.num_experts) for x in (chosen, chosen[:tokens]))
        even = shape.num_experts % cluster.devices == 0
        loads = of_all.view(cluster.devices, -1).sum(dim=1).double() if even else of_all.double()
        for name in names:
            adaptive = float(of_one.max() / of_one.sum()) if name == "tutel-adaptive" else None
            cost = gating_cost(
                ffn,
                cluster,
                tokens,
                "tutel" if name == "tutel-adaptive" else name,  # type: ignore[arg-type]
                capacity_factor=shape.capacity_factor,
                adaptive_capacity=adaptive,
                busiest=max(1.0, float(loads.max() / loads.mean())),
                active_share=float((of_all > 0).double().mean()),
            )
            rows.append(
                {
                    "gating": name,
                    "shape": shape.name,
                    "tokens": tokens,
                    "seconds": cost.total,
                    "tokens_per_s": tokens * cluster.devices / cost.total,
                    "computed_bytes": cost.activation_bytes,
                    "waste_factor": cost.waste,
                    "terms": cost.seconds,
                }
            )
    return {
        "rows": rows,
        "shape": asdict(shape),
        "hardware": {"name": hardware, "nodes": nodes, "devices": cluster.devices},
        "choices": choices,
    }


def _check_memory(
    shape: LayerShape, gates: Mapping[str, Any], tokens: int, itemsize: int, weights: int, device: Any
) -> None:
    """Raise `DoesNotFit` if weights and activations together are more than the device's memory."""
    import torch

    from executor.gating.sizes import gating_sizes
    from executor.machine import ram_bytes

    has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else ram_bytes()
    needs = {
        # At best every expert gets as many; skewed choices make an adaptive capacity larger than this.
        name: gating_sizes(
            gate, shape, tokens, fullest=-(-tokens * shape.top_k // shape.num_experts), itemsize=itemsize
        )
        for name, gate in gates.items()
    }
    worst = max(needs, key=lambda name: needs[name].peak_bytes)
    weights = min(weights, shape.num_experts * shape.expert_parameters * itemsize)
    if needs[worst].peak_bytes + weights > has:
        raise DoesNotFit(
            f"{worst} gating of {tokens} tokens needs {format_bytes(needs[worst].peak_bytes)} beside "
            f"{format_bytes(weights)} of weights, and there are {format_bytes(has)}. Lower --batch, or leave it out of "
            "--gating."
        )
