"""The lanes for real: one worker per lane, on a CUDA stream where the lane belongs to the GPU.

Each worker walks its lane's tasks in schedule order. Before a task it waits for the task's
dependencies: in host memory for work done by host threads, through events for work on streams. A GPU
lane only has to wait until a dependency on another stream has been *issued*; the stream does the rest.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from executor.machine import core_count
from hrm.errors import InvalidValue
from simulator.task import LANES, OPS, Lane, Op, Schedule

__all__ = [
    "DEFAULT_LINK_BANDWIDTH",
    "Failure",
    "Handler",
    "Idle",
    "PacedLink",
    "lane_cores",
    "lane_threads",
    "run_lanes",
    "settle",
]

Handler = Callable[[int, int, int, float], None]
"""Runs a task: (step, layer, part, moment at which its dependencies were met)."""
Idle = Callable[[int, int, int], bool]
"""Whether a task, (step, layer, part), turns out to have nothing to do."""

DEFAULT_LINK_BANDWIDTH = 2e9
"""Bytes/s of the paced link where there is no GPU."""

_WAKE_UP_SLACK_S = 3e-4
_SPIN_S = 1e-4
_COMPUTE_NICENESS = 10
_SWITCH_S = 1e-4
_LAUNCH_CORES, _FEWEST_CORES_TO_PIN = 2, 6
_GPU_LANES = (Lane.GPU, Lane.H2D, Lane.D2H)


def lane_threads(*, cuda: bool = False) -> dict[Lane, int]:
    """Threads that each lane's host kernels may use; without a GPU, half the cores for each compute lane."""
    cores = core_count()
    if cuda:
        # The three stream lanes only launch; staging wants a few cores, attention the rest.
        staging = max(1, cores // 4)
        return {Lane.GPU: 1, Lane.CPU: max(1, cores - staging - 2), Lane.H2D: 1, Lane.D2H: 1, Lane.PIN: staging}
    half = max(1, cores // 2)
    return {Lane.GPU: half, Lane.CPU: half, Lane.H2D: 1, Lane.D2H: 1, Lane.PIN: 1}


def lane_cores(*, cuda: bool = False) -> dict[Lane, list[int]]:
    """Cores of each lane's threads; empty where they are too few to be shared out, or cannot be.

    With a GPU, host kernels and staging copies stay off the cores from which work is launched. Without one, half the
    cores stand for the GPU and compute nothing else, as a GPU would; the host's lanes share the other half.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < (_FEWEST_CORES_TO_PIN if cuda else 2):
        return {lane: [] for lane in LANES}
    first = _LAUNCH_CORES if cuda else len(cores) // 2
    device = _GPU_LANES if cuda else (Lane.GPU,)
    return {lane: cores[:first] if lane in device else cores[first:] for lane in LANES}


def settle(lane: Lane, *, cuda: bool = False) -> None:
    """Put the calling thread where its lane runs; threads that it starts later, those of its kernels, follow it.

    Without a GPU, the threads that copy stand for copy engines, which never wait for a core: the others stand back.
    """
    cores = lane_cores(cuda=cuda)[lane]
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(threading.get_native_id(), cores)
    if not cuda and lane in (Lane.GPU, Lane.CPU, Lane.PIN):
        # Threads that are refused a lower priority (no such call on this system) run as they are.
        with contextlib.suppress(OSError, AttributeError):
            nice = os.getpriority(os.PRIO_PROCESS, 0) + _COMPUTE_NICENESS
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, nice))


class PacedLink:
    """One direction of the link on a machine without a GPU: real copies, no faster than a stated rate.

    The copy goes chunk by chunk and sleeps when it is ahead of the pace. Transfers that wait in line
    follow each other without a gap, as on a copy engine.
    """

    def __init__(self, bandwidth: float | None) -> None:
        if bandwidth is not None and not bandwidth > 0:
            raise InvalidValue(f"link bandwidth must be > 0: {bandwidth}")
        self.bandwidth = bandwidth
        self._free_at = 0.0

    def hold(self) -> None:
        """Nothing travelled until now, whatever was waiting."""
        self._free_at = max(self._free_at, time.perf_counter())

    def copy(self, target: torch.Tensor, source: torch.Tensor, ready: float = 0.0) -> None:
        """Copy between contiguous tensors of one shape.

        Parameters
        ----------
        ready : float
            `time.perf_counter` moment since which the transfer has been waiting.
        """
        if self.bandwidth is None:
            target.copy_(source)
            return
        # About a millisecond of link time: long enough for sleep, short enough to be smooth.
        chunk = max(65536, int(self.bandwidth * 1e-3)) // source.element_size()
        self.copy_pieces(zip(target.view(-1).split(chunk), source.view(-1).split(chunk), strict=True), ready)

    def copy_pieces(self, pieces: Iterable[tuple[torch.Tensor, torch.Tensor]], ready: float = 0.0) -> None:
        """Copy (target, source) after (target, source) as one transfer; otherwise as `copy`."""
        if self.bandwidth is None:
            for target, source in pieces:
                target.copy_(source)
            return
        due = max(self._free_at, ready) if ready else time.perf_counter()
        for target, source in pieces:
            target.copy_(source)
            due += source.nbytes / self.bandwidth
            ahead = due - time.perf_counter()
            if ahead > _SPIN_S:
                time.sleep(ahead)
        while time.perf_counter() < due:  # shorter than a sleep can be
            pass
        # A late wake-up is not the link's time; a copy that could not keep the pace is.
        now = time.perf_counter()
        self._free_at = due if now - due < _WAKE_UP_SLACK_S else now


@lru_cache(maxsize=8)
def _streams(device: torch.device) -> dict[Lane, Any]:
    """One stream per GPU lane for the whole process: the allocator keeps freed memory per stream."""
    return {lane: torch.cuda.Stream(device) for lane in _GPU_LANES}


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Let a lane that comes out of a kernel have the interpreter soon: by default it may wait for milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Failure:
    """The first error of any worker; the others stop at their next task."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._lock = threading.Lock()

    def set(self, error: BaseException) -> None:
        """Keep an error, unless there is one."""
        with self._lock:
            self.error = self.error or error


def run_lanes(
    schedule: Schedule,
    handlers: Mapping[Op, Handler],
    *,
    device: torch.device,
    idle: Mapping[Op, Idle] | None = None,
    on_done: Callable[[Op, int, float], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run every task of a schedule on its lane.

    Parameters
    ----------
    schedule : Schedule
    handlers : mapping
        What each class of task does.
    device : torch.device
        ``cuda``: GPU lanes are streams. ``cpu``: every lane is a host thread.
    idle : mapping, optional
        Asked, where there is one for a class, once the lane's tasks before have been issued. Its handler is called all
        the same, but a task with nothing to do waits for none of its dependencies.
    on_done : callable, optional
        Called with (class, step, seconds) from the worker after each task, for progress bars; on CUDA streams the
        seconds are those of the launch.

    Returns
    -------
    start, end : ndarray
        Seconds since the first task could start.

    Raises
    ------
    Exception
        The first exception of any task, after all lanes have stopped.
    """
    schedule.order()  # raises before anything runs if it cannot progress
    n = len(schedule)
    cuda = device.type == "cuda"
    lanes = schedule.lane.tolist()
    first, deps = schedule.dep_start.tolist(), schedule.deps.tolist()
    ops, steps = schedule.op.tolist(), schedule.step.tolist()
    layers, parts = schedule.layer.tolist(), schedule.part.tolist()
    owner = np.repeat(np.arange(n), np.diff(schedule.dep_start))
    crossing = np.unique(schedule.deps[schedule.lane[schedule.deps] != schedule.lane[owner]])
    signal: dict[int, threading.Event] = {int(i): threading.Event() for i in crossing}
    start, end = [0.0] * n, [0.0] * n
    marks: list[tuple[Any, Any] | None] = [None] * n
    failure = Failure()
    threads_of = lane_threads(cuda=cuda)
    gate = threading.Barrier(sum(1 for lane in LANES if len(schedule.lane_tasks(lane))) + 1)
    streams = _streams(device) if cuda else {}
    origin: Any = None

    def needed(task: int) -> list[int]:
        ask = idle.get(OPS[ops[task]]) if idle else None
        nothing = ask is not None and ask(steps[task], layers[task], parts[task])
        return [] if nothing else deps[first[task] : first[task + 1]]

    def host_task(task: int, handler: Handler) -> None:
        ready = 0.0
        for dep in needed(task):
            if dep in signal and lanes[dep] != lanes[task]:
                signal[dep].wait()
                mark = marks[dep]
                if mark is not None:
                    mark[1].synchronize()
            ready = max(ready, end[dep])
        if failure.error is not None:
            return
        start[task] = time.perf_counter()
        handler(steps[task], layers[task], parts[task], ready)
        end[task] = time.perf_counter()

    def stream_task(task: int, handler: Handler, stream: Any) -> None:
        for dep in needed(task):
            if dep in signal and lanes[dep] != lanes[task]:
                signal[dep].wait()
                mark = marks[dep]
                if mark is not None:
                    stream.wait_event(mark[1])
        if failure.error is not None:
            return
        begin = torch.cuda.Event(enable_timing=True)
        # Host threads that wait for it sleep: the cores belong to attention and staging.
        stop = torch.cuda.Event(enable_timing=True, blocking=True)
        begin.record(stream)
        handler(steps[task], layers[task], parts[task], 0.0)
        stop.record(stream)
        marks[task] = (begin, stop)

    def release() -> None:
        """After a failure, let nobody wait for what will not come."""
        if failure.error is not None:
            for event in signal.values():
                event.set()

    def work(lane: Lane) -> None:
        try:
            if cuda:
                torch.cuda.set_device(device)
            settle(lane, cuda=cuda)
            # The first torch call of a thread takes over the count that any thread set last; after the
            # gate every lane has made it, and each one's own count holds.
            torch.get_num_threads()
            stream = streams.get(lane)
            with torch.inference_mode(), torch.cuda.stream(stream):
                gate.wait()
                torch.set_num_threads(threads_of[lane])
                for task in schedule.lane_tasks(lane).tolist():
                    handler = handlers[OPS[ops[task]]]
                    begun = time.perf_counter()
                    if stream is None:
                        host_task(task, handler)
                    else:
                        stream_task(task, handler, stream)
                    if failure.error is not None:
                        break
                    if task in signal:
                        signal[task].set()
                    if on_done:
                        on_done(OPS[ops[task]], steps[task], time.perf_counter() - (start[task] or begun))
        except BaseException as error:
            failure.set(error)
            gate.abort()
        finally:
            release()  # before anything that an error on the device could hold up
            if streams.get(lane) is not None:
                try:
                    streams[lane].synchronize()  # nothing may still use buffers that the caller drops
                except BaseException as error:
                    failure.set(error)
            release()

    workers = [
        threading.Thread(target=work, args=(lane,), name=f"lane-{lane.value}", daemon=True)
        for lane in LANES
        if len(schedule.lane_tasks(lane))
    ]
    zero = 0.0
    with _short_turns():
        try:
            for worker in workers:
                worker.start()
            if cuda:
                torch.cuda.synchronize(device)
                origin = torch.cuda.Event(enable_timing=True)
                origin.record()
                origin.synchronize()
            zero = time.perf_counter()
            gate.wait()
            for worker in workers:
                worker.join()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # Ctrl-C: stop the lanes before leaving
            failure.set(error)
            gate.abort()
            for event in signal.values():
                event.set()
        for worker in workers:
            if worker.is_alive():
                worker.join()
    if failure.error is not None:
        raise failure.error
    begin_s, end_s = np.array(start) - zero, np.array(end) - zero
    for task, mark in enumerate(marks):
        if mark is not None:
            begin_s[task] = origin.elapsed_time(mark[0]) / 1e3
            end_s[task] = origin.elapsed_time(mark[1]) / 1e3
    return begin_s, end_s
