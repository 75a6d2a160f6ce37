"""The planner: every policy in its grid, the best by predicted throughput; or a given policy, evaluated."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NoReturn

import numpy as np

from hrm.bound import physical_bound
from hrm.errors import DoesNotFit, InvalidValue, PolicyInfeasible
from hrm.gating import Gate
from hrm.hardware import Hardware, Rates
from hrm.latency import Estimate, estimate, placement_of
from hrm.memory import Footprint, check_fits, usable_bytes
from hrm.model import MoEModel
from hrm.paper import MAX_MICRO_BATCH, MAX_MICRO_BATCHES, paper_problem
from hrm.plan import Plan
from hrm.policy import Policy
from hrm.problem import (
    Problem,
    grid_sizes,
    placements,
    prompt_tokens,
    run_phases,
    throughput_problem,
    workload_footprint,
)
from hrm.solvers import Solution, solve_grid, solve_milp, solved_grid
from hrm.task_times import TaskTimes
from hrm.terms import Sizes
from hrm.units import format_bytes
from hrm.workload import Workload

__all__ = ["evaluate", "plan"]

Objective = Literal["throughput", "paper"]
Solver = Literal["grid", "milp"]

_MAX_MICRO_BATCH = 1024
_MAX_MICRO_BATCHES = 256
_COARSE = 16


def evaluate(
    model: MoEModel,
    hardware: Hardware,
    workload: Workload,
    policy: Policy,
    *,
    efficiency: str | None = None,
    objective: Objective = "throughput",
    check: bool = True,
    gate: Gate | None = None,
) -> Plan:
    """Predict a given policy instead of searching for one.

    Parameters
    ----------
    check : bool
        Whether the policy must fit the machine by this project's count of memory. A system's own choice may not:
        its program keeps other things elsewhere.
    objective : {"throughput", "paper"}
        A whole run as `hrm.latency.estimate` sees it, or the authors' decode throughput (`hrm.paper`).
    gate : Gate, optional
        As that of `plan`.

    Raises
    ------
    DoesNotFit
        If it needs more memory than the machine has.
    """
    started = time.perf_counter()
    _check_request(model, workload, objective)
    rates = hardware.rates(_rate_set(hardware, efficiency, objective))
    if policy.expert_slots is not None:
        raise InvalidValue("the closed form knows no expert cache; simulator.experts.residency.evaluate_cached does.")
    if policy.kv_on_gpu > 0 and not policy.attention_on_gpu:
        raise InvalidValue(f"'kv_on_gpu' must be 0 where attention runs on the CPU: {policy.kv_on_gpu}")
    if objective == "throughput" and check:
        check_fits(_policy_memory(model, hardware, workload, policy, gate), hardware)
    request = _Request(model, hardware, workload, rates, objective, gate)
    return request.answer(policy, started=started, evaluated=1, solver="none")


def plan(
    model: MoEModel,
    hardware: Hardware,
    workload: Workload,
    *,
    efficiency: str | None = None,
    objective: Objective = "throughput",
    solver: Solver = "grid",
    attention_on_gpu: bool | None = None,
    ffn_on_gpu: bool | None = None,
    max_batch_size: int | None = None,
    num_requests: int | None = None,
    resolution: Literal["fine", "coarse"] = "fine",
    gate: Gate | None = None,
) -> Plan:
    """Search all policies (N, μ, A_g, F_g, r_w, r_c) for the one with the highest predicted throughput.

    Sizes to 128 are all tried, larger ones (μ to 1024, G to 256) in steps of less than 4 %, for both places of
    attention and of the experts; the best shares r_w and r_c of every point come in closed form. GPUs of a
    machine work together by tensor parallelism.

    Parameters
    ----------
    efficiency : {"fitted", "measured", "paper", "published", "spec"}, optional
        Which rates of the machine to use; by default the best it has ("paper" for the paper's objective).
    objective : {"throughput", "paper"}
        Tokens/s of a whole run, prefill included; or the authors' own problem, see `hrm.paper`.
    solver : {"grid", "milp"}
        Exhaustive and vectorised, or mixed-integer programming (needs pulp). They agree.
    attention_on_gpu, ffn_on_gpu : bool, optional
        Only policies with attention, or experts, there; by default either.
    max_batch_size : int, optional
        Largest N.
    num_requests : int, optional
        Requests that wait. The policy is then the one that answers all of them soonest, the last, partial
        batch included; N is at most this. By default requests never end.
    resolution : {"fine", "coarse"}
        The whole grid; or a twelfth of it, and then all of its sizes near the best: in tests at most 3.3 % below the
        fine optimum, mostly under 1 % (for sweeps over many machines).
    gate : Gate, optional
        A gate that the run will use instead of the executor's own: its masks and buffers need room on the GPU. The
        prediction's seconds do not know it.

    Returns
    -------
    Plan

    Raises
    ------
    PolicyInfeasible
        If not even one sequence fits; the message says what is missing.

    Examples
    --------
    >>> best = plan(MoEModel.from_catalog("mixtral-8x7b"), Hardware.from_catalog("gcp-l4-1x"),
    ...             Workload.parse("77,32"))
    >>> best.policy.batch_size > 100
    True
    """
    started = time.perf_counter()
    _check_request(model, workload, objective)
    if max_batch_size is not None and max_batch_size < 1:
        raise InvalidValue(f"'max_batch_size' must be >= 1: {max_batch_size}")
    if num_requests is not None and num_requests < 1:
        raise InvalidValue(f"'num_requests' must be >= 1: {num_requests}")
    if num_requests is not None and max_batch_size is not None and max_batch_size >= num_requests:
        max_batch_size = None  # no limit: a batch has no more than all requests
    if resolution not in ("fine", "coarse"):
        raise InvalidValue(f"'resolution' must be 'fine' or 'coarse': {resolution!r}")
    if solver not in ("grid", "milp"):
        raise InvalidValue(f"'solver' must be 'grid' or 'milp': {solver!r}")
    if solver == "milp" and num_requests is not None:
        raise InvalidValue("the solver 'milp' plans for requests without end; with 'num_requests' use 'grid'.")
    if objective == "paper" and (num_requests is not None or attention_on_gpu or ffn_on_gpu is False):
        raise InvalidValue(
            "the authors' problem has attention on the CPU, experts on the GPU and requests without end; "
            "use the objective 'throughput'."
        )
    most = _MAX_MICRO_BATCH * _MAX_MICRO_BATCHES
    limit = min(max_batch_size or most, num_requests or most)

    def search(machine: Hardware, sizes: np.ndarray, counts: np.ndarray) -> Plan:
        begun = time.perf_counter()
        grids = {"micro_batch": sizes[sizes <= limit], "micro_batches": counts[counts <= limit]}
        rates = machine.rates(_rate_set(machine, efficiency, objective))
        if objective == "paper":
            problems = [paper_problem(model, machine, rates, workload, max_batch_size=max_batch_size, **grids)]
        else:
            problems = [
                throughput_problem(
                    model,
                    machine,
                    rates,
                    workload,
                    place,
                    max_batch_size=max_batch_size,
                    num_requests=num_requests,
                    gate=gate,
                    **grids,
                )
                for place in placements(attention_on_gpu, ffn_on_gpu)
            ]
        if solver == "milp":
            found = solve_milp(problems)
        elif num_requests is not None:
            found = _soonest(problems, model, machine, rates, workload, num_requests)
        else:
            found = solve_grid(problems)
        if found is None:
            _explain_infeasible(model, machine, workload, problems[0])
        evaluated = sum(int(np.broadcast_to(problem.allowed, problem.shape).sum()) for problem in problems)
        request = _Request(model, machine, workload, rates, objective, gate)
        policy = _policy_of(found)
        if num_requests is not None:
            policy = replace(policy, batch_size=min(policy.batch_size, num_requests))
        return request.answer(policy, started=begun, evaluated=evaluated, solver=solver)

    def coarse(machine: Hardware, around: Policy | None = None) -> Plan:
        sizes = [grid_sizes(most, every_to=_COARSE) for most in (_MAX_MICRO_BATCH, _MAX_MICRO_BATCHES)]
        if around is not None:
            chosen = (around.micro_batch_size, around.num_micro_batches)
            sizes = [np.union1d(axis, [float(size)]) for axis, size in zip(sizes, chosen, strict=True)]
        return search(machine, *sizes)

    if objective == "paper":
        every = (np.arange(1.0, MAX_MICRO_BATCH + 1), np.arange(1.0, MAX_MICRO_BATCHES + 1))
    else:
        every = (grid_sizes(_MAX_MICRO_BATCH), grid_sizes(_MAX_MICRO_BATCHES))
    if resolution == "fine":
        result = search(hardware, *every)
    else:
        first = coarse(hardware)
        found = (first.policy.micro_batch_size, first.policy.num_micro_batches)
        result = search(hardware, *(_near(size, axis) for size, axis in zip(found, every, strict=True)))
        result = replace(result, evaluated=first.evaluated + result.evaluated)
    result = replace(result, seconds=time.perf_counter() - started)

    def again(machine: Hardware) -> Plan:
        """The best on a larger machine, which is at least this policy there."""
        found = coarse(machine, result.policy)
        same = evaluate(
            model, machine, workload, result.policy, efficiency=result.rate_set, objective=objective, gate=gate
        )
        return max(found, same, key=lambda one: one.estimate.throughput)

    return replace(result, _replan=again)


def _near(size: int, sizes: np.ndarray) -> np.ndarray:
    """Those of `sizes` within an eighth of `size`."""
    margin = size // 8 + 1
    return sizes[(sizes >= size - margin) & (sizes <= size + margin)]


def _rate_set(hardware: Hardware, efficiency: str | None, objective: Objective) -> str | None:
    """The paper's objective takes the paper's constants where the machine has them."""
    if objective not in ("throughput", "paper"):
        raise InvalidValue(f"'objective' must be 'throughput' or 'paper': {objective!r}")
    if efficiency is None and objective == "paper" and "paper" in hardware.rate_sets:
        return "paper"
    return efficiency


def _check_request(model: MoEModel, workload: Workload, objective: Objective) -> None:
    longest = workload.prompt_max + workload.gen_len
    if longest > model.max_positions:
        raise PolicyInfeasible(
            f"prompt {workload.prompt_max} + gen_len {workload.gen_len} = {longest} tokens, and "
            f"{model.name} has {model.max_positions} positions; shorten one of them."
        )
    if objective == "paper" and workload.gen_len < 2:
        raise InvalidValue(f"the authors' objective counts decode steps: 'gen_len' must be >= 2: {workload.gen_len}")


def _policy_of(found: Solution) -> Policy:
    def share(value: float, fixed: float | None) -> float:
        if fixed is not None:
            return fixed
        # Below 1: at 1 nothing would stream at all, which is a placement of its own.
        return min(value, 1.0 - 1e-9)

    place = found.problem.place
    w, c = share(found.weights_on_gpu, found.problem.fixed_weights), share(found.kv_on_gpu, found.problem.fixed_kv)
    policy = Policy(
        batch_size=found.micro_batch_size * found.num_micro_batches,
        micro_batch_size=found.micro_batch_size,
        attention_on_gpu=place.attention_on_gpu,
        ffn_on_gpu=place.ffn_on_gpu,
        weights_on_gpu=w,
        kv_on_gpu=c,
    )
    at = (
        int(np.flatnonzero(found.problem.micro_batch[:, 0] == found.micro_batch_size)[0]),
        int(np.flatnonzero(found.problem.micro_batches[0] == found.num_micro_batches)[0]),
    )
    # Shares in millionths, where that still fits; finer where both memories are full. Down leaves GPU memory
    # free, except in a shallow model, where streaming needs larger buffers than keeping.
    for scale, (round_w, round_c) in product((1e6, 1e9, 1e12), product((np.floor, np.ceil), repeat=2)):
        near_w, near_c = float(round_w(w * scale) / scale), float(round_c(c * scale) / scale)
        if (near_w == 1 > w) or (near_c == 1 > c):
            continue
        if all(
            np.broadcast_to(room.need.at(near_w, near_c), found.problem.shape)[at] <= room.room
            for room in found.problem.rooms
        ):
            return replace(policy, weights_on_gpu=near_w, kv_on_gpu=near_c)
    return policy


def _policy_memory(
    model: MoEModel, hardware: Hardware, workload: Workload, policy: Policy, gate: Gate | None
) -> Footprint:
    need: Footprint = workload_footprint(
        model,
        workload,
        placement_of(policy),
        micro_batch_size=policy.micro_batch_size,
        num_micro_batches=policy.num_micro_batches,
        batch_size=policy.batch_size,
        num_gpus=hardware.num_gpus,
        gate=gate,
    )
    return need.at(policy.weights_on_gpu, policy.kv_on_gpu)


@dataclass(frozen=True, slots=True)
class _Request:
    """What a policy is asked for, under one objective."""

    model: MoEModel
    hardware: Hardware
    workload: Workload
    rates: Rates
    objective: Objective
    gate: Gate | None

    def answer(self, policy: Policy, *, started: float, evaluated: int, solver: str) -> Plan:
        """Everything that the model says of a policy."""
        see = self._by_the_authors if self.objective == "paper" else self._whole_run
        result, memory, room = see(policy)
        return Plan(
            model=self.model,
            hardware=self.hardware,
            workload=self.workload,
            policy=policy,
            estimate=result,
            memory=memory,
            room=room,
            bound=physical_bound(
                self.model,
                self.rates,
                policy,
                prompt_len=self._mean_prompt(policy),
                gen_len=self.workload.gen_len,
                num_gpus=self.hardware.num_gpus,
                prefill=self.objective != "paper",
            ),
            rate_set=self.rates.provenance,
            objective=self.objective,
            evaluated=evaluated,
            solver=solver,
            seconds=time.perf_counter() - started,
        )

    def _mean_prompt(self, policy: Policy) -> float:
        return float(prompt_tokens(self.workload, policy.batch_size)) / policy.batch_size

    def _whole_run(self, policy: Policy) -> tuple[Estimate, Footprint, tuple[float, float]]:
        result = estimate(
            self.model,
            self.rates,
            policy,
            prompt_len=self._mean_prompt(policy),
            gen_len=self.workload.gen_len,
            num_gpus=self.hardware.num_gpus,
        )
        memory = _policy_memory(self.model, self.hardware, self.workload, policy, self.gate)
        return result, memory, usable_bytes(self.hardware)

    def _by_the_authors(self, policy: Policy) -> tuple[Estimate, Footprint, tuple[float, float]]:
        if policy.attention_on_gpu or not policy.ffn_on_gpu:
            raise InvalidValue("the authors' problem has attention on the CPU and experts on the GPU.")
        problem = paper_problem(
            self.model,
            self.hardware,
            self.rates,
            self.workload,
            micro_batch=np.array([policy.micro_batch_size]),
            micro_batches=np.array([policy.num_micro_batches]),
        )
        shares = (policy.weights_on_gpu, policy.kv_on_gpu)
        need = [float(np.squeeze(room.need.at(*shares))) for room in problem.rooms]
        for tier, size, room in zip(("GPU", "CPU"), need, problem.rooms, strict=True):
            if size > room.room * (1 + 1e-6):
                raise DoesNotFit(
                    f"by the authors' count the policy needs {format_bytes(size)} of {tier} memory and "
                    f"may use {format_bytes(room.room)} of {self.hardware.name}: "
                    f"{format_bytes(size - room.room)} too much."
                )
        (steps, phase) = problem.phases[0]
        decode = float(np.squeeze(steps * phase.seconds(*shares)))
        needs = {name: float(np.squeeze(value)) for name, value in phase.needs(*shares).items()}
        layers = self.model.num_layers
        bottleneck = max(needs, key=lambda name: needs[name])
        result = Estimate(
            throughput=float(np.squeeze(problem.tokens)) / decode,
            prefill_s=0.0,
            decode_s=decode,
            layer_s=decode / steps / layers,
            terms={name: value / layers for name, value in needs.items()},
            binding={bottleneck: decode},
            needs={name: steps * value for name, value in needs.items()},
            bottleneck=bottleneck,
        )
        memory = Footprint(gpu={"by the authors' count": need[0]}, cpu={"by the authors' count": need[1]})
        return result, memory, (problem.rooms[0].room, problem.rooms[1].room)


def _soonest(
    problems: list[Problem],
    model: MoEModel,
    hardware: Hardware,
    rates: Rates,
    workload: Workload,
    num_requests: int,
) -> Solution | None:
    """The policy that answers `num_requests` requests soonest, the last batch being smaller."""
    best: Solution | None = None
    for problem in problems:
        solved = solved_grid(problem)
        if not np.isfinite(solved.seconds_per_token).any():
            continue
        mu, n = problem.micro_batch, problem.micro_batch * problem.micro_batches
        n = np.minimum(n, num_requests)
        whole, rest = np.divmod(num_requests, mu * problem.micro_batches)
        times = TaskTimes(model, rates, hardware.num_gpus)
        parts = np.maximum(1, np.ceil(rest / mu))
        last = Sizes(
            micro_batch=np.maximum(rest, 1) / parts,
            micro_batches=parts,
            prompt_len=prompt_tokens(workload, n) / n,
        )
        shares = (solved.weights_on_gpu, solved.kv_on_gpu)
        tail: Any = sum(
            weight * phase.seconds(*shares)
            for weight, phase in run_phases(times, last, problem.place, workload.gen_len)
        )
        feasible = np.isfinite(solved.seconds_per_token)
        full = np.where(feasible, solved.seconds_per_token, 0.0)
        seconds = whole * n * workload.gen_len * full + (rest > 0) * tail
        per_token = np.where(feasible, seconds, np.inf) / (num_requests * workload.gen_len)
        order = np.lexsort(((problem.micro_batches + 0 * mu).ravel(), n.ravel(), np.round(per_token, 15).ravel()))
        at = np.unravel_index(order[0], problem.shape)
        if best is None or per_token[at] < best.seconds_per_token * (1 - 1e-9):
            best = Solution(
                problem=problem,
                micro_batch_size=int(mu[at[0], 0]),
                num_micro_batches=int(problem.micro_batches[0, at[1]]),
                weights_on_gpu=float(solved.weights_on_gpu[at]),
                kv_on_gpu=float(solved.kv_on_gpu[at]),
                seconds_per_token=float(per_token[at]),
            )
    return best


def _explain_infeasible(model: MoEModel, hardware: Hardware, workload: Workload, problem: Problem) -> NoReturn:
    gpu_room, cpu_room = (room.room for room in problem.rooms)
    gpu_need, cpu_need = (room.need for room in problem.rooms)
    gpu = float(np.min(gpu_need.at(0.0, 0.0)))
    # The host holds what is left when the GPU takes all the experts it can.
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.where(np.asarray(gpu_need.w) > 0, (gpu_room - gpu_need.constant) / gpu_need.w, 1.0)
    cpu = float(np.min(cpu_need.at(np.clip(most, 0.0, 1.0), 0.0)))
    each = " on each GPU" if hardware.num_gpus > 1 else ""
    lacks = []
    if gpu > gpu_room:
        widest = max(model.kind_expert_bytes(kind) for kind in range(len(model.kinds))) / hardware.num_gpus
        lacks.append(
            f"GPU memory: {format_bytes(gpu)} needed{each} for one sequence with no resident expert (two layers of "
            f"weights buffered take {format_bytes(2 * widest)}, all that is not an expert "
            f"{format_bytes(model.dense_bytes / hardware.num_gpus)}), {format_bytes(max(gpu_room, 0.0))} usable: "
            f"{format_bytes(gpu - max(gpu_room, 0.0))} too little"
        )
    if cpu > cpu_room:
        lacks.append(
            f"CPU memory: {format_bytes(cpu)} needed for the weights that the GPU cannot hold and one sequence, "
            f"{format_bytes(max(cpu_room, 0.0))} usable: {format_bytes(cpu - max(cpu_room, 0.0))} too little"
        )
    if not lacks:
        lacks.append("GPU and CPU memory together are too small for the weights")
    raise PolicyInfeasible(f"{model.name} does not fit on {hardware.name}: {'; '.join(lacks)}.")
