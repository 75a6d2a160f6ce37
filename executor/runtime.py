"""Walks a schedule and runs it: every task class has a method, every buffer a name.

The same lanes, buffers and kernels run all systems; what differs between them is the schedule.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from executor.buffers import Buffers, Sizes
from executor.checkpoint import Checkpoint
from executor.compute import Compute, Reduce
from executor.gating.meter import GatingMeter
from executor.lanes import Idle, run_lanes
from executor.memory import DeviceMemory
from executor.places import Places
from executor.recording import RouteRecorder
from executor.sampling import Sampling
from executor.segment import Segment
from executor.transfers import Transfers
from executor.weights import WeightStore
from hrm.policy import Policy
from hrm.systems import check_system
from simulator.cache_costs import ExpertCaching
from simulator.costs import task_work
from simulator.task import Op
from simulator.timeline import Timeline

__all__ = ["Runtime"]


class Runtime:
    """Buffers of a job, and what its tasks do.

    Parameters
    ----------
    checkpoint : Checkpoint
    weights : WeightStore
    memory : DeviceMemory
    policy, system
        What runs.
    sizes : Sizes
    pinned : bool
        Whether weights travel from where they lie.
    link_bandwidth : float or None
        Bytes/s of the paced link where there is no GPU; None for no pacing.
    sampling : Sampling
    reduce : callable, optional
        Adds up partial sums of tensor parallelism.
    recorder : RouteRecorder, optional
        Keeps every token's choice of experts.
    gating : GatingMeter, optional
        Brings tokens to experts instead of the executor's own dynamic gating.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: WeightStore,
        memory: DeviceMemory,
        *,
        policy: Policy,
        system: str,
        sizes: Sizes,
        pinned: bool = False,
        link_bandwidth: float | None = None,
        sampling: Sampling | None = None,
        reduce: Reduce | None = None,
        recorder: RouteRecorder | None = None,
        gating: GatingMeter | None = None,
    ) -> None:
        self._memory, self._weights, self._sizes = memory, weights, sizes
        self.buffers = Buffers(
            checkpoint.local,
            checkpoint.dtype,
            memory,
            policy=policy,
            system=system,
            sizes=sizes,
            gate=None if gating is None else gating.gating.planned,
        )
        self.places = Places(self.buffers, weights, memory.device)
        in_place = pinned or check_system(system).pinned_layers == 0
        self.transfers = Transfers(self.places, in_place=in_place, link_bandwidth=link_bandwidth)
        self.compute = Compute(
            self.places,
            sampling=sampling or Sampling(),
            reduce=reduce or (lambda x: x),
            recorder=recorder,
            gating=gating,
        )

    def begin(self, segment: Segment) -> None:
        """Take up the requests of a segment."""
        tokens = sum(part.tokens for part in segment.parts) if segment.prefill else 0
        requests = sum(part.size for part in segment.parts)
        # Prompt ids and positions, rows of last tokens, and what is generated.
        self._memory.reserve("token_ids", 8 * (2 * tokens + requests * (1 + segment.steps)))
        self.places.begin(segment)
        self.compute.begin()
        self.transfers.loaded.clear()
        if self._weights.experts_cached is not None:
            self._weights.experts_cached.begin()
        if self.compute.recorder is not None:
            self.compute.recorder.begin()
        if self.places.cuda:
            torch.cuda.synchronize(self._memory.device)

    def finish(self) -> list[list[list[int]]]:
        """The tokens that every request got, by micro-batch; gives the segment's buffers back."""
        tokens = [output.tolist() for output in self.compute.output]
        self._memory.release(["token_ids"])
        return tokens

    def run(
        self,
        segment: Segment,
        *,
        on_done: Callable[[Op, int, float], None] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> tuple[list[list[list[int]]], Timeline]:
        """Run a segment's schedule; the tokens that each request got, by micro-batch, and the measured timeline."""
        self.begin(segment)
        cache = self._weights.experts_cached
        before = None if cache is None else replace(cache.counts)
        started = time.time()
        handlers = {**self.transfers.handlers(), **self.compute.handlers()}
        try:
            start, end = run_lanes(
                segment.schedule, handlers, device=self._memory.device, idle=self._idle, on_done=on_done
            )
        except BaseException:
            self._memory.release(["token_ids"])
            raise
        moved, flops = self._work(segment)
        about = {"started": started, **(facts or {})}
        if cache is not None and before is not None:
            about["expert_cache"] = cache.counts.since(before).to_dict()
        timeline = Timeline(segment.schedule, start, end, moved, flops, source="measured", facts=about)
        return self.finish(), timeline

    @property
    def _idle(self) -> dict[Op, Idle]:
        return {Op.LOAD_E: self.transfers.nothing_comes, Op.EXPERTS: self.compute.nothing_to_compute}

    def _work(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and FLOPs of each task, counted as for a prediction."""
        model, size = self.buffers.model, self._weights.slots[0].element_size()
        layers = zip(model.order, self._weights.layers, strict=True)
        streamed = {kind: float(layer.streamed * size) for kind, layer in layers}
        schedule, cache = segment.schedule, self._weights.experts_cached
        caching = ExpertCaching(slots=cache.slots) if cache is not None else None
        kept = self._sizes.kv_share
        moved, flops = task_work(schedule, model, segment.shape, streamed=streamed, kv_on_gpu=kept, caching=caching)
        # What a cache missed is known, not estimated.
        for task in np.flatnonzero(schedule.mask(Op.LOAD_E)):
            place = int(schedule.step[task]), int(schedule.layer[task]), int(schedule.part[task])
            moved[task] = self.transfers.loaded.get(place, 0)
        return moved, flops
