"""The command ``hrm``: plan, simulate, measure and run Mixture-of-Experts models larger than a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from experiments.calibrating import calibrate_command
from experiments.comparing import compare_command
from experiments.experts import experts_group
from experiments.jobs import run_command
from experiments.listing import hardware_command, models_command, workloads_command
from experiments.options import (
    Capacity,
    executor_needed,
    json_option,
    paced_link_option,
)
from experiments.output import emit
from experiments.planning import plan_command, roofline_command, simulate_command, sweep_command
from experiments.reproducing import reproduce_command
from experiments.running import make_checkpoint_command, probe_command
from hrm.errors import DoesNotFit, HrmError

__all__ = ["cli", "main"]

_INTERRUPTED = 130
_BROKEN_PIPE = 141


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
    except MemoryError:
        return _fail("this takes more memory than there is; give smaller sizes.", DoesNotFit.exit_code)
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


# -- predictions against measurements ------------------------------------------------------------------


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
@click.option(
    "--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Run every case so often; medians count."
)
@json_option
def validate_command(as_json: bool, **options: Any) -> None:
    """Probe, plan, simulate and run here: predicted against measured."""
    with executor_needed():
        from experiments.validation import render, run_validation

        result = run_validation(as_json=as_json, **options)
    (options["out"] / "table.txt").write_text(render(result) + "\n")
    emit(result, lambda: render(result), as_json=as_json)


_COMMANDS = (
    roofline_command,
    plan_command,
    sweep_command,
    simulate_command,
    calibrate_command,
    reproduce_command,
    models_command,
    hardware_command,
    workloads_command,
    probe_command,
    make_checkpoint_command,
    run_command,
    compare_command,
    experts_group,
)
for _command in _COMMANDS:
    cli.add_command(_command)

if __name__ == "__main__":
    sys.exit(main())
