"""Options that commands share, and the policy that was typed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from experiments.output import make_folder
from hrm import Policy
from hrm.errors import HrmError, InvalidValue
from hrm.model import DTYPE_BYTES
from hrm.sweep import MAX_JOBS
from hrm.units import MAX_SIZE, brief, parse_bandwidth, parse_bytes

__all__ = [
    "COUNT",
    "FIGURES",
    "PACED_LINK",
    "Bandwidth",
    "Capacity",
    "Jobs",
    "NumberPair",
    "OutFile",
    "cache_policy_option",
    "executor_needed",
    "json_option",
    "paced_link_option",
    "plan_options",
    "policy_of",
    "policy_options",
    "popularity_option",
    "search_options",
]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FIGURES = (".png", ".pdf", ".svg")
PACED_LINK = "2GB/s"
"""Default of --link-bandwidth where a run is made; the executor's own default."""
_NO_BANDWIDTH = "none"
_EXECUTOR_PACKAGES = ("torch", "transformers", "safetensors")


COUNT = click.IntRange(min=1, max=MAX_SIZE)
"""Tokens or sequences."""


class Capacity(click.ParamType):
    """Bytes, written with a unit."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, or fail in one line."""
        try:
            return parse_bytes(value)
        except InvalidValue as error:
            self.fail(str(error), param, ctx)


class Bandwidth(click.ParamType):
    """Bytes per second, written with a unit, or "none" (which becomes None)."""

    name = "bandwidth"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Parse, or fail in one line."""
        if str(value).strip().lower() == _NO_BANDWIDTH:
            return None
        try:
            return parse_bandwidth(value)
        except InvalidValue as error:
            self.fail(f"{error} Or write 'none'.", param, ctx)


class NumberPair(click.ParamType):
    """Two whole numbers >= 1 with a comma between them."""

    name = "n,s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse, or fail in one line."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            self.fail(f"{brief(value)} is not two whole numbers >= 1; write them like '16,128'.", param, ctx)
        digits = len(str(MAX_SIZE))
        if not all(len(part.lstrip("0")) <= digits and 1 <= int(part) <= MAX_SIZE for part in parts):
            self.fail(f"{brief(value)} is not two whole numbers from 1 to {MAX_SIZE}.", param, ctx)
        return int(parts[0]), int(parts[1])


class Jobs(click.ParamType):
    """A number of processes, or -1 for one per core."""

    name = "jobs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, or fail in one line."""
        text = str(value).strip()
        if text == "-1":
            return -1
        if not (text.isdecimal() and len(text) < 9 and 1 <= int(text) <= MAX_JOBS):
            self.fail(f"{brief(value)} must be -1 (one per core) or 1 to {MAX_JOBS}.", param, ctx)
        return int(text)


