"""The parts of `benchmarks/gpu.py` that other programs do: compute-sanitizer, and the benchmark beside Accelerate."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_exact import tiny_checkpoint
from benchmarks.gpu_proof import Proof, without_result
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
            needs = min(_SANITIZER_S, proof.options.time_budget / 2)
            row = proof.once(partial(_sanitize, proof, tool, name), expected=needs, **keys)
        say(f"sanitizer: {name}: {without_result(row) or 'exit code ' + str(row['exit_code'])}")


def _sanitize(proof: Proof, tool: str, name: str) -> dict[str, Any]:
    """A short run of the tiny model, streamed and resident weights, under a tool; in bfloat16, as the real one is."""
    folder = tiny_checkpoint(proof.options.out, dtype="bfloat16")
    run = [
        sys.executable, "-m", "experiments.cli", "run", "--checkpoint", str(folder),
        "--random-prompts", "2,5", "--gen-len", "3", "--batch-size", "2", "--micro-batch-size", "1",
        "--weights-on-gpu", "0.4", "--device", proof.options.device.type,
    ]  # fmt: skip
    command = [tool, "--tool", name, "--error-exitcode", str(_FOUND_ERRORS), *run]
    return _call(command, timeout=max(1.0, min(_SANITIZER_S, proof.left)))


def _call(command: Sequence[str], *, timeout: float) -> dict[str, Any]:
    """Exit code and last lines of a program, which leaves no process behind."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with _terminated_by_exception(), subprocess.Popen(command, cwd=_ROOT, start_new_session=True, **pipes) as program:
        try:
            stdout, stderr = program.communicate(timeout=timeout)
        except BaseException as error:
            # A tool's own children would go on using the device.
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                return {"failed": f"was not done after {timeout:.0f} s"}
            raise
    lines = (stdout + stderr).strip().splitlines()
    return {"exit_code": program.returncode, "last_lines": lines[-_LAST_LINES:]}


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM raise, as Ctrl-C does: a program in a session of its own would outlive this one."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def peers(proof: Proof) -> None:
    """The benchmark beside Accelerate, as it stands; it keeps its own records and goes on where it stopped."""
    keys = {"kind": "peers"}
    if importlib.util.find_spec("accelerate") is None:
        row = proof.records.find(**keys) or proof.records.add(
            **keys, missing="accelerate is not installed; its runs are left out"
        )
    else:
        proof.drop()  # another process needs the memory
        row = proof.once(partial(_benchmark, proof), expected=2 * _SPARE_S if proof.options.cuda else 0.0, **keys)
    say(f"peers: {without_result(row) or 'exit code ' + str(row['exit_code'])}")


def _benchmark(proof: Proof) -> dict[str, Any]:
    """One call; raises `OutOfTime` if it needs another one, which comes further."""
    options, out, work = proof.options, proof.options.out / "peers.json", proof.options.out / "peers"
    budget = proof.left - _SPARE_S if proof.options.cuda else min(proof.left, 600.0)
    command = [
        sys.executable, str(_ROOT / "benchmarks" / "executor.py"), f"--work={work}", f"--out={out}",
        f"--device={options.device.type}", f"--time-budget={budget:.0f}",
    ]  # fmt: skip
    if not options.cuda:
        machine = options.out / "machine.json"
        command += [f"--checkpoint={tiny_checkpoint(options.out)}", *_REHEARSAL]
        command += [f"--hardware={machine}"] if machine.exists() else []
    say("peers: benchmarks/executor.py")
    before = _sizes(work)
    row = _call(command, timeout=budget + _SPARE_S)
    if row.get("exit_code") == 0 and not json.loads(out.read_text())["finished"]:
        if proof.ran or _sizes(work) != before:
            raise OutOfTime
        return {"failed": f"nothing of it ends within {budget:.0f} s; run it again with a larger --time-budget"}
    return row


def _sizes(folder: Path) -> dict[str, int]:
    """Files and their sizes: checkpoints, and records to which every run that ends adds a line."""
    return {str(file): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
