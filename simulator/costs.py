"""What each task of a schedule asks for: seconds alone, and shares of what lanes have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.errors import NotBuiltYet
from hrm.hardware import Curve, Rates
from hrm.layers import Layer
from hrm.model import MoEModel
from hrm.operators import Operator, active_experts, kv_shards, post_attention, pre_attention, prefill_layer, sampling
from hrm.pipeline import BatchShape
from hrm.systems import check_system
from hrm.task_times import TaskTimes
from simulator.cache_costs import ExpertCaching, cached_seconds, cached_work
from simulator.demands import demands_of, op_table
from simulator.expert_costs import expert_seconds, expert_work, seconds_elsewhere, work_elsewhere
from simulator.task import Op, Schedule

__all__ = ["PIECES", "WEIGHTS", "Costing", "Costs", "schedule_costs", "task_work"]


@dataclass(frozen=True)
class Costs:
    """Work of every task of a schedule, or of a segment of it."""

    seconds: np.ndarray
    """Duration when nothing else runs."""
    bytes: np.ndarray
    """Bytes moved: over the link, staged, or read from the KV cache."""
    flops: np.ndarray
    demands: dict[str, np.ndarray]
    """For each shared resource, units per second that the task uses while it runs at full speed."""
    capacities: dict[str, float | Curve]
    """For each shared resource, units per second that it has, or that it gives by how many are wanted."""

    def without_contention(self) -> Costs:
        """The same tasks with every lane on resources of its own."""
        return Costs(self.seconds, self.bytes, self.flops, {}, {})


_CONTEXTUAL = (Op.CPU_ATTN, Op.GPU_ATTN, Op.LOAD_KV, Op.STAGE_KV)
"""Tasks whose work grows with the context; all others are the same in every decode step."""


class _Work:
    """Bytes and FLOPs of a schedule's tasks."""

    def __init__(
        self,
        schedule: Schedule,
        model: MoEModel,
        batch: BatchShape,
        *,
        streamed: float | dict[int, float],
        kv_on_gpu: float = 0.0,
        kv_copies: dict[int, float] | None = None,
        replicas: int = 1,
        caching: ExpertCaching | None = None,
        popular: bool = False,
    ) -> None:
        self.caching, self.popular = caching, popular
        self.schedule, self.model, self.batch = schedule, model, batch
        self.streamed = streamed if isinstance(streamed, dict) else dict.fromkeys(set(model.order), streamed)
        self.kv_off_gpu = 1.0 - kv_on_gpu
        # With replicas, every GPU computes its share of the sequences.
        self.sequences, self.tokens = _column(batch.sequences) / replicas, _column(batch.prompt_tokens) / replicas
        self.pairs, self.longest = _column(batch.pairs) / replicas, _column(batch.longest)
        self.kinds = np.array(model.order)[schedule.layer]
        self.kv_copies = kv_copies or {}
        self.replicas = replicas

    def kept_tokens(self, layer: Layer) -> np.ndarray:
        """Prompt tokens of each micro-batch whose keys and values the layer's window will see again."""
        window = layer.attention.window
        if window is None:
            return self.tokens
        kept = [sum(min(length, window) for length in lengths) for lengths in self.batch.micro_batches]
        return _column(kept) / self.replicas

    def context(self, part: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Tokens in the KV cache of a micro-batch at a decode step, its new one included."""
        return self.tokens[part] + self.sequences[part] * step

    def seen_tokens(self, layer: Layer, part: np.ndarray, step: np.ndarray) -> np.ndarray:
        """As `context`, cut by the layer's window."""
        found = self.context(part, step)
        if layer.attention.window is None:
            return found
        return np.minimum(found, self.sequences[part] * layer.attention.window)

    def split_phases(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prefill, decode or both, where experts are tasks of their own: which tasks, and tokens."""
        prompt, computed = self.schedule.step == 0, _any(self.schedule, (Op.CPU_FFN, Op.EXPERTS))
        phases = [(prompt, self.tokens), (~prompt, self.sequences)]
        return [(phase, tokens) for phase, tokens in phases if (computed & phase).any()]

    def resident(self, kind: int) -> float:
        """r_w of a layer: the share of its experts that does not travel, nor lie on the host."""
        return 1.0 - self.streamed[kind] / self.model.kind_expert_bytes(kind)

    def expert_work(self, tokens: np.ndarray, layer: Layer, kind: int) -> dict[Op, tuple[Any, Any]]:
        """Bytes and FLOPs of the tasks of a layer's experts in prefill or decode, by part."""
        if self.caching is None:
            return expert_work(self.model, tokens, layer, self.resident(kind), self.popular)
        prompt, pieces = tokens is self.tokens, self.schedule.num_pages
        return cached_work(self.model, tokens, layer, self.caching, pieces, prompt=prompt)

    def expert_seconds(self, times: TaskTimes, tokens: np.ndarray, layer: Layer, kind: int) -> dict[Op, Any]:
        """Seconds of the same tasks."""
        if self.caching is None:
            return expert_seconds(times, tokens, layer, self.resident(kind), self.popular)
        prompt, pieces = tokens is self.tokens, self.schedule.num_pages
        return cached_seconds(times, tokens, layer, self.caching, pieces, prompt=prompt)

    def static(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and FLOPs of all tasks but those that depend on the context, which get zero."""
        schedule, model = self.schedule, self.model
        moved, flops = np.zeros(len(schedule)), np.zeros(len(schedule))
        sequences, tokens = self.sequences, self.tokens
        prompt = schedule.step == 0
        head = np.full_like(sequences, model.vocab_size * model.hidden_bytes)
        for kind in sorted(set(model.order)):
            layer = model.kinds[kind]
            of_kind = self.kinds == kind

            def fill(op: Op, size: np.ndarray, operators: list[Operator] | None = None, where: Any = of_kind) -> None:
                where = schedule.mask(op) & where
                part = schedule.part[where]
                moved[where] = size[part]
                if operators is not None:
                    flops[where] = np.asarray(sum(x.flops for x in operators))[part]

            attention, ffn = layer.attention, layer.ffn
            kv = model.kind_kv_token_bytes(kind)
            expert = ffn.expert_parameters * model.expert_element_bytes
            dense = np.full_like(sequences, attention.projection_parameters * model.dense_element_bytes)
            fill(Op.PRE_ATTN, dense, pre_attention(model, sequences, layer))
            fill(Op.POST_ATTN, active_experts(ffn, sequences) * expert, post_attention(model, sequences, layer))
            fill(Op.SAMPLE, head, sampling(model, sequences))
            operators = prefill_layer(model, tokens, self.pairs, self.longest, layer)
            fill(Op.PREFILL, active_experts(ffn, tokens) * expert, operators)
            fill(Op.OFFLOAD_QKV, sequences * (attention.query_size + attention.kv_elements) * model.dtype_bytes)
            fill(Op.LOAD_H, sequences * attention.attended_size * model.dtype_bytes)
            for op in (Op.LOAD_X, Op.STORE_X):
                fill(op, tokens * model.hidden_bytes, where=of_kind & prompt)
                fill(op, sequences * model.hidden_bytes, where=of_kind & ~prompt)
            kept = self.kept_tokens(layer) * self.kv_off_gpu
            fill(Op.STORE_KV, kept * kv, where=of_kind & prompt)
            fill(Op.STORE_KV, sequences * kv * self.kv_off_gpu, where=of_kind & ~prompt)
            fill(Op.OFFLOAD_KV, kept * kv + tokens * model.hidden_bytes)
            # Nobody reads the last layer's prompt states.
            tail = schedule.mask(Op.OFFLOAD_KV) & of_kind & (schedule.layer == model.num_layers - 1)
            moved[tail] = kept[schedule.part[tail]] * kv
            for op in (Op.LOAD_W, Op.STAGE_W):
                moved[schedule.mask(op) & of_kind] = self.streamed[kind] / schedule.num_pages
            for phase, count in self.split_phases():
                for op, (size, work) in self.expert_work(count, layer, kind).items():
                    where = schedule.mask(op) & of_kind & phase
                    moved[where], flops[where] = size[schedule.part[where]], work[schedule.part[where]]
                read = {Op.PREFILL: attention.projection_parameters, Op.POST_ATTN: 0}
                for op, parameters in read.items():
                    where = schedule.mask(op) & of_kind & phase
                    parameters += ffn.shared_parameters + ffn.router_parameters
                    moved[where] = parameters * model.dense_element_bytes
                    flops[where] -= work_elsewhere(model, count, layer)[schedule.part[where]]
        return moved, flops

    def contextual(self, ids: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and FLOPs of tasks `ids`, which depend on the context, at decode steps `steps`."""
        schedule, model = self.schedule, self.model
        moved, flops = np.zeros(len(ids)), np.zeros(len(ids))
        part, ops, kinds = schedule.part[ids], schedule.op[ids], self.kinds[ids]
        attends = (ops == Op.CPU_ATTN.code) | (ops == Op.GPU_ATTN.code)
        for kind in np.unique(kinds):
            layer, of_kind = model.kinds[kind], kinds == kind
            kv = model.kind_kv_token_bytes(int(kind))
            where = attends & of_kind
            seen = self.seen_tokens(layer, part[where], steps[where])
            moved[where] = seen * kv
            flops[where] = layer.attention.pair_flops * seen
            where = ~attends & of_kind
            # The new token's keys and values are made on the GPU.
            past = self.seen_tokens(layer, part[where], steps[where] - 1)
            moved[where] = past * kv * self.kv_off_gpu * self.kv_copies.get(int(kind), 1.0)
        return moved, flops


def _column(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=float)


def _contextual_ids(schedule: Schedule) -> np.ndarray:
    return np.flatnonzero(_any(schedule, _CONTEXTUAL))


def task_work(
    schedule: Schedule,
    model: MoEModel,
    batch: BatchShape,
    *,
    streamed: float | dict[int, float],
    kv_on_gpu: float = 0.0,
    caching: ExpertCaching | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that each task moves and FLOPs that it computes.

    Bytes are what crosses the link, is staged, or is read of weights or KV cache by a kernel; experts
    count as far as uniform routing is expected to touch them.

    Parameters
    ----------
    streamed : float or dict
        Bytes of a layer that travel; by kind of layer, where kinds differ.
    caching : ExpertCaching, optional
        For schedules with an expert cache.

    Returns
    -------
    bytes, flops : ndarray, length ``len(schedule)``
    """
    work = _Work(schedule, model, batch, streamed=streamed, kv_on_gpu=kv_on_gpu, caching=caching)
    moved, flops = work.static()
    ids = _contextual_ids(schedule)
    moved[ids], flops[ids] = work.contextual(ids, schedule.step[ids])
    return moved, flops


def streamed_bytes(model: MoEModel, weights_on_gpu: float, *, dense: bool = False) -> dict[int, float]:
    """Bytes of a layer's weights that travel, by kind of layer; with `dense`, those of attention too."""
    sizes = {}
    for kind in sorted(set(model.order)):
        sizes[kind] = (1 - weights_on_gpu) * model.kind_travelling_bytes(kind, dense=dense)
    return sizes


class Costing:
    """Turns a schedule's tasks into work, at any step of a run.

    Parameters
    ----------
    schedule : Schedule
    model : MoEModel
    rates : Rates
        What the machine attains.
    batch : BatchShape
        Prompt lengths of each micro-batch; ``batch.gen_len`` is not used, the schedule's steps are.
    weights_on_gpu, kv_on_gpu : float
        r_w and r_c.
    num_gpus : int
        GPUs of the machine: in tensor parallelism, where the GPU lane is all of them in lockstep; in pipeline
        parallelism, a stage each; with ZeRO-Inference, each with its share of the sequences.
    system : str
        Whose kernels, see `hrm.systems`.
    contention : bool
        Whether lanes share memory bandwidth, link and cores.
    caching : ExpertCaching, optional
        For schedules with an expert cache.
    popular : bool
        Of experts that are computed where they lie, the resident ones are those that the model's routing histogram
        shows to be the most popular.

    Raises
    ------
    NotBuiltYet
        For encoder-decoder models.
    """

    def __init__(
        self,
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
    ) -> None:
        if model.encoder_order:
            raise NotBuiltYet(f"schedules of encoder-decoder models such as {model.name!r} are not built yet.")
        traits = check_system(system)
        self._schedule, self._rates = schedule, rates.of_system(system)
        self._contention = contention
        replicas = num_gpus if traits.single_batch else 1
        tensor = 1 if traits.pipeline_parallel or traits.single_batch else num_gpus
        self._times = TaskTimes(model, self._rates, tensor)
        self._gathered = replicas
        copies = {kind: tensor / kv_shards(model.kinds[kind].attention, tensor) for kind in sorted(set(model.order))}
        self._work = _Work(
            schedule,
            model,
            batch,
            streamed=streamed_bytes(model, weights_on_gpu, dense=traits.streams_dense),
            kv_on_gpu=kv_on_gpu,
            kv_copies=copies,
            replicas=replicas,
            caching=caching,
            popular=popular,
        )
        self._ids = _contextual_ids(schedule)
        moved, flops = self._work.static()
        seconds = self._static_seconds(moved)
        base = self._finish(np.arange(len(schedule)), seconds, moved, flops)
        self._base = self._with_context(base, 0, len(schedule), 0)

    def at(self, first: int = 0, stop: int | None = None, shift: int = 0) -> Costs:
        """Work of tasks first..stop-1, `shift` steps later than the schedule says."""
        whole = self._base
        if stop is None:
            stop = len(self._schedule)
        span = slice(first, stop)
        part = Costs(
            whole.seconds[span],
            whole.bytes[span],
            whole.flops[span],
            {name: values[span] for name, values in whole.demands.items()},
            whole.capacities,
        )
        return part if shift == 0 else self._with_context(part, first, stop, shift)

    def _with_context(self, costs: Costs, first: int, stop: int, shift: int) -> Costs:
        ids = self._ids[np.searchsorted(self._ids, first) : np.searchsorted(self._ids, stop)]
        if not len(ids):
            return costs
        steps = self._schedule.step[ids] + shift
        moved, flops = self._work.contextual(ids, steps)
        seconds = self._contextual_seconds(ids, steps, moved)
        fresh = self._finish(ids, seconds, moved, flops)
        place = ids - first

        def merged(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            result = old.copy()
            result[place] = new
            return result

        demands = {name: merged(costs.demands[name], fresh.demands[name]) for name in costs.demands}
        return Costs(
            merged(costs.seconds, fresh.seconds),
            merged(costs.bytes, fresh.bytes),
            merged(costs.flops, fresh.flops),
            demands,
            costs.capacities,
        )

    def _static_seconds(self, moved: np.ndarray) -> np.ndarray:
        schedule, work, times = self._schedule, self._work, self._times
        model = work.model
        seconds = np.zeros(len(schedule))
        for kind in sorted(set(model.order)):
            layer, of_kind = model.kinds[kind], work.kinds == kind
            per_part = {
                Op.PRE_ATTN: times.pre_attention(work.sequences, layer),
                Op.POST_ATTN: times.post_attention(work.sequences, layer),
                Op.SAMPLE: times.sample(work.sequences),
                Op.PREFILL: times.prefill(work.tokens, work.pairs, work.longest, layer, requests=work.sequences),
            }
            for op, values in per_part.items():
                where = schedule.mask(op) & of_kind
                seconds[where] = values[schedule.part[where]]
            for phase, count in work.split_phases():
                for op, values in work.expert_seconds(times, count, layer, kind).items():
                    where = schedule.mask(op) & of_kind & phase
                    seconds[where] = values[schedule.part[where]]
                where = _any(schedule, (Op.PREFILL, Op.POST_ATTN)) & of_kind & phase
                seconds[where] -= seconds_elsewhere(times, count, layer)[schedule.part[where]]
            kept = work.kept_tokens(layer) * model.kind_kv_token_bytes(kind) * work.kv_off_gpu
            where = schedule.mask(Op.OFFLOAD_KV) & of_kind
            kv = kept[schedule.part[where]]
            seconds[where] = times.offload_kv(moved[where] - kv, kv)
            where = schedule.mask(Op.STORE_KV) & of_kind & (schedule.step == 0)
            seconds[where] = times.offload_kv(0.0, moved[where])
        up = _any(schedule, (Op.LOAD_W, Op.LOAD_H, Op.LOAD_X, Op.LOAD_FFN))
        down = _any(schedule, (Op.OFFLOAD_QKV, Op.STORE_X, Op.OFFLOAD_FFN))
        down |= schedule.mask(Op.STORE_KV) & (schedule.step > 0)
        staging = schedule.mask(Op.STAGE_W)
        seconds[up], seconds[down] = times.h2d(moved[up]), times.d2h(moved[down])
        routed = schedule.mask(Op.OFFLOAD_FFN)
        seconds[routed] = times.offload_routed(moved[routed])
        seconds[staging] = times.staging(moved[staging])
        seconds[schedule.mask(Op.BARRIER)] = self._rates.sync_s
        if self._gathered > 1 and self._rates.peer_bandwidth is not None:
            # Each GPU fetches its share of the layer, and gets the others' from its peers.
            weights = schedule.mask(Op.LOAD_W)
            others = (self._gathered - 1) * moved[weights]
            if self._rates.peer_by_host:
                seconds[weights] += others / self._rates.h2d_bandwidth
            else:
                seconds[weights] += self._rates.peer_s + others / self._gathered / self._rates.peer_bandwidth
        return seconds

    def _contextual_seconds(self, ids: np.ndarray, steps: np.ndarray, moved: np.ndarray) -> np.ndarray:
        schedule, work, times = self._schedule, self._work, self._times
        seconds = np.zeros(len(ids))
        part, ops, kinds = schedule.part[ids], schedule.op[ids], work.kinds[ids]
        for kind in np.unique(kinds):
            layer = work.model.kinds[kind]
            where = (ops == Op.CPU_ATTN.code) & (kinds == kind)
            if where.any():
                p = part[where]
                context = work.context(p, steps[where])
                seconds[where] = times.cpu_attention(work.sequences[p], context, layer)
            where = (ops == Op.GPU_ATTN.code) & (kinds == kind)
            if where.any():
                p = part[where]
                context = work.context(p, steps[where])
                seconds[where] = times.gpu_attention(work.sequences[p], context, layer)
        where = ops == Op.LOAD_KV.code
        seconds[where] = times.h2d(moved[where])
        where = ops == Op.STAGE_KV.code
        seconds[where] = times.kv_staging(moved[where])
        return seconds

    def _finish(self, ids: np.ndarray, seconds: np.ndarray, moved: np.ndarray, flops: np.ndarray) -> Costs:
        """Add what the tasks `ids` want of shared resources."""
        if not self._contention:
            return Costs(seconds, moved, flops, {}, {})
        shared = demands_of(self._schedule, self._rates, ids, seconds, moved)
        return Costs(seconds, moved, flops, *shared)


def schedule_costs(
    schedule: Schedule,
    model: MoEModel,
    rates: Rates,
    batch: BatchShape,
    *,
    weights_on_gpu: float,
    kv_on_gpu: float = 0.0,
    num_gpus: int = 1,
    system: str = "moe-lightning",
) -> Costs:
    """Work of every task of a schedule; parameters as those of `Costing`."""
    costing = Costing(
        schedule,
        model,
        rates,
        batch,
        weights_on_gpu=weights_on_gpu,
        kv_on_gpu=kv_on_gpu,
        num_gpus=num_gpus,
        system=system,
    )
    return costing.at()


WEIGHTS = op_table((Op.LOAD_W, Op.STAGE_W))
"""Which task classes move weights, by code."""
PIECES = op_table((Op.LOAD_E, Op.EXPERTS))
"""Which task classes work on pieces of a micro-batch's experts, by code."""


def _any(schedule: Schedule, ops: tuple[Op, ...]) -> np.ndarray:
    return op_table(ops)[schedule.op]
