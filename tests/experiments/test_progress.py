"""The bar of a job: its tokens, and the lane that holds it up."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from experiments import progress as module
from experiments.progress import JobProgress
from simulator.task import LANES, Lane, Op

_OPS = {op.lane: op for op in Op if op is not Op.SAMPLE}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a bar sees."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def make(gen_lens: list[int], *, timed: bool = True, **policy: int) -> tuple[JobProgress, Any]:
    """A progress on a bar that draws into memory."""
    bar = tqdm(total=sum(gen_lens), file=io.StringIO(), mininterval=0)
    sizes = {"batch_size": 4, "num_micro_batches": 2} | policy
    return JobProgress(bar, gen_lens, timed=timed, **sizes), bar


def test_the_bottleneck_is_the_busiest_lane_since_the_last_look(clock: list[float]) -> None:
    """What was busy long ago does not count."""
    job, bar = make([8] * 4)
    job.done(_OPS[Lane.PIN], 0, 50.0)
    assert not bar.postfix
    clock[0] = 1.0
    job.done(_OPS[Lane.GPU], 0, 3.0)
    assert bar.postfix == "bottleneck: staging copy"
    clock[0] = 2.5
    job.done(_OPS[Lane.H2D], 0, 4.0)
    assert bar.postfix == "bottleneck: link"
    clock[0] = 2.9
    job.done(_OPS[Lane.CPU], 0, 9.0)
    assert bar.postfix == "bottleneck: link"


def test_launches_are_not_taken_for_work(clock: list[float]) -> None:
    """On streams, tasks report how long they took to launch; the lanes' shares come with the end of a segment."""
    job, bar = make([8] * 4, timed=False)
    clock[0] = 5.0
    job.done(_OPS[Lane.GPU], 0, 3.0)
    assert not bar.postfix
    job.segment({lane.value: 0.9 if lane is Lane.H2D else 0.2 for lane in LANES})
    assert bar.postfix == "bottleneck: link"


def test_tokens_are_estimated_then_counted(clock: list[float]) -> None:
    """Each sampling task counts for the mean of its micro-batch; what is counted corrects it; early ends shrink it."""
    job, bar = make([6] * 6)
    for _ in range(4):  # two steps of two micro-batches
        job.done(Op.SAMPLE, 1, 0.0)
    assert bar.n == 8
    job.tokens(7)
    assert bar.n == 8, "never back"
    job.answered([(0, 3), (1, 6)])
    assert bar.total == 33
    job.tokens(9)
    assert bar.n == 9
    for _ in range(100):
        job.done(Op.SAMPLE, 1, 0.0)
    assert bar.n == bar.total == 33, "never past the end"


def test_lanes_may_report_at_once() -> None:
    """Every second of every lane is counted, whichever thread looks."""
    job, bar = make([10**6])

    def work(lane: Lane) -> None:
        for _ in range(5000):
            job.done(_OPS[lane], 1, 1.0)
            if lane is Lane.GPU:
                job.done(Op.SAMPLE, 1, 0.0)

    job._looked_at = -1e9  # somebody looks at once
    threads = [threading.Thread(target=work, args=(lane,)) for lane in LANES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert job._busy == dict.fromkeys(LANES, 5000.0)
    assert bar.n == 5000


def test_a_run_moves_its_bar_to_the_end(
    hrm: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole run the bar ends where the tokens do, and shows tokens, tokens per second and a bottleneck."""
    pytest.importorskip("torch")
    folder: Path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    assert hrm("make-checkpoint", "--model", "mixtral-tiny", "--out", folder).code == 0
    drawn, bars = io.StringIO(), []

    def shown(total: float, what: str, unit: str, **options: Any) -> Any:
        bars.append(tqdm(total=total, desc=what, unit=unit, file=drawn, mininterval=0, **options))
        return bars[-1]

    monkeypatch.setattr("experiments.jobs.progress_bar", shown)
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    done = hrm(
        "run", "--checkpoint", folder, "--random-prompts", "9,6", "--gen-len", 7, "--batch-size", 4,
        "--micro-batch-size", 2, "--device", "cpu", "--link-bandwidth", "none", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    tokens = json.loads(done.out)["generated_tokens"]
    assert bars[0].n == bars[0].total == tokens
    last = drawn.getvalue().split("\r")[-1]
    assert f"run: {tokens}/{tokens} tokens" in last and "tokens/s, bottleneck: " in last
