"""Gating and expert buffering of "Towards MoE Deployment" (arXiv 2303.06182) on V100 nodes, beside predictions."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from experiments.reproduce.moe_deployment_cases import (
    CASES,
    HOST_SPLIT,
    SPLIT,
    Assumptions,
    Case,
    cluster,
    implied_launch,
    model_of,
    run,
    speedup,
    variants,
)
from experiments.reproduce.result import Progress, Reproduced, published, row
from simulator.experts.buffering_memory import buffering_memory
from simulator.experts.gating_cost import Buffering
from simulator.experts.gating_model import largest_batch

__all__ = ["moe_buffering", "moe_gating"]

_TABLE = "moe_deployment"
_NODES = (1, 2, 4)
_NAMES = {"static": "static", "tutel": "Tutel"}


def moe_gating(*, progress: Progress | None = None, assume: Assumptions | None = None) -> Reproduced:
    """Throughput of dynamic gating over static and Tutel's, and latencies, on 1, 2 and 4 nodes of 8 V100.

    References
    ----------
    arXiv 2303.06182, the results on dynamic gating.
    """
    import pandas as pd

    assume = assume or Assumptions()
    ratios, latencies = published(_TABLE, "gating"), published(_TABLE, "latency")
    launch = implied_launch(latencies["mt decoder dense"], assume)
    rows: list[dict[str, Any]] = []
    for split, changed in ((SPLIT, assume), (HOST_SPLIT, replace(assume, launch_s=launch))):
        for done, case in enumerate(CASES):
            rows += _ratio_rows(case, changed, ratios, split)
            if split == SPLIT:
                rows += [
                    row(
                        case.title, f"{gating} latency, s", workload=f"batch {case.batch[gating]}", split=split,
                        published=latencies[f"{case.key} {gating}"],
                        predicted=run(case, gating, assume=changed).total,
                    )
                    for gating in ("dense", "static")
                ]  # fmt: skip
            if progress:
                progress(done + 1 + (split == HOST_SPLIT) * len(CASES), 2 * len(CASES))
    records = [record for case in CASES for record in _terms(case, assume)]
    sensitivity = _sensitivity(assume, launch)
    frame = pd.DataFrame(records + sensitivity)

    def draw(figure: Any) -> Any:
        return _draw_ratios(figure, rows, frame)

    return Reproduced(
        name="moe-gating",
        title="Towards MoE Deployment: dynamic gating beside static and Tutel's on V100 nodes",
        frame=frame,
        draw=draw,
        rows=rows,
        note=_gating_note(assume, launch, sensitivity),
        size=(11.0, 8.5),
    )


def _terms(case: Case, assume: Assumptions) -> list[dict[str, Any]]:
    """Seconds by term of every gating and number of nodes."""
    records = []
    for nodes in _NODES:
        for gating in ("dense", "static", "tutel", "dynamic"):
            found = run(case, gating, nodes=nodes, assume=assume)
            records.append(
                {
                    "what": "terms", "case": case.key, "nodes": nodes, "gating": gating, "batch": case.batch[gating],
                    "seconds": found.total, "sequences_per_s_per_gpu": case.batch[gating] / found.total,
                }
                | {f"{term}_s": seconds for term, seconds in found.seconds.items()}
            )  # fmt: skip
    return records


def _ratio_rows(case: Case, assume: Assumptions, ratios: dict[str, float], split: str) -> list[dict[str, Any]]:
    rows = [
        row(
            case.title, f"dynamic over {name}", workload="1 node", split=split,
            published=ratios[f"{case.key} dynamic over {over} 1n"], predicted=speedup(case, over, assume=assume),
        )
        for over, name in _NAMES.items()
    ]  # fmt: skip
    best = max(speedup(case, "static", nodes=nodes, assume=assume) for nodes in _NODES[1:])
    rows.append(
        row(
            case.title, "dynamic over static, best of 2 and 4 nodes", workload="2, 4 nodes", split=split,
            predicted=best, published=ratios[f"{case.key} dynamic over static multi"],
        )
    )  # fmt: skip
    return rows


def _longest_sentence(assume: Assumptions) -> int:
    """Tokens of a sentence up to which static gating fits in the encoder at the published batch."""
    encoder = CASES[1]
    limit = cluster(1, assume).gpu_bytes - assume.reserved_bytes

    def bytes_of(tokens: int) -> float:
        return run(encoder, "static", assume=replace(assume, mt_sentence=tokens)).memory_bytes

    return largest_batch(bytes_of, limit)


def _sensitivity(assume: Assumptions, launch: float) -> list[dict[str, Any]]:
    records = []
    for name, changed in variants(assume, launch).items():
        for case in CASES:
            one = {over: speedup(case, over, assume=changed) for over in _NAMES}
            best = max(speedup(case, "static", nodes=nodes, assume=changed) for nodes in _NODES[1:])
            records.append(
                {
                    "what": "sensitivity", "variant": name, "case": case.key, "over_static": one["static"],
                    "over_tutel": one["tutel"], "over_static_multi": best,
                    "dense_s": run(case, "dense", assume=changed).total,
                    "static_s": run(case, "static", assume=changed).total,
                }
            )  # fmt: skip
    return records


def _draw_ratios(figure: Any, rows: list[dict[str, Any]], frame: Any) -> Any:
    axes = figure.subplots(2, 1)
    bars = [line for line in rows if line["system"].startswith("dynamic over") and line["split"] == SPLIT]
    other = [line for line in rows if line["system"].startswith("dynamic over") and line["split"] == HOST_SPLIT]
    at = range(len(bars))
    width = 0.4
    for offset, column, color in ((-width / 2, "published", "tab:gray"), (width / 2, "predicted", "tab:blue")):
        drawn = axes[0].bar([x + offset for x in at], [line[column] for line in bars], width, label=column, color=color)
        axes[0].bar_label(drawn, fmt="%.3g", fontsize=8)
    more = {"marker": "D", "linestyle": "", "color": "tab:orange", "label": "predicted, host time from dense decoder"}
    axes[0].plot([x + width / 2 for x in at], [line["predicted"] for line in other], **more)
    labels = [f"{line['setting']}\n{line['system'].split(',')[0]}\n{line['workload']}" for line in bars]
    axes[0].set_xticks(list(at), labels, fontsize=6.5)
    axes[0].set_ylabel("times the throughput")
    axes[0].legend(fontsize=8)
    terms = frame[(frame["what"] == "terms")].reset_index(drop=True)
    names = [name for name in terms.columns if name.endswith("_s") and name not in ("dense_s", "static_s")]
    each = terms[names].fillna(0.0).div(terms["seconds"], axis=0)
    bottom = None
    for name in names:
        values = each[name].to_numpy()
        axes[1].bar(range(len(terms)), values, bottom=bottom, label=name[:-2], width=0.8)
        bottom = values if bottom is None else bottom + values
    axes[1].set_xticks(
        range(len(terms)),
        [f"{x.case}, {int(x.nodes)}n, {x.gating}" for x in terms.itertuples()],
        rotation=90,
        fontsize=6,
    )
    for at_bar, line in enumerate(terms.itertuples()):
        axes[1].text(at_bar, 1.01, f"{1e3 * line.seconds / line.batch:.3g}", ha="center", fontsize=6, rotation=45)
    axes[1].set_ylim(0, 1.3)
    axes[1].set_ylabel("share of a pass (above: ms per sequence and GPU)")
    axes[1].legend(fontsize=6.5, ncols=9, loc="upper center")
    return axes


def _gating_note(assume: Assumptions, launch: float, sensitivity: list[dict[str, Any]]) -> str:
    """What the misses are made of: every number is computed here or published."""
    latency, ratios = published(_TABLE, "latency"), published(_TABLE, "gating")
    by = {(line["variant"], line["case"]): line for line in sensitivity}
    told = next(line["variant"] for line in sensitivity if line["variant"].endswith("per kernel"))
    slower = ", ".join(
        f"{case.title} {latency[f'{case.key} dense'] / run(case, 'dense', assume=assume).total:.1f}" for case in CASES
    )
    lm, encoder, decoder = CASES
    batches = encoder.batch["dynamic"] / encoder.batch["static"]
    whole = batches * latency["mt encoder static"] / ratios["mt encoder dynamic over static 1n"]
    layer = (whole - batches * latency["mt encoder dense"]) / 6
    mine = run(encoder, "dynamic", assume=assume)
    ours = (mine.total - mine.seconds["attention"] - mine.seconds["ffn"]) / 6
    values = ", ".join(f"{name} = {value:g}" for name, value in asdict(assume).items() if value is not None)
    hosted, lm_even = by[told, decoder.key], by["one EDR port, even load", lm.key]
    loads = [_busiest_for(lm, over, ratios[f"lm dynamic over {over} 1n"], assume) for over in ("static", "tutel")]
    between = " and ".join(
        f"{max(speedup(case, 'static', nodes=nodes, assume=assume) for nodes in _NODES[1:]):.1f} (published "
        f"{ratios[f'{case.key} dynamic over static multi']})"
        for case in (encoder, decoder)
    )
    sentences = (
        "Rates are the catalog's: published measurements of single kernels, else data sheets. Nothing is fitted to "
        "these rows but the language model's sequence length, which follows from its activation memory.",
        f"Assumed: {values}. Every gating runs at its largest published batch; Tutel's capacity is C·S.",
        f"Dense passes are published as times as slow as predicted: {slower}. Kernels at their roofs are too fast for "
        "them, most of all for translation; what all gatings share is then too small, and ratios on one node too high.",
        f"Between nodes, where the exchange of bytes counts, translation comes out at {between}.",
        f"Decoder, one node: a dense step asks for {1e6 * launch:.0f} µs per kernel instead of "
        f"{1e6 * assume.launch_s:.0f}. With that, dynamic is {hosted['over_static']:.2f} times static (published "
        f"{ratios['mt decoder dynamic over static 1n']}): host time is what is missing. Over Tutel's it is "
        f"{hosted['over_tutel']:.2f} (published {ratios['mt decoder dynamic over tutel 1n']}): Tutel must also have "
        "run fewer rows than the C·S per expert that are charged here, as an adaptive capacity does.",
        f"Encoder, one node: published latency and ratio leave {1e3 * layer:.0f} ms for each MoE layer under dynamic "
        f"gating at batch {encoder.batch['dynamic']}; here it is {1e3 * ours:.0f} ms, most of it the busiest GPU's "
        "experts. An even load makes the ratio worse, and longer sentences slow all gatings down alike (above "
        f"{_longest_sentence(assume)} tokens static gating would not fit at batch {encoder.batch['static']}). Large "
        "enough would be the loop over all experts in fairseq's gate that counts language tokens and waits for the "
        "device each time, which every gating pays; whether the paper ran it is not known.",
        "Language model, one node: the published ratios are met at a load of the busiest GPU of "
        f"{loads[0]:.1f} (static) and {loads[1]:.1f} (Tutel's) times the mean; {assume.lm_busiest:.1f} is that of its "
        "worst batch. Static layers come out too fast; the outer products that build the mask are batches of tiny "
        "products, charged here as streams.",
        "Language model, nodes: where the exchange is all that counts, the ratio tends to the waste factor 12.8 over "
        f"the imbalance. With one EDR port per node and an even load it is {lm_even['over_static_multi']:.1f} "
        f"(published {ratios['lm dynamic over static multi']}): less fabric per GPU than assumed, or a more even load.",
    )
    return " ".join(sentences)


def _busiest_for(case: Case, over: str, ratio: float, assume: Assumptions) -> float:
    """Load of the busiest GPU, in multiples of the mean, at which the model gives a ratio; at least 1."""
    low, high = 1.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        if speedup(case, over, assume=replace(assume, lm_busiest=middle)) > ratio:
            low = middle
        else:
            high = middle
    return low


def moe_buffering(*, progress: Progress | None = None, assume: Assumptions | None = None) -> Reproduced:
    """Expert buffering in the MT decoder: memory saved against K, exactly, and throughput at K = 10.

    References
    ----------
    arXiv 2303.06182, the results on expert buffering.
    """
    import pandas as pd

    assume = assume or Assumptions()
    told, decoder = published(_TABLE, "buffering"), CASES[2]
    model = model_of(decoder)
    records = []
    for slots in range(1, 17):
        found = buffering_memory(model, 8, slots)
        line: dict[str, Any] = {
            "slots": slots, "static_gib": found.buffered_bytes / 2**30, "saved_gib": found.saved_bytes / 2**30,
            "saved_share": found.saved_share, "factor": found.factor,
        }  # fmt: skip
        for nodes in _NODES:
            line[f"over_static_{nodes}n"] = speedup(
                decoder, "static", nodes=nodes, assume=assume, buffering=Buffering(slots=slots)
            )
        records.append(line)
        if progress:
            progress(slots, 16)
    frame = pd.DataFrame(records)
    at = {line["slots"]: line for line in records}
    rows = [
        row("MT 54.5B, 8 GPUs", "GiB saved per GPU", workload="K=10", published=told["saved at 10"],
            predicted=at[10]["saved_gib"], split="formula"),
        row("MT 54.5B, 8 GPUs", "share of static memory saved", workload="K=1", published=told["saved share at 1"],
            predicted=at[1]["saved_share"], split="formula"),
        row("MT 54.5B, 8 GPUs", "times less static memory", workload="K=1", published=told["factor at 1"],
            predicted=at[1]["factor"], split="formula"),
    ]  # fmt: skip
    launch = implied_launch(published(_TABLE, "latency")["mt decoder dense"], assume)
    for split, changed in ((SPLIT, assume), (HOST_SPLIT, replace(assume, launch_s=launch))):
        rows += [
            row(
                decoder.title, f"buffered over static, {nodes} node{'s' * (nodes > 1)}",
                workload=f"K={_slots(nodes):g} of {16 // nodes}", split=split,
                published=told[f"mt decoder over static {nodes}n"],
                predicted=speedup(
                    decoder, "static", nodes=nodes, assume=changed, buffering=Buffering(slots=_slots(nodes))
                ),
            )
            for nodes in _NODES
        ]  # fmt: skip

    def draw(figure: Any) -> Any:
        axes = figure.subplots(1, 2)
        axes[0].plot(frame["slots"], frame["static_gib"], "o-", color="tab:blue", label="formula")
        axes[0].plot(10, at[16]["static_gib"] - told["saved at 10"], "k*", markersize=12, label="published, K = 10")
        axes[0].plot(1, at[16]["static_gib"] / told["factor at 1"], "kP", markersize=9, label="published, K = 1")
        axes[0].set_xlabel("slots K per GPU and MoE layer")
        axes[0].set_ylabel("static memory of one GPU, GiB")
        axes[0].set_ylim(0, None)
        axes[0].legend(fontsize=8)
        for nodes, marker in zip(_NODES, "osD", strict=True):
            color = f"C{nodes}"
            axes[1].plot(
                frame["slots"],
                frame[f"over_static_{nodes}n"],
                marker + "-",
                color=color,
                label=f"{nodes} node" + "s" * (nodes > 1),
            )
            axes[1].plot(_slots(nodes), told[f"mt decoder over static {nodes}n"], "*", color=color, markersize=14)
        axes[1].set_xlabel("slots K per GPU and MoE layer")
        axes[1].set_ylabel("times static gating's throughput (stars: published)")
        axes[1].legend(fontsize=8)
        return axes

    return Reproduced(
        name="moe-buffering",
        title="Towards MoE Deployment: expert buffering in the MT decoder",
        frame=frame,
        draw=draw,
        rows=rows,
        note=_buffering_note(),
        size=(11.0, 4.8),
    )


def _slots(nodes: int) -> float:
    """K: the paper keeps its slots at about 80 per layer on all GPUs together."""
    return published(_TABLE, "buffering")["slots in all"] / (8 * nodes)


def _buffering_note() -> str:
    return (
        "The paper's GB are GiB. One node is published as comparable to the baseline and entered as 1. The paper keeps "
        "about 80 slots per layer on all GPUs together: 10, 5 and 2.5 of 16, 8 and 4 experts on a GPU. Misses are "
        "those of a cache that knows no pattern, 1 - K / (experts per GPU) = 37.5 %, on the quarter of the experts "
        "that is active, the same on every GPU; copies run beside the exchange, at 12 GB/s. A cache that profits from "
        "hot experts misses less, and a GPU with more active experts than others waits longer; both are left out. The "
        "rows with the host's time per kernel of a dense decode step show how much hangs on it, see moe-gating."
    )
