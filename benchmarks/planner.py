"""How fast the planner is: the authors' problem, every catalog pair, and sweeps up to 10,000 plans.

    python benchmarks/planner.py [--sweep 10000] [--out FILE.json]

Prints a table and writes one JSON object with machine, versions and command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pulp
import scipy

from experiments.records import commit
from hrm import Hardware, HrmError, MoEModel, Workload, plan, plan_grid
from hrm.catalog import names
from hrm.paper import paper_problem
from hrm.solvers import solve_grid, solve_milp

_WORKLOADS = ("mtbench", "helm-synthetic-reasoning", "helm-summarization")


def paper_search(repeats: int = 9) -> dict[str, Any]:
    """The authors' problem: all 262,144 points, setting up included, in this process; and as a MILP."""
    model, machine = MoEModel.from_catalog("mixtral-8x7b"), Hardware.from_catalog("gcp-l4-1x")
    workload, rates = Workload.parse("77,32"), machine.rates("paper")
    seconds: dict[str, list[float]] = {"grid": [], "milp": []}
    best = {}
    for _ in range(repeats):
        for name, solve in (("grid", solve_grid), ("milp", solve_milp)):
            started = time.perf_counter()
            problem = paper_problem(model, machine, rates, workload)
            found = solve([problem])
            seconds[name].append(time.perf_counter() - started)
            assert found is not None
            best[name] = 1 / found.seconds_per_token
    points = int(np.prod(problem.shape))
    return {
        "points": points,
        "tok_s": best,
        "median_s": {name: statistics.median(values) for name, values in seconds.items()},
    }


def catalog_pairs() -> dict[str, Any]:
    """The full default search for every model on every machine, once each."""
    workload = Workload.parse("mtbench").with_options(gen_len=64)
    times, infeasible = {}, 0
    for model_name, machine_name in itertools.product(names("models"), names("hardware")):
        model, machine = MoEModel.from_catalog(model_name), Hardware.from_catalog(machine_name)
        started = time.perf_counter()
        try:
            plan(model, machine, workload)
        except HrmError:
            infeasible += 1
            continue
        times[f"{model_name} on {machine_name}"] = time.perf_counter() - started
    slowest = max(times, key=lambda pair: times[pair])
    return {
        "pairs": len(times),
        "infeasible": infeasible,
        "median_s": statistics.median(times.values()),
        "slowest_s": times[slowest],
        "slowest": slowest,
    }


def sweep(count: int, jobs: int) -> dict[str, Any]:
    """`count` plans: catalog models on catalog machines, for workloads of growing lengths."""
    models = [name for name in names("models") if name not in ("mixtral-tiny", "mixtral-demo")]
    machines = names("hardware")
    pairs = len(models) * len(machines)
    loads = [Workload.uniform(64 + 16 * i, 32 + 8 * i) for i in range(-(-count // pairs))]
    # Whole rows of the grid as far as they go, so that every size of sweep has the same mix of pairs.
    if count < pairs:
        machines, loads = machines[: max(1, round(count / len(models)))], loads[:1]
    started = time.perf_counter()
    frame = plan_grid(models, machines, loads, n_jobs=jobs)
    seconds = time.perf_counter() - started
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "plans": len(frame),
        "feasible": int(frame["error"].isna().sum()),
        "jobs": jobs,
        "seconds": seconds,
        "seconds_per_plan": seconds / len(frame),
        # Peaks of the processes so far; workers are kept from sweep to sweep.
        "peak_rss_mib": {"caller": own, "workers": _children_peaks_mib()},
    }


def _children_peaks_mib() -> list[float]:
    """Peak resident memory of the worker processes, which are still there."""
    peaks = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            facts = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if int(facts["PPid"]) == os.getpid() and "VmHWM" in facts:
            peaks.append(int(facts["VmHWM"].split()[0]) / 1024)
    return sorted(peaks, reverse=True)


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=int, default=10_000, help="plans of the largest sweep")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu(), "python": platform.python_version()},
        "commit": commit(),
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__, "pulp": pulp.__version__},
    }
    result["paper"] = paper_search()
    print(f"authors' problem, {result['paper']['points']:,} points: {result['paper']['median_s']} s", flush=True)
    result["catalog"] = catalog_pairs()
    print(f"default search: {result['catalog']}", flush=True)
    result["sweeps"] = []
    for count in (options.sweep // 100, options.sweep // 10, options.sweep):
        result["sweeps"].append(sweep(count, options.jobs))
        print(f"sweep: {result['sweeps'][-1]}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
