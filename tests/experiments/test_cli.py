"""The command line: what it prints, what it refuses, and what a killed run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from experiments.cli import main
from experiments.options import OutFile
from hrm.catalog import load_hardware
from hrm.errors import DoesNotFit, InvalidValue

L4 = ["--model", "mixtral-8x7b", "--hardware", "gcp-l4-1x", "--workload", "mtbench"]
TINY = ["--model", "mixtral-tiny", "--hardware", "gcp-l4-1x", "--workload", "8,5"]
GIVEN = ["--batch-size", "4", "--micro-batch-size", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral-tiny checkpoint that the command made."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    assert main(["make-checkpoint", "--model", "mixtral-tiny", "--out", str(folder), "--json"]) == 0
    return folder


def test_start_up_imports_nothing_heavy() -> None:
    """Importing the command line loads neither torch nor pandas nor matplotlib."""
    code = (
        "import experiments.cli, sys; "
        "print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize(
    ("command", "name"), [("models", "mixtral-8x7b"), ("hardware", "gcp-l4-1x"), ("workloads", "mtbench")]
)
def test_catalog_is_listed(hrm: Any, hrm_json: Any, command: str, name: str) -> None:
    """Each catalog prints as a table and as JSON."""
    assert name in hrm(command).out
    assert name in [entry["name"] for entry in hrm_json(command)[command]]


def test_plan_has_the_keys_of_the_contract(hrm_json: Any) -> None:
    """Scripts rely on these keys of the plan."""
    result = hrm_json("plan", *L4)
    assert {"policy", "predicted", "memory", "bound_tok_s", "search"} <= set(result)
    assert {"throughput_tok_s", "prefill_s", "decode_s", "layer_s", "bottleneck"} <= set(result["predicted"])
    assert {"gpu_bytes", "cpu_bytes"} <= set(result["memory"])
    assert result["search"]["evaluated"] > 1000
    assert result["policy"]["num_micro_batches"] > 1


def test_given_policy_is_evaluated_as_given(hrm_json: Any) -> None:
    """With --batch-size nothing is searched."""
    result = hrm_json("plan", *L4, "--batch-size", 100, "--micro-batch-size", 32, "--weights-on-gpu", 0.05)
    assert result["search"]["evaluated"] == 1
    policy = result["policy"]
    assert (policy["batch_size"], policy["micro_batch_size"], policy["weights_on_gpu"]) == (100, 32, 0.05)


def test_micro_batch_size_defaults_to_the_batch(hrm_json: Any) -> None:
    """One kernel handles the whole batch unless told otherwise."""
    assert hrm_json("plan", *L4, "--batch-size", 24)["policy"]["num_micro_batches"] == 1


def test_slower_link_lowers_the_prediction(hrm_json: Any) -> None:
    """--link-bandwidth reaches every set of rates, the data sheet's included."""
    for efficiency in ("paper", "spec"):
        args = ("plan", *L4, "--efficiency", efficiency, *GIVEN)
        fast, slow = hrm_json(*args), hrm_json(*args, "--link-bandwidth", "4GB/s")
        ratio = slow["predicted"]["layer_s"] / fast["predicted"]["layer_s"]
        assert ratio > 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights-on-gpu", "0.1"], "--batch-size"),
        (["--batch-size", "4", "--micro-batch-size", "8"], "'micro_batch_size'"),
        (["--batch-size", "four"], "'four'"),
        (["--batch-size", "4", "--max-batch-size", "4"], "--max-batch-size"),
        (["--system", "flexgen", "--ffn-on-gpu", "0"], "computes all experts on the GPU"),
        (["--system", "flexgen", "--batch-size", "8", "--attention-on-gpu", "0"], "--attention-on-gpu 1"),
        (["--system", "deepspeed-zero", "--batch-size", "8", "--micro-batch-size", "2"], "no micro-batches"),
        (["--system", "flexgan"], "unknown system"),
        (["--objective", "papers"], "'papers'"),
        (["--objective", "paper", "--gen-len", "1"], "'gen_len' must be >= 2"),
        (["--solver", "simplex"], "'simplex'"),
        (["--efficiency", "measured"], "Known: fitted, paper, spec"),
        (["--dtype", "float15"], "'float15'"),
        (["--device-memory", "16"], "'16 GiB'"),
        (["--link-bandwidth", "fast"], "'none'"),
        (["--gen-len", "0"], "'gen_len'"),
        (["--gen-len", "9" * 400], "'gen_len' must be <= 1000000000"),
        (["--prompt-len", "9" * 400], "'prompt_len' must be <= 1000000000"),
        (["--prompt-len", "1000000001"], "'prompt_len' must be <= 1000000000: 1000000001"),
        (["--batch-size", "9" * 400], "'batch_size' must be <= 1000000000"),
        (["--max-batch-size", "1000000001"], "'--max-batch-size'"),
        (["--model", ""], "name of the model is empty"),
        (["--hardware", ""], "name of the hardware is empty"),
        (["--workload", ""], "name of the workload is empty"),
        (["--model", "/"], "the folder '/' holds no config.json"),
        (["--hardware", "/"], "'/' is a folder"),
        (["--workload", "/"], "'/' is a folder"),
        (["--workload", "9" * 400 + ",5"], "must be <= 1000000000"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_bad_options_are_one_line(refused: Any, command: str, options: list[str], words: str) -> None:
    """Every refusal names what is wrong, on one line, with exit code 2."""
    assert words in refused(command, *L4, *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--ffn-on-gpu", "0"],
        ["--batch-size", "4", "--ffn-on-gpu", "0"],
    ],
)
def test_experts_on_the_cpu_are_planned_and_simulated(hrm: Any, options: list[str]) -> None:
    """The closed form and the simulator know experts on the CPU."""
    assert hrm("plan", *L4, *options).code == 0
    assert hrm("simulate", *L4, *options, "--gen-len", 4).code == 0


