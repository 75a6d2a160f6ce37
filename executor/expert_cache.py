"""Expert buffering: experts of all MoE layers in slots on the device, brought there when a micro-batch misses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from executor.kernels import ExpertWeights, add_runs
from executor.memory import DeviceMemory
from executor.weight_layout import LayerWeights
from hrm.layers import FeedForward
from hrm.model import MoEModel
from hrm.pipeline import FFN_CHUNK_ROWS, PIECES_IN_FLIGHT, expert_pieces
from simulator.experts.cache import Access, ExpertCache

__all__ = ["CacheCounts", "DeviceExperts", "Visit"]


@dataclass
class CacheCounts:
    """What a cache was asked for, over all layers."""

    accesses: int = 0
    """Active experts, micro-batch by micro-batch."""
    misses: int = 0
    bytes: int = 0
    """Copied to the device."""

    def since(self, before: CacheCounts) -> CacheCounts:
        """What has been added to an earlier count."""
        return CacheCounts(self.accesses - before.accesses, self.misses - before.misses, self.bytes - before.bytes)

    def to_dict(self) -> dict[str, Any]:
        """With hits and the miss rate."""
        rate = self.misses / self.accesses if self.accesses else None
        return {
            "accesses": self.accesses,
            "hits": self.accesses - self.misses,
            "misses": self.misses,
            "miss_rate": rate,
            "bytes": self.bytes,
        }


@dataclass
class Visit:
    """The experts of one micro-batch in one layer."""

    pieces: list[list[Access]]
    """First the experts that are there, then those that are missing; in increasing id."""
    starts: list[int]
    """[E + 1]: where each expert's tokens begin among the choices, sorted by expert."""
    slots: list[dict[int, int]]
    """Expert to slot, of the pieces that have come."""
    order: torch.Tensor | None = None
    """[n * k]: choices sorted by expert, on the device."""

    def chunks(self, piece: int) -> Iterator[list[tuple[int, int, int]]]:
        """Slots of a piece that has come and their tokens, (slot, start, stop) in `order`, so many at a time."""
        runs: list[tuple[int, int, int]] = []
        rows = 0
        for expert, slot in self.slots[piece].items():
            for start in range(self.starts[expert], self.starts[expert + 1], FFN_CHUNK_ROWS):
                stop = min(start + FFN_CHUNK_ROWS, self.starts[expert + 1])
                if rows + stop - start > FFN_CHUNK_ROWS:
                    yield runs
                    runs, rows = [], 0
                runs.append((slot, start, stop))
                rows += stop - start
        if runs:
            yield runs


