"""The stream of weight pages that every offloading schedule shares.

Layer visits are numbered over the whole run (prefill first); visit v reads buffer slot v mod 2. While
visit v computes, the pages of visit v+1 travel, one between two micro-batches.
"""

from __future__ import annotations

from hrm.pipeline import LOOKAHEAD, PINNED_PAGES
from simulator.task import Op, ScheduleBuilder

__all__ = ["WeightStream"]


class WeightStream:
    """Issues W_CtoPin and W_PinToG in page order and knows what must wait for which page.

    Parameters
    ----------
    num_layers, pages : int
        Layers of the model, and pages in which a layer's streamed weights travel (0: all resident).
    first_step, num_visits : int
        Step of visit 0, and number of layer visits in the schedule.
    lookahead, ring : int
        Pages that staging runs ahead of the link, and pages of the pinned ring.
    staged : bool
        False where weights lie in pinned memory, so that nothing has to be copied there first.
    """

    def __init__(
        self, builder: ScheduleBuilder, *, num_layers: int, pages: int, first_step: int, num_visits: int,
        lookahead: int = LOOKAHEAD, ring: int = PINNED_PAGES, staged: bool = True,
    ) -> None:  # fmt: skip
        self._builder = builder
        self._num_layers = num_layers
        self.pages = pages
        self._first_step = first_step
        self._total = num_visits * pages
        self._lookahead, self._ring, self._stages = lookahead, ring, staged
        self._staged: list[int] = []
        self._loaded: list[int] = []
        self._last_reader: dict[int, int] = {}

    def _place(self, index: int) -> tuple[int, int, int]:
        visit, page = divmod(index, self.pages)
        step, layer = divmod(visit, self._num_layers)
        return self._first_step + step, layer, page

    def prologue(self) -> None:
        """Bring the pages of visit 0 and stage the first pages of visit 1."""
        for index in range(self.pages):
            self._stage_until(index + self._lookahead)
            self._load(index)

    def load_next(self, visit: int, part: int) -> None:
        """Issue the page that travels beside micro-batch `part` of `visit`: a page of the next visit."""
        if part < self.pages:
            self._load((visit + 1) * self.pages + part)

    def stage_next(self, visit: int, part: int) -> None:
        """Stage the page that will travel `lookahead` micro-batches later."""
        if part < self.pages:
            self._stage_until((visit + 1) * self.pages + part + self._lookahead)

    def _stage_until(self, index: int) -> None:
        while self._stages and len(self._staged) <= min(index, self._total - 1):
            page = len(self._staged)
            # A slot of the pinned ring is free once the page that lay in it has travelled.
            deps = [self._loaded[page - self._ring]] if page >= self._ring else []
            self._staged.append(self._builder.add(Op.STAGE_W, *self._place(page), deps))

    def _load(self, index: int) -> None:
        if index >= self._total:
            return
        self._stage_until(index)
        deps = [self._staged[index]] if self._stages else []
        visit = index // self.pages
        if visit - 2 in self._last_reader:
            deps.append(self._last_reader[visit - 2])
        self._loaded.append(self._builder.add(Op.LOAD_W, *self._place(index), deps))

    def needed_by(self, visit: int) -> list[int]:
        """The pages that the first reader of `visit` waits for; the last one stands for all."""
        return [self._loaded[(visit + 1) * self.pages - 1]] if self.pages else []

    def read_by(self, visit: int, task: int) -> None:
        """Record `task` as the (so far) last reader of `visit`'s weights."""
        self._last_reader[visit] = task
        self._last_reader.pop(visit - 3, None)
