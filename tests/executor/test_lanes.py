"""Lanes: order, waiting, pacing, and what happens when a task fails."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from executor import lanes as lanes_module
from executor.lanes import Handler, PacedLink, run_lanes
from executor.machine import OtherLoad, machine_facts
from hrm.errors import InvalidValue
from simulator.schedules import cgopipe
from simulator.task import Lane, Op

CPU = torch.device("cpu")


def test_every_task_runs_once_after_its_dependencies() -> None:
    """Handlers are called once per task, in lane order, when the dependencies have ended."""
    schedule = cgopipe(num_layers=3, num_micro_batches=4, decode_steps=2)
    done: dict[str, float] = {}
    lock = threading.Lock()

    def handler(op: Op):
        def run(step: int, layer: int, part: int, ready: float) -> None:
            with lock:
                done[f"{op.value}({step},{layer},{part})"] = time.perf_counter()

        return run

    start, end = run_lanes(schedule, {op: handler(op) for op in Op}, device=CPU)
    assert set(done) == set(schedule.labels()) and len(done) == len(schedule)
    for task in schedule:
        for dep in task.deps:
            assert start[task.id] >= end[dep]


def test_a_task_with_nothing_to_do_does_not_wait() -> None:
    """It ends before what it would have waited for; the others wait as ever."""
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=2)
    place, gone = (1, 1, 1), threading.Event()

    def attend(step: int, layer: int, part: int, ready: float) -> None:
        assert (step, layer, part) != place or gone.wait(30), "LoadH(1,1,1) waited."

    def load(step: int, layer: int, part: int, ready: float) -> None:
        if (step, layer, part) == place:
            gone.set()

    handlers = {op: (lambda *_: None) for op in Op} | {Op.CPU_ATTN: attend, Op.LOAD_H: load}
    idle = {Op.LOAD_H: lambda *where: where == place}
    start, end = run_lanes(schedule, handlers, device=CPU, idle=idle)
    for task in schedule:
        waited = all(start[task.id] >= end[dep] for dep in task.deps)
        assert waited != (task.op is Op.LOAD_H and (task.step, task.layer, task.part) == place)


def test_a_failing_task_stops_all_lanes() -> None:
    """The first error comes out as itself, and no worker is left behind."""
    schedule = cgopipe(num_layers=4, num_micro_batches=3, decode_steps=2)
    before = threading.active_count()

    def fail(step: int, layer: int, part: int, ready: float) -> None:
        raise RuntimeError(f"no kernel for {layer}")

    handlers = {op: (lambda *_: None) for op in Op} | {Op.CPU_ATTN: fail}
    with pytest.raises(RuntimeError, match="no kernel for 0"):
        run_lanes(schedule, handlers, device=CPU)
    assert threading.active_count() == before


def test_progress_is_reported_per_task() -> None:
    """The callback sees every task's class and step."""
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=1)
    seen: list[tuple[Op, int]] = []
    run_lanes(
        schedule,
        {op: (lambda *_: None) for op in Op},
        device=CPU,
        on_done=lambda op, step, seconds: seen.append((op, step)),
    )
    assert len(seen) == len(schedule)
    assert sorted(step for op, step in seen if op is Op.SAMPLE) == [0, 0, 1, 1]


def test_paced_link_copies_and_is_never_faster_than_its_pace() -> None:
    """Bytes arrive unchanged, and not before their time; waiting transfers keep the pace together."""
    source = torch.randint(0, 255, (3_000_001,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    link = PacedLink(100e6)
    begin = time.perf_counter()
    link.copy(target, source)
    link.copy(target, source, ready=begin)
    spent = time.perf_counter() - begin
    assert torch.equal(source, target)
    assert spent >= 2 * source.numel() / 100e6 - 1e-3


class Clock:
    """Stands for the module `time`: every look takes a microsecond, and every sleep ends late."""

    late = 2e-4

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late


def test_transfers_that_waited_follow_each_other_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that have waited since before the call take their bytes over the pace since then: not less, hardly more."""
    clock, source = Clock(), torch.ones(3_000_000, dtype=torch.uint8)
    monkeypatch.setattr(lanes_module, "time", clock)
    link, ready = PacedLink(100e6), clock.now - 0.02
    for _ in range(2):
        link.copy(torch.empty_like(source), source, ready=ready)
    assert 0 <= clock.now - ready - 2 * 0.03 <= 2 * Clock.late


def test_paced_link_needs_a_pace() -> None:
    """Zero and negative bandwidths are refused."""
    for bad in (0.0, -1.0):
        with pytest.raises(InvalidValue, match="must be > 0"):
            PacedLink(bad)


def test_other_load_and_facts() -> None:
    """The share of others is a share, and the facts name the machine and the versions."""
    with OtherLoad() as load:
        sum(range(10000))
    assert 0 <= load.share <= 1
    assert {"cpu", "cores", "memory_bytes", "torch", "transformers", "python", "date"} <= set(machine_facts())


def test_each_lane_has_its_own_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a task, kernels use the lane's threads, whatever other lanes set."""
    wanted = {Lane.GPU: 3, Lane.CPU: 2, Lane.H2D: 1, Lane.D2H: 1, Lane.PIN: 1}
    monkeypatch.setattr(lanes_module, "lane_threads", lambda **_: wanted)
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=1)
    seen: dict[Op, set[int]] = {op: set() for op in Op}

    def note(op: Op) -> Handler:
        def run(step: int, layer: int, part: int, ready: float) -> None:
            torch.ones(4).sum()
            seen[op].add(torch.get_num_threads())

        return run

    before = torch.get_num_threads()
    try:
        run_lanes(schedule, {op: note(op) for op in Op}, device=CPU)
    finally:
        torch.set_num_threads(before)
    played = {task.op for task in schedule}
    assert {task.op.lane for task in schedule} == set(Lane)
    assert seen == {op: {wanted[op.lane]} if op in played else set() for op in Op}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be kept to cores on this system")
def test_the_device_lane_has_cores_of_its_own() -> None:
    """Without a GPU, half the cores run the GPU lane and nothing else, where there are two or more."""
    cores = lanes_module.lane_cores()
    schedule = cgopipe(num_layers=2, num_micro_batches=2, decode_steps=1)
    seen: dict[Lane, set[int]] = {lane: set() for lane in Lane}

    def note(op: Op) -> Handler:
        return lambda *_: seen[op.lane].update(os.sched_getaffinity(0))

    before = os.sched_getaffinity(0)
    run_lanes(schedule, {op: note(op) for op in Op}, device=CPU)
    assert os.sched_getaffinity(0) == before
    if len(before) < 2:
        assert not any(cores.values())
        return
    assert seen == {lane: set(mine) for lane, mine in cores.items()}
    assert all(not seen[Lane.GPU] & seen[lane] for lane in Lane if lane is not Lane.GPU)
