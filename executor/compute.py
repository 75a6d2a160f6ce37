"""Tasks of the two processors: what is computed, on the device and on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from executor.buffers import FfnSlot
from executor.cpu_attention import decode_attention
from executor.device_attention import device_attention
from executor.families import Routed
from executor.gating.meter import GatingMeter
from executor.grouped_experts import grouped_kernel
from executor.kernels import moe_ffn
from executor.lanes import Handler
from executor.places import Places, prompt_spans
from executor.recording import RouteRecorder
from executor.sampling import Sampling, choose
from executor.weights import Held, Where
from simulator.task import Op

__all__ = ["Compute", "Reduce"]

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Adds up partial sums of tensor parallelism."""


class Compute:
    """One method per task class that computes.

    Parameters
    ----------
    places : Places
    sampling : Sampling
    reduce : callable
    recorder : RouteRecorder, optional
        Keeps every token's choice of experts.
    gating : GatingMeter, optional
        Brings tokens to experts instead of the executor's own dynamic gating.
    """

    def __init__(
        self,
        places: Places,
        *,
        sampling: Sampling,
        reduce: Reduce,
        recorder: RouteRecorder | None = None,
        gating: GatingMeter | None = None,
    ) -> None:
        self.recorder, self._gating = recorder, gating
        self._places, self._weights = places, places.weights
        self._sampling, self._reduce = sampling, reduce
        self._sinks: dict[tuple[int, torch.device], torch.Tensor | None] = {}

    def handlers(self) -> Mapping[Op, Handler]:
        """What each task class does."""
        return {
            Op.PREFILL: self.prefill,
            Op.PRE_ATTN: self.pre_attention,
            Op.CPU_ATTN: self.cpu_attention,
            Op.GPU_ATTN: self.gpu_attention,
            Op.POST_ATTN: self.post_attention,
            Op.CPU_FFN: self.cpu_experts,
            Op.GPU_FFN: self.gpu_experts,
            Op.EXPERTS: self.cached_experts,
            Op.ADD_FFN: self.add_experts,
            Op.SAMPLE: self.sample,
        }

    def begin(self) -> None:
        """Take up the segment that `places` has: prompts and first tokens to the device."""
        segment, device = self._places.segment, self._places.device

        def ids(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device)

        self._adds_resident = bool(segment.schedule.mask(Op.GPU_FFN).any())
        self._turns: dict[int, tuple[int, list[torch.Tensor]]] = {}
        self._prompt_ids: list[torch.Tensor] = []
        self._prompt_positions: list[torch.Tensor] = []
        self._last_rows: list[torch.Tensor] = []
        self.output = [
            torch.zeros(part.size, segment.steps, dtype=torch.int64, device=device) for part in segment.parts
        ]
        """Tokens that every request gets, [n, steps], by micro-batch."""
        for part, next_ids in zip(segment.parts, self._places.next_ids, strict=True):
            if segment.prefill:
                self._prompt_ids.append(ids([token for request in part.requests for token in request.prompt]))
                self._prompt_positions.append(ids([i for n in part.lengths for i in range(n)]))
                self._last_rows.append(ids(part.lengths).cumsum(0) - 1)
            elif part.size:
                next_ids.copy_(ids([request.output[-1] for request in part.requests]))
        # Processes begin together: none is timed while it waits for what another one sets up.
        self._reduce(torch.zeros(1, device=device))

    # -- device ------------------------------------------------------------------------------------

    def _turn(self, positions: torch.Tensor) -> list[torch.Tensor]:
        return [table[positions] for table in self._weights.rotary]

    def _keep_choices(self, step: int, layer: int, part: int, index: torch.Tensor) -> None:
        if self.recorder is not None and self._places.model.layers[layer].ffn.routed:
            self.recorder.add(step, layer, part, index)

    def _hand_over(self, step: int, layer: int, part: int, hidden: torch.Tensor) -> None:
        """Route a micro-batch; its experts, tasks of their own, find states and choices in a slot."""
        dense, n = self._weights.layer(layer, self._places.visit(step, layer)), hidden.shape[0]
        x, index, weight = dense.route(hidden)
        self._keep_choices(step, layer, part, index)
        slot, k = self._places.device_ffn(step, layer, part), index.shape[1]
        slot.states[:n].copy_(x)
        slot.index[:n, :k].copy_(self._weights.places(layer, index))
        slot.weight[:n, :k].copy_(weight)
        shared = dense.shared(x)
        if shared is not None:
            hidden.add_(self._reduce(shared))

    def _feed_forward(self, step: int, layer: int, part: int, hidden: torch.Tensor) -> None:
        visit = self._places.visit(step, layer)
        dense = self._weights.layer(layer, visit)
        x, index, weight = dense.route(hidden)
        self._keep_choices(step, layer, part, index)
        y = self._experts(x, self._weights.places(layer, index), weight, layer, visit)
        shared = dense.shared(x)
        hidden.add_(self._reduce(y if shared is None else y.add_(shared)))

    def _experts(
        self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, layer: int, where: Where
    ) -> torch.Tensor:
        """What the experts that lie there add to states [n, H], with choices and weights [n, k]."""
        ffn, weights = self._places.model.layers[layer].ffn, self._weights
        activation = weights.family.activation
        gating = self._gating if ffn.routed else None
        if gating is None and ffn.routed:
            grouped = grouped_kernel(x.device, x.dtype, ffn.hidden_size, ffn.intermediate_size)
            if grouped is not None:
                return grouped(x, index, weight, weights.groups(layer, where), ffn.num_experts, activation)
        run = moe_ffn if gating is None else gating.ffn
        return run(x, index, weight, weights.experts(layer, where), activation)

    def prefill(self, step: int, layer: int, part: int, ready: float) -> None:
        """Prefill: one layer on all prompt tokens of a micro-batch."""
        places = self._places
        state = places.part(part)
        if not state.size:
            return
        hidden, rows = places.prompt_hidden(layer, part), places.prompt_rows(layer, part)
        if layer == 0:
            hidden.copy_(self._weights.embed(self._prompt_ids[part]))
        turn = self._turn(self._prompt_positions[part])
        dense = self._weights.layer(layer, places.visit(step, layer))
        hidden.add_(self._reduce(dense.prefill(hidden, turn, state.lengths, rows)))
        arena = places.device_rows(layer)
        for start, stop, target in prompt_spans(state, places.attention[layer].window, range(state.on_device)):
            arena[target : target + stop - start].copy_(rows[start:stop])
        if self._weights.experts_cached is not None:
            self._hand_over(step, layer, part, hidden)
        else:
            self._feed_forward(step, layer, part, hidden)

    def pre_attention(self, step: int, layer: int, part: int, ready: float) -> None:
        """PreAttn: norm, projections, rotary embedding; the result lies ready in a slot."""
        places, hidden = self._places, self._places.hidden[part]
        if not hidden.shape[0]:
            return
        if layer == 0:
            hidden.copy_(self._weights.embed(places.next_ids[part]))
        if part not in self._turns or self._turns[part][0] != step:
            positions = places.device_part(part).positions(places.decoded(step))
            self._turns[part] = (step, self._turn(positions))
        slot = places.device_slot(step, layer, part)
        dense = self._weights.layer(layer, places.visit(step, layer))
        queries, rows = places.queries(slot, layer, part), places.new_rows(slot, layer, part)
        dense.decode_inputs(hidden, self._turns[part][1], queries, rows)

    def gpu_attention(self, step: int, layer: int, part: int, ready: float) -> None:
        """GPUAttn: append the new rows on the device, attend over cache and buffer there."""
        places = self._places
        state, window = places.part(part), places.attention[layer].window
        n, first = state.size, state.on_device
        slot = places.device_slot(step, layer, part)
        _, visible, _ = state.rows(places.decoded(step), window)
        there = places.device_part(part)
        new, _, _ = there.rows(places.decoded(step), window)
        queries, rows = places.queries(slot, layer, part), places.new_rows(slot, layer, part)
        out = places.attended(slot, layer, part)
        arenas = []
        if first:
            arena = places.device_rows(layer)
            arenas.append((slice(0, first), arena, state.starts(window)[:first], there.starts(window)[:first]))
        if first < n:
            arena = places.kv_buffer(step, layer, part)
            arenas.append((slice(first, n), arena, *places.buffer_starts(layer, part)))
        for which, arena, starts, begin in arenas:
            arena[begin + new[which]] = rows[which]
            self._attend(layer, queries[which], arena, starts, visible[which], out[which])

    def _attend(
        self,
        layer: int,
        queries: torch.Tensor,
        arena: torch.Tensor,
        starts: torch.Tensor,
        visible: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Decode attention, by the host's kernel wherever the memory is the host's."""
        attention, dense = self._places.attention[layer], self._weights.layer(layer, 0)
        rank = attention.kv_rank
        kernel = device_attention if arena.is_cuda else decode_attention
        kernel(
            queries,
            arena,
            starts,
            visible,
            out,
            num_kv_heads=attention.num_kv_heads if rank is None else 1,
            key_dim=attention.head_dim if rank is None else attention.kv_elements,
            value_dim=attention.value_dim if rank is None else rank,
            value_offset=attention.num_kv_heads * attention.head_dim if rank is None else 0,
            scale=dense.scale,
            sinks=self._sinks_of(layer, arena.device),
        )

    def _sinks_of(self, layer: int, device: torch.device) -> torch.Tensor | None:
        if (layer, device) not in self._sinks:
            sinks = self._weights.layer(layer, 0).sinks
            self._sinks[layer, device] = None if sinks is None else sinks.to(device=device, dtype=torch.float32)
        return self._sinks[layer, device]

    def post_attention(self, step: int, layer: int, part: int, ready: float) -> None:
        """PostAttn: O projection, router, experts; or states and choices for the experts of both processors."""
        places, hidden = self._places, self._places.hidden[part]
        if not hidden.shape[0]:
            return
        attended = places.attended(places.device_slot(step, layer, part), layer, part)
        dense = self._weights.layer(layer, places.visit(step, layer))
        hidden.add_(self._reduce(dense.decode_output(attended)))
        if places.buffers.device_ffn:
            self._hand_over(step, layer, part, hidden)
        else:
            self._feed_forward(step, layer, part, hidden)

    def gpu_experts(self, step: int, layer: int, part: int, ready: float) -> None:
        """GPUFFN: the experts that stay on the device."""
        slot = self._places.device_ffn(step, layer, part)
        x, index, weight = self._routed(slot, step, layer, part)
        if len(x):
            slot.sums[0][: len(x)] = self._experts(x, index, weight, layer, Held.RESIDENT)

    def cached_experts(self, step: int, layer: int, number: int, ready: float) -> None:
        """Experts: those of a piece, which lie in the cache's slots; a dense FFN stays on the device."""
        part, piece = self._places.piece(number)
        slot = self._places.device_ffn(step, layer, part)
        routed = self._routed(slot, step, layer, part)
        total = slot.sums[0][: len(routed.x)]
        if not len(total):
            return
        if self._places.model.layers[layer].ffn.routed:
            cache = self._weights.experts_cached
            assert cache is not None
            cache.compute(step, layer, part, piece, routed, total, self._weights.family.activation)
        elif piece == 0:
            total.copy_(self._experts(*routed, layer, Held.RESIDENT))

    def nothing_to_compute(self, step: int, layer: int, number: int) -> bool:
        """Whether no expert is in the piece of Experts."""
        part, piece = self._places.piece(number)
        cache = self._weights.experts_cached
        if not self._places.rows(step, part) or not self._places.model.layers[layer].ffn.routed or cache is None:
            return piece > 0
        return cache.nothing_to_compute(step, layer, part, piece)

    def _routed(self, slot: FfnSlot, step: int, layer: int, part: int) -> Routed:
        n, k = self._places.rows(step, part), self._places.model.layers[layer].ffn.top_k
        return Routed(slot.states[:n], slot.index[:n, :k], slot.weight[:n, :k])

    def add_experts(self, step: int, layer: int, part: int, ready: float) -> None:
        """AddFFN: what all experts made, to the hidden states."""
        hidden = self._places.states(step, layer, part)
        sums = [x[: hidden.shape[0]] for x in self._places.device_ffn(step, layer, part).sums]
        if len(sums) == 1:
            hidden.add_(self._reduce(sums[0]))
            return
        from_gpu, from_cpu = sums
        hidden.add_(self._reduce(from_gpu + from_cpu if self._adds_resident else from_cpu.clone()))

    def sample(self, step: int, layer: int, part: int, ready: float) -> None:
        """Sample: final norm, LM head, choice of the next token."""
        places, state = self._places, self._places.part(part)
        if not state.size:
            return
        hidden = places.hidden[part] if step else places.prompt_hidden(layer, part)[self._last_rows[part]]
        count = places.decoded(step) + places.segment.prefill if step else 0
        draws = self._sampling.draws(state.requests, count)
        ids = choose(self._weights.logits(hidden), self._sampling, draws)
        # All processes go on with the tokens of the first.
        ids = self._reduce(self._weights.family.first_of_sum(ids))
        places.next_ids[part].copy_(ids)
        self.output[part][:, count].copy_(ids)

    # -- host --------------------------------------------------------------------------------------

    def cpu_attention(self, step: int, layer: int, part: int, ready: float) -> None:
        """CPUAttn: append the new keys and values, attend over the cache."""
        places = self._places
        state, window = places.part(part), places.attention[layer].window
        if not state.size:
            return
        slot, arena = places.host_slot(step, layer, part), places.host_rows(layer)
        new, visible, _ = state.rows(places.decoded(step), window)
        starts = state.starts(window)
        arena[starts + new] = places.new_rows(slot, layer, part)
        out = places.attended(slot, layer, part)
        self._attend(layer, places.queries(slot, layer, part), arena, starts, visible, out)

    def cpu_experts(self, step: int, layer: int, part: int, ready: float) -> None:
        """CPUFFN: the experts that lie in host memory."""
        slot = self._places.host_ffn(step, layer, part)
        x, index, weight = self._routed(slot, step, layer, part)
        if len(x):
            slot.sums[0][: len(x)] = self._experts(x, index, weight, layer, Held.HOST)
