"""Predicted against measured on this machine: probe, plan, simulate and run a set of cases.

Predictions come from probe constants alone, never from runs. Kernels and copies are timed again right before and
after each case (what lanes cost each other is measured once, at the start), because shared machines change speed from
minute to minute; cases of one setting, whose systems are ranked, are predicted for one machine, that of all probes
around them. A case during which others took the processor, or after which the probe finds another machine than before,
is run again.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.kept_runs import KeptRuns
from experiments.output import make_folder
from experiments.records import Records, commit, say
from experiments.validation_cases import QUICK, Case, validation_cases
from experiments.validation_report import judged, render, roofs, write
from experiments.validation_runs import Runs
from hrm import Hardware, MoEModel, Plan, Workload, plan
from hrm.catalog import model_config
from hrm.errors import HrmError, InvalidValue
from simulator import Timeline
from simulator.gantt import gantt_pair

__all__ = ["render", "run_validation"]

_DEMO_MODEL = "mixtral-demo"
_DEMO_DEVICE_MEMORY = 288 * 2**20
# A quick validation tries no case again after this long, to end within three minutes.
_RETRY_QUICK_S = 75.0
# While others use the processor, a case waits this often for a pause before it is predicted.
_PATIENCE, _PATIENCE_QUICK = 6, 1


def run_validation(
    *,
    checkpoint: Path | None = None,
    quick: bool = False,
    device: str | None = None,
    device_memory: int | None = None,
    link_bandwidth: float | None = 2e9,
    out: Path | None = None,
    rounds: int = 1,
    as_json: bool = False,
) -> dict[str, Any]:
    """Probe, plan, predict, run and compare.

    Parameters
    ----------
    checkpoint : Path, optional
        A checkpoint folder; by default a small random-weight Mixtral is made under `out`.
    quick : bool
        Three cases instead of all.
    device, device_memory, link_bandwidth
        As for `executor.generate`; the planned case obeys them, other cases state their own link.
    out : Path, optional
        Folder for tables, timelines, traces and pictures; "out" by default. A validation that was killed goes on
        there after the last run that had ended, with the same version of the code.
    rounds : int
        How often every case runs, in turn with the others of its setting; the run of median throughput counts.
    as_json : bool
        Keep stdout free for the caller.

    Returns
    -------
    dict
        ``cases``, ``mean_abs_error``, ``worst_abs_error``, ``machine``, ``plan``, ``files``.
    """
    from executor.checkpoint import Checkpoint
    from executor.machine import pick_device
    from executor.probe import Prober

    if rounds < 1:
        raise InvalidValue(f"'rounds' must be >= 1: {rounds}")
    started, version = time.monotonic(), commit()
    target = pick_device(device)
    # Nothing is made for a call that is refused.
    opened = None if checkpoint is None else Checkpoint.open(checkpoint)
    out = out or Path("out")
    make_folder(out)
    if checkpoint is None:
        checkpoint = _demo_checkpoint(out, say)
        device_memory = device_memory or _DEMO_DEVICE_MEMORY
    opened = opened or Checkpoint.open(checkpoint)
    pace = None if target.type == "cuda" else link_bandwidth
    say("probing this machine")
    prober = Prober(opened.model, device=target, progress=lambda text: say(f"  {text}"))
    machine = prober.hardware()
    machine.save(out / "machine.json")
    chosen = _plan(opened.model, machine, device_memory, pace)
    say(str(chosen))
    lens = chosen.workload.prompt_lens
    cases = list(validation_cases(chosen.policy, chosen.workload.gen_len, lens, pace, target.type == "cuda"))
    if quick:
        cases = [case for case in cases if case.name in QUICK]
    partial = out / "cases.partial.jsonl"
    own = {"rounds": str(rounds), "commit": str(version)}
    kept = Records(partial, _conditions(checkpoint, device_memory, pace, machine) | own)
    kept_runs = KeptRuns(kept, out / "runs.partial")
    patience = _PATIENCE_QUICK if quick else _PATIENCE
    deadline = started + _RETRY_QUICK_S if quick else math.inf
    # Of several rounds every one has probes around it.
    passes = (2, 1) if rounds == 1 else (1, 1)
    runs = Runs(opened, prober, target, device_memory, say, patience, deadline, passes=passes)
    rows, number = [], 0
    for _, group in itertools.groupby(cases, key=lambda case: case.setting):
        waiting = []
        for case in group:
            number += 1
            done = kept.find(case=_key(case))
            say(f"case {number}/{len(cases)}: {case.name} " + ("was finished before" if done else f"({case.policy})"))
            if done:
                rows.append(done["row"])
            else:
                waiting.append(case)
        for run, row, prediction in runs.predict(runs.measure_in_turn(waiting, rounds, kept_runs)):
            kept.add(case=_key(run.case), row=row)
            rows.append(row)
            if run.case.name == "planned":
                _save_timelines(run.case, prediction.timeline, run.timeline, out)
    result = {
        "cases": rows,
        **judged(rows),
        "machine": {**machine.facts, "roofline": roofs(machine)},
        "plan": chosen.to_dict(),
        "command": "hrm " + shlex.join(sys.argv[1:]),
        "commit": version,
        "files": sorted(str(p) for p in out.glob("*.*") if p.suffix in (".json", ".png", ".csv")),
    }
    write(result, out)
    partial.unlink(missing_ok=True)
    kept_runs.forget()
    return result


def _conditions(checkpoint: Path, device_memory: int | None, pace: float | None, machine: Hardware) -> dict[str, str]:
    """What two runs must share for the cases of one to count in the other."""
    facts = ("cpu", "gpu", "cores", "python", "torch", "transformers")
    given = {"checkpoint": checkpoint.resolve(), "device_memory": device_memory, "link": pace}
    return {key: str(value) for key, value in (given | {k: machine.facts.get(k) for k in facts}).items()}


def _demo_checkpoint(out: Path, say: Callable[[str], None]) -> Path:
    from executor.checkpoint import Checkpoint, make_checkpoint

    path = out / f"checkpoint-{_DEMO_MODEL}"
    try:
        Checkpoint.open(path)
    except HrmError:
        if path.exists():
            raise
        say(f"making a random-weight checkpoint of {_DEMO_MODEL} in {path}")
        make_checkpoint(model_config(_DEMO_MODEL), path)
    return path


def _plan(model: MoEModel, machine: Hardware, device_memory: int | None, pace: float | None) -> Plan:
    """What the planner would do with 96 waiting requests of 24 to 40 tokens."""
    lens = tuple(24 + (7 * i) % 17 for i in range(17))
    workload = Workload(
        name="96 requests",
        prompt_avg=sum(lens) / len(lens),
        prompt_max=max(lens),
        prompt_lens=lens,
        gen_len=16,
    )
    here = machine.with_capacity(gpu_bytes=device_memory).with_link(pace)
    return plan(model, here, workload, num_requests=96, attention_on_gpu=False, ffn_on_gpu=True)


def _key(case: Case) -> str:
    """What a finished case is found by; the planner's choice moves with the probe, so that its name stands for it."""
    return case.name if case.name == "planned" else case.key


def _save_timelines(case: Case, predicted: Timeline, measured: Timeline, out: Path) -> None:
    import matplotlib.pyplot as plt

    for name, timeline in (("predicted", predicted), ("measured", measured)):
        timeline.save(out / f"{name}.json")
        timeline.save_trace(out / f"{name}.trace.json")
    figure = gantt_pair(predicted, measured, title=f"CGOPipe, one schedule played and run: {case.policy}")
    figure.savefig(out / "gantt.png", dpi=130)
    plt.close(figure)
