"""What lanes cost each other: calls of several lanes, timed when all run at once."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from executor.lanes import Failure, lane_threads, run_lanes, settle
from hrm.hardware import Curve
from simulator.schedules import cgopipe
from simulator.task import Lane, Op

if TYPE_CHECKING:
    from executor.bench import Bench

__all__ = ["Contention", "Crowd", "crowd_of", "together"]

_COPY_SHARE = 0.4
_ROWS = 4
"""Tokens per expert of the kernel that stands for the GPU lane's."""

Call = Callable[[], Any]
Point = tuple[float, float]


class Crowd(NamedTuple):
    """What lanes cost each other."""

    task_s: float
    """Seconds from the end of a task to the start of one that waits for it on another lane."""
    cores: Curve
    """Work done at once by lanes that share cores, in lanes' worth, by lanes' worth wanted."""
    memory_traffic: float
    """Bytes/s of host memory that lanes attain together, read and written."""
    processors: Curve | None
    """As `cores`, by the GPU lane on cores of its own and the host's lanes; None where it is not so."""


class Contention:
    """Times the calls of a `Bench` beside each other."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._cuda, self._apart = bench, bench.cuda, bench.apart
        self._experts, self._top_k = bench.experts, bench.model.top_k

    def hand_over(self) -> float:
        """Seconds between the end of a task and the start of one that waits for it on another lane."""
        schedule = cgopipe(num_layers=8, num_micro_batches=1, decode_steps=8, stream_weights=False)
        begin, _ = run_lanes(schedule, {op: (lambda *_: None) for op in Op}, device=torch.device("cpu"))
        early = schedule.step < 2
        pre = begin[schedule.mask(Op.PRE_ATTN) & ~early]
        post = begin[schedule.mask(Op.POST_ATTN) & ~early]
        return statistics.median((post - pre).tolist()) / 4  # PreAttn to PostAttn is four hand-overs

    def shared_cores(self) -> list[Point]:
        """(Lanes' worth of work wanted, done) where lanes share cores: attention beside two copies, paced and not.

        Where the GPU lane has no cores of its own, its kernels are beside them too.
        """
        attention = {Lane.CPU: self._bench.attention_call(16, 128)}
        if not self._apart:
            attention[Lane.GPU] = self._kernel()
        copy_alone = self._copy_alone()
        alone = [self._together({lane: call}, 0.3)[0] for lane, call in attention.items()]
        alone += [copy_alone, copy_alone]
        points = []
        for share in (_COPY_SHARE, 1.0):
            copies = self._bench.two_copies(share * copy_alone * self._bench.piece_bytes if share < 1 else None)
            points.append((len(attention) + 2 * share, _done(self._together(attention | copies, 0.6), alone)))
        return points

    def processors(self) -> list[Point]:
        """The same of the GPU lane and of the host's: an expert kernel beside one copy, and beside two.

        Cores of one machine share its memory, its caches and its power, so that each does less beside the other.
        """
        if not self._apart:
            return []
        kernel, copies = {Lane.GPU: self._kernel()}, self._bench.two_copies(None)
        # Alone before and after: a machine whose speed drifts would otherwise pass for one that slows down.
        before, copy_alone = self._together(kernel, 0.3)[0], self._copy_alone()
        one = self._together(kernel | {Lane.H2D: copies[Lane.H2D]}, 0.5)
        two = self._together(kernel | copies, 0.5)
        alone = [(before + self._together(kernel, 0.3)[0]) / 2, copy_alone, copy_alone]
        return [(2.0, min(2.0, _done(one, alone))), (3.0, min(2.0, _done(two, alone)))]

    def memory_traffic(self) -> float:
        """Bytes/s of host memory, read and written, when a pipeline's lanes use it at once.

        Without a GPU: an expert kernel that reads its weights for few tokens beside two copies. With one: two copies.
        """
        bench = self._bench
        copies, moved = bench.two_copies(None), 2 * bench.piece_bytes
        if self._cuda:
            return moved * sum(self._together(copies, 0.5))
        tokens = max(1, 2 * self._experts // self._top_k)
        active = self._experts * (1 - (1 - self._top_k / self._experts) ** tokens)
        kernel, *copied = self._together({Lane.GPU: bench.expert_call(tokens), **copies}, 0.5)
        return kernel * active * bench.model.expert_bytes + moved * sum(copied)

    def _kernel(self) -> Call:
        return self._bench.expert_call(max(1, _ROWS * self._experts // self._top_k))

    def _copy_alone(self) -> float:
        return self._together({Lane.H2D: self._bench.two_copies(None)[Lane.H2D]}, 0.2)[0]

    def _together(self, calls: dict[Lane, Call], seconds: float) -> list[float]:
        return together(calls, seconds, cuda=self._cuda)


def crowd_of(task_s: float, cores: list[list[Point]], traffic: list[float], processors: list[list[Point]]) -> Crowd:
    """Medians of what was measured several times."""
    both = _curve(processors) if all(processors) else None
    return Crowd(max(0.0, task_s), _curve(cores), statistics.median(traffic), both)


def _curve(taken: list[list[Point]]) -> Curve:
    points = [(1.0, 1.0)]
    for several in zip(*taken, strict=True):
        points.append((several[0][0], statistics.median(done for _, done in several)))
    return Curve(tuple(points))


def _done(rates: list[float], alone: list[float]) -> float:
    return sum(rate / single for rate, single in zip(rates, alone, strict=False))


def together(calls: dict[Lane, Call], seconds: float, *, cuda: bool) -> list[float]:
    """Calls per second of each when all run at once for so many seconds, every one as its lane would run it.

    Raises
    ------
    Exception
        The first exception of any call, after all have stopped.
    """
    counts, spent = [0] * len(calls), [1.0] * len(calls)
    threads = lane_threads(cuda=cuda)
    stop = threading.Event()
    gate = threading.Barrier(len(calls) + 1)

    failure = Failure()

    def loop(index: int, lane: Lane, call: Call) -> None:
        settle(lane, cuda=cuda)
        with torch.inference_mode():
            call()
            gate.wait()  # as in `run_lanes`: every thread has called torch before any sets its count
            torch.set_num_threads(threads[lane])
            begin = time.perf_counter()
            while not stop.is_set():
                call()
                counts[index] += 1
            spent[index] = time.perf_counter() - begin

    def work(index: int, lane: Lane, call: Call) -> None:
        try:
            loop(index, lane, call)
        except BaseException as error:
            failure.set(error)
            gate.abort()
            stop.set()

    workers = [threading.Thread(target=work, args=(i, *item)) for i, item in enumerate(calls.items())]
    for worker in workers:
        worker.start()
    try:
        gate.wait()
        stop.wait(seconds)
    except threading.BrokenBarrierError:
        pass
    except BaseException as error:  # Ctrl-C: stop the calls before leaving
        failure.set(error)
        gate.abort()
    stop.set()
    for worker in workers:
        worker.join()
    if failure.error is not None:
        raise failure.error
    return [count / each for count, each in zip(counts, spent, strict=True)]
