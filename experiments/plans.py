"""From what was typed to models, machines and plans, and plans simulated."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click

from experiments.options import policy_of
from hrm import Hardware, MoEModel, Plan, Policy, Workload, evaluate, plan
from hrm.batching import batch_of
from hrm.catalog import load_hardware, load_model
from hrm.errors import DoesNotFit, InvalidConfig, InvalidValue
from hrm.hardware import Quantity
from hrm.system_policies import system_policy
from hrm.systems import System, check_system
from simulator import Prediction, simulate
from simulator.experts.cache import DEFAULT_POLICY
from simulator.experts.cache import cache_policy as cache_policy_class
from simulator.experts.residency import better_residency, cached_instead, evaluate_cached, simulated_estimate
from simulator.schedules import check_buildable

__all__ = ["make_plan", "simulate_plan", "simulated_plan", "with_link", "with_popularity"]


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
    cache_policy: str | None = None,
    miss_rate: float | None = None,
    popularity: Path | None = None,
    simulated: bool = False,
    **policy: Any,
) -> Plan:
    """Search for a policy, or evaluate the one given, as the options of ``hrm plan`` say.

    With `simulated`, only policies whose schedule can be built; where neither policy nor objective is given, the
    policy is the one that the system would choose for itself, if the machine's rates were fitted to runs of the
    systems' own programs or the system is not MoE-Lightning.

    Parameters
    ----------
    cache_policy, miss_rate
        Of an expert cache; refused where none is asked for and none is looked at.
    popularity : Path, optional
        A routing trace whose popularity of experts the model gets.

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
    searches = chosen is None and not simulated and objective != "paper" and max_batch_size is not None
    may_cache = searches and places.get("ffn_on_gpu") is not False
    caches = chosen is not None and chosen.expert_slots is not None
    for option, value in (("--cache-policy", cache_policy), ("--miss-rate", miss_rate)):
        if value is not None and not may_cache and not caches:
            may_search = (
                chosen is None and not simulated and objective != "paper" and places.get("ffn_on_gpu") is not False
            )
            other = ", or --max-batch-size N, with which the search looks at one" if may_search else ""
            raise click.UsageError(f"{option} needs an expert cache: add --expert-slots K and --batch-size N{other}.")
    cache: dict[str, Any] = {"efficiency": efficiency, "cache_policy": cache_policy or DEFAULT_POLICY}
    cache_policy_class(cache["cache_policy"])
    the_model: MoEModel = load_model(model)
    if popularity is not None:
        the_model = with_popularity(the_model, popularity)
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
    if chosen is not None and caches:
        check_buildable(system, chosen)
        if objective == "paper":
            raise click.UsageError("the authors' problem has no expert cache; leave --objective or --expert-slots out.")
        return evaluate_cached(the_model, machine, requests, chosen, miss_rate=miss_rate, **cache)
    if chosen is not None:
        return evaluate(
            the_model, machine, requests, chosen, efficiency=efficiency, objective=objective or "throughput"
        )
    if simulated:
        places = _defaults(traits, places)
    cache["attention_on_gpu"] = places.get("attention_on_gpu")
    if miss_rate is not None:
        cache["miss_rate"] = lambda tokens, slots: miss_rate
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
        if not may_cache or max_batch_size is None:
            raise
        return cached_instead(error, the_model, machine, requests, max_batch_size=max_batch_size, **cache)
    return better_residency(found, max_batch_size=max_batch_size, **cache) if may_cache else found


def simulated_plan(found: Plan, system: str, **options: Any) -> Plan:
    """A plan whose estimate is the simulator's, for systems that the closed form does not describe."""
    prediction = simulate_plan(found, system, **options)
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


def with_popularity(model: MoEModel, trace: Path) -> MoEModel:
    """The model with experts as popular as a routing trace shows them, the mean of its layers in every layer.

    Raises
    ------
    InvalidValue
        If the trace is of another number of experts, or no trace.
    """
    from simulator.experts.shares import typical_popularity
    from simulator.experts.trace import RoutingTrace

    found = RoutingTrace.load(trace)
    if found.num_experts != model.num_experts:
        raise InvalidValue(
            f"--popularity: {str(trace)!r} is of {found.num_experts} experts, {model.name} has {model.num_experts}."
        )
    return model.with_routing(typical_popularity(found).tolist())


def _defaults(traits: System, places: dict[str, Any]) -> dict[str, Any]:
    """Where a system computes, completed by what `places` leaves open."""
    own = {"attention_on_gpu": bool(traits.attention_on_gpu), "ffn_on_gpu": True}
    return own | places