def test_the_papers_objective_refuses_other_places(refused: Any) -> None:
    """The authors' problem has one placement; another is refused, not ignored."""
    for option in (["--attention-on-gpu", 1], ["--ffn-on-gpu", 0]):
        assert "attention on the CPU, experts on the GPU" in refused("plan", *L4, "--objective", "paper", *option)


def test_a_budget_beyond_the_ram_is_refused(refused: Any) -> None:
    """A device budget that takes all RAM of a machine without a GPU leaves no room for the host."""
    case = ("--model", "mixtral-8x7b", "--hardware", "cpu-2core", "--workload", "77,32", "--device-memory", "30GiB")
    for solver in ("grid", "milp"):
        assert "0 B usable" in refused("plan", *case, "--solver", solver, code=3)


def test_kv_on_the_gpu_needs_attention_there(refused: Any) -> None:
    """A KV share on the GPU is refused while attention runs on the CPU."""
    assert "'kv_on_gpu' must be 0" in refused("plan", *L4, "--batch-size", 4, "--kv-on-gpu", 0.5)


def test_places_alone_are_conditions_on_the_search(hrm_json: Any) -> None:
    """--attention-on-gpu without --batch-size is searched under, not evaluated."""
    result = hrm_json("plan", *L4, "--attention-on-gpu", 1, "--no-advice")
    assert result["policy"]["attention_on_gpu"] is True
    assert result["search"]["evaluated"] > 100_000
    assert result["predicted"]["throughput_tok_s"] < hrm_json("plan", *L4)["predicted"]["throughput_tok_s"]


def test_the_papers_objective(hrm_json: Any) -> None:
    """The authors' policy gives their numbers, and the search of their problem beats it, with either solver."""
    case = ("--model", "mixtral-8x7b", "--hardware", "gcp-l4-1x", "--workload", "77,32")
    paper = ("plan", *case, "--objective", "paper", "--no-advice")
    policy = ("--batch-size", 4536, "--micro-batch-size", 324, "--weights-on-gpu", 0.055884688)
    theirs = hrm_json(*paper, *policy)["predicted"]
    assert theirs["throughput_tok_s"] == pytest.approx(944.66, rel=1e-3)
    assert theirs["layer_s"] == pytest.approx(0.1549, rel=1e-3)
    for solver in ("grid", "milp"):
        assert hrm_json(*paper, "--solver", solver)["predicted"]["throughput_tok_s"] >= 964


def test_plan_gives_slack_memory_and_advice(hrm: Any, hrm_json: Any) -> None:
    """The answer says what binds, how idle the rest is, what each tier holds, and what would help."""
    result = hrm_json("plan", *L4, "--efficiency", "paper")
    assert result["slack"][result["predicted"]["bottleneck"]] < 0.1
    assert result["memory"]["gpu_bytes"] <= result["memory"]["gpu_usable_bytes"]
    gains = [change["gain"] for change in result["advice"]]
    assert gains == sorted(gains, reverse=True) and gains[-1] > -1e-6
    assert "+64 GiB CPU memory: +" in hrm("plan", *L4).out


