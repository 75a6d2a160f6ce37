"""Options that commands share, and the way from what was typed to models, machines and policies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click

from hrm import Hardware, MoEModel, Plan, Policy, Workload, evaluate, plan
from hrm.batching import batch_of
from hrm.catalog import load_hardware, load_model
from hrm.errors import DoesNotFit, HrmError, InvalidConfig, InvalidValue
from hrm.hardware import Quantity
from hrm.model import DTYPE_BYTES
from hrm.sweep import MAX_JOBS
from hrm.system_policies import system_policy
from hrm.systems import System, check_system
from hrm.units import MAX_SIZE, brief, parse_bandwidth, parse_bytes
from simulator import Prediction, simulate
from simulator.experts.residency import better_residency, cached_instead, evaluate_cached, simulated_estimate
from simulator.schedules import check_buildable

__all__ = [
    "COUNT",
    "FIGURES",
    "PACED_LINK",
    "Bandwidth",
    "Capacity",
    "Jobs",
    "NumberPair",
    "OutFile",
    "executor_needed",
    "json_option",
    "make_plan",
    "paced_link_option",
    "plan_options",
    "policy_of",
    "policy_options",
    "search_options",
    "simulate_plan",
    "simulated_plan",
    "with_link",
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
    """A file to be written, refused before anything is computed if it cannot be.

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
        if not path.parent.is_dir():
            self.fail(f"the folder {str(path.parent)!r} does not exist; make it first.", param, ctx)
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

plan_options = _stack(search_options, policy_options)


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


def with_link(machine: Hardware, bandwidth: float | None) -> Hardware:
    """The machine with its link set to `bandwidth` bytes/s, in its data sheet and in every rate set."""
    if bandwidth is None:
        return machine
    speed = Quantity(bandwidth, source="set by the caller")
    links = tuple(x if x.source == x.target else replace(x, bandwidth=speed) for x in machine.links)
    return replace(machine.with_link(bandwidth), links=links)


_PLACES = ("attention_on_gpu", "ffn_on_gpu")


def make_plan(
    *,
    model: str,
    hardware: str,
    workload: str,
    gen_len: int | None,
    prompt_len: int | None,
    padded: bool,
    objective: Literal["throughput", "paper"] | None,
    solver: Literal["grid", "milp"],
    efficiency: str | None,
    device_memory: int | None,
    link_bandwidth: float | None,
    max_batch_size: int | None,
    system: str,
    dtype: str | None,
    kv_dtype: str | None,
    simulated: bool = False,
    **policy: Any,
) -> Plan:
    """Search for a policy, or evaluate the one given, as the options of ``hrm plan`` say.

    With `simulated`, only policies whose schedule can be built; where neither policy nor objective is given, the
    policy is the one that the system would choose for itself, if the machine's rates were fitted to runs of the
    systems' own programs or the system is not MoE-Lightning.

    Raises
    ------
    HrmError
        For unknown names, bad values, what this version lacks, or what does not fit.
    """
    traits = check_system(system)
    places: dict[str, Any] = {}
    if policy["batch_size"] is None:
        # Without sizes, places are conditions on the search.
        for name in _PLACES:
            if policy[name] is not None:
                places[name] = bool(policy[name])
                policy[name] = None
    elif policy["attention_on_gpu"] is None and traits.attention_on_gpu:
        policy["attention_on_gpu"] = 1
        if traits.single_batch and policy["kv_on_gpu"] is None:
            policy["kv_on_gpu"] = 1.0
    chosen = policy_of(**policy)
    if chosen is not None and max_batch_size is not None:
        raise click.UsageError("--max-batch-size bounds the search, and with --batch-size there is none.")
    if simulated and chosen is not None and traits.single_batch and chosen.kv_on_gpu != 1:
        raise InvalidValue(f"{system!r} keeps the whole KV cache on the GPU: 'kv_on_gpu' must be 1: {chosen.kv_on_gpu}")
    if simulated:
        kv = 1.0 if traits.single_batch else 0.0
        sketch = Policy(batch_size=1, micro_batch_size=1, kv_on_gpu=kv, **_defaults(traits, places))
        check_buildable(system, chosen or sketch)
        if system != "moe-lightning" and objective is not None:
            raise click.UsageError(f"--objective is MoE-Lightning's planner's; {system!r} chooses in its own way.")
    the_model: MoEModel = load_model(model)
    if dtype is not None:
        the_model = the_model.with_dtype(dtype)
    if kv_dtype is not None:
        the_model = the_model.with_kv_dtype(kv_dtype)
    machine = with_link(load_hardware(hardware).with_capacity(gpu_bytes=device_memory), link_bandwidth)
    requests = Workload.parse(workload).with_options(
        gen_len=gen_len, prompt_len=prompt_len, padded=True if padded or (simulated and traits.pads) else None
    )
    if simulated and chosen is None and objective is None and not places:
        own = system != "moe-lightning" or machine.rates(efficiency).provenance == "fitted"
        # The authors' problem counts decode steps; without one it has nothing to choose by.
        if own and (requests.gen_len > 1 or system not in ("moe-lightning", "fastdecode")):
            with contextlib.suppress(InvalidConfig):
                chosen = system_policy(system, the_model, machine, requests, max_batch_size=max_batch_size)
                return evaluate(the_model, machine, requests, chosen, efficiency=efficiency, check=False)
    if chosen is not None and chosen.expert_slots is not None:
        check_buildable(system, chosen)
        if objective == "paper":
            raise click.UsageError("the authors' problem has no expert cache; leave --objective or --expert-slots out.")
        return evaluate_cached(the_model, machine, requests, chosen, efficiency=efficiency)
    if chosen is not None:
        return evaluate(
            the_model, machine, requests, chosen, efficiency=efficiency, objective=objective or "throughput"
        )
    if simulated:
        places = _defaults(traits, places)
    streams_only = simulated or objective == "paper" or max_batch_size is None or places.get("ffn_on_gpu") is False
    cache = {"attention_on_gpu": places.get("attention_on_gpu"), "efficiency": efficiency}
    try:
        found = plan(
            the_model,
            machine,
            requests,
            efficiency=efficiency,
            objective=objective or "throughput",
            solver=solver,
            max_batch_size=max_batch_size,
            **places,
        )
    except DoesNotFit as error:
        if streams_only or max_batch_size is None:
            raise
        return cached_instead(error, the_model, machine, requests, max_batch_size=max_batch_size, **cache)
    return found if streams_only else better_residency(found, max_batch_size=max_batch_size, **cache)


def simulated_plan(found: Plan, system: str) -> Plan:
    """A plan whose estimate is the simulator's, for systems that the closed form does not describe."""
    prediction = simulate_plan(found, system)
    estimate = simulated_estimate(found.model, found.workload, prediction)
    return replace(found, estimate=estimate, solver="simulation")


def simulate_plan(found: Plan, system: str, *, mean_output: float | None = None, **options: Any) -> Prediction:
    """Play the schedule of a plan; with `mean_output`, requests end by themselves (`hrm.batching.batch_of`)."""
    return simulate(
        found.model,
        found.hardware.rates(found.rate_set),
        found.policy,
        batch_of(found.workload, found.policy, mean_output=mean_output),
        system=system,
        num_gpus=found.hardware.num_gpus,
        **options,
    )


def _defaults(traits: System, places: dict[str, Any]) -> dict[str, Any]:
    """Where a system computes, completed by what `places` leaves open."""
    own = {"attention_on_gpu": bool(traits.attention_on_gpu), "ffn_on_gpu": True}
    return own | places