class DeviceExperts:
    """K slots per MoE layer, and room for the pieces that are on their way or in use.

    Which experts lie in the slots is up to a policy of `simulator.experts.cache`, one cache per layer, asked in the
    order in which micro-batches come; so a run misses exactly what a replay of its routing trace misses.

    Parameters
    ----------
    model : MoEModel
        Shapes of this process' part.
    memory : DeviceMemory
    dtype : torch.dtype
    slots : int
        K.
    policy : str
        One of `simulator.experts.cache.CACHE_POLICIES` that needs no future.
    host : sequence of Tensor
        The experts of every layer in host memory, flat.
    """

    def __init__(
        self,
        model: MoEModel,
        memory: DeviceMemory,
        dtype: torch.dtype,
        *,
        slots: int,
        policy: str,
        host: Sequence[torch.Tensor],
    ) -> None:
        routed = {number: layer.ffn for number, layer in enumerate(model.layers) if layer.ffn.routed}
        self._ffn: FeedForward = next(iter(routed.values()))
        size, count = self._ffn.expert_parameters, self._ffn.num_experts
        self._expert_bytes = size * dtype.itemsize
        self.num_pieces, most = expert_pieces(count)
        kept, spare = min(slots, count) * len(routed), PIECES_IN_FLIGHT * most
        # Two allocations under the names that the footprint has; slots are views of one or the other.
        resident = memory.empty("resident_experts", (kept, size), dtype)
        moving = memory.empty("weight_buffers", (spare, size), dtype)
        self._slots: list[torch.Tensor] = [*resident, *moving]
        self._views = [*self._as_experts(resident), *self._as_experts(moving)]
        self._host = {number: host[number].view(count, size) for number in routed}
        self.policy, self.slots, self.counts = policy, slots, CacheCounts()
        self._empty()

    def _empty(self) -> None:
        """Forget what lies in the slots."""
        count = self._ffn.num_experts
        self._free = deque(range(len(self._slots)))
        self._leaving: deque[list[int]] = deque([[] for _ in range(PIECES_IN_FLIGHT)])
        self._caches = {number: ExpertCache(self.policy, self.slots, count) for number in self._host}
        self._where: dict[int, dict[int, int]] = {number: {} for number in self._host}
        self._visits: dict[tuple[int, int, int], Visit] = {}
        # Of the lane that brings experts, which may still be at it when the last piece has been computed.
        self._coming: tuple[tuple[int, int, int], Visit] | None = None

    def _as_experts(self, pool: torch.Tensor) -> list[ExpertWeights]:
        layout = LayerWeights(replace(self._ffn, num_experts=len(pool), top_k=1, routing=None), (), 0)
        views = layout.experts(None, pool.view(-1))
        return [view for view in views if view is not None]

    def begin(self) -> None:
        """Start a segment; what lies in the slots stays, unless the one before stopped half-way."""
        if self._visits:
            self._empty()

    def visit(self, step: int, layer: int, part: int, index: torch.Tensor) -> None:
        """Look up the choices of a micro-batch, [n, k] on the host, and cut its active experts into pieces.

        The cache is asked for them in increasing id, whatever the order in which they are computed.
        """
        counts = torch.bincount(index.reshape(-1), minlength=self._ffn.num_experts)
        active = counts.nonzero().flatten().tolist()
        found = self._caches[layer].batch(active)
        misses = sum(not access.hit for access in found)
        self.counts.accesses += len(found)
        self.counts.misses += misses
        self.counts.bytes += misses * self._expert_bytes
        missing = [access for access in found if not access.hit]
        rest = self.num_pieces - 1
        cuts = [min(i, misses) if misses < rest else misses * i // rest for i in range(rest + 1)]
        pieces = [[access for access in found if access.hit], *(missing[a:b] for a, b in pairwise(cuts))]
        starts = [0, *counts.cumsum(0).tolist()]
        visit = self._visits[step, layer, part] = Visit(pieces, starts, [])
        self._coming = (step, layer, part), visit

    def nothing_comes(self, step: int, layer: int, part: int, piece: int) -> bool:
        """Whether a piece after the first lacks nothing; for the lane that calls `visit` and `bring`."""
        return piece > 0 and not self._brought(step, layer, part).pieces[piece]

    def nothing_to_compute(self, step: int, layer: int, part: int, piece: int) -> bool:
        """The same for the lane that calls `compute`."""
        return piece > 0 and not self._visits[step, layer, part].pieces[piece]

    def _brought(self, step: int, layer: int, part: int) -> Visit:
        assert self._coming is not None and self._coming[0] == (step, layer, part)
        return self._coming[1]

    def bring(
        self, step: int, layer: int, part: int, piece: int, copy: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> int:
        """Copy what a piece lacks into free slots, in increasing id; bytes copied.

        Called in the order of the schedule, once the piece two before has been computed, or earlier if nothing comes.
        """
        # Nobody reads any more what left the cache two pieces ago, once something comes into it.
        self._free.extend(self._leaving.popleft())
        leaving: list[int] = []
        self._leaving.append(leaving)
        visit, where = self._brought(step, layer, part), self._where[layer]
        moved = 0
        if piece == 0:
            # Taken down now: later pieces may put some of these experts out.
            visit.slots.append({access.expert: where[access.expert] for access in visit.pieces[0]})
            return moved
        mine: dict[int, int] = {}
        for access in visit.pieces[piece]:
            if access.evicted is not None:
                leaving.append(where.pop(access.evicted))
            slot = where[access.expert] = mine[access.expert] = self._free.popleft()
            copy(self._slots[slot], self._host[layer][access.expert])
            moved += self._expert_bytes
        visit.slots.append(mine)
        return moved

    def compute(
        self,
        step: int,
        layer: int,
        part: int,
        piece: int,
        routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        total: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Add to `total`, [n, H], what the experts of a piece make of states [n, H], choices and weights [n, k]."""
        x, index, weight = routed
        visit = self._visits[step, layer, part]
        if piece == 0:
            total.zero_()
            visit.order = index.reshape(-1).argsort(stable=True)
        assert visit.order is not None
        for chunk in visit.chunks(piece) if visit.pieces[piece] else ():
            runs = [(self._views[slot], start, stop) for slot, start, stop in chunk]
            add_runs(total, x, visit.order, weight, runs, activation)
        if piece == self.num_pieces - 1:
            visit.order = None  # the other lane may hold the visit for a while
            del self._visits[step, layer, part]
