"""The executor's systems and Hugging Face Accelerate, run in turn on one checkpoint, prompts and device memory.

    python benchmarks/executor.py [--case tight] [--rounds 3] [--out FILE.json] [--figure FILE.png]

Runs five systems of the executor, each with the policy that its own rule or planner picks for the budget and a probe of
this machine; CGOPipe proper as well (attention on the host, experts on the device), where the planner might prefer
another placement; and Accelerate's `cpu_offload` and `disk_offload` of transformers' own model with the largest batch
that fits the budget. All answer the same prompts greedily, in rounds in which each takes its turn. What loading weights
takes does not count, for anybody.

Without a GPU everybody's weights travel over the same paced link, and in a second series over one without a pace. The
executor's lanes share the cores as they always do; Accelerate's modules get all cores. Its weights are fetched when a
module asks for them, as on a GPU (see `accelerate_peer.py`). Files of `disk_offload` are in the page cache.

With a GPU the checkpoint is Mixtral 8x7B in bfloat16 with as many layers as host memory and disk hold (--layers), and
results are also written to experiments/measured. There one round is run, and whoever needs many batches for all prompts
answers one (--max-batches). A call takes ten minutes at most: it stops before the first run that would pass
--time-budget. Runs that have ended are kept in the work folder for six hours, so that the same command goes on from
there; --part runs one entry at a time, and the command without it picks them all up.

Prints a table and writes one JSON object with machine, versions and command.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Python puts this file's folder first, where its own name hides the package that is measured.
    sys.path[0] = str(_ROOT)

from benchmarks.accelerate_peer import PEERS  # noqa: E402
from benchmarks.executor_cases import CPU_CASES, Case, cuda_cases, open_checkpoint  # noqa: E402
from benchmarks.executor_report import report, save_figure, table  # noqa: E402
from benchmarks.executor_runs import OWN, Bench  # noqa: E402
from executor.machine import machine_facts, pick_device  # noqa: E402
from experiments.records import OutOfTime, Records, commit, say  # noqa: E402
from hrm import Policy  # noqa: E402
from hrm.errors import HrmError, InvalidValue  # noqa: E402
from hrm.units import parse_bandwidth, parse_bytes  # noqa: E402

_DIGIT = {"N": "batch_size", "mu": "micro_batch_size"}
_SHARE = {"r_w": "weights_on_gpu", "r_c": "kv_on_gpu"}
_PLACE = {"A_g": "attention_on_gpu", "F_g": "ffn_on_gpu"}


def given_policy(text: str) -> tuple[str, Policy]:
    """``flexgen:N=64,mu=16,A_g=1,r_w=0.1`` as an entry and its policy."""
    entry, _, settings = text.partition(":")
    values: dict[str, Any] = {}
    try:
        if entry not in OWN:
            raise ValueError
        for setting in settings.split(","):
            name, _, value = setting.partition("=")
            if name in _DIGIT:
                values[_DIGIT[name]] = int(value)
            elif name in _SHARE:
                values[_SHARE[name]] = float(value)
            else:
                values[_PLACE[name]] = bool(int(value))
        return entry, Policy(**values)
    except (ValueError, KeyError, TypeError, HrmError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no policy; write e.g. 'flexgen:N=64,mu=16,A_g=1,F_g=1,r_w=0.1,r_c=0' with one of "
            f"{', '.join(OWN)}"
        ) from None


def _between(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first), int(last or first)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help=f"on a machine without a GPU: {', '.join(CPU_CASES)}")
    parser.add_argument(
        "--part", action="append", choices=(*OWN, *PEERS), metavar="ENTRY", help=f"only {', '.join((*OWN, *PEERS))}"
    )
    parser.add_argument("--rounds", type=int, help="by default 3, with a GPU 1")
    parser.add_argument("--max-batches", type=int, help="most batches per run, 0 for all prompts; with a GPU 1")
    parser.add_argument("--policy", action="append", default=[], type=given_policy, metavar="ENTRY:N=..,mu=..")
    parser.add_argument("--hardware", help="a file that `hrm probe` wrote, or a catalog name, instead of a probe")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--paced-only", action="store_true", help="leave out the series without a pace")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="SECONDS", help="with a GPU 540")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="SECONDS", help="wait that long for a pause of others per run"
    )
    parser.add_argument("--work", type=Path, default=_ROOT / "out" / "benchmark-executor", help="checkpoints and runs")
    parser.add_argument("--layers", type=int, help="of Mixtral 8x7B, with a GPU")
    parser.add_argument("--device-memory", action="append", type=parse_bytes, help="other budgets than the cases'")
    own = parser.add_argument_group("a case of one's own")
    own.add_argument("--checkpoint", type=Path)
    own.add_argument("--num-requests", type=int, default=64)
    own.add_argument("--prompt-lens", type=_between, default=(24, 40), metavar="A:B")
    own.add_argument("--gen-len", type=int, default=16)
    own.add_argument("--link-bandwidth", type=parse_bandwidth, default=2e9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    return parser.parse_args(arguments)


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    budgets = options.device_memory or []
    if options.checkpoint:
        if not budgets:
            raise InvalidValue("--checkpoint needs --device-memory.")
        base = Case(
            name="given",
            about=options.checkpoint.name,
            num_requests=options.num_requests,
            prompt_lens=options.prompt_lens,
            gen_len=options.gen_len,
            device_memory=budgets[0],
            link_bandwidth=options.link_bandwidth,
            checkpoint=options.checkpoint,
        )
        known = {base.name: base}
    elif options.device.type == "cuda":
        known = cuda_cases(options.work, options.layers)
    else:
        known = CPU_CASES
    for name in options.case or known:
        if name not in known:
            raise InvalidValue(f"there is no case {name!r}; there are {', '.join(known)}.")
        if not budgets:
            yield known[name]
        for budget in budgets:
            suffix = f"-{budget / 2**20:.0f}mib" if len(budgets) > 1 else ""
            yield replace(known[name], name=name + suffix, device_memory=budget)


def _run(bench: Bench, options: argparse.Namespace) -> None:
    entries = [entry for entry in (*OWN, *PEERS) if not options.part or entry in options.part]
    for turn in range(options.rounds):
        for link in bench.links:
            for entry in entries:
                bench.run(entry, link, turn)
                bench.make_room()


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    facts = {key: machine_facts().get(key) for key in ("cpu", "gpu", "cores", "torch", "transformers")}
    given = {entry: str(policy) for entry, policy in options.policy.items()}
    given |= {"device": options.device.type, "max_batches": options.max_batches, "hardware": options.hardware}
    return facts | given | {"commit": commit()}


def _accelerate() -> str | None:
    try:
        import accelerate
    except ImportError:
        return None
    return str(accelerate.__version__)


def _one_case(case: Case, options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Results of a case, and whether all of its runs are there."""
    checkpoint = open_checkpoint(case, options.work, say, quick=options.device.type == "cuda")
    conditions = _conditions(options) | asdict(case) | {"bytes": checkpoint.size_bytes}
    records = Records(options.work / "runs.jsonl", conditions)
    finished = True
    try:
        _run(Bench(case, checkpoint, records, options), options)
    except OutOfTime:
        finished = False
        say("the time budget is used up; the same command goes on from here.")
    if finished and not options.part:
        records.finish()
    gc.collect()
    return report(case, checkpoint, records.rows, (*OWN, *PEERS)), finished


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and report."""
    options = _options(arguments)
    options.started, options.device = time.monotonic(), pick_device(options.device)
    cuda = options.device.type == "cuda"
    options.policy = dict(options.policy)
    options.rounds = options.rounds or (1 if cuda else 3)
    options.max_batches = (1 if cuda else 0) if options.max_batches is None else options.max_batches
    if cuda and options.time_budget == math.inf:
        options.time_budget = 540.0
    options.work.mkdir(parents=True, exist_ok=True)
    if _accelerate() is None:
        say("accelerate is not installed: its runs are left out (pip install 'moe-hrm[benchmarks]').")
    result: dict[str, Any] = {
        "command": shlex.join(["python", *(sys.argv if arguments is None else ["benchmarks/executor.py", *arguments])]),
        "machine": machine_facts(),
        "commit": commit(),
        "accelerate": _accelerate(),
        "rounds": options.rounds,
        "finished": True,
        "cases": {},
    }
    for case in _cases(options):
        found, result["finished"] = _one_case(case, options)
        result["cases"][case.name] = found
        print(table(case.name, found), flush=True)
        if not result["finished"]:
            break
    text = json.dumps(result, indent=1) + "\n"
    if cuda:
        slug = re.sub(r"[^a-z0-9]+", "-", str(result["machine"]["gpu"]).lower()).strip("-")
        (_ROOT / "experiments" / "measured" / f"{slug}.json").write_text(text)
    if options.out:
        options.out.write_text(text)
    if options.figure:
        save_figure(result, options.figure)


if __name__ == "__main__":
    try:
        main()
    except HrmError as failure:
        sys.exit(f"benchmarks/executor.py: error: {failure}")
