"""Tasks of the link and of the staging copy: what travels between host and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from executor.lanes import Handler, PacedLink
from executor.places import Places, joined, prompt_spans
from simulator.task import Op

__all__ = ["Transfers"]


class Transfers:
    """One method per task class that moves data.

    Parameters
    ----------
    places : Places
    in_place : bool
        Weights travel from where they lie, not from the pinned ring.
    link_bandwidth : float or None
        Bytes/s of the paced link where there is no GPU; None for no pacing.
    """

    def __init__(self, places: Places, *, in_place: bool, link_bandwidth: float | None) -> None:
        self._places, self._in_place = places, in_place
        self.loaded: dict[tuple[int, int, int], int] = {}
        """Bytes of every LoadExperts task of the segment."""
        self._up, self._down = PacedLink(link_bandwidth), PacedLink(link_bandwidth)

    def handlers(self) -> Mapping[Op, Handler]:
        """What each task class does."""
        return {
            Op.STAGE_W: self.stage_weights,
            Op.LOAD_W: self.load_weights,
            Op.LOAD_X: self.load_hidden,
            Op.STORE_X: self.store_hidden,
            Op.OFFLOAD_KV: self.offload_prompt,
            Op.STAGE_KV: self.stage_kv,
            Op.LOAD_KV: self.load_kv,
            Op.STORE_KV: self.store_kv,
            Op.OFFLOAD_QKV: self.offload_qkv,
            Op.LOAD_H: self.load_attended,
            Op.OFFLOAD_FFN: self.offload_states,
            Op.LOAD_FFN: self.load_expert_sums,
            Op.OFFLOAD_ROUTES: self.offload_choices,
            Op.LOAD_E: self.load_experts,
            Op.BARRIER: self.barrier,
        }

    def _copy(self, link: PacedLink, target: torch.Tensor, source: torch.Tensor, ready: float) -> None:
        if self._places.cuda:
            target.copy_(source, non_blocking=True)
        else:
            link.copy(target, source, ready)

    def _copy_pieces(self, link: PacedLink, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], ready: float) -> None:
        if self._places.cuda:
            for target, source in pieces:
                target.copy_(source, non_blocking=True)
        else:
            link.copy_pieces(pieces, ready)

    def _land(self) -> None:
        """Wait until what the device sent is there, before the host touches it."""
        if self._places.cuda:
            torch.cuda.current_stream().synchronize()

    # -- weights -----------------------------------------------------------------------------------

    def stage_weights(self, step: int, layer: int, page: int, ready: float) -> None:
        """W_CtoPin: a page from pageable to pinned host memory."""
        places = self._places
        places.pinned_page(step, layer, page).copy_(places.weights.host[layer][places.page(layer, page)])

    def load_weights(self, step: int, layer: int, page: int, ready: float) -> None:
        """W_PinToG: a page into its place in the buffer slot of its layer visit."""
        places = self._places
        where = places.page(layer, page)
        source = places.weights.host[layer][where] if self._in_place else places.pinned_page(step, layer, page)
        self._copy(self._up, places.weight_slot(step, layer)[where], source, ready)

    # -- hidden states -----------------------------------------------------------------------------

    def load_hidden(self, step: int, layer: int, part: int, ready: float) -> None:
        """LoadX: hidden states of a micro-batch to the device."""
        target = self._places.states(step, layer, part)
        self._copy(self._up, target.view(-1), self._places.host_hidden[part][: target.numel()], ready)

    def store_hidden(self, step: int, layer: int, part: int, ready: float) -> None:
        """StoreX: hidden states of a micro-batch to host memory."""
        source = self._places.states(step, layer, part)
        self._copy(self._down, self._places.host_hidden[part][: source.numel()], source.view(-1), ready)

    def offload_qkv(self, step: int, layer: int, part: int, ready: float) -> None:
        """OffloadQKV (D1)."""
        attention = self._places.attention[layer]
        used = self._places.part(part).size * (attention.query_size + attention.kv_elements)
        target, source = (get(step, layer, part) for get in (self._places.host_slot, self._places.device_slot))
        self._copy(self._down, target.flat[:used], source.flat[:used], ready)

    def load_attended(self, step: int, layer: int, part: int, ready: float) -> None:
        """LoadH (D2)."""
        used = self._places.part(part).size * self._places.attention[layer].attended_size
        target, source = (get(step, layer, part) for get in (self._places.device_slot, self._places.host_slot))
        self._copy(self._up, target.attended[:used], source.attended[:used], ready)

    def offload_states(self, step: int, layer: int, part: int, ready: float) -> None:
        """OffloadFFN: normed states and the tokens' choice of experts to the host."""
        n = self._places.part(part).size
        here, there = self._places.device_ffn(step, layer, part), self._places.host_ffn(step, layer, part)
        pairs = ((there.states, here.states), (there.index, here.index), (there.weight, here.weight))
        self._copy_pieces(self._down, [(target[:n], source[:n]) for target, source in pairs], ready)

    def load_expert_sums(self, step: int, layer: int, part: int, ready: float) -> None:
        """LoadFFN: what the CPU's experts made, to the device."""
        n = self._places.part(part).size
        target = self._places.device_ffn(step, layer, part).sums[1]
        source = self._places.host_ffn(step, layer, part).sums[0]
        self._copy(self._up, target[:n].view(-1), source[:n].view(-1), ready)

    def offload_choices(self, step: int, layer: int, part: int, ready: float) -> None:
        """OffloadRoutes: the tokens' choice of experts, to the host."""
        places, ffn = self._places, self._places.model.layers[layer].ffn
        n = places.rows(step, part)
        if n and ffn.routed:
            here, there = places.device_ffn(step, layer, part), places.host_ffn(step, layer, part)
            self._copy(self._down, there.index[:n].view(-1), here.index[:n].view(-1), ready)

    def load_experts(self, step: int, layer: int, number: int, ready: float) -> None:
        """LoadExperts: experts of a piece that the cache lacks, into its slots."""
        places, ffn, cache = self._places, self._places.model.layers[layer].ffn, self._places.weights.experts_cached
        part, piece = places.piece(number)
        n = places.rows(step, part)
        if not n or not ffn.routed or cache is None:
            return
        if piece == 0:
            self._land()  # the choices
            index = places.host_ffn(step, layer, part).index[:n, : ffn.top_k]
            cache.visit(step, layer, part, index)
            self._up.hold()
        moved = cache.bring(
            step, layer, part, piece, lambda target, source: self._copy(self._up, target, source, ready)
        )
        self.loaded[step, layer, number] = moved

    def nothing_comes(self, step: int, layer: int, number: int) -> bool:
        """Whether LoadExperts has nothing to load, and is not the one that looks."""
        places, ffn, cache = self._places, self._places.model.layers[layer].ffn, self._places.weights.experts_cached
        part, piece = places.piece(number)
        if not places.rows(step, part) or not ffn.routed or cache is None:
            return piece > 0
        return cache.nothing_comes(step, layer, part, piece)

    # -- KV cache ----------------------------------------------------------------------------------

    def offload_prompt(self, step: int, layer: int, part: int, ready: float) -> None:
        """OffloadKV: prompt keys and values to the host cache, hidden states to host memory."""
        if layer < self._places.model.num_layers - 1:
            self.store_hidden(step, layer, part, ready)
            ready = 0.0
        self._store_prompt(layer, part, ready)

    def _store_prompt(self, layer: int, part: int, ready: float) -> None:
        """Prompt rows of the requests whose KV lies on the host, as far as the layer will see them again."""
        places = self._places
        state, window = places.part(part), places.attention[layer].window
        rows, arena = places.prompt_rows(layer, part), places.host_rows(layer)
        spans = prompt_spans(state, window, range(state.on_device, state.size))
        if not spans:
            return
        down, home, at = [], [], 0
        for start, stop, row in spans:
            down.append((start, at, stop - start))
            home.append((at, row, stop - start))
            at += stop - start
        landed = places.buffers.prompt_kv[: at * rows.shape[1]].view(at, rows.shape[1])
        for source, target in joined(down):
            self._copy(self._down, landed[target], rows[source], ready)
        self._land()
        for source, target in joined(home):
            arena[target].copy_(landed[source])

    def store_kv(self, step: int, layer: int, part: int, ready: float) -> None:
        """StoreKV: new keys and values of the requests whose KV lies on the host."""
        if step == 0:
            self._store_prompt(layer, part, ready)
            return
        places = self._places
        state, window = places.part(part), places.attention[layer].window
        first = state.on_device
        if first == state.size:
            return
        made = places.new_rows(places.device_slot(step, layer, part), layer, part)[first:]
        landed = places.new_rows(places.host_slot(step, layer, part), layer, part)[first:]
        self._copy(self._down, landed.view(-1), made.view(-1), ready)
        self._land()
        new, _, _ = state.rows(places.decoded(step), window)
        places.host_rows(layer)[(state.starts(window) + new)[first:]] = landed

    def _kv_runs(self, step: int, layer: int, part: int) -> list[tuple[slice, slice]]:
        """Rows of the KV that travels, in the host's arena and in the buffer."""
        places = self._places
        state, window = places.part(part), places.attention[layer].window
        past = state.rows(places.decoded(step), window)[2].tolist()[state.on_device :]
        starts = state.starts(window).tolist()[state.on_device :]
        targets = places.buffer_starts(layer, part)[0].tolist()
        return joined(zip(starts, targets, past, strict=True))

    def stage_kv(self, step: int, layer: int, part: int, ready: float) -> None:
        """KVtoPin: the KV cache of a micro-batch to pinned memory."""
        arena, pinned = self._places.host_rows(layer), self._places.kv_buffer(step, layer, part, pinned=True)
        for rows, target in self._kv_runs(step, layer, part):
            pinned[target].copy_(arena[rows])

    def load_kv(self, step: int, layer: int, part: int, ready: float) -> None:
        """LoadKV: the KV cache of a micro-batch to a buffer on the device."""
        places = self._places
        buffer, arena = places.kv_buffer(step, layer, part), places.host_rows(layer)
        staged = places.kv_buffer(step, layer, part, pinned=True) if places.buffers.pinned_kv else None
        runs = self._kv_runs(step, layer, part)
        pieces = [(buffer[target], arena[rows] if staged is None else staged[target]) for rows, target in runs]
        self._copy_pieces(self._up, pieces, ready)

    def barrier(self, step: int, layer: int, part: int, ready: float) -> None:
        """Barrier: nothing more is launched until all that was has ended."""
        self._land()
