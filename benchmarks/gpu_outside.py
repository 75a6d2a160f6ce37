"""The parts of `benchmarks/gpu.py` that other programs do: compute-sanitizer, and the benchmark beside Accelerate."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_exact import tiny_checkpoint
from benchmarks.gpu_proof import Proof
from experiments.records import OutOfTime, say

__all__ = ["find_sanitizer", "peers", "sanitizer"]

_ROOT = Path(__file__).resolve().parents[1]
_TOOLS = ("memcheck", "racecheck")
_FOUND_ERRORS = 9
_LAST_LINES = 12
_SANITIZER_S = 240.0
_SPARE_S = 30.0
_REHEARSAL = (
    "--num-requests=4", "--gen-len=2", "--prompt-lens=3:6", "--device-memory=16MiB", "--rounds=1", "--paced-only"
)  # fmt: skip


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, or with the newest CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    there = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return str(there[-1]) if there else None


def sanitizer(proof: Proof) -> None:
    """One record per tool: its exit code and last lines, or that it was not found."""
    tool = find_sanitizer()
    for name in _TOOLS:
        keys = {"kind": "sanitizer", "tool": name}
        if tool is None:
            row = proof.records.find(**keys) or proof.records.add(**keys, missing="compute-sanitizer was not found")
        else:
            row = proof.once(partial(_sanitize, proof, tool, name), **keys)
        ended = row.get("missing") or row.get("failed") or f"exit code {row['exit_code']}"
        say(f"sanitizer: {name}: {ended}")


def _sanitize(proof: Proof, tool: str, name: str) -> dict[str, Any]:
    """A short run of the tiny model, streamed and resident weights, under a tool; in bfloat16, as the real one is."""
    proof.check_time(min(_SANITIZER_S, proof.options.time_budget / 2))
    folder = tiny_checkpoint(proof.options.out, dtype="bfloat16")
    run = [
        sys.executable, "-m", "experiments.cli", "run", "--checkpoint", str(folder),
        "--random-prompts", "2,5", "--gen-len", "3", "--batch-size", "2", "--micro-batch-size", "1",
        "--weights-on-gpu", "0.4", "--device", proof.options.device.type,
    ]  # fmt: skip
    command = [tool, "--tool", name, "--error-exitcode", str(_FOUND_ERRORS), *run]
    return _call(command, timeout=max(1.0, min(_SANITIZER_S, proof.left)))


def _call(command: Sequence[str], *, timeout: float) -> dict[str, Any]:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"was not done after {timeout:.0f} s"}
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"exit_code": done.returncode, "last_lines": lines[-_LAST_LINES:]}


def peers(proof: Proof) -> None:
    """The benchmark beside Accelerate, as it stands; it keeps its own records and goes on where it stopped."""
    keys = {"kind": "peers"}
    if importlib.util.find_spec("accelerate") is None:
        row = proof.records.find(**keys) or proof.records.add(
            **keys, missing="accelerate is not installed; its runs are left out"
        )
        say(f"peers: {row['missing']}")
        return
    proof.drop()  # another process needs the memory
    if proof.wanted(**keys):
        proof.check_time(2 * _SPARE_S if proof.options.cuda else 0.0)
        proof.once(partial(_benchmark, proof), **keys)


def _benchmark(proof: Proof) -> dict[str, Any]:
    """One call; raises `OutOfTime` if it needs another one."""
    options, out = proof.options, proof.options.out / "peers.json"
    budget = proof.left - _SPARE_S if proof.options.cuda else min(proof.left, 600.0)
    command = [
        sys.executable, str(_ROOT / "benchmarks" / "executor.py"), f"--work={options.out / 'peers'}", f"--out={out}",
        f"--device={options.device.type}", f"--time-budget={budget:.0f}",
    ]  # fmt: skip
    if not options.cuda:
        machine = options.out / "machine.json"
        command += [f"--checkpoint={tiny_checkpoint(options.out)}", *_REHEARSAL]
        command += [f"--hardware={machine}"] if machine.exists() else []
    say("peers: benchmarks/executor.py")
    row = _call(command, timeout=budget + _SPARE_S)
    if row.get("exit_code") == 0 and not json.loads(out.read_text())["finished"]:
        raise OutOfTime
    return row
