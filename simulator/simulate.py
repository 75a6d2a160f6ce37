"""Predict a run by playing its schedule, every step of it or from sampled decode steps."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hrm.hardware import Rates
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from hrm.policy import Policy
from simulator.cache_costs import ExpertCaching
from simulator.costs import Costing, Costs
from simulator.early_exits import EarlyExits, make_costing
from simulator.engine import Played, Program, play, play_segments, warm_up
from simulator.experts.cache import DEFAULT_POLICY
from simulator.loop import Loop, find_loop
from simulator.schedules import ScheduleFamily, schedule_builder
from simulator.task import LANES, Op, Schedule
from simulator.timeline import Timeline

__all__ = ["Prediction", "simulate", "simulate_schedule"]

_EXACT_TASKS = 60_000
_EXACT_UNEVEN_TASKS = 3_000_000
"""With pipeline stages, or requests that end by themselves, steps differ more from each other, so that more of such
runs are played as they are."""
_TOLERANCE = 0.004
"""How far a step in the middle may lie from the line between two sampled steps before it is a sample itself."""
_SAMPLE, _STAGED_SAMPLE = 4, 7
"""Repetitions of a step that a sample plays, and with pipeline stages. The last is not taken: in it the pipeline
drains."""
_TAKEN, _STAGED_TAKEN = 1, 4
"""Of how many repetitions before the last a sample takes the mean. Stages that share a link may take turns at being
late, so that steps of two lengths alternate."""
_MAX_SPLITS = 5


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Result of a simulation."""

    throughput_tok_s: float
    prefill_s: float
    decode_s: float
    simulated_s: float
    """Simulated seconds of the whole run."""
    num_tasks: int
    """Tasks of the whole run."""
    played_tasks: int
    """Tasks that were played; fewer than `num_tasks` when decode steps were sampled."""
    wall_s: float
    """Seconds that the simulation took."""
    sampling_error: float
    """Estimated relative error of `simulated_s` from sampling; 0 where every step was played. Too low where steps vary,
    with pipeline stages and early ends: there sampling was off by up to 2 % in tests."""
    utilization: dict[str, float]
    _play: Callable[[], Timeline] = field(repr=False)

    @cached_property
    def timeline(self) -> Timeline:
        """The whole run, or three decode steps from its end where it was not played as a whole."""
        return self._play()

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``hrm simulate``."""
        keys = ("throughput_tok_s", "prefill_s", "decode_s", "num_tasks", "played_tasks", "simulated_s", "wall_s")
        return {key: getattr(self, key) for key in keys} | {
            "tasks_per_s": self.played_tasks / self.wall_s,
            "sampling_error": self.sampling_error,
            "utilization": self.utilization,
        }


def simulate_schedule(
    schedule: Schedule,
    model: MoEModel,
    rates: Rates,
    batch: BatchShape,
    *,
    weights_on_gpu: float,
    kv_on_gpu: float = 0.0,
    num_gpus: int = 1,
    system: str = "moe-lightning",
    contention: bool = True,
    caching: ExpertCaching | None = None,
    popular: bool = False,
) -> Timeline:
    """Play `schedule` with times from `rates`; see `simulator.costs.Costing` for the parameters."""
    costing = make_costing(
        schedule,
        model,
        rates,
        batch,
        weights_on_gpu=weights_on_gpu,
        kv_on_gpu=kv_on_gpu,
        num_gpus=num_gpus,
        system=system,
        contention=contention,
        caching=caching,
        popular=popular,
    )
    costs = costing.at()
    start, end = play(schedule, costs)
    return Timeline(schedule, start, end, costs.bytes, costs.flops, source="simulated")


def simulate(
    model: MoEModel,
    rates: Rates,
    policy: Policy,
    batch: BatchShape,
    *,
    system: str = "moe-lightning",
    num_gpus: int = 1,
    exact: bool | None = None,
    contention: bool = True,
    keep_timeline: bool = False,
    cache_policy: str = DEFAULT_POLICY,
    miss_rate: float | None = None,
    popular: bool = False,
) -> Prediction:
    """Predict throughput of one batch under a policy.

    Parameters
    ----------
    rates : Rates
        What the machine attains (`Hardware.rates`).
    batch : BatchShape
        Prompt lengths and generation length; with ``output_lens`` requests end by themselves and their place stays
        empty.
    system : str
        Whose schedule and kernels, see `hrm.systems.SYSTEMS`.
    num_gpus : int
        GPUs of the machine (`Hardware.num_gpus`): in tensor parallelism, for FlexGen as pipeline stages.
    exact : bool, optional
        Play every decode step. By default runs of more than 60,000 tasks are sampled: a step is played in steady
        state at both ends of the run and between them until every step checked lies within 0.4 % of the line
        (step time is piecewise linear in the context).
    contention : bool
        Whether lanes share memory bandwidth, link and cores.
    keep_timeline : bool
        Hold start and end of all tasks even of a long run; without it memory does not grow with the steps.
    cache_policy : str
        With an expert cache (`Policy.expert_slots`), which expert makes room for another, see
        `simulator.experts.cache`. Without a miss rate it is replayed on routes drawn independently: uniformly, or by
        the model's routing histogram.
    miss_rate : float, optional
        Misses per active expert in decode, as a trace shows them (`simulator.experts`); takes the place of that.
    popular : bool
        Of experts that are computed where they lie, the resident ones are the most popular by the model's routing
        histogram (`MoEModel.with_routing`), as ``hrm run --popularity`` has it.

    Returns
    -------
    Prediction
    """
    warm_up()
    started = time.perf_counter()
    build = schedule_builder(
        model.num_layers,
        policy,
        num_micro_batches=batch.num_micro_batches,
        system=system,
        num_gpus=num_gpus,
        weight_pieces=model.num_experts,
        stages_weights=rates.stages_weights,
    )
    steps = batch.gen_len - 1
    options: dict[str, Any] = {
        "weights_on_gpu": policy.weights_on_gpu,
        "kv_on_gpu": policy.kv_on_gpu,
        "num_gpus": num_gpus,
        "system": system,
        "contention": contention,
        "caching": policy.expert_slots
        and ExpertCaching(slots=policy.expert_slots, policy=cache_policy, miss_rate=miss_rate),
        "popular": popular,
    }
    loop = _loop_of(build, steps)
    small = loop is None or loop.num_tasks(steps) <= _EXACT_TASKS
    if loop is None or (small and exact is not False) or (exact and keep_timeline):
        timeline = simulate_schedule(build(steps), model, rates, batch, **options)
        result: dict[str, Any] = {
            "prefill_s": timeline.prefill_s,
            "decode_s": timeline.decode_s,
            "num_tasks": len(timeline.schedule),
            "played_tasks": len(timeline.schedule),
            "sampling_error": 0.0,
            "utilization": timeline.utilization(),
            "_play": lambda: timeline,
        }
    else:
        run = _Run(loop, make_costing(loop.sample, model, rates, batch, **options), steps)
        uneven = loop.sample.num_stages > 1 or batch.output_lens is not None
        whole = exact or run.is_short or (uneven and exact is None and loop.num_tasks(steps) <= _EXACT_UNEVEN_TASKS)
        result = run.whole() if whole else run.sampled()

        def last_steps() -> Timeline:
            schedule = build(3, prefill=False, first_step=steps - 2)
            return simulate_schedule(schedule, model, rates, batch, **options)

        result["_play"] = last_steps
    whole = result["prefill_s"] + result["decode_s"]
    return Prediction(
        throughput_tok_s=batch.generated_tokens / whole,
        simulated_s=whole,
        wall_s=time.perf_counter() - started,
        **result,
    )


_loops: OrderedDict[object, Loop] = OrderedDict()
_KEPT_LOOPS, _KEPT_TASKS = 16, 300_000


def _loop_of(build: ScheduleFamily, steps: int) -> Loop | None:
    """`find_loop`, remembered for those who simulate the same shape again with other numbers."""
    found = _loops.pop(build, None)
    if found is None or found.repetitions(steps) < 2:
        found = find_loop(build, steps)
    if found is not None and len(found.sample) <= _KEPT_TASKS:
        _loops[build] = found
        if len(_loops) > _KEPT_LOOPS:
            _loops.popitem(last=False)
    return found


def _marks(schedule: Schedule) -> np.ndarray:
    """What tells when a segment is over: its choices of a token, of the head only those that end prefill."""
    first_decode = int(np.argmax(schedule.step > 2))
    marks = schedule.mask(Op.SAMPLE)
    marks[:first_decode] &= schedule.step[:first_decode] == 0
    return marks


class _Run:
    """A long run, played from the segments of a loop."""

    def __init__(self, loop: Loop, costing: Costing | EarlyExits, steps: int) -> None:
        self._loop, self._costing, self._steps = loop, costing, steps
        self._repetitions = loop.repetitions(steps)
        staged = loop.sample.num_stages > 1
        self._size, self._taken = (_STAGED_SAMPLE, _STAGED_TAKEN) if staged else (_SAMPLE, _TAKEN)
        # How far stages are apart decides how they share the link, and stays much as prefill left it: begun
        # together they fall into another rhythm. So their samples begin with prefill.
        self._lead = [0] if staged else []
        self._program = Program(loop.segments, _marks(loop.sample))
        self._played = 0

    def _play(self, sequence: list[int], shifts: list[int]) -> Played:
        loop, costing = self._loop, self._costing
        segments = loop.segments
        self._played += sum(len(segments[which]) for which in sequence)

        def costs_of(r: int) -> Costs:
            item = segments[sequence[r]]
            return costing.at(item.first, item.stop, shifts[r])

        return play_segments(self._program, sequence, costs_of)

    def _sample(self, played: Played, which: int) -> tuple[float, np.ndarray]:
        """Seconds of a repetition and of lanes at work in it; the mean of some, the last of which is `which`."""
        taken = self._taken
        seconds = float(played.ends[which] - played.ends[which - taken]) / taken
        return seconds, played.busy[which - taken + 1 : which + 1].mean(axis=0)

    @property
    def is_short(self) -> bool:
        """Too few steps to sample from."""
        return self._repetitions < 2 * self._size

    def whole(self) -> dict[str, Any]:
        """Every step."""
        sequence = self._loop.sequence(self._steps)
        shifts = [self._loop.shift(r, self._steps) for r in range(len(sequence))]
        played = self._play(sequence, shifts)
        return self._result(float(played.ends[0]), played.makespan, played.busy.sum(axis=0), 0.0)

    def sampled(self) -> dict[str, Any]:
        """Beginning and end as they are, and steps between them interpolated from a few."""
        last, size = self._repetitions, self._size
        early = size - 2
        begin = self._play([0, *[1] * (size - 1)], [0, *range(size - 1)])
        tail_shift = self._loop.shift(last + 1, self._steps)
        lead = self._lead
        finish = self._play([*lead, *[1] * size, 2], [*[0] * len(lead), *range(last - size, last), tail_shift])
        late = len(lead) + size - 2
        samples = {early: self._sample(begin, early), last - 1: self._sample(finish, late)}
        error = self._refine(samples, early, last - 1, _MAX_SPLITS)
        nodes = sorted(samples)
        between = np.arange(early + 1, last)
        seconds = np.interp(between, nodes, [samples[r][0] for r in nodes])
        columns = np.array([samples[r][1] for r in nodes])
        busy = begin.busy[: early + 1].sum(axis=0) + finish.busy[late + 1 :].sum(axis=0)
        busy = busy + np.array([np.interp(between, nodes, column).sum() for column in columns.T])
        whole = float(begin.ends[early] + seconds.sum() + (finish.makespan - finish.ends[late]))
        return self._result(float(begin.ends[0]), whole, busy, error / whole)

    def _refine(self, samples: dict[int, tuple[float, np.ndarray]], low: int, high: int, splits: int) -> float:
        """Sample between two repetitions until a straight line will do; seconds that this may be off by."""
        if high - low < 2:
            return 0.0
        middle = (low + high) // 2
        # The r-th repetition is r - 1 steps after the sample schedule's.
        size, lead = self._size, self._lead
        first = max(0, middle - (size - 1))
        played = self._play([*lead, *[1] * size], [*[0] * len(lead), *range(first, first + size)])
        found, _ = samples[middle] = self._sample(played, len(lead) + size - 2)
        share = (middle - low) / (high - low)
        expected = samples[low][0] * (1 - share) + samples[high][0] * share
        off = abs(found - expected)
        if off <= _TOLERANCE * found or splits == 0 or self._played > self._loop.num_tasks(self._steps):
            # Halves of a parabola lie a quarter as far from their chords, and two thirds of that on average.
            return (high - low) * off / 6
        return self._refine(samples, low, middle, splits - 1) + self._refine(samples, middle, high, splits - 1)

    def _result(self, prefill_s: float, whole: float, busy: np.ndarray, error: float) -> dict[str, Any]:
        return {
            "prefill_s": prefill_s,
            "decode_s": whole - prefill_s,
            "num_tasks": self._loop.num_tasks(self._steps),
            "played_tasks": self._played,
            "sampling_error": error,
            "utilization": {lane.value: float(seconds) / whole for lane, seconds in zip(LANES, busy, strict=True)},
        }
