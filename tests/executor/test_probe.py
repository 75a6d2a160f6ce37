"""The probe yields a complete, loadable hardware file from real measurements."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from executor import bench as bench_module
from executor import probe as probe_module
from executor.contention import Crowd
from executor.probe import Prober
from experiments.cli import main
from hrm import Hardware, MoEModel, Workload, plan


def test_probe_measures_and_round_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A (shortened) probe of this machine gives positive rates, saves, loads, and can be planned with."""
    monkeypatch.setattr(probe_module, "_PASSES", 1)
    monkeypatch.setattr(bench_module, "_COLD_BYTES", 32 * 2**20)
    monkeypatch.setattr(bench_module, "_TIME_PER_POINT", 0.002)
    model = MoEModel.from_catalog("mixtral-tiny")
    notes: list[str] = []
    prober = Prober(model, device=torch.device("cpu"), progress=notes.append)
    machine = prober.hardware()
    rates = machine.rates()
    assert rates.provenance == "measured" and machine.shared_memory
    assert rates.cores is not None and 1 <= rates.cores.peak <= 8
    assert 0 < rates.h2d_bandwidth == rates.copy_bandwidth
    assert min(y for _, y in rates.gpu_experts.points) > 0
    assert any("all lanes at once" in note for note in notes)
    machine.save(tmp_path / "here.json")
    again = Hardware.from_file(tmp_path / "here.json")
    assert again.rates() == rates
    assert plan(model, again.with_link(1e9), Workload.uniform(8, 4)).policy.batch_size >= 1
    fresh = prober.refresh(passes=1).rates()
    assert fresh.cores == rates.cores and fresh.gpu_gemm != rates.gpu_gemm


def test_with_a_gpu_no_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lanes on shared cores do together is measured where they share them, and there alone."""
    timed: list[str] = []

    class Lanes:
        def __init__(self, bench: SimpleNamespace) -> None:
            pass

        def hand_over(self) -> float:
            return 1e-5

        def shared_cores(self) -> list[tuple[float, float]]:
            timed.append("cores")
            return [(2.0, 1.5)]

        def processors(self) -> list[tuple[float, float]]:
            return []

        def memory_traffic(self) -> float:
            return 1e10

    def crowd(cuda: bool) -> Crowd:
        bench = SimpleNamespace(cuda=cuda, one_pass=lambda: {})
        monkeypatch.setattr(probe_module, "Bench", lambda model, device: bench)
        monkeypatch.setattr(probe_module, "hardware_of", lambda bench, spent, crowd, share: crowd)
        return Prober(MoEModel.from_catalog("mixtral-tiny"), device=torch.device("cpu")).hardware()  # type: ignore[return-value]

    monkeypatch.setattr(probe_module, "Contention", Lanes)
    assert crowd(cuda=True).processors is None and not timed
    assert crowd(cuda=False).cores.points == ((1.0, 1.0), (2.0, 1.5)) and timed


def test_probe_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`hrm probe` prints a readable table and writes a file that loads."""
    monkeypatch.setattr(probe_module, "_PASSES", 1)
    monkeypatch.setattr(bench_module, "_COLD_BYTES", 16 * 2**20)
    monkeypatch.setattr(bench_module, "_TIME_PER_POINT", 0.001)
    out = tmp_path / "here.json"
    assert main(["probe", "--model", "mixtral-tiny", "--device", "cpu", "--out", str(out)]) == 0
    assert "lanes at once" in capsys.readouterr().out
    assert Hardware.from_file(out).rates().provenance == "measured"
