"""``hrm compare``: predictions against measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from experiments.options import FIGURES, OutFile, json_option
from experiments.output import emit, save_figure
from hrm.errors import InvalidSchedule, InvalidValue
from hrm.units import brief

__all__ = ["Steps", "compare_command"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIGITS = 9


class Steps(click.ParamType):
    """First and last step, both included, with a colon between them."""

    name = "a:b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse, or fail in one line."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(":")]
        if len(parts) != 2 or not all(part.isdecimal() and len(part) <= _DIGITS for part in parts):
            self.fail(f"{brief(value)} is not two steps; write them like '3:4'.", param, ctx)
        first, last = int(parts[0]), int(parts[1])
        if first > last:
            self.fail(f"{brief(value)} ends before it begins.", param, ctx)
        return first, last


@click.command("compare")
@click.argument("predicted", type=_FILE)
@click.argument("measured", type=_FILE)
@click.option("--out", type=OutFile(FIGURES), help="Draw the seconds of each task class.")
@click.option("--gantt", type=OutFile(FIGURES), help="Draw both timelines, predicted above measured.")
@click.option("--steps", type=Steps(), metavar="A:B", help="Steps that --gantt shows (default: two of steady decode).")
@json_option
def compare_command(
    predicted: Path,
    measured: Path,
    out: Path | None,
    gantt: Path | None,
    steps: tuple[int, int] | None,
    as_json: bool,
) -> None:
    """Set two timelines side by side: task classes, lanes, waits, and where a decode step's time went."""
    if steps and not gantt:
        raise InvalidValue("--steps says what --gantt shows; give --gantt FILE, too.")
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
    if gantt:
        from matplotlib.figure import Figure

        from simulator.gantt import gantt_pair, steady_steps

        chosen = steps or steady_steps(timelines[0])
        figure = gantt_pair(*timelines, steps=chosen, title=comparison.schedule, figure=Figure(layout="constrained"))
        figure.savefig(gantt, dpi=150)
    emit(comparison.to_dict(), lambda: str(comparison), as_json=as_json)
