"""How fast the simulator is: its two engines, whole runs of two published settings, and SimPy beside it.

    python benchmarks/simulator.py [--quick] [--out FILE.json]

All times are medians of rounds in which everything that is measured takes its turn. Prints a table and writes one
JSON object with machine, versions and command.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
# Python puts this file's folder first, where its own name hides the package that is measured.
sys.path[0] = str(_ROOT)

import numba  # noqa: E402
import numpy as np  # noqa: E402
import simpy  # noqa: E402

from experiments.records import commit  # noqa: E402
from hrm import BatchShape, Hardware, MoEModel, Policy  # noqa: E402
from simulator.costs import Costing  # noqa: E402
from simulator.engine import Program, play, play_segments, warm_up  # noqa: E402
from simulator.loop import find_loop  # noqa: E402
from simulator.schedules import schedule_builder  # noqa: E402
from simulator.simulate import Prediction, simulate  # noqa: E402
from simulator.task import Op  # noqa: E402
from tests.simulator.simpy_oracle import simpy_play  # noqa: E402

_SIMULATE = importlib.import_module("simulator.simulate")
_MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")
_L4 = Hardware.from_catalog("gcp-l4-1x").rates("paper")
_S2 = Policy(batch_size=1560, micro_batch_size=132)
_PROMPT, _GEN = 77, 256


def compile_seconds() -> dict[str, float]:
    """Seconds to compile the inner loops on a machine that never did, and to load them on one that has."""
    script = "import time; from simulator.engine import warm_up; t = time.perf_counter(); warm_up(); "
    script += "print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        run = [
            float(
                subprocess.run(
                    [sys.executable, "-c", script],
                    cwd=_ROOT,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for _ in range(2)
        ]
    return {"first_s": run[0], "later_s": run[1]}


def _fresh(run: Callable[[], Prediction]) -> Callable[[], Prediction]:
    """As in a new process: no schedule remembered from the last time."""

    def forgetful() -> Prediction:
        _SIMULATE._loops.clear()
        return run()

    return forgetful


def engines() -> dict[str, tuple[Callable[[], Any], int]]:
    """Both engines on the whole S2 schedule, every step with the same costs; what to call, and tasks."""
    batch = BatchShape.uniform(_S2.batch_size, _S2.micro_batch_size, _PROMPT, _GEN)
    build = schedule_builder(_MIXTRAL.num_layers, _S2, num_micro_batches=batch.num_micro_batches)
    loop = find_loop(build, _GEN - 1)
    assert loop is not None
    program, sequence = Program(loop.segments, loop.sample.mask(Op.SAMPLE)), loop.sequence(_GEN - 1)
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, contention in (("recurrence", False), ("shared", True)):
        costing = Costing(loop.sample, _MIXTRAL, _L4, batch, weights_on_gpu=0.0, contention=contention)
        costs = [costing.at(item.first, item.stop) for item in loop.segments]

        def run(costs: Any = costs) -> None:
            play_segments(program, sequence, lambda r: costs[sequence[r]])

        calls[f"engine, {name}"] = (run, loop.num_tasks(_GEN - 1))
    return calls


def whole_runs() -> dict[str, Callable[[], Prediction]]:
    """Whole predictions, from nothing: S2, and the largest run of FlexGen that MoE-Lightning reports."""
    batch = BatchShape.uniform(_S2.batch_size, _S2.micro_batch_size, _PROMPT, _GEN)
    model, rates = MoEModel.from_catalog("mixtral-8x22b"), Hardware.from_catalog("gcp-t4-2x").rates("paper")
    policy = Policy(batch_size=522, micro_batch_size=2, attention_on_gpu=True)
    large = BatchShape.uniform(522, 2, 418, _GEN)
    return {
        "S2, exact, recurrence": _fresh(lambda: simulate(_MIXTRAL, _L4, _S2, batch, exact=True, contention=False)),
        "S2, exact, shared": _fresh(lambda: simulate(_MIXTRAL, _L4, _S2, batch, exact=True)),
        "S2, sampled": _fresh(lambda: simulate(_MIXTRAL, _L4, _S2, batch)),
        "FlexGen, 8x22B on two T4s, sampled": _fresh(
            lambda: simulate(model, rates, policy, large, system="flexgen", num_gpus=2)
        ),
    }


def decode_step() -> tuple[dict[str, Callable[[], Any]], int]:
    """One decode step of Mixtral 8x7B, 32 layers x 16 micro-batches, at the middle of the run; and its tasks."""
    policy = Policy(batch_size=16 * 97, micro_batch_size=97)
    batch = BatchShape.uniform(policy.batch_size, policy.micro_batch_size, _PROMPT, _GEN)
    family = schedule_builder(_MIXTRAL.num_layers, policy)
    schedule = family(1, prefill=False, first_step=_GEN // 2)

    def cost(contention: bool) -> Any:
        return Costing(schedule, _MIXTRAL, _L4, batch, weights_on_gpu=0.0, contention=contention).at()

    alone, shared = cost(False), cost(True)
    calls: dict[str, Callable[[], Any]] = {
        "build the schedule": lambda: family(1, prefill=False, first_step=_GEN // 2),
        "costs": lambda: cost(True),
        "play, recurrence": lambda: play(schedule, alone),
        "play, shared": lambda: play(schedule, shared),
        "costs and play, shared": lambda: play(schedule, cost(True)),
    }
    return calls, len(schedule)


def simpy_pair() -> tuple[dict[str, Callable[[], Any]], int]:
    """One decode pass of S2 by the engine, without sharing, and by SimPy; and its tasks."""
    batch = BatchShape.uniform(_S2.batch_size, _S2.micro_batch_size, _PROMPT, _GEN)
    family = schedule_builder(_MIXTRAL.num_layers, _S2, num_micro_batches=batch.num_micro_batches)
    schedule = family(1, prefill=False, first_step=_GEN // 2)
    costs = Costing(schedule, _MIXTRAL, _L4, batch, weights_on_gpu=0.0, contention=False).at()
    (_, mine), (_, other) = play(schedule, costs), simpy_play(schedule, costs.seconds)
    assert np.allclose(mine, other, rtol=1e-9, atol=0)
    return {
        "engine": lambda: play(schedule, costs),
        "simpy": lambda: simpy_play(schedule, costs.seconds),
    }, len(schedule)


def timed(calls: dict[str, Callable[[], Any]], rounds: int, least: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each call, in turn; short ones are repeated until they add up to `least` seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        repeats[name] = max(1, round(least / (time.perf_counter() - started)))
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - started) / repeats[name])
    return seconds


def memory(gen_lens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Peak of what Python and NumPy allocate in an exact run of S2, by its length."""
    rows = []
    for gen_len in gen_lens:
        batch = BatchShape.uniform(_S2.batch_size, _S2.micro_batch_size, _PROMPT, gen_len)
        _SIMULATE._loops.clear()
        tracemalloc.start()
        found = simulate(_MIXTRAL, _L4, _S2, batch, exact=True)
        rows.append(
            {
                "gen_len": gen_len,
                "num_tasks": found.num_tasks,
                "peak_mib": tracemalloc.get_traced_memory()[1] / 2**20,
            }
        )
        tracemalloc.stop()
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of everything, shorter runs for memory")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds = 1 if options.quick else 9
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu(), "python": platform.python_version()},
        "commit": commit(),
        "versions": {"numpy": np.__version__, "numba": numba.__version__, "simpy": simpy.__version__},
        "rounds": rounds,
    }
    result["compile"] = compile_seconds()
    print(f"compiling: {result['compile']}", flush=True)
    warm_up()

    calls = engines()
    times = timed({name: run for name, (run, _) in calls.items()}, rounds)
    result["engines"] = {
        name: {"num_tasks": tasks, "tasks_per_s": tasks / statistics.median(times[name]), **_spread(times[name])}
        for name, (_, tasks) in calls.items()
    }
    _table(result["engines"])

    runs = whole_runs()
    answers = {name: run() for name, run in runs.items()}
    times = timed({name: run for name, run in runs.items() if "8x22B" not in name}, rounds)
    times |= timed({name: run for name, run in runs.items() if "8x22B" in name}, min(rounds, 5))
    result["runs"] = {
        name: {
            "num_tasks": found.num_tasks,
            "played_tasks": found.played_tasks,
            "tasks_per_s": found.played_tasks / statistics.median(times[name]),
            "throughput_tok_s": found.throughput_tok_s,
            "sampling_error": found.sampling_error,
            **_spread(times[name]),
        }
        for name, found in answers.items()
    }
    _table(result["runs"])

    steps, tasks = decode_step()
    result["decode_step"] = {"num_tasks": tasks}
    result["decode_step"] |= {name: _spread(values) for name, values in timed(steps, rounds, 0.02).items()}
    _table(result["decode_step"])

    pair, tasks = simpy_pair()
    times = timed(pair, rounds, 0.02)
    ratios = [other / mine for mine, other in zip(times["engine"], times["simpy"], strict=True)]
    result["simpy"] = {"num_tasks": tasks, "times_faster": statistics.median(ratios)}
    result["simpy"] |= {name: _spread(values) for name, values in times.items()}
    _table(result["simpy"])

    result["memory"] = memory((32, 64) if options.quick else (32, 128, 512, 2048))
    for row in result["memory"]:
        print(row, flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _table(rows: dict[str, Any]) -> None:
    for name, row in rows.items():
        if not isinstance(row, dict):
            print(f"{name:40} {row:,.6g}")
            continue
        rate = f"{row['tasks_per_s'] / 1e6:8.2f} M tasks/s" if "tasks_per_s" in row else ""
        print(f"{name:40} {row['median_s'] * 1e3:10.3f} ms{rate}", flush=True)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