class OutFile(click.ParamType):
    """A file to be written, refused before anything is computed if it cannot be; its folder is made.

    Parameters
    ----------
    suffixes : tuple of str
        Allowed endings; any if empty.
    """

    name = "file"

    def __init__(self, suffixes: tuple[str, ...] = ()) -> None:
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path, checked."""
        path = Path(value)
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"{str(path)!r} must end in {' or '.join(self.suffixes)}.", param, ctx)
        if path.is_dir():
            self.fail(f"{str(path)!r} is a folder; name a file.", param, ctx)
        make_folder(path.parent)
        if path.exists():
            if not os.access(path, os.W_OK):
                self.fail(f"{str(path)!r} cannot be written; name another file.", param, ctx)
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            self.fail(f"the folder {str(path.parent)!r} is not writable; name a file elsewhere.", param, ctx)
        return path


def _stack(*decorators: Decorator) -> Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


paced_link_option = click.option(
    "--link-bandwidth",
    type=Bandwidth(),
    default=PACED_LINK,
    show_default=True,
    help="Pace of the link on a CPU.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, in SI units.")

cache_policy_option = click.option(
    "--cache-policy",
    metavar="P",
    help="With an expert cache: which expert makes room for another (default: inactive-first-lifo).",
)
popularity_option = click.option(
    "--popularity",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="TRACE",
    help="A routing trace, which shows how popular experts are; the popular ones stay on the GPU. Predictions take the "
    "mean of its layers, however many they are; a run needs the model's own.",
)

_SWITCH = click.IntRange(0, 1)
policy_options = _stack(
    click.option("--batch-size", type=int, metavar="N", help="Sequences per pass; turns the search off."),
    click.option("--micro-batch-size", type=int, metavar="MU", help="Sequences per kernel (default: N)."),
    click.option("--weights-on-gpu", type=float, metavar="R", help="Resident share of expert weights, 0..1."),
    click.option("--kv-on-gpu", type=float, metavar="R", help="Share of the KV cache on the GPU, 0..1."),
    click.option("--attention-on-gpu", type=_SWITCH, metavar="0|1", help="Where decode attention runs."),
    click.option("--ffn-on-gpu", type=_SWITCH, metavar="0|1", help="Where the experts run."),
    click.option(
        "--expert-slots", type=int, metavar="K", help="Cache K experts per MoE layer on the GPU; a miss loads one."
    ),
    click.option("--system", default="moe-lightning", metavar="S", show_default=True, help="Schedule to use."),
)

search_options = _stack(
    click.option("--model", required=True, metavar="M", help="Catalog name, config.json or checkpoint folder."),
    click.option("--hardware", required=True, metavar="H", help="Catalog name or hardware file."),
    click.option("--workload", required=True, metavar="W", help="Catalog name, file, or PROMPT_LEN,GEN_LEN."),
    click.option("--gen-len", type=int, metavar="G", help="Tokens to generate per request."),
    click.option("--prompt-len", type=int, metavar="S", help="Give every prompt this length."),
    click.option("--padded", is_flag=True, help="Pad every prompt to the workload's longest."),
    click.option(
        "--objective",
        type=click.Choice(["throughput", "paper"]),
        help="What the planner maximises (default: throughput; simulate: as the system's own planner).",
    ),
    click.option("--solver", type=click.Choice(["grid", "milp"]), default="grid"),
    click.option(
        "--efficiency", metavar="spec|published|paper|measured|fitted", help="Rates to use (default: the best known)."
    ),
    click.option("--device-memory", type=Capacity(), help="Use this much GPU memory, e.g. 16GiB."),
    click.option("--link-bandwidth", type=Bandwidth(), default=_NO_BANDWIDTH, help="Pace the link, e.g. 2GB/s."),
    click.option("--dtype", type=click.Choice(list(DTYPE_BYTES)), help="Type of the weights (default: the config's)."),
    click.option("--kv-dtype", type=click.Choice(list(DTYPE_BYTES)), help="Type of the KV cache."),
    click.option("--max-batch-size", type=COUNT, metavar="N", help="Largest N to search."),
)

plan_options = _stack(
    search_options,
    policy_options,
    cache_policy_option,
    click.option(
        "--miss-rate",
        type=click.FloatRange(0, 1),
        metavar="R",
        help="With an expert cache: misses per active expert in decode (default: the policy's, if nothing is known).",
    ),
    popularity_option,
)


@contextlib.contextmanager
def executor_needed() -> Iterator[None]:
    """Turn a missing torch (or what comes with it) into one line that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXECUTOR_PACKAGES:
            raise
        raise HrmError(f'this command needs {package}: pip install "moe-hrm[executor]".') from None


def policy_of(
    *,
    batch_size: int | None,
    micro_batch_size: int | None,
    weights_on_gpu: float | None,
    kv_on_gpu: float | None,
    attention_on_gpu: int | None,
    ffn_on_gpu: int | None,
    expert_slots: int | None,
) -> Policy | None:
    """The policy that was typed, or None if the planner is to choose one.

    Raises
    ------
    click.UsageError
        For a part of a policy without ``--batch-size``.
    InvalidValue
        For values out of range.
    """
    given = {
        "micro_batch_size": micro_batch_size,
        "weights_on_gpu": weights_on_gpu,
        "kv_on_gpu": kv_on_gpu,
        "attention_on_gpu": None if attention_on_gpu is None else bool(attention_on_gpu),
        "ffn_on_gpu": None if ffn_on_gpu is None else bool(ffn_on_gpu),
        "expert_slots": expert_slots,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if batch_size is None:
        if given:
            name = "--" + next(iter(given)).replace("_", "-")
            raise click.UsageError(
                f"{name} is part of a policy: add --batch-size, or leave it out and let the planner choose."
            )
        return None
    values: dict[str, Any] = {"micro_batch_size": batch_size} | given
    return Policy(batch_size=batch_size, **values)
