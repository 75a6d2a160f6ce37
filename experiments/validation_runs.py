"""Running the cases of a validation, and predicting them from the probes taken around them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.validation_cases import Case
from hrm import BatchShape, Hardware, MoEModel
from hrm.bound import physical_bound
from hrm.memory import batch_footprint
from hrm.rates import Rates
from simulator import Prediction, Timeline, simulate
from simulator.loss import Loss, account

if TYPE_CHECKING:
    from executor.checkpoint import Checkpoint
    from executor.host_weights import HostWeights
    from executor.probe import Passes, Prober
    from experiments.kept_runs import KeptRuns

__all__ = ["Run", "Runs", "described", "expected"]

_MOST_TRIES = 3
_QUIET_SHARE = 0.05
_QUIET_DRIFT = 0.10
_PAUSE_S = 5.0
_OTHER_PROMPTS = (104729, 15485863, 32452843, 49979687)
"""Factors that make prompts other than those of the run. A few sequences of a model with random weights soon repeat
themselves, so that what one trace misses says little."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A case that was run, between two probes."""

    case: Case
    tokens: int
    """Generated."""
    prefill_s: float
    decode_s: float
    setup_s: float
    peak_memory: dict[str, int]
    timeline: Timeline
    """What was measured; a case is one batch."""
    before: Passes
    after: Passes
    budget: int
    """Device memory in bytes."""
    taken_by_others: float
    """Share of the processor, the most of probes and run."""
    miss_rate: float | None = None
    """With an expert cache: of this checkpoint's routing on other prompts."""
    attempts: int = 1
    rounds: tuple[float, ...] = ()
    """Tokens/s of every time that the case was run, where that was more than once."""
    allocated: int | None = None
    """With a GPU: most bytes that torch's allocator had in use for the run."""

    @property
    def throughput_tok_s(self) -> float:
        """Generated tokens per second of prefill and decode."""
        return self.tokens / (self.prefill_s + self.decode_s)

    @property
    def drift(self) -> float:
        """How far the machine's speed moved: median relative change of the long calls of the probe."""
        changes = []
        for key in self.before[0]:
            if key[0] in ("experts", "gemm", "staging", "attention"):
                old = statistics.median(single[key] for single in self.before)
                new = statistics.median(single[key] for single in self.after)
                changes.append(math.log(new / old))
        return abs(math.expm1(statistics.median(changes)))

    @property
    def disturbance(self) -> float:
        """Above 1: others took the processor, or the machine changed."""
        return max(self.taken_by_others / _QUIET_SHARE, self.drift / _QUIET_DRIFT)


