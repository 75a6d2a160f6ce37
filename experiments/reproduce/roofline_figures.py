"""Fig. 4 and 5 of MoE-Lightning, and the executor's measured tasks under the roofs of its machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.reproduce.result import Progress, Reproduced, published, row
from experiments.rooflines import measured_points, points_frame
from hrm.errors import InvalidConfig
from hrm.hardware import Hardware
from hrm.model import DTYPE_BYTES, MoEModel
from hrm.operators import attention_core, expert_ffn
from hrm.plots import roofline
from hrm.roofline import RooflinePoint, roofline_point, turning_points
from simulator.timeline import Timeline

__all__ = [
    "attention_points",
    "ffn_points",
    "fig4",
    "fig5",
    "measured_roofline",
    "measured_run",
    "plot_fig4",
    "plot_fig5",
    "plot_measured",
]

Count = Literal["paper", "exact"]

_MACHINE, _MODEL = "gcp-l4-1x", "mixtral-8x7b"
_CONTEXT, _MICRO_BATCH, _BATCHES = 512, 128, (32, 128, 1024, 16384)
_MEASURED = Path(__file__).resolve().parent.parent / "measured" / "cpu-2core"


def attention_points(
    *,
    machine: str = _MACHINE,
    model: str = _MODEL,
    context: int = _CONTEXT,
    kv_dtypes: Sequence[str] = ("float16", "int4"),
    count: Count = "paper",
) -> list[RooflinePoint]:
    """Decode attention by type of the KV cache; its intensity does not depend on the batch.

    References
    ----------
    MoE-Lightning, Fig. 4.
    """
    hardware, of = Hardware.from_catalog(machine), MoEModel.from_catalog(model)
    points = []
    for dtype in kv_dtypes:
        op = attention_core(of, 1, context, kv_dtype_bytes=DTYPE_BYTES[dtype], count=count)
        points.append(roofline_point(hardware, replace(op, name=f"attention, {dtype}"), batch=1))
    return points


def ffn_points(
    *,
    machine: str = _MACHINE,
    model: str = _MODEL,
    batches: Sequence[int] = _BATCHES,
    micro_batch: int = _MICRO_BATCH,
    count: Count = "paper",
) -> list[RooflinePoint]:
    """The MoE FFN of N sequences, by a kernel that handles `micro_batch` of them.

    References
    ----------
    MoE-Lightning, Fig. 5.
    """
    hardware, of = Hardware.from_catalog(machine), MoEModel.from_catalog(model)
    kernel = expert_ffn(of, micro_batch, count=count)
    return [
        roofline_point(hardware, replace(expert_ffn(of, n, count=count), name="MoE FFN"), batch=n, kernel_op=kernel)
        for n in batches
    ]


def plot_fig4(ax: Any = None, *, machine: str = _MACHINE, **choices: Any) -> Any:
    """Draw Fig. 4; `choices` as in `attention_points`. Returns the axes."""
    points = attention_points(machine=machine, **choices)
    hardware = Hardware.from_catalog(machine)
    title = f"Decode attention on {hardware.title}"
    return roofline(hardware, points, ax=ax, labels="name", verticals=True, turning=points[0], title=title)


def plot_fig5(ax: Any = None, *, machine: str = _MACHINE, micro_batch: int = _MICRO_BATCH, **choices: Any) -> Any:
    """Draw Fig. 5; `choices` as in `ffn_points`. Returns the axes."""
    points = ffn_points(machine=machine, micro_batch=micro_batch, **choices)
    hardware = Hardware.from_catalog(machine)
    title = f"MoE FFN, kernel at μ = {micro_batch}, on {hardware.title}"
    return roofline(hardware, points, ax=ax, labels="batch", verticals=True, turning=points[0], title=title)


def _p1(machine: str) -> float:
    """Where the link's roof meets the CPU's compute roof."""
    p1, _ = turning_points(Hardware.from_catalog(machine), gpu_intensity=1.0, cpu_intensity=np.inf)
    return float(p1)


def _rows(figure: str, predicted: dict[str, float]) -> list[dict[str, Any]]:
    theirs = published("moe_lightning_rooflines", figure)
    return [
        row(f"{_MODEL} on {_MACHINE}", name, published=theirs[name], predicted=value, split="formula")
        for name, value in predicted.items()
    ]


def fig4(*, progress: Progress | None = None) -> Reproduced:
    """Attention of Mixtral 8x7B in decode on the L4 machine, KV cache in float16 and int4."""
    points = attention_points()
    predicted = {f"attention intensity {p.name.split()[-1]}": p.intensity["cpu"] for p in points}
    exact = attention_points(count="exact")[0].intensity["cpu"]
    if progress:
        progress(1, 1)
    return Reproduced(
        name="fig4",
        title="MoE-Lightning, Fig. 4: decode attention of Mixtral 8x7B on one L4, context 512",
        frame=points_frame(points),
        draw=lambda figure: plot_fig4(figure.add_subplot()),
        rows=_rows("fig4", predicted | {"P1": _p1(_MACHINE)}),
        note="The authors' count leaves out the product with V and gives queries the cache's type; counted in "
        f"full, float16 has {exact:.3g} FLOP/B, still far left of P1.",
    )


def fig5(*, progress: Progress | None = None) -> Reproduced:
    """MoE FFN of Mixtral 8x7B in decode on the L4 machine, kernel at micro-batch 128."""
    points = ffn_points()
    predicted = {f"FFN intensity N={p.batch}": p.intensity["cpu"] for p in points}
    exact = ffn_points(count="exact")[0].p2
    if progress:
        progress(1, 1)
    return Reproduced(
        name="fig5",
        title="MoE-Lightning, Fig. 5: MoE FFN of Mixtral 8x7B on one L4, micro-batch 128",
        frame=points_frame(points),
        draw=lambda figure: plot_fig5(figure.add_subplot()),
        rows=_rows("fig5", predicted | {"P1": _p1(_MACHINE), "P2": points[0].p2}),
        note="The authors' count reads each token once, however many experts it goes to; counted in full, P2 is "
        f"{exact:.4g} FLOP/B. Their 242 TFLOP/s of an L4 is the data sheet's figure with sparsity.",
    )


def measured_run(folder: str | Path = _MEASURED, *, machine: str = "cpu-2core") -> tuple[Hardware, Timeline]:
    """A committed run: its machine with the link paced as it was, and the measured timeline of the planned case."""
    folder = Path(folder)
    try:
        cases = json.loads((folder / "validation.json").read_text())["cases"]
        pace = next(case["link_bandwidth"] for case in cases if case["name"] == "planned")
    except (OSError, KeyError, ValueError, StopIteration) as error:
        raise InvalidConfig(f"{str(folder)!r} holds no measured run: {error!r}.") from None
    hardware = Hardware.from_catalog(machine)
    if pace is not None:
        hardware = hardware.scaled(link=min(1.0, pace / float(hardware.h2d.bandwidth)))
    return hardware, Timeline.load(folder / "measured.json")


def plot_measured(ax: Any = None, *, folder: str | Path = _MEASURED, machine: str = "cpu-2core") -> Any:
    """Draw what the executor's tasks achieved under the probed roofs; percentages are shares of the roof above."""
    hardware, timeline = measured_run(folder, machine=machine)
    frame = measured_points(timeline, hardware)
    policy = timeline.facts.get("policy", {})
    sizes = f", N = {policy['batch_size']}, μ = {policy['micro_batch_size']}" if policy else ""
    title = f"Measured tasks, {hardware.title.split(';')[0]}{sizes}"
    return roofline(hardware, ax=ax, measured=frame, title=title)


def measured_roofline(*, progress: Progress | None = None) -> Reproduced:
    """The executor's tasks on the machine without a GPU that the committed measurements come from."""
    hardware, timeline = measured_run()
    if progress:
        progress(1, 1)
    return Reproduced(
        name="measured-roofline",
        title="What the executor's tasks achieved on the 2-core machine, under its probed roofs",
        frame=measured_points(timeline, hardware),
        draw=lambda figure: plot_measured(figure.add_subplot()),
        note="Device and host share cores and memory there, so that a task's own time includes waiting for others.",
    )
