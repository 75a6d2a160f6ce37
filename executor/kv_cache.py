"""The KV cache: one arena of rows per layer, in which every request has a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hrm.model import MoEModel

__all__ = ["KVCache", "Request", "Slabs"]


class Slabs:
    """Runs of rows in an arena, first fit.

    Examples
    --------
    >>> slabs = Slabs(10)
    >>> slabs.take(4), slabs.take(4), slabs.take(4)
    (0, 4, None)
    >>> slabs.give(0, 4); slabs.take(3)
    0
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)]

    def take(self, size: int) -> int | None:
        """First row of a run of `size` rows, or None if there is no such run."""
        for place, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[place : place + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Give a run back."""
        merged: list[tuple[int, int]] = []
        for run in sorted([*self._free, (start, start + size)]):
            if merged and merged[-1][1] == run[0]:
                merged[-1] = (merged[-1][0], run[1])
            elif run[1] > run[0]:
                merged.append(run)
        self._free = merged


@dataclass(eq=False)
class Request:
    """A request while it is answered."""

    index: int
    """Its place among the prompts."""
    prompt: Sequence[int]
    gen_len: int
    """Tokens that it may generate."""
    draws: np.ndarray | None = None
    """A uniform random number for each of them, where tokens are sampled."""
    output: list[int] = field(default_factory=list)
    ended: bool = False
    starts: dict[int | None, int] = field(default_factory=dict)
    """First row of its run, by the window of the layer (None: no window)."""
    on_device: bool = False
    """Where its KV cache lies."""

    @property
    def room(self) -> int:
        """Rows that its KV cache needs at most, without a window."""
        return len(self.prompt) + self.gen_len

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are cached: all but the last that was generated."""
        return len(self.prompt) + len(self.output) - 1

    @property
    def remaining(self) -> int:
        """Tokens that it may still generate."""
        return 0 if self.ended else self.gen_len - len(self.output)


class KVCache:
    """Keys and values of all requests that are being answered, on the host or on the device.

    A layer with a window keeps the last so many tokens, token t in row ``t mod window`` of its run.

    Parameters
    ----------
    model : MoEModel
    batches : sequence of sequence of int
        Rows that each request needs, batch by batch; every batch fits by itself.
    empty : callable
        Makes a tensor of a shape.
    """

    def __init__(
        self, model: MoEModel, batches: Sequence[Sequence[int]], empty: Callable[[tuple[int, int]], torch.Tensor]
    ) -> None:
        self._slabs = {
            window: Slabs(max((sum(_rows(room, window) for room in rooms) for rooms in batches), default=0))
            for window in {layer.attention.window for layer in model.layers}
        }
        self.rows = [
            empty((self._slabs[layer.attention.window].capacity, layer.attention.kv_elements)) for layer in model.layers
        ]
        """One arena per layer, ``[rows, kv_elements]``."""
        self.nbytes = sum(arena.nbytes for arena in self.rows)

    def admit(self, request: Request) -> bool:
        """Give a request its runs; False if there is no room now."""
        starts: dict[int | None, int] = {}
        for window, slabs in self._slabs.items():
            start = slabs.take(_rows(request.room, window))
            if start is None:
                for taken, at in starts.items():
                    self._slabs[taken].give(at, _rows(request.room, taken))
                return False
            starts[window] = start
        request.starts = starts
        return True

    def leave(self, requests: Iterable[Request]) -> None:
        """Take the runs of requests back."""
        for request in requests:
            for window, start in request.starts.items():
                self._slabs[window].give(start, _rows(request.room, window))
            request.starts = {}


def _rows(room: int, window: int | None) -> int:
    return room if window is None else min(room, window)
