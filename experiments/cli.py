"""The command ``hrm``: plan, simulate, measure and run Mixture-of-Experts models larger than a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from experiments.listing import hardware_command, models_command, workloads_command
from experiments.options import (
    FIGURES,
    Capacity,
    OutFile,
    executor_needed,
    json_option,
    make_plan,
    paced_link_option,
    plan_options,
)
from experiments.output import emit, percentages, save_figure, table
from experiments.running import make_checkpoint_command, probe_command, run_command
from hrm import BatchShape, Plan, micro_batches
from hrm.catalog import load_hardware, load_model
from hrm.errors import HrmError, InvalidSchedule, NotBuiltYet
from hrm.model import DTYPE_BYTES
from hrm.units import format_flops, format_seconds

__all__ = ["cli", "main"]

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="moe-hrm", prog_name="hrm")
@click.pass_context
def cli(context: click.Context) -> None:
    """Plan, simulate and run Mixture-of-Experts models on machines whose GPU cannot hold them."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; failures become one line on stderr.

    Parameters
    ----------
    argv : sequence of str, optional
        By default the process's own arguments.
    """
    try:
        code = cli.main(args=None if argv is None else list(argv), prog_name="hrm", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except HrmError as error:
        return _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", _INTERRUPTED)
        if argv is None:
            # Threads that the interrupt caught inside a kernel would abort an orderly shutdown.
            sys.stderr.flush()
            os._exit(_INTERRUPTED)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing that is still buffered may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        name = f" {str(error.filename)!r}" if error.filename is not None else ""
        return _fail(f"cannot use{name}: {error.strerror or error}", 2)


def _fail(message: str, code: int) -> int:
    click.echo(f"hrm: error: {' '.join(message.split())}", err=True)
    return code


# -- the model -----------------------------------------------------------------------------------------


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


@cli.command("roofline", cls=_ManyBatches)
@click.option("--model", required=True, metavar="M", help="Catalog name, config.json or checkpoint folder.")
@click.option("--hardware", required=True, metavar="H", help="Catalog name or hardware file.")
@click.option("--batch", multiple=True, type=click.IntRange(min=1), metavar="N", help="Batch sizes; one or more.")
@click.option("--micro-batch", type=click.IntRange(min=1), metavar="MU", help="Sequences per kernel (default: N).")
@click.option("--context", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens per sequence.")
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


@cli.command("plan")
@plan_options
@json_option
def plan_command(as_json: bool, **options: Any) -> None:
    """Choose the policy with the highest predicted throughput, or evaluate the one given."""
    result = make_plan(**options)
    emit(result.to_dict(), lambda: str(result), as_json=as_json)


def _batch_of(plan: Plan) -> BatchShape:
    """The workload's first N requests in the plan's micro-batches."""
    policy, workload = plan.policy, plan.workload
    lengths = workload.lengths(policy.batch_size)
    groups, _ = micro_batches(
        lengths, num_micro_batches=policy.num_micro_batches, micro_batch_size=policy.micro_batch_size
    )
    parts = (sorted((lengths[i] for i in group), reverse=True) for group in groups)
    return BatchShape(tuple(tuple(part) for part in parts), workload.gen_len)


@cli.command("simulate")
@plan_options
@click.option("--trace", type=OutFile(), help="Write a trace for ui.perfetto.dev.")
@click.option("--timeline", type=OutFile(), help="Write the timeline as JSON, for hrm compare.")
@click.option("--gantt", type=OutFile(FIGURES), help="Draw the timeline.")
@click.option("--exact", is_flag=True, help="Play every decode step, however many there are.")
@json_option
def simulate_command(
    trace: Path | None, timeline: Path | None, gantt: Path | None, exact: bool, as_json: bool, **options: Any
) -> None:
    """Play the schedule task by task, under contention for memory, link and cores."""
    from simulator import simulate

    plan = make_plan(**options)
    rates = plan.hardware.rates(options["efficiency"])
    prediction = simulate(
        plan.model,
        rates,
        plan.policy,
        _batch_of(plan),
        system=options["system"],
        num_gpus=plan.hardware.num_gpus,
        exact=True if exact else None,
    )
    if trace:
        prediction.timeline.save_trace(trace)
    if timeline:
        prediction.timeline.save(timeline)
    if gantt:
        from simulator.gantt import gantt as draw

        save_figure(gantt, lambda ax: draw(prediction.timeline, ax=ax), size=(14.0, 4.5))
    context = {"model": plan.model.name, "hardware": plan.hardware.name, "workload": plan.workload.name}
    context |= {"system": options["system"], "efficiency": plan.rate_set}
    result = prediction.to_dict() | context | {"policy": plan.policy.to_dict()}

    def text() -> str:
        lines = [
            f"{plan.model.name} on {plan.hardware.name}, {plan.workload} (efficiency: {plan.rate_set})",
            f"  policy      {plan.policy}",
            f"  simulated   {prediction.throughput_tok_s:.4g} tok/s  "
            f"(prefill {format_seconds(prediction.prefill_s)}, decode {format_seconds(prediction.decode_s)})",
            f"  closed form {float(plan.estimate.throughput):.4g} tok/s",
            f"  busy        {percentages(prediction.utilization)}",
            f"  tasks       {prediction.num_tasks:,}, {prediction.played_tasks:,} of them played, "
            f"in {format_seconds(prediction.wall_s)}",
        ]
        if prediction.played_tasks != prediction.num_tasks and (trace or timeline or gantt):
            lines.append("  note        the files hold the last sampled decode steps; --exact gives the whole run")
        return "\n".join(lines)

    emit(result, text, as_json=as_json)


# -- predictions against measurements ------------------------------------------------------------------


@cli.command("compare")
@click.argument("predicted", type=_FILE)
@click.argument("measured", type=_FILE)
@click.option("--out", type=OutFile(FIGURES), help="Draw the seconds of each task class.")
@json_option
def compare_command(predicted: Path, measured: Path, out: Path | None, as_json: bool) -> None:
    """Set two timelines side by side, by task class and by lane."""
    from simulator import Timeline
    from simulator.compare import compare

    timelines = []
    for path in (predicted, measured):
        try:
            timelines.append(Timeline.load(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidSchedule(f"timeline {str(path)!r} is damaged: {error!r}.") from None
    comparison = compare(*timelines)
    if out:
        save_figure(out, lambda ax: comparison.plot(ax=ax))
    emit(comparison.to_dict(), lambda: str(comparison), as_json=as_json)


@cli.command("validate")
@click.option("--quick", is_flag=True, help="A small model and few cases: a minute or two.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Run this one (default: random weights).",
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: CUDA where there is one.")
@click.option("--device-memory", type=Capacity(), help="Use this much GPU memory, e.g. 16GiB.")
@paced_link_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out"),
    show_default=True,
    metavar="DIR",
)
@json_option
def validate_command(as_json: bool, **options: Any) -> None:
    """Probe, plan, simulate and run here: predicted against measured."""
    with executor_needed():
        from experiments.validation import render, run_validation

        result = run_validation(as_json=as_json, **options)
    emit(result, lambda: render(result), as_json=as_json)


# -- what is not built yet -----------------------------------------------------------------------------


def _not_built(name: str, summary: str) -> None:
    @cli.command(name, help=f"{summary} Not in this version.", context_settings={"ignore_unknown_options": True})
    @click.argument("args", nargs=-1, type=click.UNPROCESSED)
    def command(args: tuple[str, ...]) -> None:
        raise NotBuiltYet(f"'hrm {name}' is not built yet; this version cannot run it.")


_not_built("calibrate", "Fit a machine's efficiencies to measurements.")
_not_built("reproduce", "Set the papers' tables beside ours.")
_not_built("experts", "Expert gating, caching and placement.")


_COMMANDS = (
    models_command,
    hardware_command,
    workloads_command,
    probe_command,
    make_checkpoint_command,
    run_command,
)
for _command in _COMMANDS:
    cli.add_command(_command)

if __name__ == "__main__":
    sys.exit(main())
