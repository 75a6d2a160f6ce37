"""The proof on a GPU, rehearsed without one: end to end, killed and resumed, and what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from benchmarks import gpu, gpu_outside, gpu_validate
from benchmarks.gpu_cases import Cap, Chosen, Limits, choose, planning_machine
from benchmarks.gpu_proof import Proof
from benchmarks.gpu_report import system_ratios
from benchmarks.gpu_upper import layers_on_device
from executor import bench as bench_module
from executor import probe as probe_module
from experiments.records import OutOfTime, Records
from experiments.rooflines import kernel_shares
from experiments.validation_runs import expected
from hrm import Hardware, MoEModel
from hrm.catalog import load_model
from hrm.errors import DoesNotFit, HrmError, InvalidValue
from hrm.memory import batch_footprint
from hrm.systems import SYSTEMS
from simulator import Timeline

_ROOT = Path(__file__).resolve().parents[2]
_CAP = "12MiB"
_SYSTEMS = {"moe-lightning", "fastdecode", "flexgen", "flexgen-c", "deepspeed-zero"}


def _command(out: Path, *more: str) -> list[str]:
    return [
        "--device=cpu", "--model=mixtral-tiny", f"--out={out}", f"--cap={_CAP}", "--gen-len=4", "--long-gen-len=6",
        "--most-requests=16", "--batch-sizes=1,3", "--link-bandwidth=1GB/s", "--time-budget=3000", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A rehearsal that is killed in its third case and goes on: its folder, and the cases in the order they ran."""
    out = tmp_path_factory.mktemp("proof")
    ran: list[str] = []
    run_case = gpu_validate._run

    def dying(proof: Any, cap: Cap, case: Any) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(case.name)
        return run_case(proof, cap, case)

    def noting(proof: Any, cap: Cap, case: Any) -> dict[str, Any]:
        ran.append(case.name)
        return run_case(proof, cap, case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_module, "_PASSES", 1)
        patch.setattr(probe_module, "_QUIET", 1.1)
        patch.setattr(bench_module, "_COLD_BYTES", 16 * 2**20)
        patch.setattr(bench_module, "_TIME_PER_POINT", 0.001)
        patch.setattr(gpu_validate, "_run", dying)
        with pytest.raises(KeyboardInterrupt):
            gpu.main(_command(out, "--part=validate"))
        assert len(ran) == 2
        with (out / "records.jsonl").open("a") as stream:
            stream.write('{"kind": "run", "cap"')  # as a kill leaves a line
        patch.setattr(gpu_validate, "_run", noting)
        assert gpu.main(_command(out, "--part=validate")) == 0
        assert gpu.main(_command(out, "--part=upper")) == 0
    return out, ran


