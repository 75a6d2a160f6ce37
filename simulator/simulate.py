"""Predict a run by playing its schedule, exactly or from sampled decode steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hrm.hardware import Rates
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from hrm.policy import Policy
from simulator.costs import schedule_costs
from simulator.engine import play
from simulator.schedules import build_schedule, cgopipe, check_buildable
from simulator.task import Schedule
from simulator.timeline import Timeline

__all__ = ["Prediction", "simulate", "simulate_schedule"]

_EXACT_TASKS = 60_000
_SAMPLED_CONTEXTS = 5


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
    utilization: dict[str, float]
    timeline: Timeline = field(repr=False)
    """The whole run, or its last sampled piece of decode."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``hrm simulate``."""
        keys = ("throughput_tok_s", "prefill_s", "decode_s", "num_tasks", "played_tasks", "simulated_s", "wall_s")
        return {key: getattr(self, key) for key in keys} | {
            "tasks_per_s": self.played_tasks / self.wall_s,
            "utilization": self.utilization,
        }


def simulate_schedule(
    schedule: Schedule,
    model: MoEModel,
    rates: Rates,
    batch: BatchShape,
    *,
    weights_on_gpu: float,
    num_gpus: int = 1,
    contention: bool = True,
) -> Timeline:
    """Play `schedule` with times from `rates`; see `simulator.costs.schedule_costs`."""
    costs = schedule_costs(schedule, model, rates, batch, weights_on_gpu=weights_on_gpu, num_gpus=num_gpus)
    start, end = play(schedule, costs if contention else costs.without_contention())
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
) -> Prediction:
    """Predict throughput of one batch under a policy.

    Parameters
    ----------
    rates : Rates
        What the machine attains (`Hardware.rates`).
    batch : BatchShape
        Prompt lengths and generation length.
    num_gpus : int
        GPUs of the machine (`Hardware.num_gpus`), in tensor parallelism.
    exact : bool, optional
        Play every decode step. By default runs of more than 60,000 tasks are sampled: steps at five
        contexts are played in steady state and step times interpolated between them (step time is
        piecewise linear in the context).
    contention : bool
        Whether lanes share memory bandwidth and cores.

    Returns
    -------
    Prediction
    """
    started = time.perf_counter()
    check_buildable(system, policy)
    layers, g, steps = model.num_layers, batch.num_micro_batches, batch.gen_len - 1
    share = policy.weights_on_gpu

    def run(schedule: Schedule) -> Timeline:
        return simulate_schedule(
            schedule, model, rates, batch, weights_on_gpu=share, num_gpus=num_gpus, contention=contention
        )

    # Tasks per (layer, micro-batch): five, two for weights if any travel; samples come on top.
    per_step = g * (layers * (5 + 2 * (share < 1)) + 1)
    if exact is None:
        exact = per_step * (steps + 1) <= _EXACT_TASKS
    if exact or steps <= 3 * _SAMPLED_CONTEXTS:
        timeline = run(build_schedule(layers, policy, gen_len=batch.gen_len, num_micro_batches=g, system=system))
        prefill_s, decode_s, played = timeline.prefill_s, timeline.decode_s, len(timeline.schedule)
        total = played
        utilization = timeline.utilization()
    else:

        def piece(**options: Any) -> Timeline:
            return run(cgopipe(num_layers=layers, num_micro_batches=g, stream_weights=share < 1, **options))

        # Prefill and the first steps exactly (fill of the pipeline), later steps from samples. The last step
        # of a piece is not a sample: no next weights travel beside it.
        head = piece(decode_steps=4)
        ends = head.step_ends()
        contexts = np.unique(np.linspace(3, steps, _SAMPLED_CONTEXTS).round().astype(int))
        marginal, played, spans, busy = [], len(head.schedule), [], []
        timeline = head
        for step in contexts:
            first = max(1, int(step) - 2)
            timeline = piece(decode_steps=4, prefill=False, first_step=first)
            piece_ends = timeline.step_ends()
            marginal.append(piece_ends[first + 2] - piece_ends[first + 1])
            busy.append(timeline.window(piece_ends[first + 1], piece_ends[first + 2]))
            spans.append(marginal[-1])
            played += len(timeline.schedule)
        later = np.interp(np.arange(4, steps + 1), contexts, marginal)
        prefill_s = head.prefill_s
        decode_s = ends[3] - prefill_s + float(later.sum())
        total = len(head.schedule) + (len(later) - 1) * per_step
        whole = ends[3] + float(later.sum())
        mean = {lane: float(np.mean([b[lane] for b in busy])) for lane in busy[0]}
        start_busy = head.window(0.0, ends[3])
        utilization = {lane: (start_busy[lane] * ends[3] + mean[lane] * float(later.sum())) / whole for lane in mean}
    return Prediction(
        throughput_tok_s=batch.batch_size * batch.gen_len / (prefill_s + decode_s),
        prefill_s=prefill_s,
        decode_s=decode_s,
        simulated_s=prefill_s + decode_s,
        num_tasks=total,
        played_tasks=played,
        wall_s=time.perf_counter() - started,
        utilization=utilization,
        timeline=timeline,
    )
