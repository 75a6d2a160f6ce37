"""How far a job is: tokens, tokens per second, and which lane holds it up."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from simulator.task import LANES, Lane, Op

__all__ = ["JobProgress"]

_LOOK_S = 1.0
"""Seconds between two looks at the lanes."""
_NAMES = {
    Lane.GPU: "GPU",
    Lane.CPU: "CPU",
    Lane.H2D: "link",
    Lane.D2H: "link to host",
    Lane.PIN: "staging copy",
}


class JobProgress:
    """Moves a bar forward; its methods are the callbacks of `executor.generate.generate`.

    Between two segments the tokens are counted. While one runs they are estimated: tasks do not say how many requests
    their micro-batch has, so each that samples counts for the mean.

    Parameters
    ----------
    bar : tqdm
        Its total is the tokens that the requests may generate.
    gen_lens : sequence of int
        Tokens that each request may generate.
    batch_size, num_micro_batches : int
        N and G of the policy.
    timed : bool
        Whether the seconds of tasks are those of their work, and not of its launch on a stream. If not, busy lanes
        are known only when a segment has ended.
    """

    def __init__(
        self, bar: Any, gen_lens: Sequence[int], *, batch_size: int, num_micro_batches: int, timed: bool
    ) -> None:
        self._bar, self._gen_lens, self._timed = bar, gen_lens, timed
        self._left = len(gen_lens)
        self._batch_size = batch_size
        self._parts = min(num_micro_batches, len(gen_lens))
        self._tokens = 0.0
        # One number per lane, written by the lane's own thread alone.
        self._busy = dict.fromkeys(LANES, 0.0)
        self._seen = dict(self._busy)
        self._looked_at = time.monotonic()
        self._lock = threading.Lock()

    def done(self, op: Op, step: int, seconds: float) -> None:
        """A task has ended; called by the lanes' threads."""
        self._busy[op.lane] += seconds
        if op is Op.SAMPLE:
            with self._lock:
                self._move(self._tokens + min(self._batch_size, self._left) / self._parts)
        if self._timed and time.monotonic() - self._looked_at >= _LOOK_S:
            self._look()

    def answered(self, outputs: Sequence[tuple[int, int]]) -> None:
        """Requests have ended: (place among the prompts, tokens) of each."""
        with self._lock:
            self._left -= len(outputs)
            # What they might have generated and did not will not come.
            self._bar.total -= sum(self._gen_lens[index] - tokens for index, tokens in outputs)

    def tokens(self, count: int) -> None:
        """A segment has ended, with so many tokens so far."""
        with self._lock:
            self._tokens = count
            self._move(count)

    def segment(self, utilization: Mapping[str, float]) -> None:
        """A segment has ended, in which the lanes were busy for these shares."""
        if not self._timed:
            with self._lock:
                self._name(Lane(max(utilization, key=lambda lane: utilization[lane])))

    def _look(self) -> None:
        """Name the lane that was busiest since the last look."""
        if not self._lock.acquire(blocking=False):
            return  # another lane's thread is looking
        try:
            now = dict(self._busy)
            spent = {lane: now[lane] - self._seen[lane] for lane in LANES}
            self._seen, self._looked_at = now, time.monotonic()
            if any(spent.values()):
                self._name(max(spent, key=lambda lane: spent[lane]))
        finally:
            self._lock.release()

    def _name(self, lane: Lane) -> None:
        self._bar.set_postfix_str(f"bottleneck: {_NAMES[lane]}")

    def _move(self, tokens: float) -> None:
        """Forward only, and not past the end; an estimate may have been too high."""
        self._tokens = min(tokens, self._bar.total)
        ahead = self._tokens - self._bar.n
        if ahead > 0:
            self._bar.update(ahead)