def test_a_rehearsal_goes_on_after_a_kill_and_reports(proof: tuple[Path, list[str]]) -> None:
    """No case is run twice; every one is predicted, and within the cap."""
    out, ran = proof
    assert len(ran) == len(set(ran)) and ran[0] == "planned"
    assert gpu.main(_command(out, "--part=validate", "--part=report")) == 0
    results = out / "results"
    found = json.loads((results / "validation.json").read_text())
    assert [row["name"] for row in found["cases"]] == [f"{_CAP}: {name}" for name in ran]
    assert not found["failed"]
    assert {row["system"] for row in found["cases"] if row["setting"] == f"{_CAP}: padded"} == _SYSTEMS
    for row in found["cases"]:
        assert row["error"] == pytest.approx(row["predicted_tok_s"] / row["measured_tok_s"] - 1)
        assert 0 < row["peak_of_cap"] <= 1 and row["device_budget_bytes"] == 12 * 2**20
        assert 0 <= row["h2d_busy_in_decode"] <= 1 and row["num_layers"] == 3
        assert row["ffn"]["near"] in ("compute", "memory")
        assert row["loss_items"]["measured_s"] > 0 and row["loss"]
        bounded = row["system"] in ("moe-lightning", "fastdecode")
        assert (row["share_of_bound"] is not None) == bounded
    most = {row["name"]: row["weights_on_gpu"] for row in found["cases"]}
    assert most[f"{_CAP}: r_w 0"] == 0 < max(most.values())
    predicted, measured = (Timeline.load(results / f"{side}-{_CAP}.json.gz") for side in ("predicted", "measured"))
    assert predicted.schedule == measured.schedule
    assert (predicted.source, measured.source) == ("simulated", "measured")
    figures = (f"gantt-{_CAP}.png", "decode_and_bound.png", "roofline.png", "predicted_vs_measured.png")
    assert all((results / name).stat().st_size > 0 for name in figures)
    assert json.loads((results / "config.json").read_text())["num_hidden_layers"] == 3
    assert Hardware.from_file(results / "machine.json").shared_memory
    with (results / "cases.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(ran)
    text = (results / "summary.md").read_text()
    for wanted in ("rehearsal", "mean absolute error", "flexgen-c", "published, T4", "## Cases"):
        assert wanted in text
    assert {r["who"] for r in found["upper"]} == {"transformers", "executor"}
    assert all(r["decode_tok_s"] > 0 for r in found["upper"])


def test_a_command_stops_before_its_time_is_up(
    proof: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has ended is not run again, and nothing begins that would take too long."""
    out = _copy(proof[0], tmp_path)
    monkeypatch.setattr(gpu_validate, "_run", lambda *_: pytest.fail("ran again"))
    assert gpu.main(_command(out, "--part=validate")) == 0
    monkeypatch.setattr(gpu_validate, "_chosen", lambda *_: _chosen_with(out, fast=1.0, slow=1e6))
    monkeypatch.setattr(Proof, "prober", None)
    monkeypatch.setattr(Proof, "weights", None)
    monkeypatch.setattr(gpu_validate, "_run", lambda *_: {"fine": True})
    assert gpu.main(_command(out, "--part=validate")) == 4
    assert not _rows(out, case="slow")


def test_what_no_command_has_time_for_is_left_out(
    proof: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeating a command comes to an end, and a larger budget takes the case up again."""
    out = _copy(proof[0], tmp_path)
    monkeypatch.setattr(gpu_validate, "_chosen", lambda *_: _chosen_with(out, slow=1e6, slower=2e6))
    monkeypatch.setattr(Proof, "prober", None)
    monkeypatch.setattr(Proof, "weights", None)
    command = _command(out, "--part=validate")
    monkeypatch.setattr(gpu_validate, "_run", lambda *_: pytest.fail("has no time"))
    assert [gpu.main(command) for _ in range(3)] == [4, 0, 0]
    (row,) = _rows(out, case="slow")
    assert row["no_time"].startswith("would take 1000000 s, and a command of 3000 s has ")
    assert gpu.main([*command, "--part=report"]) == 0
    assert "slower: would take 2000000 s" in (out / "results" / "summary.md").read_text()
    monkeypatch.setattr(gpu_validate, "_run", lambda *_: {"fine": True})
    assert gpu.main([*command, "--time-budget=1500000"]) == 4
    assert _rows(out, case="slow")[-1]["fine"]


def test_a_budget_that_start_up_takes_does_not_stop_everything(tmp_path: Path) -> None:
    """What nobody can predict is begun by a command in which nothing else has ended."""
    made = gpu._proof(gpu._options(_command(tmp_path)), 0.0)
    made.options.time_budget = 1.0
    assert made.once(lambda: {"fine": True}, kind="test", number=1)["fine"]
    with pytest.raises(OutOfTime):
        made.once(lambda: {"fine": True}, kind="test", number=2)


def test_other_limits_choose_anew(
    proof: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A case that was left out for a limit is taken up when the limit is lifted, the others keep their results."""
    out = _copy(proof[0], tmp_path)
    took = _rows(out, kind="cases")[-1]["seconds"]
    ran: list[str] = []
    monkeypatch.setattr(gpu_validate, "_run", lambda proof, cap, case: ran.append(case.name) or {"fine": True})
    made = gpu._proof(gpu._options(_command(out)), 0)
    made.options.seconds_per_cap = 0.6 * sum(took)
    few = gpu_validate._chosen(made, Cap.parse(_CAP))
    assert few is not None and few.left_out and len(few.cases) < len(took)
    all_again = gpu_validate._chosen(gpu._proof(gpu._options(_command(out)), 0), Cap.parse(_CAP))
    assert all_again is not None and len(all_again.cases) == len(took) and len(_rows(out, kind="cases")) == 3
    assert gpu.main(_command(out, "--part=validate")) == 0 and not ran


def test_a_report_names_several_versions_and_what_was_disturbed(proof: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Results of another commit count, under its name; the error without disturbed cases stands beside the other."""
    out = _copy(proof[0], tmp_path)
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines() if '"row"' in line]
    for line, disturbed in zip(lines, [True] + [False] * len(lines), strict=False):
        line["row"]["disturbed"] = disturbed
    old = lines[0] | {"commit": "0123456789"}
    with (out / "records.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in [old, *lines[1:]])
    assert gpu.main(_command(out, "--part=report")) == 0
    found = json.loads((out / "results" / "validation.json").read_text())
    assert len(found["cases"]) == len(lines) and found["commits"]["0123456789"] == 1
    assert found["cases"][0]["commit"] == "0123456789"
    text = (out / "results" / "summary.md").read_text()
    assert "**Results of 2 versions of the code" in text.partition("Probe:")[0]
    quiet = found["undisturbed"]["mean_abs_error"]
    assert f"without the 1 that others disturbed {quiet:.1%}" in text and "planned (disturbed)" in text


def _copy(out: Path, folder: Path) -> Path:
    """A folder of records that a test may add to."""
    return Path(shutil.copytree(out, folder / "copy"))


def _rows(out: Path, **keys: Any) -> list[dict[str, Any]]:
    """Rows on disk with these entries."""
    found = []
    for line in (out / "records.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the line that a kill cut short
    return [row for row in found if all(row.get(key) == value for key, value in keys.items())]


def _chosen_with(out: Path, **seconds: float) -> Chosen:
    """The first case that was chosen, under these names and so long."""
    case = Chosen.from_dict(_rows(out, kind="cases")[0]).cases[0]
    cases = tuple(replace(case, name=name) for name in seconds)
    return Chosen(cases=cases, seconds=tuple(seconds.values()), left_out={})


def test_a_failure_is_a_result(proof: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is recorded and passed over; what nobody expected is recorded and raised, once."""
    made = gpu._proof(gpu._options(_command(proof[0])), 0.0)
    made.options.time_budget = float("inf")

    def refuses() -> dict[str, Any]:
        raise DoesNotFit("too large.")

    def breaks() -> dict[str, Any]:
        raise RuntimeError("CUDA error: something\nand more")

    assert made.once(refuses, kind="test", number=1)["failed"] == "too large."
    with pytest.raises(RuntimeError, match="CUDA error"):
        made.once(breaks, kind="test", number=2)
    assert made.once(breaks, kind="test", number=2)["failed"] == "RuntimeError: CUDA error: something"
    made.options.retry = True
    assert made.once(lambda: {"fine": True}, kind="test", number=2)["fine"]
    again = gpu._proof(gpu._options(_command(proof[0])), 0.0)
    again.options.time_budget = float("inf")
    assert again.once(breaks, kind="test", number=2)["fine"]
    assert "failed" in again.once(breaks, kind="test", number=1)
    again.records.add(kind="upper", who="executor", batch_size=7, failed="too large.")
    again.records.add(kind="upper", who="executor", batch_size=7, decode_tok_s=1.0)
    third = gpu._proof(gpu._options(_command(proof[0])), 0.0)
    assert [row["decode_tok_s"] for row in third.latest("upper") if row["batch_size"] == 7] == [1.0]
    made.options.time_budget = 0.0
    with pytest.raises(OutOfTime):
        made.once(lambda: {}, kind="test", number=3)


def test_exact_compares_families_under_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain family and one with latent attention answer as transformers does; the table says so."""
    from benchmarks import gpu_exact

    policies = gpu_exact._policies
    monkeypatch.setattr(gpu_exact, "SYSTEMS", {name: SYSTEMS[name] for name in ("moe-lightning", "flexgen")})
    monkeypatch.setattr(gpu_exact, "_policies", lambda *args: dict(list(policies(*args).items())[-2:]))
    monkeypatch.setattr(gpu_exact, "_GEN_LEN", 4)
    out = tmp_path / "out"
    assert gpu.main(_command(out, "--part=exact")) == 0
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert {row["family"] for row in rows} == {"mixtral", "deepseek-v2"} and len(rows) == 8
    assert all(row["equal"] == row["requests"] == 6 for row in rows)
    made = gpu._proof(gpu._options(_command(out)), 0.0)
    made.records.add(**rows[0] | {"equal": 5})
    capsys.readouterr()
    assert gpu.main(_command(out, "--part=exact")) == 5
    assert capsys.readouterr().err.splitlines()[-1] == "failed: exact: mixtral, moe-lightning, " + rows[0]["policy"]


def test_programs_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the sanitizer nor Accelerate is needed: a record says that it is missing, until it is there."""
    monkeypatch.setattr(gpu_outside, "find_sanitizer", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert gpu.main(_command(tmp_path, "--part=sanitizer", "--part=peers")) == 0
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [row["missing"] for row in rows] == [
        "compute-sanitizer was not found",
        "compute-sanitizer was not found",
        "accelerate is not installed; its runs are left out",
    ]
    assert gpu.main(_command(tmp_path, "--part=sanitizer", "--part=peers")) == 0
    assert len(_rows(tmp_path)) == 3
    monkeypatch.setattr(gpu_outside, "find_sanitizer", lambda: "tool")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "there")
    codes = {"memcheck": 0, "racecheck": 9}
    monkeypatch.setattr(gpu_outside, "_sanitize", lambda _proof, _tool, name: {"exit_code": codes[name]})
    monkeypatch.setattr(gpu_outside, "_benchmark", lambda _: {"exit_code": 0})
    assert gpu.main(_command(tmp_path, "--part=sanitizer", "--part=peers")) == 5
    assert [row["exit_code"] for row in _rows(tmp_path)[3:]] == [0, 9, 0]
    assert capsys.readouterr().err.splitlines()[-1] == "failed: sanitizer: racecheck"
    monkeypatch.setattr(gpu_outside, "find_sanitizer", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert gpu.main(_command(tmp_path, "--part=sanitizer", "--part=peers")) == 5


def test_a_program_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    """A shell's child holds no file, no memory and no device afterwards."""
    noted = tmp_path / "child"
    row = gpu_outside._call(["sh", "-c", f"sleep 60 & echo $! > {noted}; wait"], timeout=1.0)
    assert row == {"failed": "was not done after 1 s"}
    state = Path("/proc") / noted.read_text().strip() / "stat"
    for _ in range(100):
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                break  # killed; whoever inherits it has not read that yet
        except OSError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_a_benchmark_that_comes_no_further_is_not_begun_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is repeated while the benchmark adds to its files, and no longer."""
    made = gpu._proof(gpu._options(_command(tmp_path)), 0.0)
    made.options.time_budget = float("inf")
    work = tmp_path / "peers"
    work.mkdir()

    def further(*_: Any, **__: Any) -> dict[str, Any]:
        (work / "runs.jsonl").write_text("{}\n")
        (tmp_path / "peers.json").write_text('{"finished": false}')
        return {"exit_code": 0}

    monkeypatch.setattr(gpu_outside, "_call", further)
    with pytest.raises(OutOfTime):
        gpu_outside._benchmark(made)
    assert gpu_outside._benchmark(made)["failed"].startswith("nothing of it ends within")


def test_the_sanitizer_runs_a_short_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code and last lines are recorded; a stand-in runs what it is given."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\nshift 4\n"$@" || exit 9\necho "ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu_outside, "_TOOLS", ("memcheck",))
    assert gpu.main(_command(tmp_path / "out", "--part=sanitizer")) == 0
    row = json.loads((tmp_path / "out" / "records.jsonl").read_text())
    assert row["exit_code"] == 0 and row["last_lines"][-1] == "ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part=validat"], "'validat'"),
        (["--cap=sixteen"], "sixteen"),
        (["--layers=99"], "'layers' must be between 1 and 3"),
        (["--gen-len=0"], "'gen-len' must be >= 1"),
        (["--part=report"], "no case has ended"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Before anything is measured."""
    with pytest.raises(HrmError, match=message) as error:
        gpu.main(_command(tmp_path, *arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batch-sizes=0,-3", "'0,-3' is no list of batch sizes"),
        ("--batch-sizes=abc", "write e.g. '1,8,32'"),
        ("--batch-sizes=4,", "write e.g. '1,8,32'"),
        ("--link-bandwidth=nope", "'nope'"),
    ],
)
def test_bad_options_are_refused_with_an_example(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the parser, before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        gpu.main(_command(tmp_path, argument))
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and argument.partition("=")[0] in last


def test_without_a_gpu_nothing_large_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValue, match="there is no GPU here; --device cpu with a small --model"):
        gpu.main([f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_cap_that_holds_nothing_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before anything is probed, and the next cap and part have their turn."""
    monkeypatch.setattr(Proof, "machine", property(lambda _: pytest.fail("probed")))
    upper: list[Any] = []
    monkeypatch.setattr(gpu, "upper", upper.append)
    command = _command(tmp_path, "--cap=1KiB", "--part=validate", "--part=upper")
    command.remove(f"--cap={_CAP}")
    command.append("--cap=2KiB")
    assert gpu.main(command) == 5 and len(upper) == 1
    failed = [row["failed"] for row in _rows(tmp_path, kind="cases")]
    assert len(failed) == 2 and failed[0].startswith("a single request of mixtral-tiny")
    assert capsys.readouterr().err.splitlines()[-1] == "failed: cap 1KiB; cap 2KiB"


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    """A script of the checkout: no entry point, no installation, no traceback."""
    command = [sys.executable, str(_ROOT / "benchmarks" / "gpu.py"), *_command(tmp_path, "--part=validat")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("benchmarks/gpu.py: error: ") and done.stderr.count("\n") == 1


_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "pulp", "joblib", "accelerate", "highspy", "ipywidgets"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
sys.path.insert(0, ".")
import benchmarks.gpu
import experiments.cli
from hrm import Hardware, Workload, plan
from hrm.catalog import load_model
model, machine = load_model("mixtral-tiny"), Hardware.from_catalog("cpu-2core")
print(plan(model, machine, Workload.parse("16,4"), max_batch_size=4).policy)
"""


def test_libraries_that_a_gpu_machine_may_lack() -> None:
    """The proof and the command that the sanitizer runs need torch, transformers and the usual, and nothing else."""
    done = subprocess.run([sys.executable, "-c", _WITHOUT], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("N=")


# -- pieces --------------------------------------------------------------------------------------------

_H100 = "h100-sxm-1x"


def _machine(gibibytes: int) -> Hardware:
    """An H100's published rates as if they had been measured, and so much host memory."""
    machine = Hardware.from_catalog(_H100).with_capacity(cpu_bytes=gibibytes * 2**30)
    return replace(machine, rate_sets={"measured": machine.rates()})


@cache
def _choose(cap: str, **more: Any) -> tuple[MoEModel, Chosen]:
    """What would be run on an H100's data sheet with 128 GiB of host memory."""
    model, machine = load_model("mixtral-8x7b"), _machine(128)
    held = int(model.num_parameters * model.dtype_bytes)
    limits = Limits(gen_len=32, long_gen_len=128, held=held, **more)
    return model, choose(model, machine, Cap.parse(cap), None, limits)


@pytest.mark.parametrize("cap", ["16GiB", "24GiB", "none"])
def test_cases_of_the_whole_model_fit(cap: str) -> None:
    """Every case fits the cap, and its requests host memory beside all weights."""
    model, chosen = _choose(cap)
    names = [case.name for case in chosen.cases]
    assert names[0] == "planned" and "gen 128" in names
    assert {case.system for case in chosen.cases if case.setting == "padded"} == _SYSTEMS
    assert any(case.weights_on_gpu == 0 for case in chosen.cases)
    assert any(case.attention_on_gpu and case.system == "moe-lightning" for case in chosen.cases)
    room = {"16GiB": 16 * 2**30, "24GiB": 24 * 2**30}.get(cap, 81559 * 2**20)
    for case in chosen.cases:
        need = batch_footprint(model, case.shape(), case.policy, system=case.system)
        assert need.gpu_bytes <= 0.92 * room * (1 + 1e-6), case.name
        beside = need.cpu_bytes - need.cpu["streamed_experts"]
        assert model.num_parameters * 2 + beside <= 0.93 * 128 * 2**30, case.name
        assert case.pinned_weights == (not case.system.startswith("flexgen"))
        lens = case.prompt_lens
        assert lens == (418,) if case.setting == "padded" else (round(sum(lens) / len(lens)), max(lens)) == (77, 418)
    assert Chosen.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


def test_the_timeline_of_a_long_run_is_whole() -> None:
    """A prediction that is set beside a run has every task of it, however many."""
    model, chosen = _choose("16GiB")
    here = planning_machine(_machine(128), Cap.parse("16GiB"), None)
    prediction, rates = expected(chosen.cases[0], model, here)
    assert len(prediction.timeline.schedule) == prediction.num_tasks > 60_000
    assert not rates.stages_weights
    assert prediction.simulated_s == pytest.approx(chosen.seconds[0], rel=1e-6)


def test_cases_are_left_out_by_their_time() -> None:
    """Those that take too long alone, and those at the end when all take too long together."""
    _, everything = _choose("16GiB")
    _, fewer = _choose("16GiB", all_s=sum(everything.seconds[:4]), longest_s=max(everything.seconds) - 1)
    assert len(fewer.cases) < len(everything.cases)
    assert any("would take" in why for why in fewer.left_out.values())
    assert set(fewer.cases) <= set(everything.cases)


def test_a_cap_without_room_and_a_host_without_room() -> None:
    """One line says what is too small."""
    with pytest.raises(HrmError) as error:
        _choose("1GiB")
    assert "\n" not in str(error.value)
    model = load_model("mixtral-8x7b")
    small = _machine(64)
    limits = Limits(gen_len=32, long_gen_len=128, held=int(90e9))
    with pytest.raises(InvalidValue, match="take fewer --layers"):
        choose(model, small, Cap.parse("16GiB"), None, limits)
    with pytest.raises(HrmError):
        Cap.parse("-1GiB")


def test_published_ratios_stand_beside_ours() -> None:
    """Padded cases of one cap; the paper's ratios at the same generation length."""
    base = {"cap": "16GiB", "setting": "16GiB: padded", "gen_len": 32}
    rows = [
        base | {"system": "moe-lightning", "measured_tok_s": 30.0, "predicted_tok_s": 28.0},
        base | {"system": "flexgen", "measured_tok_s": 10.0, "predicted_tok_s": 14.0},
        base | {"system": "fastdecode", "measured_tok_s": 20.0, "predicted_tok_s": 20.0},
    ]
    flexgen, fastdecode = system_ratios(rows)
    assert (flexgen["measured"], flexgen["predicted"]) == (3.0, 2.0)
    assert flexgen["T4"] == pytest.approx(15.609 / 12.1)
    assert "T4" not in fastdecode


def test_layers_on_a_device() -> None:
    """As many as fit beside what lies outside all layers."""
    model = load_model("mixtral-8x7b")
    assert layers_on_device(model, 60e9) == 20
    assert layers_on_device(model, 1e12) == 32 and layers_on_device(model, 1e6) == 1


def test_kernel_shares_of_a_committed_run() -> None:
    """FLOP/s and bytes/s of the tasks' own time, against the probe's ceilings."""
    folder = _ROOT / "experiments" / "measured" / "cpu-2core"
    timeline, machine = Timeline.load(folder / "measured.json"), Hardware.from_file(folder / "machine.json")
    found = kernel_shares(timeline, machine)
    row = timeline.by_op().loc[("decode", "PostAttn")]
    assert found["flops_per_s"] == pytest.approx(row["gflop_per_s"] * 1e9)
    assert found["of_read"] == pytest.approx(found["bytes_per_s"] / float(machine.gpu.bandwidth))
    assert found["near"] == ("compute" if found["of_gemm"] > found["of_read"] else "memory")


def test_records_survive_a_line_that_was_cut_short(tmp_path: Path) -> None:
    """What was cut is lost, what follows is not; other conditions' rows are left alone."""
    path = tmp_path / "records.jsonl"
    Records(path, {"a": 1}).add(kind="run", number=1)
    with path.open("a") as stream:
        stream.write('{"kind": "ru')
    again = Records(path, {"a": 1})
    again.add(kind="run", number=2)
    Records(path, {"a": 2}).add(kind="run", number=3)
    assert [row["number"] for row in Records(path, {"a": 1}).rows] == [1, 2]
    Records(path, {"a": 1}).finish()
    assert not Records(path, {"a": 1}).rows and Records(path, {"a": 2}).find(number=3)
    Records(path, {"a": 2}).finish()
    assert not path.exists()
