"""Predicted against measured on this machine: probe, plan, simulate and run a set of cases.

Every prediction is made before its run, from probe constants alone. The probe is repeated right before
each case, because shared machines change speed from minute to minute; a case during which others took
the processor, or after which the probe finds another machine than before, is run again.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hrm import BatchShape, Hardware, MoEModel, Plan, Policy, Workload, micro_batches, plan
from hrm.catalog import model_config
from hrm.errors import HrmError
from hrm.memory import batch_footprint
from hrm.units import format_bandwidth, format_bytes, format_flops, format_seconds
from simulator import Prediction, Timeline, simulate
from simulator.gantt import gantt_pair

__all__ = ["Case", "render", "run_validation"]

_DEMO_MODEL = "mixtral-demo"
_DEMO_DEVICE_MEMORY = 288 * 2**20
_MOST_TRIES = 3
_QUIET_SHARE = 0.05
_QUIET_DRIFT = 0.10
# While others use the processor, a case waits this often for a pause before it is predicted.
_PATIENCE, _PATIENCE_QUICK, _PAUSE_S = 6, 1, 5.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run to predict and measure."""

    name: str
    batch_size: int
    micro_batch_size: int
    weights_on_gpu: float
    prompt_lens: tuple[int, ...]
    """One length for all, or lengths that repeat."""
    gen_len: int
    link_bandwidth: float | None
    """Bytes/s of the paced link; None for none."""

    @property
    def policy(self) -> Policy:
        """The policy to run."""
        return Policy(
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            weights_on_gpu=self.weights_on_gpu,
        )

    def lengths(self) -> list[int]:
        """Prompt length of each request."""
        return [self.prompt_lens[i % len(self.prompt_lens)] for i in range(self.batch_size)]

    def shape(self) -> BatchShape:
        """The batch as Algorithm 2 forms it."""
        lengths = self.lengths()
        groups, _ = micro_batches(
            lengths,
            num_micro_batches=self.policy.num_micro_batches,
            micro_batch_size=self.micro_batch_size,
        )
        return BatchShape(tuple(tuple(lengths[i] for i in group) for group in groups), self.gen_len)


def _cases(planned: Policy, gen_len: int, lens: tuple[int, ...], pace: float | None, cuda: bool) -> Iterator[Case]:
    """The planned case, then a spread over batch, micro-batch, residency, lengths and link pace."""
    yield Case(
        name="planned",
        batch_size=planned.batch_size,
        micro_batch_size=planned.micro_batch_size,
        weights_on_gpu=planned.weights_on_gpu,
        prompt_lens=lens,
        gen_len=gen_len,
        link_bandwidth=pace,
    )
    mixed = (8, 96, 24, 40, 16, 64, 32, 120)
    table: list[tuple[str, int, int, float, tuple[int, ...], int, float | None]] = [
        # name, N, mu, r_w, prompt lengths, gen_len, link
        ("slow link", 32, 16, 0.0, (32,), 8, 0.5e9),
        ("streaming", 64, 16, 0.0, (32,), 12, 2e9),
        ("balanced", 64, 16, 0.0, (32,), 12, 1e9),
        ("small micro-batches", 32, 8, 0.0, (32,), 12, 2e9),
        ("half resident", 64, 16, 0.5, (32,), 12, 2e9),
        ("all resident", 64, 32, 1.0, (32,), 12, 2e9),
        ("one micro-batch", 16, 16, 0.5, (64,), 12, 2e9),
        ("two micro-batches", 64, 32, 0.25, (16,), 12, 1e9),
        ("long prompts", 32, 16, 0.5, (128,), 8, 2e9),
        ("few sequences", 24, 4, 0.0, (16,), 8, 1e9),
        ("no pacing", 64, 16, 0.0, (32,), 12, None),
        ("slow, mostly resident", 48, 16, 0.75, (32,), 12, 0.5e9),
        ("uneven prompts", 48, 16, 0.25, mixed, 12, 2e9),
    ]
    for name, n, mu, share, lengths, gen, link in table:
        yield Case(
            name=name,
            batch_size=n,
            micro_batch_size=mu,
            weights_on_gpu=share,
            prompt_lens=lengths,
            gen_len=gen,
            link_bandwidth=None if cuda else link,
        )


_QUICK = ("planned", "slow link", "streaming")


