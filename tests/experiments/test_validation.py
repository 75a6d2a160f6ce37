"""A validation end to end on the tiny model: files, consistency, and going on after a kill."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from executor import bench as bench_module
from executor import probe as probe_module
from executor.checkpoint import make_checkpoint
from experiments import validation, validation_runs
from experiments.kept_runs import KeptRuns
from experiments.records import Records
from experiments.validation_cases import Case
from experiments.validation_runs import Run, Runs
from hrm.catalog import model_config
from hrm.errors import CheckpointError, InvalidValue
from simulator import Timeline


@pytest.fixture
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real measurements, but few and on little memory; one try per case, no waiting."""
    monkeypatch.setattr(probe_module, "_PASSES", 1)
    monkeypatch.setattr(bench_module, "_COLD_BYTES", 16 * 2**20)
    monkeypatch.setattr(bench_module, "_TIME_PER_POINT", 0.001)
    monkeypatch.setattr(validation_runs, "_MOST_TRIES", 1)
    monkeypatch.setattr(validation, "_PATIENCE_QUICK", 0)


def test_quick_validation_and_going_on_after_a_kill(
    tmp_path: Path, short_probe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies after its first case goes on with the second, and leaves whole, consistent results."""
    checkpoint = make_checkpoint(model_config("mixtral-tiny"), tmp_path / "tiny")
    out = tmp_path / "out"
    tried: list[str] = []
    run_case = Runs.measure
    monkeypatch.setattr(validation, "commit", lambda: "this")

    def dying(self: Runs, case: Case, **options: Any) -> Run:
        if tried:
            raise KeyboardInterrupt
        tried.append(case.name)
        return run_case(self, case, **options)

    monkeypatch.setattr(Runs, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        validation.run_validation(checkpoint=checkpoint, quick=True, device="cpu", out=out)
    assert tried == ["planned"] and not (out / "validation.json").exists()
    run, row = map(json.loads, (out / "cases.partial.jsonl").read_text().splitlines())
    assert "measured" in run and "row" in row
    conditions = row["conditions"]
    assert conditions["commit"] == "this"  # of another one the row would not count:
    assert not Records(out / "cases.partial.jsonl", conditions | {"commit": "another"}).rows

    def noting(self: Runs, case: Case, **options: Any) -> Run:
        tried.append(case.name)
        return run_case(self, case, **options)

    monkeypatch.setattr(Runs, "measure", noting)
    result = validation.run_validation(checkpoint=checkpoint, quick=True, device="cpu", out=out)
    assert tried == ["planned", "slow link", "streaming"] and result["commit"] == "this"
    assert not (out / "cases.partial.jsonl").exists()
    for row in result["cases"]:
        assert row["error"] == pytest.approx(row["predicted_tok_s"] / row["measured_tok_s"] - 1)
        assert row["peak_memory"]["device_bytes"] <= row["device_budget_bytes"]
    errors = [abs(row["error"]) for row in result["cases"]]
    assert result["mean_abs_error"] == pytest.approx(sum(errors) / 3)
    assert result["worst_abs_error"] == max(errors)
    assert json.loads((out / "validation.json").read_text())["cases"] == result["cases"]
    predicted, measured = (Timeline.load(out / f"{name}.json") for name in ("predicted", "measured"))
    assert predicted.schedule == measured.schedule
    assert (predicted.source, measured.source) == ("simulated", "measured")
    for name in ("gantt.png", "predicted_vs_measured.png", "predicted.trace.json", "machine.json", "cases.csv"):
        assert (out / name).stat().st_size > 0
    text = validation.render(result)
    assert "mean absolute error" in text and "slow link" in text


def test_of_several_rounds_the_quiet_ones_count(
    tmp_path: Path, short_probe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases take turns; each is known by its quiet run nearest to the median of all, or else by the quietest."""
    monkeypatch.setattr(validation, "QUICK", ("planned",))
    checkpoint = make_checkpoint(model_config("mixtral-tiny"), tmp_path / "tiny")
    result = validation.run_validation(checkpoint=checkpoint, quick=True, device="cpu", out=tmp_path / "out", rounds=3)
    [row] = result["cases"]
    assert len(row["rounds_tok_s"]) == 3 and row["attempts"] == 3
    assert row["measured_tok_s"] in row["rounds_tok_s"]

    @dataclass(frozen=True)
    class Told(Run):
        told: float = 0.0

        @property
        def disturbance(self) -> float:
            return self.told

    def known_by(*runs: tuple[float, float]) -> float:
        rest: dict[str, Any] = {"case": None, "timeline": None, "before": [{}], "after": [{}], "taken_by_others": 0.0}
        rest |= {"tokens": 100, "prefill_s": 0.0, "setup_s": 0.0, "peak_memory": {}, "budget": 1}
        made: list[Run] = [Told(decode_s=100 / tok_s, told=disturbance, **rest) for tok_s, disturbance in runs]
        return validation_runs._median(made).throughput_tok_s

    assert known_by((5.0, 0.2), (10.0, 0.1), (8.0, 0.3)) == 8.0
    assert known_by((5.0, 4.0), (10.0, 0.1), (8.0, 0.3)) == 8.0
    assert known_by((5.0, 0.1), (10.0, 4.0), (8.0, 0.3)) == 8.0
    assert known_by((5.0, 4.0), (10.0, 1.1), (8.0, 2.0)) == 10.0


def test_a_kill_between_rounds_loses_no_run(tmp_path: Path, short_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended is taken from disk as it was; one whose timeline is damaged is done again."""
    monkeypatch.setattr(validation, "QUICK", ("planned",))
    monkeypatch.setattr(validation, "commit", lambda: "this")
    checkpoint = make_checkpoint(model_config("mixtral-tiny"), tmp_path / "tiny")
    out = tmp_path / "out"
    case = Case(
        name="planned",
        setting="planned",
        batch_size=4,
        micro_batch_size=2,
        prompt_lens=(3, 5),
        gen_len=3,
        link_bandwidth=None,
    )
    monkeypatch.setattr(validation, "validation_cases", lambda *_: iter([case]))
    measured: list[Run] = []
    asked: list[int] = []
    # The package has a function of the module's name.
    module = importlib.import_module("executor.generate")
    run_case, run_prompts = Runs.measure, module.generate

    def counted(checkpoint: Any, prompts: list[list[int]], **options: Any) -> Any:
        asked.append(len(prompts))
        return run_prompts(checkpoint, prompts, **options)

    monkeypatch.setattr(module, "generate", counted)

    def mortal(self: Runs, case: Case, **options: Any) -> Run:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(run_case(self, case, **options))
        return measured[-1]

    def validate() -> dict[str, Any]:
        return validation.run_validation(checkpoint=checkpoint, quick=True, device="cpu", out=out, rounds=3)

    monkeypatch.setattr(Runs, "measure", mortal)
    with pytest.raises(KeyboardInterrupt):
        validate()
    assert not (out / "validation.json").exists()
    assert asked == [2, 4, 4]  # one micro-batch makes the process warm
    conditions = json.loads((out / "cases.partial.jsonl").read_text().splitlines()[0])["conditions"]
    kept = KeptRuns(Records(out / "cases.partial.jsonl", conditions), out / "runs.partial")
    back = kept.find(measured[0].case, 0)
    assert back is not None and kept.find(measured[0].case, 2) is None
    for field in fields(Run):
        if field.name != "timeline":
            assert getattr(back, field.name) == getattr(measured[0], field.name), field.name
    assert back.timeline.schedule == measured[0].timeline.schedule
    assert back.timeline.makespan == pytest.approx(measured[0].timeline.makespan)

    first = json.loads((out / "cases.partial.jsonl").read_text().splitlines()[0])["timeline"]
    (out / "runs.partial" / first).write_bytes(b"cut sh")
    old = list(measured)
    measured.clear()
    [row] = validate()["cases"]
    assert len(measured) == 2
    assert row["rounds_tok_s"] == [measured[0].throughput_tok_s, old[1].throughput_tok_s, measured[1].throughput_tok_s]
    assert not (out / "cases.partial.jsonl").exists() and not (out / "runs.partial").exists()


def test_no_rounds_are_refused(tmp_path: Path) -> None:
    """One line, before anything is probed."""
    with pytest.raises(InvalidValue, match="'rounds' must be >= 1: 0"):
        validation.run_validation(quick=True, out=tmp_path, rounds=0)


def test_what_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    """A folder that is no checkpoint: one line, and nothing is made."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        validation.run_validation(checkpoint=tmp_path / "empty", device="cpu", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
