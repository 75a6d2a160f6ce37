"""Which buffer holds what: every task finds its operands by step, layer and micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from executor.buffers import Buffers, FfnSlot, Slot
from executor.kv_cache import Request
from executor.segment import Part, Segment
from executor.weights import WeightStore
from hrm.layers import Attention
from hrm.pipeline import ACTIVATION_SLOTS
from simulator.task import Op

__all__ = ["Places", "joined", "prompt_spans"]


class Places:
    """The operands of tasks of the segment that runs.

    Parameters
    ----------
    buffers : Buffers
    weights : WeightStore
    device : torch.device
    """

    segment: Segment

    def __init__(self, buffers: Buffers, weights: WeightStore, device: torch.device) -> None:
        self.buffers, self.weights, self.device = buffers, weights, device
        self.model = buffers.model
        self.cuda = device.type == "cuda"
        self.attention: list[Attention] = [layer.attention for layer in self.model.layers]

    def begin(self, segment: Segment) -> None:
        """Share the buffers out to the micro-batches of a segment."""
        self.segment = segment
        schedule = segment.schedule
        self._first_decode = max(1, int(schedule.step.min()) if len(schedule) else 0)
        # Prompts whose hidden states never leave the device stay in one slot.
        self._prompts_move = bool((schedule.mask(Op.LOAD_X) | schedule.mask(Op.OFFLOAD_KV)).any())
        if schedule.mask(Op.STAGE_W).any():
            self.buffers.make_ring(schedule.num_pages, self.weights.longest_page(schedule.num_pages))
        self._buffer_starts: dict[tuple[int, int | None], tuple[torch.Tensor, torch.Tensor]] = {}
        self._device_parts = [part.on(self.device) for part in segment.parts]
        sizes = [part.size for part in segment.parts]
        self.hidden = list(self.buffers.hidden[: sum(sizes)].split(sizes))
        """Hidden states of each micro-batch in decode, [n, H]."""
        self.next_ids = list(self.buffers.next_ids[: sum(sizes)].split(sizes))
        """Token that each request feeds in next, [n]."""
        rows = [part.tokens if segment.prefill else part.size for part in segment.parts]
        self.host_hidden = self._split_host(rows)
        """Hidden states of each micro-batch on the host: of its prompts, later of its sequences; flat."""

    def _split_host(self, rows: Sequence[int]) -> list[torch.Tensor]:
        h = self.model.hidden_size
        return list(self.buffers.host_hidden[: sum(rows) * h].split([n * h for n in rows]))

    # -- numbering ---------------------------------------------------------------------------------

    def part(self, part: int) -> Part:
        """The requests of a micro-batch."""
        return self.segment.parts[part]

    def device_part(self, part: int) -> Part:
        """The same, with rows and positions on the device."""
        return self._device_parts[part]

    def decoded(self, step: int) -> int:
        """Decode steps of the segment before `step`."""
        return step - self._first_decode

    def visit(self, step: int, layer: int) -> int:
        """Number of a layer visit, over the whole run."""
        return step * self.model.num_layers + layer

    def _number(self, step: int, layer: int, part: int) -> int:
        return self.visit(step, layer) * len(self.segment.parts) + part

    def _slot(self, step: int, layer: int, part: int) -> int:
        return self._number(step, layer, part) % ACTIVATION_SLOTS

    # -- weights -----------------------------------------------------------------------------------

    def page(self, layer: int, page: int) -> slice:
        """Where a page lies in the streamed part of a layer."""
        return slice(*self.weights.layers[layer].bounds(page, self.segment.schedule.num_pages))

    def pinned_page(self, step: int, layer: int, page: int) -> torch.Tensor:
        """Where a page is staged."""
        where = self.page(layer, page)
        ring, pages = self.buffers.pinned, self.buffers.pages
        return ring[(self.visit(step, layer) * pages + page) % len(ring)][: where.stop - where.start]

    def weight_slot(self, step: int, layer: int) -> torch.Tensor:
        """The buffer that the streamed part of a layer travels to."""
        return self.weights.slots[self.visit(step, layer) % WeightStore.SLOTS]

    # -- activations -------------------------------------------------------------------------------

    def prompt_hidden(self, layer: int, part: int) -> torch.Tensor:
        """Hidden states of a micro-batch in prefill, on the device, [tokens, H]."""
        slot = self._slot(0, layer, part) if self._prompts_move else 0
        tokens, h = self.part(part).tokens, self.model.hidden_size
        return self.buffers.prompt_slots[slot][: tokens * h].view(tokens, h)

    def states(self, step: int, layer: int, part: int) -> torch.Tensor:
        """Hidden states of a micro-batch on the device, in prefill or decode."""
        return self.prompt_hidden(layer, part) if step == 0 else self.hidden[part]

    def rows(self, step: int, part: int) -> int:
        """Tokens of a micro-batch: of its prompts in prefill, else one per request."""
        return self.part(part).tokens if step == 0 else self.part(part).size

    def piece(self, number: int) -> tuple[int, int]:
        """Micro-batch and piece of a task whose experts come in pieces."""
        return divmod(number, self.segment.schedule.num_pages)

    def prompt_rows(self, layer: int, part: int) -> torch.Tensor:
        """Cache rows of a micro-batch in prefill, on the device, [tokens, kv_elements]."""
        tokens, width = self.part(part).tokens, self.attention[layer].kv_elements
        return self.buffers.kv_slots[self._slot(0, layer, part)][: tokens * width].view(tokens, width)

    def device_slot(self, step: int, layer: int, part: int) -> Slot:
        """Queries, new cache rows and attention output, on the device."""
        return self.buffers.device_slots[self._slot(step, layer, part)]

    def host_slot(self, step: int, layer: int, part: int) -> Slot:
        """The same on the host."""
        return self.buffers.host_slots[self._slot(step, layer, part)]

    def device_ffn(self, step: int, layer: int, part: int) -> FfnSlot:
        """States and sums of a micro-batch whose experts are tasks of their own, on the device."""
        return self.buffers.device_ffn[self._slot(step, layer, part)]

    def host_ffn(self, step: int, layer: int, part: int) -> FfnSlot:
        """The same on the host."""
        return self.buffers.host_ffn[self._slot(step, layer, part)]

    def new_rows(self, slot: Slot, layer: int, part: int) -> torch.Tensor:
        """New cache rows in a slot, [n, kv_elements]."""
        attention = self.attention[layer]
        return slot.cached(self.part(part).size, attention.query_size, attention.kv_elements)

    def queries(self, slot: Slot, layer: int, part: int) -> torch.Tensor:
        """Queries in a slot, [n, query_size]."""
        return slot.queries(self.part(part).size, self.attention[layer].query_size)

    def attended(self, slot: Slot, layer: int, part: int) -> torch.Tensor:
        """Attention output in a slot, [n, attended_size]."""
        return slot.output(self.part(part).size, self.attention[layer].attended_size)

    # -- KV cache ----------------------------------------------------------------------------------

    def host_rows(self, layer: int) -> torch.Tensor:
        """The arena of a layer in host memory."""
        return self.buffers.host_cache.rows[layer]

    def device_rows(self, layer: int) -> torch.Tensor:
        """The arena of a layer on the device."""
        return self.buffers.device_cache.rows[layer]

    def travelling(self, part: int) -> list[Request]:
        """Requests of a micro-batch whose KV lies on the host."""
        state = self.part(part)
        return state.requests[state.on_device :]

    def kv_buffer(self, step: int, layer: int, part: int, *, pinned: bool = False) -> torch.Tensor:
        """Where KV of a micro-batch travels to (or is staged), [rows, kv_elements]."""
        buffers = self.buffers.pinned_kv if pinned else self.buffers.kv_buffers
        flat, width = buffers[self._number(step, layer, part) % len(buffers)], self.attention[layer].kv_elements
        return flat[: flat.numel() // width * width].view(-1, width)

    def buffer_starts(self, layer: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First row in a KV buffer of each request whose KV travels, on the host and on the device."""
        window = self.attention[layer].window
        if (part, window) not in self._buffer_starts:
            rooms = [r.room if window is None else min(r.room, window) for r in self.travelling(part)]
            starts = torch.tensor([0, *rooms], dtype=torch.int64).cumsum(0)[:-1]
            self._buffer_starts[part, window] = starts, starts.to(self.device)
        return self._buffer_starts[part, window]


