"""What a schedule is run on: the requests of each micro-batch, where their rows lie, and which tokens they have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from executor.kv_cache import Request
from hrm.pipeline import BatchShape
from simulator.task import Schedule

__all__ = ["Part", "Segment"]


class Part:
    """The requests of one micro-batch while a segment runs; those whose KV lies on the device come first."""

    def __init__(self, requests: Sequence[Request], *, prefill: bool) -> None:
        self.requests = sorted(requests, key=lambda request: not request.on_device)
        self.size = len(self.requests)
        self.on_device = sum(request.on_device for request in self.requests)
        self.lengths = [len(request.prompt) for request in self.requests]
        self.tokens = sum(self.lengths)
        # In a segment that begins with prefill, decoding goes on from the prompt.
        cached = self.lengths if prefill else [request.cached for request in self.requests]
        self._cached = torch.tensor(cached, dtype=torch.int64)
        self._last_row = torch.tensor([request.room - 1 for request in self.requests], dtype=torch.int64)
        self._starts: dict[int | None, torch.Tensor] = {}
        self._views: dict[tuple[int, int | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def on(self, device: torch.device) -> Part:
        """The same with all numbers on a device, whose lane need not wait for copies then; itself on a CPU."""
        if device.type == "cpu":
            return self
        twin = copy.copy(self)
        twin._cached, twin._last_row = self._cached.to(device), self._last_row.to(device)
        twin._starts = {window: self.starts(window).to(device) for window in self._windows()}
        twin._views = {}
        return twin

    def _windows(self) -> set[int | None]:
        return {window for request in self.requests for window in request.starts}

    def positions(self, decoded: int) -> torch.Tensor:
        """Position of the token that each request feeds in after `decoded` tokens of this segment, [n].

        A request that has ended stays at its last place until the segment is over.
        """
        return torch.minimum(self._cached + decoded, self._last_row)

    def starts(self, window: int | None) -> torch.Tensor:
        """First row of each request's run, [n]."""
        if window not in self._starts:
            self._starts[window] = torch.tensor([r.starts[window] for r in self.requests], dtype=torch.int64)
        return self._starts[window]

    def rows(self, decoded: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the new token goes in its run, how many rows attention then sees, and how many were there before.

        Returns
        -------
        slot, visible, past : Tensor, [n]
        """
        key = (decoded, window)
        found = self._views.get(key)
        if found is None:
            position = self.positions(decoded)
            if window is None:
                found = position, position + 1, position
            else:
                found = position % window, (position + 1).clamp(max=window), position.clamp(max=window)
            # Layers share these; those of steps before the last are not asked for again. Lanes come here at once.
            for old in list(self._views):
                if old[0] < decoded - 1:
                    self._views.pop(old, None)
            self._views[key] = found
        return found

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Tokens in each request's cache at the beginning (of prefill: to be), longest first; one for nobody."""
        lengths = tuple(sorted((int(n) for n in self._cached), reverse=True))
        return lengths or (1,)


@dataclass(frozen=True)
class Segment:
    """A schedule and the requests that it works on."""

    schedule: Schedule
    parts: list[Part]
    prefill: bool
    steps: int
    """Tokens that every request gets: decode steps, and one from prefill."""

    @property
    def shape(self) -> BatchShape:
        """What the simulator would be told."""
        return BatchShape(tuple(part.shape for part in self.parts), max(1, self.schedule.num_steps))