class Runs:
    """Measures cases, then predicts them.

    Parameters
    ----------
    checkpoint : Checkpoint
    prober : Prober
    device : torch.device
    device_memory : int, optional
        Budget of the planned case; other cases get what their policy needs.
    say : callable
    patience : int
        Pauses that a case waits for while others use the processor.
    deadline : float
        `time.monotonic` moment after which nothing is tried again.
    capped : bool
        Whether `device_memory` is the budget of every case.
    passes : tuple of int
        Passes of the probe right before and right after a case.
    host_weights : HostWeights, optional
        The checkpoint's weights, for all cases.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prober: Prober,
        device: Any,
        device_memory: int | None,
        say: Callable[[str], None],
        patience: int,
        deadline: float,
        *,
        capped: bool = False,
        passes: tuple[int, int] = (2, 1),
        host_weights: HostWeights | None = None,
    ) -> None:
        self._checkpoint, self._prober, self._device = checkpoint, prober, device
        self._device_memory, self._say = device_memory, say
        self._patience, self._deadline = patience, deadline
        self._capped, self._passes, self._host_weights = capped, passes, host_weights
        self._miss_rates: dict[str, float] = {}
        self._warm: set[int] = set()

    def measure(self, case: Case, *, tries: int = _MOST_TRIES, on_probe: Callable[[Passes], None] | None = None) -> Run:
        """Run a case in a process that is warm, again if it was disturbed; the least disturbed try counts.

        Parameters
        ----------
        case : Case
        tries : int
            Most tries.
        on_probe : callable, optional
            Called with the passes of the probe before each try, when the run has not begun.
        """
        best: Run | None = None
        attempts = 0
        while attempts < tries:
            attempts += 1
            run = self._try(case, on_probe)
            disturbed = ", disturbed" if run.disturbance > 1 else ""
            self._say(
                f"  {case.name}: measured {run.throughput_tok_s:.1f} tok/s; "
                f"others took {run.taken_by_others:.0%} of the CPU, speed drifted {run.drift:.0%}{disturbed}"
            )
            if best is None or run.disturbance < best.disturbance:
                best = run
            if run.disturbance <= 1 or time.monotonic() > self._deadline:
                break
        assert best is not None
        return replace(best, attempts=attempts)

    def measure_in_turn(self, cases: Sequence[Case], rounds: int, kept: KeptRuns) -> list[Run]:
        """Run cases one after the other, so many times; of each one run, with all its probes.

        It is the run nearest to the median throughput of all, of those that were not disturbed; where all were, the
        least disturbed. Nothing is tried again where there are several rounds. What is kept already is not run.
        """
        taken: list[list[Run]] = [[] for _ in cases]
        for number in range(rounds):
            for case, runs in zip(cases, taken, strict=True):
                run = kept.find(case, number)
                if run is None:
                    run = self.measure(case, tries=_MOST_TRIES if rounds == 1 else 1)
                    kept.add(run, number)
                runs.append(run)
        return [_median(runs) for runs in taken]

    def predict(self, runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any], Prediction]]:
        """Each run beside what the simulator says of it, on the machine of all probes around these runs."""
        if not runs:
            return
        machine = self._prober.machine_of([single for run in runs for single in (*run.before, *run.after)])
        for run in runs:
            prediction, rates = expected(run.case, self._checkpoint.model, machine, run.miss_rate)
            row = described(run, self._checkpoint.model, rates, prediction)
            self._say(
                f"  {run.case.name}: predicted {row['predicted_tok_s']:.1f}, measured {row['measured_tok_s']:.1f} "
                f"tok/s ({row['error']:+.1%})"
            )
            yield run, row, prediction

    def _try(self, case: Case, on_probe: Callable[[Passes], None] | None) -> Run:
        import torch

        from executor.generate import generate
        from executor.machine import OtherLoad

        model, shape = self._checkpoint.model, case.shape()
        self._warm_up(case)
        waited = 0
        while True:
            with OtherLoad() as before_load:
                self._prober.refresh(self._passes[0])
            if before_load.share <= _QUIET_SHARE or waited >= self._patience:
                break
            time.sleep(_PAUSE_S)
            waited += 1
        before = self._prober.last_passes
        if on_probe:
            on_probe(before)
        memory = batch_footprint(model, shape, case.policy, system=case.system)
        given = self._device_memory if self._capped or case.name == "planned" else None
        budget = given or math.ceil(memory.gpu_bytes)
        cuda = self._device.type == "cuda"
        lent, probes = budget if not cuda else self._device_memory, 0
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            # The probe's own buffers lie beside the run's, and are not the run's to fit.
            probes = torch.cuda.memory_allocated(self._device)
            lent = None if lent is None else lent + probes
        prompts = _prompts(case, model, 7919)
        with OtherLoad() as load:
            result = generate(
                self._checkpoint,
                prompts,
                gen_len=case.gen_len,
                policy=case.policy,
                system=case.system,
                pinned_weights=case.pinned_weights,
                device=self._device.type,
                device_memory=lent,
                link_bandwidth=case.link_bandwidth,
                host_weights=self._host_weights,
            )
        allocated = torch.cuda.max_memory_allocated(self._device) - probes if cuda else None
        with OtherLoad() as after_load:
            self._prober.refresh(self._passes[1])
        return Run(
            case=case,
            tokens=result.generated_tokens,
            prefill_s=result.prefill_s,
            decode_s=result.decode_s,
            setup_s=result.setup_s,
            peak_memory=result.peak_memory,
            timeline=result.timelines[0],
            before=before,
            after=self._prober.last_passes,
            budget=budget,
            taken_by_others=max(before_load.share, load.share, after_load.share),
            miss_rate=self._miss_rate(case),
            allocated=allocated,
        )

    def _warm_up(self, case: Case) -> None:
        """Run one micro-batch of a size that this process has not seen: a first prefill on a processor takes longer,
        since memory is new and libraries make kernels for the sizes that they meet."""
        if self._device.type == "cuda" or case.micro_batch_size in self._warm:
            return
        from executor.generate import generate

        self._warm.add(case.micro_batch_size)
        generate(
            self._checkpoint,
            _prompts(case, self._checkpoint.model, 7919)[: case.micro_batch_size],
            gen_len=min(2, case.gen_len),
            policy=replace(case.policy, batch_size=case.micro_batch_size),
            system=case.system,
            pinned_weights=case.pinned_weights,
            device=self._device.type,
            link_bandwidth=None,
            host_weights=self._host_weights,
        )

    def _miss_rate(self, case: Case) -> float | None:
        """Misses per active expert in decode, the mean of traces of other prompts of the same lengths."""
        if case.expert_slots is None:
            return None
        from executor.generate import generate
        from executor.recording import RouteRecorder
        from simulator.experts.study import decode_miss_rate

        if case.name not in self._miss_rates:
            rates = []
            for factor in _OTHER_PROMPTS:
                recorder = RouteRecorder(self._checkpoint.local)
                generate(
                    self._checkpoint,
                    _prompts(case, self._checkpoint.model, factor),
                    gen_len=case.gen_len,
                    policy=replace(case.policy, expert_slots=None),
                    device=self._device.type,
                    link_bandwidth=None,
                    recorder=recorder,
                )
                rates.append(decode_miss_rate(recorder.trace(), case.expert_slots, most_tokens=case.micro_batch_size))
            self._miss_rates[case.name] = statistics.fmean(rates)
        return self._miss_rates[case.name]


def _median(runs: list[Run]) -> Run:
    """Of the quiet runs the one nearest to the median throughput of all; of others the quietest; between all probes."""
    if len(runs) == 1:
        return runs[0]
    quiet = [run for run in runs if run.disturbance <= 1] or [min(runs, key=lambda run: run.disturbance)]
    middle = statistics.median(run.throughput_tok_s for run in runs)
    return replace(
        min(quiet, key=lambda run: abs(run.throughput_tok_s - middle)),
        before=[single for run in runs for single in run.before],
        after=[single for run in runs for single in run.after],
        attempts=sum(run.attempts for run in runs),
        rounds=tuple(run.throughput_tok_s for run in runs),
    )


def _prompts(case: Case, model: MoEModel, factor: int) -> list[list[int]]:
    size = model.vocab_size
    return [[(factor * (i + 1) * (j + 3)) % size for j in range(n)] for i, n in enumerate(case.lengths())]


def expected(
    case: Case, model: MoEModel, machine: Hardware, miss_rate: float | None = None, *, keep_timeline: bool = True
) -> tuple[Prediction, Rates]:
    """What the simulator says of a case on a probed machine, and the rates that it says so from.

    Parameters
    ----------
    keep_timeline : bool
        Keep every task of a long run, which a comparison with the measured timeline needs.
    """
    rates = replace(machine.rates().with_link(case.link_bandwidth), stages_weights=not case.pinned_weights)
    prediction = simulate(
        model,
        rates,
        case.policy,
        case.shape(),
        system=case.system,
        exact=True,
        keep_timeline=keep_timeline,
        miss_rate=miss_rate,
    )
    return prediction, rates


def described(
    run: Run, model: MoEModel, rates: Rates, prediction: Prediction, loss: Loss | None = None
) -> dict[str, Any]:
    """A run beside its prediction: the row of a validation's table.

    Parameters
    ----------
    loss : Loss, optional
        Where the time of a decode step went, if that is known already.
    """
    case, measured, shape = run.case, run.timeline, run.case.shape()
    op, seconds = _worst_class(prediction.timeline, measured)
    steps = case.batch_size * (case.gen_len - 1)
    return asdict(case) | {
        "num_micro_batches": case.policy.num_micro_batches,
        "prompt_lens": list(case.prompt_lens),
        "predicted_tok_s": prediction.throughput_tok_s,
        "measured_tok_s": run.throughput_tok_s,
        "error": prediction.throughput_tok_s / run.throughput_tok_s - 1,
        "predicted_prefill_s": prediction.prefill_s,
        "measured_prefill_s": run.prefill_s,
        "predicted_decode_s": prediction.decode_s,
        "measured_decode_s": run.decode_s,
        **_limit(case, model, rates, shape, steps / run.decode_s if steps else 0.0),
        "loss": (loss or account(prediction.timeline, measured)).sentence(),
        "predicted_utilization": prediction.timeline.decode_utilization(),
        "measured_utilization": measured.decode_utilization(),
        "most_off": op,
        "most_off_s": seconds,
        "device_budget_bytes": run.budget,
        "peak_memory": run.peak_memory,
        "cpu_taken_by_others": run.taken_by_others,
        "drift": run.drift,
        "attempts": run.attempts,
        "rounds_tok_s": list(run.rounds) or None,
        "miss_rate": run.miss_rate,
        "disturbed": run.disturbance > 1,
    }


def _limit(case: Case, model: MoEModel, rates: Rates, shape: BatchShape, measured: float) -> dict[str, Any]:
    """How near decode came to what no schedule can pass; for systems whose dense weights stay on the device."""
    # What a cache misses depends on the routing that it meets, which the bound takes to be uniform.
    if case.system not in ("moe-lightning", "fastdecode") or case.gen_len < 2 or case.expert_slots is not None:
        return {"bound_decode_tok_s": None, "bound_by": None, "share_of_bound": None}
    prompt = sum(shape.prompt_tokens) / case.batch_size
    bound = physical_bound(model, rates, case.policy, prompt_len=prompt, gen_len=case.gen_len, prefill=False)
    tok_s = case.batch_size * (case.gen_len - 1) / max(bound.seconds.values())
    return {"bound_decode_tok_s": tok_s, "bound_by": bound.resource, "share_of_bound": measured / tok_s}


def _worst_class(predicted: Timeline, measured: Timeline) -> tuple[str, float]:
    """The task class whose total time differs most, and by how many seconds (measured minus predicted)."""
    difference = measured.by_op()["seconds"] - predicted.by_op()["seconds"]
    phase, op = difference.abs().idxmax()
    return f"{phase} {op}", float(difference[phase, op])