def run_validation(
    *,
    checkpoint: Path | None = None,
    quick: bool = False,
    device: str | None = None,
    device_memory: int | None = None,
    link_bandwidth: float | None = 2e9,
    out: Path | None = None,
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
        Folder for tables, timelines, traces and pictures; "out" by default. A run that was killed goes on
        there after the last case that it had finished.
    as_json : bool
        Keep stdout free for the caller.

    Returns
    -------
    dict
        ``cases``, ``mean_abs_error``, ``worst_abs_error``, ``machine``, ``plan``, ``files``.
    """
    from executor.checkpoint import Checkpoint
    from executor.generate import pick_device
    from executor.probe import Prober

    out = out or Path("out")
    out.mkdir(parents=True, exist_ok=True)
    say = _say
    target = pick_device(device)
    if checkpoint is None:
        checkpoint = _demo_checkpoint(out, say)
        device_memory = device_memory or _DEMO_DEVICE_MEMORY
    opened = Checkpoint.open(checkpoint)
    pace = None if target.type == "cuda" else link_bandwidth
    say("probing this machine")
    prober = Prober(opened.model, device=target, progress=lambda text: say(f"  {text}"))
    machine = prober.hardware()
    machine.save(out / "machine.json")
    chosen = _plan(opened.model, machine, device_memory, pace)
    say(str(chosen))
    lens = chosen.workload.prompt_lens
    cases = list(_cases(chosen.policy, chosen.workload.gen_len, lens, pace, target.type == "cuda"))
    if quick:
        cases = [case for case in cases if case.name in _QUICK]
    kept = _Kept(out / "cases.partial.jsonl", {"checkpoint": str(checkpoint), "device": str(target)})
    patience = _PATIENCE_QUICK if quick else _PATIENCE
    rows = []
    for number, case in enumerate(cases, start=1):
        row = kept.find(case)
        if row is None:
            say(f"case {number}/{len(cases)}: {case.name} ({case.policy})")
            row = _validate(case, opened, prober, target, device_memory, out, say, patience)
            kept.add(case, row)
        else:
            say(f"case {number}/{len(cases)}: {case.name} was finished before")
        rows.append(row)
    errors = [abs(row["error"]) for row in rows]
    result = {
        "cases": rows,
        "mean_abs_error": statistics.fmean(errors),
        "worst_abs_error": max(errors),
        "machine": {**machine.facts, "roofline": _roofs(machine)},
        "plan": chosen.to_dict(),
        "command": "hrm " + shlex.join(sys.argv[1:]),
        "files": sorted(str(p) for p in out.glob("*.*") if p.suffix in (".json", ".png", ".csv")),
    }
    _write(result, out)
    kept.finish()
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    return plan(model, here, workload, max_batch_size=96)


def _validate(
    case: Case,
    checkpoint: Any,
    prober: Any,
    device: Any,
    device_memory: int | None,
    out: Path,
    say: Callable[[str], None],
    patience: int,
) -> dict[str, Any]:
    """Predict and run a case, again if it was disturbed; the least disturbed try counts."""
    best: tuple[float, dict[str, Any], Prediction, Timeline] | None = None
    for attempt in range(1, (_MOST_TRIES if patience > _PATIENCE_QUICK else 2) + 1):
        row, prediction, measured = _try(case, checkpoint, prober, device, device_memory, patience)
        disturbance = max(row["cpu_taken_by_others"] / _QUIET_SHARE, row["drift"] / _QUIET_DRIFT)
        row |= {"attempts": attempt, "disturbed": disturbance > 1}
        say(
            f"  predicted {row['predicted_tok_s']:.1f}, measured {row['measured_tok_s']:.1f} tok/s "
            f"({row['error']:+.1%}); others took {row['cpu_taken_by_others']:.0%} of the CPU, "
            f"speed drifted {row['drift']:.0%}" + (", disturbed" if disturbance > 1 else "")
        )
        if best is None or disturbance < best[0]:
            best = (disturbance, row, prediction, measured)
        if disturbance <= 1:
            break
    assert best is not None
    _, row, prediction, measured = best
    row["attempts"] = attempt
    if case.name == "planned":
        _save_timelines(case, prediction.timeline, measured, out)
    return row


def _try(
    case: Case, checkpoint: Any, prober: Any, device: Any, device_memory: int | None, patience: int
) -> tuple[dict[str, Any], Prediction, Timeline]:
    from executor.generate import generate
    from executor.machine import OtherLoad

    waited = 0
    while True:
        with OtherLoad() as before_load:
            machine = prober.refresh()
        if before_load.share <= _QUIET_SHARE or waited >= patience:
            break
        time.sleep(_PAUSE_S)
        waited += 1
    before = prober.last_passes
    shape = case.shape()
    rates = machine.rates().with_link(case.link_bandwidth)
    prediction = simulate(checkpoint.model, rates, case.policy, shape, exact=True)
    memory = batch_footprint(checkpoint.model, shape, case.weights_on_gpu)
    budget = device_memory if case.name == "planned" and device_memory else math.ceil(memory.gpu_bytes)
    lengths = case.lengths()
    vocabulary = checkpoint.model.vocab_size
    prompts = [[(7919 * (i + 1) * (j + 3)) % vocabulary for j in range(n)] for i, n in enumerate(lengths)]
    with OtherLoad() as load:
        result = generate(
            checkpoint,
            prompts,
            gen_len=case.gen_len,
            policy=case.policy,
            device=device.type,
            device_memory=budget if device.type == "cpu" else device_memory,
            link_bandwidth=case.link_bandwidth,
        )
    with OtherLoad() as after_load:
        prober.refresh(passes=1)
    measured = result.timelines[0]
    op, seconds = _worst_class(prediction.timeline, measured)
    row = asdict(case) | {
        "num_micro_batches": case.policy.num_micro_batches,
        "prompt_lens": list(case.prompt_lens),
        "predicted_tok_s": prediction.throughput_tok_s,
        "measured_tok_s": result.throughput_tok_s,
        "error": prediction.throughput_tok_s / result.throughput_tok_s - 1,
        "predicted_prefill_s": prediction.prefill_s,
        "measured_prefill_s": result.prefill_s,
        "predicted_decode_s": prediction.decode_s,
        "measured_decode_s": result.decode_s,
        "predicted_utilization": prediction.timeline.decode_utilization(),
        "measured_utilization": measured.decode_utilization(),
        "most_off": op,
        "most_off_s": seconds,
        "device_budget_bytes": budget,
        "peak_memory": result.peak_memory,
        "cpu_taken_by_others": max(before_load.share, load.share, after_load.share),
        "drift": _drift(before, prober.last_passes),
    }
    return row, prediction, measured


def _drift(before: list[dict[Any, float]], after: list[dict[Any, float]]) -> float:
    """How far the machine's speed moved: mean relative change of the long calls of the probe."""
    changes = []
    for key in before[0]:
        if key[0] in ("experts", "gemm", "staging", "attention"):
            old = statistics.median(single[key] for single in before)
            new = statistics.median(single[key] for single in after)
            changes.append(math.log(new / old))
    return abs(math.expm1(statistics.median(changes)))


def _worst_class(predicted: Timeline, measured: Timeline) -> tuple[str, float]:
    """The task class whose total time differs most, and by how many seconds (measured minus predicted)."""
    difference = measured.by_op()["seconds"] - predicted.by_op()["seconds"]
    phase, op = difference.abs().idxmax()
    return f"{phase} {op}", float(difference[phase, op])


def _save_timelines(case: Case, predicted: Timeline, measured: Timeline, out: Path) -> None:
    import matplotlib.pyplot as plt

    for name, timeline in (("predicted", predicted), ("measured", measured)):
        timeline.save(out / f"{name}.json")
        timeline.save_trace(out / f"{name}.trace.json")
    figure = gantt_pair(predicted, measured, title=f"CGOPipe, one schedule played and run: {case.policy}")
    figure.savefig(out / "gantt.png", dpi=130)
    plt.close(figure)


class _Kept:
    """Cases that a killed run had finished, one JSON line each."""

    def __init__(self, path: Path, header: Mapping[str, str]) -> None:
        self._path, self._header = path, dict(header)
        self._rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that the kill cut short
                if entry["header"] == self._header:
                    self._rows[entry["case"]] = entry["row"]

    @staticmethod
    def _key(case: Case) -> str:
        # The planner's choice moves with the probe; the finished planned case stands for it.
        return case.name if case.name == "planned" else json.dumps(asdict(case))

    def find(self, case: Case) -> dict[str, Any] | None:
        return self._rows.get(self._key(case))

    def add(self, case: Case, row: dict[str, Any]) -> None:
        with self._path.open("a") as stream:
            stream.write(json.dumps({"header": self._header, "case": self._key(case), "row": row}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        self._path.unlink(missing_ok=True)


def _roofs(machine: Hardware) -> dict[str, float]:
    rates = machine.rates("measured")
    return {
        "device_gemm_flops": rates.gpu_gemm.peak,
        "device_expert_flops": rates.gpu_experts.peak,
        "device_read_bytes_per_s": float(machine.gpu.bandwidth),
        "cpu_attention_bytes_per_s": rates.cpu_attention.peak,
        "copy_bytes_per_s": rates.h2d_bandwidth,
        "staging_bytes_per_s": rates.staging_bandwidth,
        "task_hand_over_s": rates.task_s,
        "lanes_at_once": rates.cores.points[-1][1] if rates.cores else 0.0,
    }


def _write(result: dict[str, Any], out: Path) -> None:
    import matplotlib.pyplot as plt
    import pandas as pd

    (out / "validation.json").write_text(json.dumps(result, indent=1) + "\n")
    flat = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in result["cases"]]
    pd.DataFrame(flat).to_csv(out / "cases.csv", index=False)
    figure, ax = plt.subplots(figsize=(5, 4.6), layout="constrained")
    measured = [row["measured_tok_s"] for row in result["cases"]]
    predicted = [row["predicted_tok_s"] for row in result["cases"]]
    top = 1.1 * max(measured + predicted)
    ax.plot([0, top], [0, top], color="black", linewidth=0.8)
    ax.fill_between([0, top], [0, 0.88 * top], [0, 1.12 * top], color="#54a24b", alpha=0.15, label="± 12 %")
    ax.scatter(measured, predicted, color="#1f4e79", zorder=3)
    for row in result["cases"]:
        ax.annotate(
            row["name"],
            (row["measured_tok_s"], row["predicted_tok_s"]),
            xytext=(4, -8),
            textcoords="offset points",
            fontsize=7,
        )
    ax.set(xlim=(0, top), ylim=(0, top), xlabel="measured tokens/s", ylabel="predicted tokens/s")
    ax.legend(frameon=False)
    figure.savefig(out / "predicted_vs_measured.png", dpi=130)
    plt.close(figure)


def render(result: dict[str, Any]) -> str:
    """The result as a person reads it: machine, plan, table of cases, errors."""
    machine, roofs = result["machine"], result["machine"]["roofline"]
    policy = result["plan"]["policy"]
    lines = [
        f"machine     {machine['cpu']}, {machine['cores']} cores, {format_bytes(machine['memory_bytes'])}"
        + (f", {machine['gpu']}" if "gpu" in machine else ", no GPU: device and host are two heaps"),
        f"versions    Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['date']}",
        f"measured    device GEMM {format_flops(roofs['device_gemm_flops'])}, "
        f"experts {format_flops(roofs['device_expert_flops'])}, "
        f"memory read {format_bandwidth(roofs['device_read_bytes_per_s'])}",
        f"            CPU attention {format_bandwidth(roofs['cpu_attention_bytes_per_s'])} of KV, "
        f"copies {format_bandwidth(roofs['copy_bytes_per_s'])}, "
        f"hand-over {format_seconds(roofs['task_hand_over_s'])}"
        + (f", {roofs['lanes_at_once']:.2f} lanes' worth at once" if roofs["lanes_at_once"] else ""),
        f"plan        N={policy['batch_size']} mu={policy['micro_batch_size']} G={policy['num_micro_batches']} "
        f"r_w={policy['weights_on_gpu']:.3f}: bound by the {result['plan']['predicted']['bottleneck']}",
        "",
    ]
    head = (
        f"{'case':<22}{'N':>4}{'mu':>4}{'G':>3}{'r_w':>6}{'gen':>5}{'link':>10} |{'predicted':>10}{'measured':>10}"
        f"{'error':>8} |{'prefill s':>13}{'decode s':>13} |{'link busy':>10}{'others':>8}  most off"
    )
    lines += [head, "-" * len(head)]
    for row in result["cases"]:
        link = "none" if row["link_bandwidth"] is None else format_bandwidth(row["link_bandwidth"])
        prefill = f"{row['predicted_prefill_s']:.2f} {row['measured_prefill_s']:.2f}"
        decode = f"{row['predicted_decode_s']:.2f} {row['measured_decode_s']:.2f}"
        busy = f"{row['measured_utilization']['h2d']:.0%}"
        lines.append(
            f"{row['name']:<22}{row['batch_size']:>4}{row['micro_batch_size']:>4}{row['num_micro_batches']:>3}"
            f"{row['weights_on_gpu']:>6.2f}{row['gen_len']:>5}{link:>10} |{row['predicted_tok_s']:>10.1f}"
            f"{row['measured_tok_s']:>10.1f}{row['error']:>+8.1%} |{prefill:>13}{decode:>13} |{busy:>10}"
            f"{row['cpu_taken_by_others']:>8.1%}  {row['most_off']} {row['most_off_s']:+.2f} s"
            + (" (disturbed)" if row["disturbed"] else "")
        )
    lines += [
        "-" * len(head),
        f"tokens/s: mean absolute error {result['mean_abs_error']:.1%}, worst {result['worst_abs_error']:.1%} over "
        f"{len(result['cases'])} cases; prefill and decode columns: predicted, measured",
    ]
    return "\n".join(lines)
