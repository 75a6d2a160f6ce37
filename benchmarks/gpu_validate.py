"""The parts ``validate``: every case of a cap predicted from the probe, then run, and both side by side."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.gpu_cases import Cap, Chosen, Limits, check_cap, choose, holds_a_request
from benchmarks.gpu_proof import Proof
from executor.probe import Passes
from experiments.records import say
from experiments.rooflines import kernel_shares
from experiments.validation_cases import Case
from experiments.validation_runs import Run, Runs, described, expected
from hrm import Hardware, MoEModel
from hrm.memory import batch_footprint
from hrm.rates import Rates
from simulator import Prediction
from simulator.gantt import gantt_pair
from simulator.loss import Loss, account

__all__ = ["validate"]

_OVERHEAD_CUDA_S = 25.0
"""Seconds of a case besides its prefill and decode: probes before and after, buffers, the resident weights' copy."""
_LONGEST_SHARE = 0.6
"""Of a command's time, that one case may take at most: drawing and locking the weights takes some of it."""


def validate(proof: Proof, cap: Cap) -> None:
    """Run what is left of a cap's cases.

    Raises
    ------
    OutOfTime
        When the next case would pass the time budget.
    """
    chosen = _chosen(proof, cap)
    if chosen is None:
        return
    for number, (case, seconds) in enumerate(zip(chosen.cases, chosen.seconds, strict=True), start=1):
        keys = {"kind": "run", "cap": cap.name, "case": case.name}
        if proof.wanted(**keys):
            _ = proof.prober, proof.weights  # whose making is no part of the prediction
            say(f"{cap.name}, case {number}/{len(chosen.cases)}: {case.name} ({case.system}, {case.policy})")
        proof.once(partial(_run, proof, cap, case), expected=seconds, **keys)


def _chosen(proof: Proof, cap: Cap) -> Chosen | None:
    """The cap's cases: chosen once for the same limits, so that a later command has the same ones; None if no policy
    fits the cap, which is recorded and does not keep other caps from being measured."""
    keys = {"kind": "cases", "cap": cap.name}
    limits = _limits(proof)
    known = proof.records.find(**keys)
    again = known is not None and known.get("limits") != asdict(limits)
    if (again or proof.wanted(**keys)) and holds_a_request(proof.model, cap):
        _ = proof.machine  # here, because a probe that breaks says nothing about the cap
    row = proof.once(partial(_choose, proof, cap, limits), again=again, **keys, limits=asdict(limits))
    if "failed" in row:
        say(f"{cap.name}: {row['failed']}")
        return None
    return Chosen.from_dict(row)


def _limits(proof: Proof) -> Limits:
    options = proof.options
    return Limits(
        gen_len=options.gen_len,
        long_gen_len=options.long_gen_len,
        held=proof.checkpoint.size_bytes,
        most_requests=options.most_requests,
        longest_s=_LONGEST_SHARE * options.time_budget,
        all_s=options.seconds_per_cap,
        overhead_s=_OVERHEAD_CUDA_S if options.cuda else 0.0,
    )


def _choose(proof: Proof, cap: Cap, limits: Limits) -> dict[str, Any]:
    check_cap(proof.model, cap)
    chosen = choose(proof.model, proof.machine, cap, proof.options.link_bandwidth, limits)
    for name, why in chosen.left_out.items():
        say(f"{cap.name}: {name} is left out: {why}")
    return chosen.to_dict()


def _run(proof: Proof, cap: Cap, case: Case) -> dict[str, Any]:
    """A case's row: predicted after the probe and before the run."""
    options, model = proof.options, proof.model
    prober, weights = proof.prober, proof.weights
    told: list[tuple[Hardware, Prediction, Rates]] = []

    def predict(passes: Passes) -> None:
        machine = prober.machine_of([*proof.passes, *passes])
        told.append((machine, *expected(case, model, machine)))
        say(f"  predicted {told[-1][1].throughput_tok_s:.1f} tok/s")

    runs = Runs(
        proof.checkpoint,
        prober,
        options.device,
        cap.bytes,
        say,
        patience=0,
        deadline=0.0,  # nothing is tried twice
        capped=True,
        passes=(1, 1),
        host_weights=weights,
    )
    run = runs.measure(case, on_probe=predict)
    machine, prediction, rates = told[-1]
    loss = account(prediction.timeline, run.timeline)
    row = described(run, model, rates, prediction, loss) | _more(run, model, machine, loss, cap)
    if case.name == "planned":
        _save(proof, cap, run, prediction)
    say(f"  {row['error']:+.1%}; {row['loss']}")
    return {"row": row, "passes": len(proof.passes) + 1}


def _more(run: Run, model: MoEModel, machine: Hardware, loss: Loss, cap: Cap) -> dict[str, Any]:
    """What a GPU's row has besides a validation's."""
    peak = run.allocated if run.allocated is not None else run.peak_memory["device_bytes"]
    measured = run.timeline
    return {
        "cap": cap.name,
        "num_layers": measured.schedule.num_layers,
        "h2d_busy_in_decode": measured.decode_utilization()["h2d"],
        "ffn": kernel_shares(measured, machine),
        "peak_device_bytes": peak,
        "peak_of_cap": None if cap.bytes is None else peak / cap.bytes,
        "footprint_bytes": batch_footprint(model, run.case.shape(), run.case.policy, system=run.case.system).gpu_bytes,
        "loss_items": loss.to_dict(),
        "setup_s": run.setup_s,
        "rates": {
            "h2d_bytes_per_s": machine.rates().h2d_bandwidth,
            "expert_flops": machine.rates().gpu_experts.peak,
            "read_bytes_per_s": float(machine.gpu.bandwidth),
            "cpu_attention_bytes_per_s": machine.rates().cpu_attention.peak,
        },
    }


def _save(proof: Proof, cap: Cap, run: Run, prediction: Prediction) -> None:
    """Both timelines of the planned case, and their picture."""
    import matplotlib.pyplot as plt

    folder = proof.options.out
    prediction.timeline.save(folder / f"predicted-{cap.name}.json.gz")
    run.timeline.save(folder / f"measured-{cap.name}.json.gz")
    title = f"CGOPipe, one schedule played and run, cap {cap.name}: {run.case.policy}"
    figure = gantt_pair(prediction.timeline, run.timeline, title=title)
    figure.savefig(folder / f"gantt-{cap.name}.png", dpi=130)
    plt.close(figure)
