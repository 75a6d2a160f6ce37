"""A long job under kills: a queue of requests, once undisturbed and once killed again and again, compared.

    python benchmarks/soak.py [--quick] [--out FILE.json]

Makes a tiny checkpoint and a queue of requests with random prompt lengths, lengths of output and end tokens. `hrm run`
answers it undisturbed, while its resident memory is sampled; then it is killed with SIGKILL at random moments and
resumed until it is through. Every request must be answered once, with the same tokens; what differs is set beside
the logits in double precision. Exits with 1 if anything is missing, repeated or different without being a tie, or if
memory grows by more than the margin.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
# Python puts this file's folder first, where another benchmark's name hides a package.
sys.path[0] = str(_ROOT)

import torch  # noqa: E402

from executor.checkpoint import make_checkpoint  # noqa: E402
from executor.machine import machine_facts  # noqa: E402
from experiments.records import commit  # noqa: E402
from hrm.catalog import model_config  # noqa: E402

_GEN_LEN, _LONGEST = 24, 60
_SAMPLE_S = 0.25
_LOOK_S = 0.02
_AT_START = 0.2
"""Share of the kills that come while a run starts up."""
_MARGIN = 0.02
"""Most that resident memory may grow from the first quarter of the work to the last."""
_TIE = 1e-5
"""Logits closer than this, in units of their standard deviation, may be ranked either way in float32."""
_PAGE = 4096


@dataclass(frozen=True)
class Size:
    """How much work, and how often it is killed."""

    requests: int
    kills: int
    policy: tuple[str, ...]


_FULL = Size(5000, 10, ("--batch-size", "128", "--micro-batch-size", "32", "--weights-on-gpu", "0.25"))
_QUICK = Size(200, 3, ("--batch-size", "32", "--micro-batch-size", "8", "--weights-on-gpu", "0.25"))


def make_job(folder: Path, size: Size, seed: int) -> list[str]:
    """Write checkpoint and prompts; the command that answers them, but for its --out."""
    config = model_config("mixtral-tiny") | {"initializer_range": 0.08, "torch_dtype": "float32"}
    checkpoint = make_checkpoint(config, folder / "tiny", seed=seed)
    vocabulary = config["vocab_size"]
    # One token in about twenty ends an answer.
    ends = {"eos_token_id": list(range(0, vocabulary, 20))}
    (checkpoint / "generation_config.json").write_text(json.dumps(ends))
    rng = random.Random(seed)
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(size.requests):
            ids = [rng.randrange(vocabulary) for _ in range(rng.randint(1, _LONGEST))]
            line = {"id": f"request-{number}", "prompt_ids": ids, "gen_len": rng.randint(1, _GEN_LEN)}
            file.write(json.dumps(line) + "\n")
    return [
        *(sys.executable, "-m", "experiments.cli", "run", "--checkpoint", str(checkpoint)),
        *("--prompts", str(folder / "prompts.jsonl"), "--gen-len", str(_GEN_LEN), *size.policy),
        *("--device", "cpu", "--link-bandwidth", "none", "--resume", "--json", "--out"),
    ]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process now; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def answers_in(file: Path) -> int:
    """Whole lines of a file of answers."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def undisturbed(command: list[str], out: Path) -> dict[str, Any]:
    """Run to the end; what it reports, and its memory while it answers."""
    started = time.monotonic()
    process = subprocess.Popen([*command, str(out)], cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    samples: list[tuple[float, int]] = []
    first = None
    while process.poll() is None:
        moment, size = time.monotonic() - started, resident_bytes(process.pid)
        if first is None and answers_in(out):
            first = moment
        if first is not None and size:
            samples.append((moment, size))
        time.sleep(_SAMPLE_S)
    wall = time.monotonic() - started
    assert process.stdout is not None
    report = process.stdout.read()
    if process.returncode or first is None or len(samples) < 8:
        raise SystemExit(f"the undisturbed run failed with {process.returncode}, {len(samples)} samples: {report}")
    result = json.loads(report)
    quarter = len(samples) // 4
    early, late = (statistics.median(b for _, b in part) for part in (samples[:quarter], samples[-quarter:]))
    every = max(1, len(samples) // 40)
    return {
        "wall_s": wall,
        "first_answers_after_s": first,
        **{key: result[key] for key in ("throughput_tok_s", "generated_tokens", "batches", "segments", "policy")},
        "resident_bytes": {
            "first_quarter": early,
            "last_quarter": late,
            "growth": late / early - 1,
            "margin": _MARGIN,
            "most": max(b for _, b in samples),
            "samples": [[round(moment, 2), size] for moment, size in samples[::every]],
        },
    }


def disturbed(command: list[str], out: Path, size: Size, rng: random.Random) -> dict[str, Any]:
    """Kill and resume until the last life is left alone; when each kill came and what it left."""
    kills: list[dict[str, Any]] = []
    started = time.monotonic()
    while len(kills) < size.kills:
        process = subprocess.Popen([*command, str(out)], cwd=_ROOT, stdout=subprocess.DEVNULL)
        born = time.monotonic()
        if rng.random() < _AT_START:
            time.sleep(rng.uniform(0, 5))
        else:
            # After so many more answers that there is work for the other lives, and then at any moment.
            had = answers_in(out)
            wanted = had + rng.randint(1, 2 * (size.requests - had) // (size.kills - len(kills) + 2))
            while process.poll() is None and answers_in(out) < wanted:
                time.sleep(_LOOK_S)
            time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            raise SystemExit(f"a run ended with {process.returncode} before it was killed")
        process.kill()
        process.wait()
        data = out.read_bytes() if out.exists() else b""
        torn = data != b"" and not data.endswith(b"\n")
        kills.append({"after_s": time.monotonic() - born, "answers": data.count(b"\n"), "torn_line": torn})
        print(f"kill {len(kills)} after {kills[-1]['after_s']:.1f} s: {kills[-1]['answers']} answers", flush=True)
    last = subprocess.run([*command, str(out)], cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return {
        "wall_s": time.monotonic() - started,
        "kills": kills,
        "skipped_by_the_last_run": json.loads(last.stdout)["skipped"],
    }


def compare(folder: Path, size: Size, one: Path, other: Path) -> dict[str, Any]:
    """Who is missing, repeated or different, and how close the logits are where answers part."""
    found = []
    repeated = 0
    for file in (one, other):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found.append({line["id"]: line["output_ids"] for line in lines})
        repeated += len(lines) - len(found[-1])
    requests = {entry["id"]: entry for entry in map(json.loads, (folder / "prompts.jsonl").read_text().splitlines())}
    ends = set(json.loads((folder / "tiny" / "generation_config.json").read_text())["eos_token_id"])
    wrong_length = 0
    for outputs in found:
        for name, tokens in outputs.items():
            stopped = [k for k, token in enumerate(tokens) if token in ends]
            wrong_length += (stopped != [len(tokens) - 1]) if stopped else len(tokens) != requests[name]["gen_len"]
    both = [name for name in requests if name in found[0] and name in found[1]]
    differing = [name for name in both if found[0][name] != found[1][name]]
    return {
        "requests": size.requests,
        "missing": 2 * len(requests) - len(found[0]) - len(found[1]),
        "repeated": repeated,
        "wrong_length": wrong_length,
        "identical": len(both) - len(differing),
        "differing": [
            {"id": name}
            | where_they_part(folder / "tiny", requests[name]["prompt_ids"], found[0][name], found[1][name])
            for name in differing
        ],
    }


def where_they_part(checkpoint: Path, prompt: list[int], one: list[int], other: list[int]) -> dict[str, Any]:
    """The first token in which two answers differ, and how far apart the two tokens' logits are in float64.

    "router_margin" is the smallest distance between the probability of the last expert that was chosen and of the
    first that was not, over all layers and tokens so far: of near ties among experts, rounding takes either.
    """
    from transformers import AutoModelForCausalLM

    at = next(k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        out = model(torch.tensor([prompt + one[:at]]), output_router_logits=True)
    logits = out.logits[0, -1].double()
    gap = abs(float(logits[one[at]] - logits[other[at]])) / float(logits.std())
    router = torch.cat([layer.double().softmax(dim=-1) for layer in out.router_logits])
    ranked = router.sort(dim=-1, descending=True).values
    top_k = model.config.num_experts_per_tok
    router_margin = float((ranked[:, top_k - 1] - ranked[:, top_k]).min())
    return {"position": at, "tokens": [one[at], other[at]], "logit_gap": gap, "router_margin": router_margin}


def main() -> None:
    """Run everything, print what was found, and write it with --out."""
    parser = argparse.ArgumentParser(description="`hrm run` under kills, compared with an undisturbed run.")
    parser.add_argument("--quick", action="store_true", help="200 requests and 3 kills.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = _QUICK if options.quick else _FULL
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = make_job(folder, size, options.seed)
        whole = undisturbed(command, folder / "whole.jsonl")
        print(f"undisturbed: {whole['wall_s']:.1f} s, {whole['segments']} segments", flush=True)
        killed = disturbed(command, folder / "killed.jsonl", size, rng)
        same = compare(folder, size, folder / "whole.jsonl", folder / "killed.jsonl")
        shown = " ".join(command).replace(str(folder), "JOB").replace(sys.executable, "python")
    ties = [each for each in same["differing"] if min(each["logit_gap"], each["router_margin"]) < _TIE]
    growth = whole["resident_bytes"]["growth"]
    fine = (
        same["missing"] == same["repeated"] == same["wrong_length"] == 0
        and len(ties) == len(same["differing"])
        and abs(growth) < _MARGIN
    )
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_facts(),
        "commit": commit(),
        "seed": options.seed,
        "job": f"{shown} FILE",
        "passed": fine,
        "compared": same,
        "undisturbed": whole,
        "killed": killed,
    }
    print(
        f"{same['identical']} of {same['requests']} answers identical, {len(same['differing'])} different "
        f"({len(ties)} at a tie), {same['missing']} missing, {same['repeated']} repeated; memory {growth:+.1%}"
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