def test_a_machine_of_several_gpus_is_simulated(hrm_json: Any) -> None:
    """GPUs of one host work in lockstep, in the plan and in the simulation."""
    case = ("simulate", "--model", "mixtral-8x22b", "--workload", "77,4", "--efficiency", "spec", "--hardware")
    two, four = (hrm_json(*case, machine)["throughput_tok_s"] for machine in ("gcp-t4-2x", "gcp-t4-4x"))
    assert 1.5 * two < four


def test_sweep_is_a_table_and_goes_on(hrm: Any, hrm_json: Any, tmp_path: Path) -> None:
    """A sweep has a row per combination, with the reason where nothing fits; its file is not planned again."""
    out = tmp_path / "sweep.jsonl"
    sweep = ("sweep", "--model", "mixtral-8x7b", "--hardware", "gcp-l4-1x", "--hardware", "cpu-2core", "--workload")
    sweep = (*sweep, "77,32", "--gen-len", 8, "--gen-len", 16, "--jobs", 1, "--out", out)
    rows = hrm_json(*sweep)["rows"]
    assert len(rows) == 4
    assert [row["error"] is None for row in rows] == [True, True, False, False]
    assert hrm_json(*sweep)["rows"] == rows
    done = hrm(*sweep)
    assert f"mixtral-8x7b on cpu-2core, 77,32,gen8: {rows[2]['error']}" in done.out.splitlines()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--jobs", "0"], "'--jobs'"),
        (["--jobs", "1000000"], "1 to 256"),
        (["--jobs", "-2"], "-1 (one per core)"),
        (["--jobs", "two"], "'two'"),
        (["--efficiency", "papper"], "Did you mean 'paper'?"),
        (["--gen-len", "1000000001"], "'--gen-len'"),
        (["--hardware", "gcp-l4"], "Did you mean 'gcp-l4-1x'?"),
    ],
)
def test_bad_options_of_a_sweep_are_one_line(refused: Any, options: list[str], words: str) -> None:
    """What is wrong with a sweep as a whole is refused before anything is planned."""
    assert words in refused("sweep", *L4, *options)


def test_a_sweep_in_which_nothing_fits_exits_with_3(hrm: Any) -> None:
    """The table or the JSON is printed with the reasons, and the exit code says that there is no plan."""
    sweep = ("sweep", "--model", "mixtral-8x7b", "--hardware", "cpu-2core", "--workload", "77,32", "--jobs", 1)
    done = hrm(*sweep)
    assert done.code == 3 and "does not fit" in done.out
    done = hrm(*sweep, "--json")
    assert done.code == 3 and "does not fit" in json.loads(done.out)["rows"][0]["error"]
    assert "Exits with 3" in hrm("sweep", "--help").out


def test_a_damaged_store_of_a_sweep_is_one_line(refused: Any, tmp_path: Path) -> None:
    """A file that no sweep wrote is refused with its line and left alone."""
    out = tmp_path / "sweep.jsonl"
    out.write_text("[1]\n")
    assert "line 1, is not a row of a sweep" in refused("sweep", *L4, "--jobs", 1, "--out", out)
    assert out.read_text() == "[1]\n"


def test_reproduce_sets_published_beside_ours(hrm: Any, hrm_json: Any, refused: Any, tmp_path: Path) -> None:
    """Figures come as numbers, errors and pictures; misspelt names are refused."""
    result = hrm_json("reproduce", "fig4", "flexgen-opt", "--out", tmp_path)
    keys = {"setting", "system", "workload", "gen_len", "published", "predicted", "error", "split"}
    assert all(keys <= set(row) for row in result["rows"])
    assert (tmp_path / "fig4.png").stat().st_size > 10_000
    assert (tmp_path / "flexgen-opt.csv").exists()
    assert "cost model" in hrm("reproduce", "flexgen-opt", "--out", tmp_path).out
    assert "Did you mean 'fig5'?" in refused("reproduce", "fig55")


def test_what_does_not_fit_exits_with_3(refused: Any) -> None:
    """Too little memory is another kind of failure than bad input."""
    assert "GPU memory" in refused("plan", *L4, "--batch-size", 64, "--weights-on-gpu", 0.9, code=3)
    assert "does not fit" in refused("plan", *L4, "--device-memory", "1GiB", code=3)