def prompt_spans(state: Part, window: int | None, which: range) -> list[tuple[int, int, int]]:
    """(first row, last row, first row in the arena) of prompt rows to keep, for some requests of a micro-batch.

    With a window the last rows are kept, token t in row t mod window: two runs where they wrap.
    """
    spans = []
    first = sum(state.lengths[: which.start])
    starts = state.starts(window)
    for index in which:
        length, target = state.lengths[index], int(starts[index])
        begin = 0 if window is None else max(0, length - window)
        while begin < length:
            at = begin if window is None else begin % window
            stop = length if window is None else min(length, begin + window - at)
            spans.append((first + begin, first + stop, target + at))
            begin = stop
        first += length
    return spans


def joined(runs: Iterable[tuple[int, int, int]]) -> list[tuple[slice, slice]]:
    """Runs of rows (first row here, first row there, rows) as slices, with runs that adjoin in both places made one.

    Examples
    --------
    >>> joined([(0, 5, 2), (2, 7, 1), (4, 8, 1), (9, 9, 0)])
    [(slice(0, 3, None), slice(5, 8, None)), (slice(4, 5, None), slice(8, 9, None))]
    """
    whole: list[tuple[int, int, int]] = []
    for here, there, count in runs:
        if whole and (here, there) == (whole[-1][0] + whole[-1][2], whole[-1][1] + whole[-1][2]):
            whole[-1] = (*whole[-1][:2], whole[-1][2] + count)
        elif count:
            whole.append((here, there, count))
    return [(slice(here, here + count), slice(there, there + count)) for here, there, count in whole]
