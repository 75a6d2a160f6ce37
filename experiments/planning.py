"""Commands of the model: roofline, plan, sweep, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from experiments.options import (
    COUNT,
    FIGURES,
    Jobs,
    OutFile,
    json_option,
    plan_options,
)
from experiments.output import emit, percentages, progress_bar, save_figure, table
from experiments.plans import make_plan, simulate_plan, simulated_plan
from hrm import Plan, Workload
from hrm.catalog import load_hardware, load_model, names
from hrm.errors import DoesNotFit
from hrm.model import DTYPE_BYTES
from hrm.units import format_flops, format_seconds
from simulator.cache_costs import ExpertCaching
from simulator.experts.cache import DEFAULT_POLICY

__all__ = ["plan_command", "roofline_command", "simulate_command", "sweep_command"]


class _ManyBatches(click.Command):
    """Takes ``--batch 32 64`` as well as ``--batch 32 --batch 64``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option's name before each of its numbers."""
        spread: list[str] = []
        for number, arg in enumerate(args):
            if arg.isdecimal() and number and args[number - 1].isdecimal() and "--batch" in spread[-2:-1]:
                spread.append("--batch")
            spread.append(arg)
        return super().parse_args(ctx, spread)


@click.command("roofline", cls=_ManyBatches)
@click.option("--model", required=True, metavar="M", help="Catalog name, config.json or checkpoint folder.")
@click.option("--hardware", required=True, metavar="H", help="Catalog name or hardware file.")
@click.option("--batch", multiple=True, type=COUNT, metavar="N", help="Batch sizes; one or more.")
@click.option("--micro-batch", type=COUNT, metavar="MU", help="Sequences per kernel (default: N).")
@click.option("--context", type=COUNT, default=512, show_default=True, help="Tokens per sequence.")
@click.option("--kv-dtype", type=click.Choice(list(DTYPE_BYTES)), help="Type of the KV cache (default: model's).")
@click.option("--attention-flops", type=click.Choice(["paper", "exact"]), default="exact", show_default=True)
@click.option("--out", type=OutFile(FIGURES), help="Write the figure here.")
@json_option
def roofline_command(
    model: str,
    hardware: str,
    batch: tuple[int, ...],
    micro_batch: int | None,
    context: int,
    kv_dtype: str | None,
    attention_flops: Any,
    out: Path | None,
    as_json: bool,
) -> None:
    """Place a layer's operators on the machine's hierarchical roofline."""
    from experiments.rooflines import roofline_points

    the_model, machine = load_model(model), load_hardware(hardware)
    points = roofline_points(
        the_model,
        machine,
        batch or (1, 32, 128, 512, 2048),
        micro_batch=micro_batch,
        context=context,
        kv_dtype=kv_dtype,
        attention_flops=attention_flops,
    )
    if out:
        from hrm.plots import roofline

        save_figure(out, lambda ax: roofline(machine, points, ax=ax))
    keys = ("name", "batch", "intensity", "attainable_flops", "p1", "p2", "bound_by")
    result = {
        "model": the_model.name,
        "hardware": machine.name,
        "context": context,
        "micro_batch": micro_batch,
        "kv_dtype": kv_dtype or the_model.dtype,
        "attention_flops": attention_flops,
        "operators": [{key: getattr(point, key) for key in keys} for point in points],
    }
    rows = [
        [p.name, p.batch, *(f"{x:.4g}" for x in (p.intensity["cpu"], p.intensity["gpu"])),
         format_flops(p.attainable_flops), f"{p.p1:.4g}", f"{p.p2:.4g}", p.bound_by]
        for p in points
    ]  # fmt: skip
    headers = [
        "operator",
        "N",
        "CPU FLOP/B",
        "GPU FLOP/B",
        "attainable",
        "P1 FLOP/B",
        "P2 FLOP/B",
        "bound by",
    ]
    title = f"{the_model.name} on {machine.name}, context {context}, KV cache {result['kv_dtype']}"
    emit(result, lambda: f"{title}\n{table(headers, rows)}", as_json=as_json)