def test_unknown_command_and_name(refused: Any) -> None:
    """Misspelt commands and catalog names are named."""
    assert "'plam'" in refused("plam")
    assert "Did you mean 'mixtral-8x7b'?" in refused("plan", *L4[2:], "--model", "mixtral-8x7")


def test_interrupt_is_one_line(hrm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with 130 and no traceback."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.planning.make_plan", stop)
    done = hrm("plan", *L4)
    assert (done.code, done.err.strip()) == (130, "hrm: error: interrupted")


def test_reader_that_goes_away_leaves_no_traceback() -> None:
    """A closed pipe on stdout is not an error to report."""
    program = "import sys; from experiments.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() != 0


def test_missing_torch_says_what_to_install(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the executor's packages, its commands name the extra."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "executor")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "moe-hrm[executor]" in refused("make-checkpoint", "--model", "mixtral-tiny", "--out", "nowhere")


def test_roofline_places_the_case_study(hrm_json: Any, tmp_path: Path) -> None:
    """On the L4, P1 of a compute-bound CPU operator is 81.25 FLOP/B, and attention stays on the CPU."""
    figure = tmp_path / "roofline.png"
    result = hrm_json(
        "roofline", *L4[:4], "--batch", 32, 1024, "--batch", 64, "--micro-batch", 128,
        "--attention-flops", "paper", "--out", figure,
    )  # fmt: skip
    points = {(p["name"], p["batch"]): p for p in result["operators"]}
    assert {batch for _, batch in points} == {32, 64, 1024}
    assert points["expert_ffn", 1024]["p1"] == 81.25
    assert points["expert_ffn", 1024]["bound_by"] == "link"
    assert points["expert_ffn", 1024]["intensity"]["gpu"] < points["expert_ffn", 1024]["intensity"]["cpu"]
    assert points["attention", 32]["bound_by"] == "CPU memory"
    assert points["attention", 32]["intensity"]["cpu"] == pytest.approx(2.0, rel=0.01)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_int4_cache_raises_the_intensity_of_attention(hrm_json: Any) -> None:
    """A quarter of the bytes for the same work."""
    args = ("roofline", *L4[:4], "--batch", 1, "--attention-flops", "paper")
    half, quarter = (hrm_json(*args, "--kv-dtype", t)["operators"][0] for t in ("bfloat16", "int4"))
    assert quarter["intensity"]["cpu"] == pytest.approx(4 * half["intensity"]["cpu"])


def test_simulate_has_the_keys_of_the_contract(hrm_json: Any, tmp_path: Path) -> None:
    """Scripts rely on these keys; the files hold every task of a run that is played whole."""
    trace, timeline, gantt = tmp_path / "t.json", tmp_path / "l.json", tmp_path / "g.png"
    files = ("--trace", trace, "--timeline", timeline, "--gantt", gantt)
    result = hrm_json("simulate", *TINY, *GIVEN, "--exact", *files)
    assert {
        "throughput_tok_s", "prefill_s", "decode_s", "num_tasks", "played_tasks", "simulated_s", "wall_s",
        "tasks_per_s", "utilization", "policy", "model", "hardware", "workload",
    } <= set(result)  # fmt: skip
    assert result["num_tasks"] == result["played_tasks"] == len(json.loads(timeline.read_text())["start"])
    assert sum(e["ph"] == "X" for e in json.loads(trace.read_text())["traceEvents"]) == result["num_tasks"]
    assert gantt.stat().st_size > 1000


def test_padding_costs_throughput(hrm_json: Any) -> None:
    """Padded prompts make the same policy slower."""
    args = ("simulate", *L4, "--gen-len", 4, "--batch-size", 64, "--micro-batch-size", 16)
    assert hrm_json(*args, "--padded")["throughput_tok_s"] < hrm_json(*args)["throughput_tok_s"]


@pytest.mark.parametrize("option", ["--batch", "--micro-batch", "--context"])
@pytest.mark.parametrize("value", ["0", "1000000001", pytest.param("9" * 400, id="digits")])
def test_sizes_of_a_roofline_have_limits(refused: Any, option: str, value: str) -> None:
    """A size of nothing or of more than a billion is refused by its option."""
    assert f"'{option}'" in refused("roofline", *L4[:4], option, value)


def test_folders_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    """A folder or a file without permission to write is an error before anything is computed."""
    folder, file = tmp_path / "folder", tmp_path / "old.json"
    folder.mkdir()
    folder.chmod(0o555)
    file.touch(0o444)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    for path, words in ((folder / "x.json", "is not writable"), (file, "cannot be written")):
        with pytest.raises(click.BadParameter, match=words):
            OutFile().convert(str(path), None, None)
    assert OutFile().convert(os.devnull, None, None) == Path(os.devnull)


@pytest.mark.parametrize("option", ["--trace", "--timeline", "--gantt"])
def test_output_paths_are_checked_first(hrm: Any, refused: Any, tmp_path: Path, option: str) -> None:
    """A folder that is not there is made; one that cannot be is an error before anything is computed."""
    assert hrm("simulate", *TINY, *GIVEN, option, tmp_path / "new" / "deep" / "x.png").code == 0
    assert (tmp_path / "new" / "deep" / "x.png").stat().st_size > 0
    (tmp_path / "file").touch()
    assert "cannot make the folder" in refused("simulate", *TINY, option, tmp_path / "file" / "deep" / "x.png")


def test_a_sweep_makes_its_folder(hrm: Any, tmp_path: Path) -> None:
    """As every command that writes a file."""
    rows = tmp_path / "new" / "rows.jsonl"
    assert hrm("sweep", *TINY, "--jobs", 1, "--out", rows).code == 0
    assert len(rows.read_text().splitlines()) == 1


def test_compare_sets_a_timeline_beside_itself(hrm: Any, hrm_json: Any, tmp_path: Path) -> None:
    """A prediction compared with itself is off by nothing, in every class and lane."""
    file, figure = tmp_path / "l.json", tmp_path / "c.png"
    assert hrm("simulate", *TINY, *GIVEN, "--timeline", file).code == 0
    result = hrm_json("compare", file, file, "--out", figure)
    assert {row["ratio"] for row in result["tasks"]} == {1.0}
    assert [row["lane"] for row in result["lanes"]] == ["gpu", "cpu", "h2d", "d2h", "pin"]
    assert result["totals"]["makespan_s"]["ratio"] == 1.0
    phases = [row["phase"] for row in result["tasks"]]
    assert phases == sorted(phases, reverse=True)
    assert sum(row["tasks"] for row in result["tasks"]) == len(json.loads(file.read_text())["start"])
    assert figure.stat().st_size > 1000
    text = hrm("compare", file, file).out
    assert "PostAttn" in text and "measured for a steady decode step on lane" in text


def test_compare_has_the_keys_of_the_contract(hrm: Any, hrm_json: Any, tmp_path: Path) -> None:
    """Scripts rely on these keys; idle time is the waits, and the items of the loss are the measured time."""
    file = tmp_path / "l.json"
    assert hrm("simulate", *TINY, *GIVEN, "--timeline", file).code == 0
    result = hrm_json("compare", file, file)
    assert set(result) == {"schedule", "tasks", "lanes", "totals", "idle", "waits", "loss"}
    sides = {f"{side}_{key}" for side in ("predicted", "measured") for key in ("busy_s", "idle_s", "idle_share")}
    assert set(result["idle"][0]) == {"window", "lane"} | sides
    assert set(result["waits"][0]) == {
        "window", "lane", "waited_for", "predicted_s", "measured_s", "difference_s",
    }  # fmt: skip
    assert {row["window"] for row in result["waits"]} == {"run", "steady"}
    assert {row["difference_s"] for row in result["waits"]} == {0.0}
    loss = result["loss"]
    assert set(loss) == {
        "lane", "stage", "window", "steps", "predicted_s", "measured_s", "limit_s", "items",
    }  # fmt: skip
    assert sum(item["measured_s"] for item in loss["items"]) == pytest.approx(loss["measured_s"])


def test_compare_draws_both_timelines(hrm: Any, refused: Any, tmp_path: Path) -> None:
    """The steps in the picture can be chosen; wrong ones are one line, and leave no picture."""
    file, figure = tmp_path / "l.json", tmp_path / "g.png"
    assert hrm("simulate", *TINY, *GIVEN, "--timeline", file).code == 0
    for steps in ((), ("--steps", "1:3"), ("--steps", "0:0")):
        assert hrm("compare", file, file, "--gantt", figure, *steps).code == 0
        assert figure.read_bytes().startswith(b"\x89PNG")
        figure.unlink()
    for steps, message in (
        ("3:9", "has no steps 3 to 9; it has steps 0 to 4"),
        ("3", "write them like '3:4'"),
        ("3:-1", "write them like '3:4'"),
        ("9" * 30 + ":1", "write them like '3:4'"),
        ("4:3", "ends before it begins"),
    ):
        assert message in refused("compare", file, file, "--gantt", figure, "--steps", steps)
    assert "--gantt FILE" in refused("compare", file, file, "--steps", "1:2")
    assert not figure.exists()


def test_compare_refuses_what_cannot_be_compared(hrm: Any, refused: Any, tmp_path: Path) -> None:
    """Different schedules, and files that are no timelines, are one line each."""
    one, other, bad = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "3.json"
    assert hrm("simulate", *TINY, *GIVEN, "--timeline", one).code == 0
    assert hrm("simulate", *TINY, *GIVEN, "--gen-len", 7, "--timeline", other).code == 0
    message = refused("compare", one, other)
    assert "5 steps" in message and "7 steps" in message
    bad.write_text('{"format": "moe-hrm timeline 1"}')
    assert "damaged" in refused("compare", one, bad)
    assert "nothing.json" in refused("compare", one, tmp_path / "nothing.json")


def test_make_checkpoint_resizes_the_config(hrm_json: Any, tmp_path: Path) -> None:
    """Sizes change the config; a stored head size gives way to hidden / heads."""
    pytest.importorskip("torch")
    result = hrm_json(
        "make-checkpoint", "--model", "mixtral-tiny", "--hidden", 96, "--layers", 2, "--experts", 4,
        "--top-k", 3, "--dtype", "bfloat16", "--out", tmp_path / "c",
    )  # fmt: skip
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_local_experts"]) == (96, 2, 4)
    assert (config["num_experts_per_tok"], config["dtype"]) == (3, "bfloat16")
    assert "head_dim" not in config
    assert result["bytes"] > 2 * result["parameters"]


def test_make_checkpoint_refuses(refused: Any, checkpoint: Path, tmp_path: Path) -> None:
    """A folder in use, a size that does not divide and an unknown type are one line each."""
    make = ("make-checkpoint", "--model", "mixtral-tiny", "--out")
    assert "not an empty folder" in refused(*make, checkpoint)
    assert "'hidden_size'" in refused(*make, tmp_path / "c", "--hidden", 98)
    assert "'dtype'" in refused(*make, tmp_path / "c", "--dtype", "int4")


def test_probe_writes_what_plan_reads(hrm: Any, hrm_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a probe is a machine for the planner; the measuring itself is tested elsewhere."""
    pytest.importorskip("torch")
    machine = load_hardware("gcp-l4-1x")
    stand_in = replace(machine, rate_sets={"measured": machine.spec_rates()})
    monkeypatch.setattr("experiments.running.measure", lambda model, device: stand_in)
    file = tmp_path / "here.json"
    assert "written to" in hrm("probe", "--out", file).out
    assert hrm_json("plan", *L4[:2], "--hardware", file, *L4[4:])["efficiency"] == "measured"


def test_validate_hands_its_options_on(
    hrm: Any, hrm_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation gets the options in SI units; its result is printed and its table left, either way."""
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}

    def run_validation(**options: Any) -> dict[str, Any]:
        seen.update(options)
        options["out"].mkdir()
        return {"cases": []}

    module = SimpleNamespace(run_validation=run_validation, render=lambda result: "a table")
    monkeypatch.setitem(sys.modules, "experiments.validation", module)
    assert hrm_json("validate", "--quick", "--device-memory", "1GiB", "--out", "here") == {"cases": []}
    assert seen == {
        "checkpoint": None,
        "quick": True,
        "device": None,
        "device_memory": 2**30,
        "link_bandwidth": 2e9,
        "out": Path("here"),
        "rounds": 1,
        "as_json": True,
    }
    assert hrm("validate", "--link-bandwidth", "none").out == "a table\n"
    assert seen["link_bandwidth"] is None
    assert [(tmp_path / folder / "table.txt").read_text() for folder in ("here", "out")] == ["a table\n"] * 2


def test_exit_codes_are_the_errors_own() -> None:
    """Bad input is 2 and what does not fit is 3."""
    assert (InvalidValue.exit_code, DoesNotFit.exit_code) == (2, 3)
