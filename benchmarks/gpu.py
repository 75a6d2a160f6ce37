"""The proof on a real GPU: predicted against measured for a model that the GPU cannot hold, and what surrounds it.

    python benchmarks/gpu.py [--part validate --cap 16GiB] [--out out/gpu]

Made for a machine with one H100 or H200, 16 cores and 128 GiB of memory, and no network. The model is Mixtral 8x7B in
bfloat16 with as many of its layers as host memory holds beside a KV cache; its weights are random, drawn in place in
host memory (no disk), page-locked, and kept for all cases of a command.

Parts, in this order without --part:

    validate    five systems, each with the policy that its own rule chooses, and changes of the planned policy, under
                a cap of device memory (--cap 16GiB, 24GiB, none); each case is predicted from the probe, then run
    exact       tokens of small float32 models on the device beside transformers' own greedy generation
    sanitizer   compute-sanitizer's memcheck and racecheck on a short run, where the tool is found
    peers       benchmarks/executor.py, beside Hugging Face Accelerate, where it is installed
    upper       everything on the device: transformers' own model and the executor, by batch size
    report      tables, figures and summary.md from all that has ended so far

A command begins nothing that is predicted to end after --time-budget. What has ended is on disk (records.jsonl in
--out), and the same command goes on from there, on the same kind of machine. What would not even end in a command that
does nothing else is left out, until a command has a larger --time-budget. A case that failed is run again by a command
with --retry (not by each of a loop), and the later result counts. The report names the versions of the code that its
results come from. Without a GPU everything runs as a rehearsal:
--device cpu --model mixtral-tiny --cap 12MiB --link-bandwidth 2GB/s --most-requests 16 --gen-len 8.

Exit codes:

    0           all has ended
    1           nothing can be done: one line says why
    2           an option is not understood
    4           something is left for the same command to go on with
    5           all has ended and something failed, which the last line names: a case, a cap that holds no batch,
                answers that differ from transformers', errors that the sanitizer found, the benchmark beside Accelerate
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Python puts this file's folder first, where names of files hide packages.
    sys.path[0] = str(_ROOT)

from benchmarks.gpu_cases import Cap  # noqa: E402
from benchmarks.gpu_exact import exact  # noqa: E402
from benchmarks.gpu_outside import peers, sanitizer  # noqa: E402
from benchmarks.gpu_proof import Options, Proof  # noqa: E402
from benchmarks.gpu_report import failures, report  # noqa: E402
from benchmarks.gpu_upper import upper  # noqa: E402
from benchmarks.gpu_validate import validate  # noqa: E402
from executor.lanes import DEFAULT_LINK_BANDWIDTH  # noqa: E402
from executor.machine import pick_device  # noqa: E402
from experiments.records import OutOfTime, say  # noqa: E402
from hrm.errors import HrmError, InvalidValue, UnknownName  # noqa: E402
from hrm.units import parse_bandwidth  # noqa: E402

_PARTS = ("validate", "exact", "sanitizer", "peers", "upper", "report")
_CAPS = ("16GiB", "24GiB", "none")
_MODEL = "mixtral-8x7b"
_BUDGET_S, _CAP_S = 540.0, 1250.0
_UNFINISHED, _FAILED = 4, 5


def _sizes(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) >= 1 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of batch sizes, each at least 1; write e.g. '1,8,32'")
    return tuple(int(size) for size in sizes)


def _bandwidth(text: str) -> float:
    try:
        return parse_bandwidth(text)
    except HrmError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", metavar="PART", help=f"only {', '.join(_PARTS)}")
    parser.add_argument(
        "--cap", action="append", metavar="SIZE", help=f"of device memory; by default {', '.join(_CAPS)}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--model", default=_MODEL, help="of the catalog")
    parser.add_argument("--layers", type=int, help="of the model, instead of as many as host memory holds")
    parser.add_argument("--time-budget", type=float, default=_BUDGET_S, metavar="SECONDS")
    parser.add_argument(
        "--cap-seconds", type=float, default=_CAP_S, metavar="SECONDS", help="of a cap's cases, predicted"
    )
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--long-gen-len", type=int, default=128)
    parser.add_argument("--most-requests", type=int, help="by default what host memory holds")
    parser.add_argument("--batch-sizes", type=_sizes, default=(1, 8, 32, 128, 512), help="of the part upper")
    parser.add_argument("--link-bandwidth", type=_bandwidth, help="of the paced link, without a GPU")
    parser.add_argument("--out", type=Path, default=_ROOT / "out" / "gpu", help="records, probe, timelines")
    parser.add_argument("--results", type=Path, help="by default experiments/measured/<gpu>, in a rehearsal in --out")
    parser.add_argument("--retry", action="store_true", help="run cases again that failed")
    return parser.parse_args(arguments)


def _proof(given: argparse.Namespace, started: float) -> Proof:
    device = pick_device(given.device)
    for name in ("time_budget", "cap_seconds", "gen_len", "long_gen_len", "most_requests"):
        value = getattr(given, name)
        if value is not None and not value >= 1:
            raise InvalidValue(f"'{name.replace('_', '-')}' must be >= 1: {value}")
    cuda = device.type == "cuda"
    if given.device is None and not cuda:
        raise InvalidValue("there is no GPU here; --device cpu with a small --model (mixtral-tiny) rehearses.")
    if cuda and given.link_bandwidth is not None:
        raise InvalidValue("a GPU's link has its own pace; leave --link-bandwidth out.")
    proof = Proof(
        Options(
            device=device,
            model=given.model,
            out=given.out,
            results=given.results or given.out / "results",
            started=started,
            layers=given.layers,
            link_bandwidth=None if cuda else given.link_bandwidth or DEFAULT_LINK_BANDWIDTH,
            time_budget=given.time_budget,
            seconds_per_cap=given.cap_seconds,
            gen_len=given.gen_len,
            long_gen_len=given.long_gen_len,
            most_requests=given.most_requests,
            batch_sizes=given.batch_sizes,
            retry=given.retry,
        )
    )
    if cuda and given.results is None:
        proof.options.results = _ROOT / "experiments" / "measured" / proof.slug
    return proof


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts until they have ended or the time is used up; returns the exit code."""
    started = time.monotonic()
    given = _options(arguments)
    parts = given.part or list(_PARTS)
    for part in parts:
        if part not in _PARTS:
            raise UnknownName.of("part", part, _PARTS)
    caps = [Cap.parse(text) for text in given.cap or _CAPS]
    proof = _proof(given, started)
    say(f"{given.model}, {proof.model.num_layers} layers, {proof.slug}, {given.time_budget:.0f} s")
    work: dict[str, list[Callable[[], object]]] = {
        "validate": [partial(validate, proof, cap) for cap in caps],
        "exact": [partial(exact, proof)],
        "sanitizer": [partial(sanitizer, proof)],
        "peers": [partial(peers, proof)],
        "upper": [partial(upper, proof)],
        "report": [partial(report, proof)],
    }
    try:
        for part in parts:
            for step in work[part]:
                step()
    except OutOfTime:
        say("the time budget is used up; the same command goes on from here.")
        return _UNFINISHED
    except HrmError:
        _say_what_failed(proof, parts, caps)  # without which the error may not be understood
        raise
    return _FAILED if _say_what_failed(proof, parts, caps) else 0


def _say_what_failed(proof: Proof, parts: Sequence[str], caps: Sequence[Cap]) -> bool:
    failed = failures(proof, parts, [cap.name for cap in caps])
    if failed:
        say(f"failed: {'; '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HrmError as failure:
        sys.exit(f"benchmarks/gpu.py: error: {failure}")