@click.command("plan")
@plan_options
@click.option("--no-advice", is_flag=True, help="Do not plan for larger machines as well.")
@json_option
def plan_command(no_advice: bool, as_json: bool, **options: Any) -> None:
    """Choose the policy with the highest predicted throughput, or evaluate the one given.

    For a --system other than moe-lightning: the policy that the system would choose for itself, simulated.
    """
    system = options["system"]
    if system == "moe-lightning":
        result = make_plan(**options)
    else:
        # Their schedules are not what the closed form describes.
        result, no_advice = simulated_plan(make_plan(simulated=True, **options), system), True
    emit(result.to_dict(advice=not no_advice), lambda: result.text(advice=not no_advice), as_json=as_json)


@click.command("sweep")
@click.option("--model", "models", multiple=True, required=True, metavar="M", help="Name or path; repeat, or 'all'.")
@click.option("--hardware", multiple=True, required=True, metavar="H", help="Name or path; repeat, or 'all'.")
@click.option("--workload", "workloads", multiple=True, required=True, metavar="W", help="Repeat for several.")
@click.option("--gen-len", "gen_lens", multiple=True, type=COUNT, metavar="G", help="Repeat for several.")
@click.option("--padded", is_flag=True, help="Pad every prompt to the workload's longest.")
@click.option("--objective", type=click.Choice(["throughput", "paper"]), default="throughput")
@click.option("--efficiency", metavar="SET", help="Rates to use on every machine (default: the best each has).")
@click.option("--jobs", type=Jobs(), default=-1, show_default=True, help="Processes; -1: one per core.")
@click.option("--out", type=OutFile((".jsonl",)), help="Keep rows here; an interrupted sweep goes on from it.")
@json_option
def sweep_command(
    models: tuple[str, ...],
    hardware: tuple[str, ...],
    workloads: tuple[str, ...],
    gen_lens: tuple[int, ...],
    padded: bool,
    jobs: int,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan every combination of models, machines and workloads, as one table.

    Where nothing fits, a row has the reason. Exits with 3 if that is every row.
    """
    from hrm.sweep import plan_grid

    loads = [Workload.parse(text).with_options(padded=True if padded else None) for text in workloads]
    if gen_lens:
        loads = [load.with_options(gen_len=gen_len) for load in loads for gen_len in gen_lens]
    model_names = names("models") if "all" in models else models
    machines = names("hardware") if "all" in hardware else hardware
    given = {key: value for key, value in options.items() if value not in (None, "throughput")}
    with progress_bar(len(model_names) * len(machines) * len(loads), "plans", "plan") as bar:
        frame = plan_grid(model_names, machines, loads, n_jobs=jobs, out=out, progress=bar.update, **given)
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")

    def text() -> str:
        shown = [
            [
                row["model"], row["hardware"], row["workload"],
                *([f"{row['throughput_tok_s']:.4g}", f"{row['bound_tok_s']:.4g}", row["bottleneck"],
                   int(row["batch_size"]), int(row["micro_batch_size"]), f"{row['weights_on_gpu']:.3f}"]
                  if row["error"] is None else ["-"] * 6),
            ]
            for row in rows
        ]  # fmt: skip
        headers = ["model", "machine", "workload", "tok/s", "bound", "bottleneck", "N", "mu", "r_w"]
        reasons = [
            f"{row['model']} on {row['hardware']}, {row['workload']}: {row['error']}"
            for row in rows
            if row["error"] is not None
        ]
        return "\n".join([table(headers, shown), *reasons])

    emit({"rows": rows}, text, as_json=as_json)
    if all(row["error"] is not None for row in rows):
        click.get_current_context().exit(DoesNotFit.exit_code)


@click.command("simulate")
@plan_options
@click.option("--trace", type=OutFile(), help="Write a trace for ui.perfetto.dev.")
@click.option("--timeline", type=OutFile(), help="Write the timeline as JSON, for hrm compare.")
@click.option("--gantt", type=OutFile(FIGURES), help="Draw the timeline.")
@click.option(
    "--mean-output",
    type=click.FloatRange(min=1),
    metavar="L",
    help="Requests end by themselves after L tokens on average (geometric), at --gen-len at the latest.",
)
@click.option("--exact", is_flag=True, help="Play every decode step, however many there are.")
@json_option
def simulate_command(
    trace: Path | None, timeline: Path | None, gantt: Path | None, mean_output: float | None,
    exact: bool, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Play the schedule task by task, under contention for memory, link and cores."""
    plan = make_plan(simulated=True, **options)
    keep = exact and bool(trace or timeline or gantt)
    popular = options["popularity"] is not None and not plan.policy.ffn_on_gpu
    cache = _cache_of(plan, options["cache_policy"], options["miss_rate"])
    prediction = simulate_plan(
        plan, options["system"], mean_output=mean_output, exact=True if exact else None, keep_timeline=keep,
        cache_policy=options["cache_policy"] or DEFAULT_POLICY, miss_rate=options["miss_rate"], popular=popular,
    )  # fmt: skip
    if trace:
        prediction.timeline.save_trace(trace)
    if timeline:
        prediction.timeline.save(timeline)
    if gantt:
        from simulator.gantt import gantt as draw

        save_figure(gantt, lambda ax: draw(prediction.timeline, ax=ax), size=(14.0, 4.5))
    context = {"model": plan.model.name, "hardware": plan.hardware.name, "workload": plan.workload.name}
    context |= {"system": options["system"], "efficiency": plan.rate_set}
    result = prediction.to_dict() | context | {"policy": plan.policy.to_dict(), "expert_cache": cache}

    def text() -> str:
        lines = [
            f"{plan.model.name} on {plan.hardware.name}, {plan.workload} (efficiency: {plan.rate_set})",
            f"  policy      {plan.policy}",
            f"  simulated   {prediction.throughput_tok_s:.4g} tok/s  "
            f"(prefill {format_seconds(prediction.prefill_s)}, decode {format_seconds(prediction.decode_s)})",
            f"  busy        {percentages(prediction.utilization)}",
            f"  tasks       {prediction.num_tasks:,}, {prediction.played_tasks:,} of them played, "
            f"in {format_seconds(prediction.wall_s)}"
            + (f", sampling error about {prediction.sampling_error:.2%}" if prediction.sampling_error else ""),
        ]
        if cache is not None:
            lines.insert(
                2,
                f"  experts     {cache['slots']} slots per layer ({cache['policy']}): "
                f"{cache['miss_rate']:.1%} of the active ones miss in decode",
            )
        if options["system"] == "moe-lightning" and plan.solver != "simulation":
            lines.insert(3, f"  closed form {float(plan.estimate.throughput):.4g} tok/s")
        if prediction.played_tasks != prediction.num_tasks and (trace or timeline or gantt):
            lines.append("  note        the files hold the last three decode steps; --exact gives the whole run")
        return "\n".join(lines)

    emit(result, text, as_json=as_json)


def _cache_of(found: Plan, policy: str | None, miss_rate: float | None) -> dict[str, Any] | None:
    """Slots, policy and expected misses per active expert of a plan's expert cache; None without one."""
    slots, ffn = found.policy.expert_slots, found.model.main_layer.ffn
    if slots is None:
        return None
    cache = ExpertCaching(slots=slots, policy=policy or DEFAULT_POLICY, miss_rate=miss_rate)
    rate = cache.decode_rate(ffn, found.policy.micro_batch_size)
    return {"slots": slots, "policy": cache.policy, "miss_rate": rate}
