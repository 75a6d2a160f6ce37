"""``hrm run`` on several processes: started by itself or by torchrun, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from executor.checkpoint import make_checkpoint
from experiments.cli import main
from hrm.catalog import model_config

_REQUESTS = ["--random-prompts", "8,6", "--gen-len", "12", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with clear-cut logits."""
    config = model_config("mixtral-tiny") | {"initializer_range": 0.08}
    return make_checkpoint(config, tmp_path_factory.mktemp("parallel") / "tiny", seed=3)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output lines of one process."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(["run", "--checkpoint", str(checkpoint), *_REQUESTS, "--out", str(out)]) == 0
    return out.read_text()


def _followers(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_rank_is_named_and_the_run_goes_on(checkpoint: Path, whole: str, tmp_path: Path) -> None:
    """SIGKILL of rank 1 in mid-run: one line within seconds, exit code 2, answers kept; --resume completes them."""
    out = tmp_path / "out.jsonl"
    run = ["run", "--checkpoint", str(checkpoint), *_REQUESTS, "--out", str(out)]
    command = [sys.executable, "-m", "experiments.cli", *run, "--tp", "2", "--link-bandwidth", "2MB/s"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            _until(lambda: out.exists() and out.stat().st_size > 0, 120)
            (follower,) = _followers(process.pid)
            os.kill(follower, signal.SIGKILL)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 2
    assert stdout == ""
    assert stderr.startswith("hrm: error: rank 1 of 2 was killed by SIGKILL")
    assert stderr.rstrip().endswith("--resume goes on.") and stderr.count("\n") == 1
    kept = out.read_text()
    assert 0 < kept.count("\n") < 8 and whole.startswith(kept)
    assert main([*run, "--resume"]) == 0
    assert out.read_text() == whole


def test_torchrun_starts_the_ranks(checkpoint: Path, whole: str, tmp_path: Path) -> None:
    """Under torchrun the command is one rank of several, and only rank 0 answers."""
    out = tmp_path / "out.jsonl"
    run = ["run", "--checkpoint", str(checkpoint), *_REQUESTS, "--out", str(out), "--json", "--link-bandwidth", "none"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "experiments.cli", *run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tp"] == 2 and result["requests"] == 8
    assert out.read_text() == whole


def test_refused_sizes(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that does not divide the heads, and one that contradicts the launcher's, are one line each."""
    run = ["run", "--checkpoint", str(checkpoint), *_REQUESTS]
    assert main([*run, "--tp", "3"]) == 2
    assert "does not split over 3 processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*run, "--tp", "4"]) == 2
    assert "--tp 4 and a launcher that has started 2 processes" in capsys.readouterr().err
