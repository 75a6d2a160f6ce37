"""Waste factors, memory and largest batches of "Towards MoE Deployment" (arXiv 2303.06182)."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.reproduce.moe_deployment_cases import CASES, SPLIT, Assumptions, cluster, model_of, run
from experiments.reproduce.result import Progress, Reproduced, published, row
from simulator.experts.buffering_memory import waste_factor
from simulator.experts.gating_model import largest_batch, weight_bytes

__all__ = ["moe_memory", "moe_waste"]

_TABLE = "moe_deployment"
_GIB = 2**30
_MODELS = {"lm": (CASES[0],), "mt": (CASES[1], CASES[2])}
"""The cases that one GPU holds at once; translation keeps both stacks, and its larger pass counts."""
_TITLES = {"lm": "LM 52B", "mt": "MT 54.5B"}


def moe_waste(*, progress: Progress | None = None) -> Reproduced:
    """Waste factors of static gating, E·C/k, over the capacity factor, and parameters of the two models.

    References
    ----------
    arXiv 2303.06182, the section on dynamic gating; Table I.
    """
    import pandas as pd

    told, sizes = published(_TABLE, "waste"), published(_TABLE, "memory")
    rows, records = [], []
    factors = np.geomspace(1 / 512, 1, 40)
    points = {}
    for key, cases in _MODELS.items():
        model, capacity = model_of(cases[0]), cases[0].capacity_factor
        found = waste_factor(model.num_experts, model.top_k, capacity)
        points[key] = (capacity, found)
        rows.append(
            row(_TITLES[key], "waste factor", workload=f"E={model.num_experts}, C={capacity:g}, k={model.top_k}",
                published=told[key], predicted=found, split="formula")
        )  # fmt: skip
        rows.append(
            row(_TITLES[key], "parameters", published=sizes[f"{key} parameters"], predicted=float(model.num_parameters),
                split="formula")
        )  # fmt: skip
        records += [
            {"model": key, "experts": model.num_experts, "capacity_factor": c,
             "waste": waste_factor(model.num_experts, model.top_k, c)}
            for c in factors
        ]  # fmt: skip
    if progress:
        progress(1, 1)
    frame = pd.DataFrame(records)

    def draw(figure: Any) -> Any:
        ax = figure.add_subplot()
        for key, lines in frame.groupby("model", sort=False):
            drawn = ax.plot(lines["capacity_factor"], lines["waste"], label=f"{_TITLES[str(key)]}: E·C/k")[0]
            capacity, _ = points[str(key)]
            ax.plot(
                capacity,
                told[str(key)],
                "*",
                color=drawn.get_color(),
                markersize=14,
                label=f"published {told[str(key)]:g}",
            )
        ax.axhline(1, color="gray", linestyle=":", label="dynamic gating")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("capacity factor C")
        ax.set_ylabel("rows computed over rows needed")
        ax.legend(fontsize=8)
        return ax

    note = (
        "Below 1 static gating has fewer slots than tokens have choices and must drop some. Published parameter "
        "counts are "
        "rounded."
    )
    return Reproduced("moe-waste", "Towards MoE Deployment: waste factors of static gating", frame, draw, rows, note)


def moe_memory(*, progress: Progress | None = None, assume: Assumptions | None = None) -> Reproduced:
    """Weights, activations and largest batches of one GPU on one node.

    References
    ----------
    arXiv 2303.06182, the results on memory.
    """
    import pandas as pd

    assume = assume or Assumptions()
    told = published(_TABLE, "memory")
    limit = cluster(1, assume).gpu_bytes - assume.reserved_bytes
    rows, records = [], []

    def peak(key: str, gating: str, batch: int) -> tuple[float, float]:
        """Bytes of activations and in all."""
        passes = [run(case, gating, batch=batch, assume=assume) for case in _MODELS[key]]
        return max(x.activation_bytes for x in passes), max(x.memory_bytes for x in passes)

    for done, (key, cases) in enumerate(_MODELS.items()):
        title, batch = _TITLES[key], cases[0].batch["static"]
        at = f"batch {batch}"
        for gating in ("dense", "static"):
            rows.append(
                row(title, f"{gating}, GiB per GPU", workload=at, published=told[f"{key} {gating}"],
                    predicted=peak(key, gating, batch)[1] / _GIB, split=SPLIT)
            )  # fmt: skip
        for gating in ("static", "dynamic"):
            split = "V100 assumption" if (key, gating) == ("lm", "static") else SPLIT
            quantity = f"{key} {gating} activation at 8"
            rows.append(
                row(title, f"{gating}, activations, GiB", workload="batch 8", split=split, published=told[quantity],
                    predicted=peak(key, gating, 8)[0] / _GIB)
            )  # fmt: skip
        for gating in ("static", "tutel", "dynamic"):
            if f"{key} {gating} batch" not in told:
                continue
            # The paper's batches are its smallest one times powers of two.
            found = largest_batch(
                lambda n, key=key, gating=gating: peak(key, gating, n)[1],  # type: ignore[misc]
                limit, ladder=2, start=batch // 8,
            )  # fmt: skip
            rows.append(
                row(title, f"{gating}, largest batch", workload="steps of 2", split=SPLIT,
                    published=told[f"{key} {gating} batch"], predicted=float(found))
            )  # fmt: skip
        for gating in ("static", "tutel", "dynamic"):
            for power in range(-3, 6):
                n = int(batch * 2.0**power)
                activation, whole = peak(key, gating, n)
                records.append(
                    {"model": key, "gating": gating, "batch": n,
                     "weights_gib": weight_bytes(model_of(cases[0]), 8) / _GIB,
                     "activation_gib": activation / _GIB, "memory_gib": whole / _GIB, "fits": whole <= limit}
                )  # fmt: skip
        if progress:
            progress(done + 1, len(_MODELS))
    frame = pd.DataFrame(records)

    def draw(figure: Any) -> Any:
        axes = figure.subplots(1, 2, sharey=True)
        for ax, key in zip(axes, _MODELS, strict=True):
            for gating, lines in frame[frame["model"] == key].groupby("gating", sort=False):
                ax.plot(lines["batch"], lines["memory_gib"], "o-", label=str(gating))
                if f"{key} {gating} batch" in told:
                    ax.axvline(told[f"{key} {gating} batch"], color="gray", linestyle=":", linewidth=1)
            ax.plot(
                _MODELS[key][0].batch["static"], told[f"{key} static"], "k*", markersize=12, label="published, static"
            )
            ax.axhline(limit / _GIB, color="black", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.set_ylim(8, 40)
            ax.set_xlabel("sequences per GPU (dotted: largest published)")
            ax.set_title(_TITLES[key], fontsize=10)
        axes[0].set_ylabel("GiB on one GPU")
        axes[0].legend(fontsize=8)
        return axes

    weights = {key: weight_bytes(model_of(cases[0]), 8) / _GIB for key, cases in _MODELS.items()}
    gap = told["mt static activation at 8"] - told["mt dynamic activation at 8"]
    ours = (peak("mt", "static", 8)[0] - peak("mt", "dynamic", 8)[0]) / _GIB
    full = peak("lm", "dynamic", 128)[1] / _GIB
    above = told["mt dense"] - weight_bytes(model_of(CASES[1], dense=True), 8) / _GIB
    note = (
        f"{assume.reserved_bytes / 2**20:.0f} MiB of a GPU are taken to be no tensors; at batch 128 the language "
        f"model's dynamic gating needs {full:.2f} GiB. Weights alone are {weights['lm']:.2f} and {weights['mt']:.2f} "
        "GiB per GPU of 8. The language model's sequence length follows from its static activations, so that this row "
        "tests nothing (split 'V100 assumption'); the others are predictions with it. MT at batch 8: what static "
        f"gating has above dynamic gating is {gap:.2f} GB as published and {ours:.2f} GiB here, so that sentences in "
        f"batches of 8 must have been longer than {assume.mt_sentence} tokens, or padded; and both have about a GiB "
        f"that does not belong to gating, as has the dense model with {above:.2f} GiB above its weights (beams, caches "
        "and logits over whole outputs are not in the decode step here). MT under dynamic gating: activations grow by "
        "a few MiB per sentence here, so that batches far above 96 fit; what stopped the paper at 96 is not in this "
        "model. Tutel's buffers are smaller here than the language model's logits: its limit of 32 is not reproduced."
    )
    return Reproduced(
        "moe-memory",
        "Towards MoE Deployment: memory of one V100 and largest batches",
        frame,
        draw,
        rows,
        note,
        (11.0, 4.8),
    )
