"""Operators and measured tasks on the hierarchical roofline of a machine (MoE-Lightning, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from hrm.hardware import Hardware
from hrm.model import DTYPE_BYTES, MoEModel
from hrm.operators import Operator, attention_core, expert_ffn, post_attention, pre_attention
from hrm.roofline import RooflinePoint, performance, roofline_point
from simulator.task import Lane, Op
from simulator.timeline import Timeline

__all__ = ["explore", "kernel_shares", "measured_points", "points_frame", "roofline_points"]

Count = Literal["paper", "exact"]


def roofline_points(
    model: MoEModel,
    hardware: Hardware,
    batches: Iterable[int],
    *,
    micro_batch: int | None = None,
    context: int = 512,
    kv_dtype: str | None = None,
    attention_flops: Count = "exact",
    ffn_bytes: Count = "exact",
) -> list[RooflinePoint]:
    """Place attention, expert FFN and the projections of one decode layer for each batch size.

    Parameters
    ----------
    batches : iterable of int
        N: sequences per pass; what crosses the link is shared by all of them.
    micro_batch : int, optional
        μ: sequences that one GPU kernel handles; by default, and at most, N.
    context : int
        Tokens in the KV cache per sequence.
    kv_dtype : str, optional
        Type of the KV cache, a key of `hrm.model.DTYPE_BYTES`; by default the model's.
    attention_flops : {"exact", "paper"}
        How attention is counted, see `hrm.operators.attention_core`.
    ffn_bytes : {"exact", "paper"}
        How the expert FFN is counted, see `hrm.operators.expert_ffn`.

    References
    ----------
    MoE-Lightning, Fig. 4 and 5.
    """
    kv_bytes = None if kv_dtype is None else DTYPE_BYTES[kv_dtype]

    def operators(sequences: int) -> list[Operator]:
        attention = attention_core(model, sequences, context, kv_dtype_bytes=kv_bytes, count=attention_flops)
        projections = [*pre_attention(model, sequences), *post_attention(model, sequences)]
        by_name = {op.name: op for op in projections}
        ffn = replace(expert_ffn(model, sequences, count=ffn_bytes), name="expert_ffn")
        return [attention, ffn, by_name["qkv_proj"], by_name["o_proj"]]

    points = []
    for batch in batches:
        kernel = operators(min(micro_batch or batch, batch))
        for op, kernel_op in zip(operators(batch), kernel, strict=True):
            points.append(roofline_point(hardware, op, batch=batch, kernel_op=kernel_op))
    return points


def points_frame(points: Sequence[RooflinePoint]) -> Any:
    """One row per point: what `RooflinePoint` holds, intensities by level in columns of their own."""
    import pandas as pd

    rows = [
        {
            "operator": point.name,
            "batch": point.batch,
            "cpu_flop_per_byte": point.intensity["cpu"],
            "gpu_flop_per_byte": point.intensity["gpu"],
            "attainable_flops": point.attainable_flops,
            "on_gpu_flops": point.on_gpu_flops,
            "on_cpu_flops": point.on_cpu_flops,
            "p1": point.p1,
            "p2": point.p2,
            "bound_by": point.bound_by,
        }
        for point in points
    ]
    return pd.DataFrame(rows)


def measured_points(timeline: Timeline, hardware: Hardware) -> Any:
    """What a timeline's tasks achieved, for the `measured` of `hrm.plots.roofline`.

    Kernels stand at FLOP per byte of weights or KV cache that they read, and FLOP per second of their own time
    (which includes waiting for memory and cores that other lanes use). What reads streamed experts stands at
    FLOP per byte over the link as well, there per second of the whole phase, since transfers run beside it.

    Parameters
    ----------
    hardware : Hardware
        Whose roofs: ``share`` is the part of them that was achieved.

    Returns
    -------
    pandas.DataFrame
        Columns name, level, intensity, flops_per_s, share, seconds.
    """
    import pandas as pd

    tasks = timeline.to_frame()
    tasks["phase"] = (tasks["step"] > 0).map({False: "prefill", True: "decode"})
    rows = []

    def add(name: str, level: str, flops: float, moved: float, seconds: float) -> None:
        intensity, on = flops / moved, "cpu" if level == "cpu" else "gpu"
        local = {on: intensity} if level != "link" else {"gpu": float("inf"), "cpu": intensity}
        roof, _ = performance(hardware, local, run_on=on, data_on="cpu" if level == "link" else on)
        achieved = flops / seconds
        rows.append(
            {"name": name, "level": level, "intensity": intensity, "flops_per_s": achieved, "share": achieved / roof,
             "seconds": seconds}
        )  # fmt: skip

    sums = tasks.groupby("op", observed=True)[["flops", "bytes", "seconds"]].sum()
    for op, row in sums.iterrows():
        if min(row["flops"], row["bytes"], row["seconds"]) > 0:
            lane = tasks.loc[tasks["op"] == op, "lane"].iloc[0]
            add(str(op), "cpu" if lane == Lane.CPU.value else "gpu", row["flops"], row["bytes"], row["seconds"])
    durations = {"prefill": timeline.prefill_s, "decode": timeline.decode_s}
    for phase, op in (("prefill", Op.PREFILL), ("decode", Op.POST_ATTN)):
        mine = tasks[tasks["phase"] == phase].groupby("op", observed=True)[["flops", "bytes"]].sum()
        if op.value in mine.index and Op.LOAD_W.value in mine.index and mine.loc[Op.LOAD_W.value, "bytes"] > 0:
            add(op.value, "link", mine.loc[op.value, "flops"], mine.loc[Op.LOAD_W.value, "bytes"], durations[phase])
    return pd.DataFrame(rows)


def kernel_shares(timeline: Timeline, hardware: Hardware, op: Op = Op.POST_ATTN) -> dict[str, Any]:
    """What a task class attained in decode, beside what the machine's kernels attain alone.

    Parameters
    ----------
    timeline : Timeline
        A measured one.
    hardware : Hardware
        With the rate set "measured": the ceilings are the best of its experts' GEMM and the device's read bandwidth.
    op : Op
        By default the one with the experts; its time includes whatever else it computes.

    Returns
    -------
    dict
        ``flops_per_s``, ``of_gemm`` (share of the GEMM ceiling), ``bytes_per_s``, ``of_read`` (share of the read
        bandwidth), and ``near``: "compute" or "memory", the larger share. Empty without such tasks in decode.
    """
    table = timeline.by_op()
    if ("decode", op.value) not in table.index or not table.loc[("decode", op.value), "seconds"] > 0:
        return {}
    row = table.loc[("decode", op.value)]
    flops, moved = (float(row[key]) / float(row["seconds"]) for key in ("flops", "bytes"))
    shares = {
        "of_gemm": flops / hardware.rates("measured").gpu_experts.peak,
        "of_read": moved / float(hardware.gpu.bandwidth),
    }
    near = "compute" if shares["of_gemm"] > shares["of_read"] else "memory"
    return {"flops_per_s": flops, "bytes_per_s": moved, **shares, "near": near}


def explore(
    hardware: Sequence[str] = ("gcp-l4-1x", "gcp-t4-1x", "rtx-4090-1x", "h100-sxm-1x"),
    models: Sequence[str] = ("mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b", "olmoe-1b-7b"),
) -> Any:
    """Sliders that redraw the roofline, for Jupyter (needs ipywidgets).

    Parameters
    ----------
    hardware, models : sequence of str
        Catalog names to choose from.

    Returns
    -------
    ipywidgets.Widget
    """
    import ipywidgets as widgets
    import matplotlib.pyplot as plt
    from IPython.display import display

    from hrm.plots import roofline

    def power(name: str, first: int, last: int, start: int) -> Any:
        sizes = [2**n for n in range(first, last + 1)]
        return widgets.SelectionSlider(options=sizes, value=start, description=name, continuous_update=False)

    controls = {
        "machine": widgets.Dropdown(options=list(hardware), description="machine"),
        "model": widgets.Dropdown(options=list(models), description="model"),
        "batch": power("N", 0, 14, 1024),
        "micro_batch": power("μ", 0, 10, 128),
        "context": power("context", 6, 15, 512),
        "kv_dtype": widgets.Dropdown(options=list(DTYPE_BYTES), value="bfloat16", description="KV cache"),
    }

    def draw(machine: str, model: str, batch: int, micro_batch: int, context: int, kv_dtype: str) -> None:
        there = Hardware.from_catalog(machine)
        points = roofline_points(
            MoEModel.from_catalog(model), there, [batch], micro_batch=micro_batch, context=context, kv_dtype=kv_dtype
        )
        # Experts are what streams; their turning points decide about N.
        ffn = next(point for point in points if point.name == "expert_ffn")
        figure, ax = plt.subplots(figsize=(9.0, 5.5), layout="constrained")
        roofline(there, points, ax=ax, turning=ffn, title=f"{model} on {there.title}")
        display(figure)
        plt.close(figure)

    columns = list(controls.values())
    panel = widgets.HBox([widgets.VBox(columns[:3]), widgets.VBox(columns[3:])])
    return widgets.VBox([panel, widgets.interactive_output(draw, controls)])
