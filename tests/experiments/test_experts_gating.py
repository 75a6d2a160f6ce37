"""``hrm experts gating``: what it measures, computes, predicts and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.gating import ratios

_SMALL = ["--shape", "custom", "--experts", "16", "--hidden", "32", "--intermediate", "64", "--rounds", "1"]
_KEYS = {
    "gating",
    "shape",
    "tokens",
    "seconds",
    "tokens_per_s",
    "peak_bytes",
    "computed_bytes",
    "waste_factor",
    "dropped",
    "mask_bytes",
    "buffer_bytes",
    "expert_flops",
    "dispatch_flops",
}


def test_rows_have_the_keys_of_the_contract(hrm_json: Any) -> None:
    """One row per gate and batch, measured and computed columns beside each other."""
    result = hrm_json("experts", "gating", *_SMALL, "--capacity-factor", "0.5", "--batch", "8,20")
    rows = result["rows"]
    assert [(r["tokens"], r["gating"]) for r in rows] == [
        (tokens, name) for tokens in (8, 20) for name in ("static", "tutel", "tutel-adaptive", "dynamic")
    ]
    assert all(set(row) >= _KEYS and row["seconds"] > 0 for row in rows)
    by_gate = {row["gating"]: row for row in rows if row["tokens"] == 20}
    assert by_gate["static"]["waste_factor"] == by_gate["tutel"]["waste_factor"] == 16 * 0.5 / 2
    assert by_gate["dynamic"]["waste_factor"] == 1
    # Two masks of S x E x C·S floats; rows of H floats; two products of H x I per row.
    assert by_gate["static"]["mask_bytes"] == 2 * 20 * 16 * 10 * 4
    assert by_gate["static"]["buffer_bytes"] == 16 * 10 * 32 * 4
    assert by_gate["dynamic"]["buffer_bytes"] == 40 * 32 * 4
    assert by_gate["static"]["expert_flops"] == 16 * 10 * 4 * 32 * 64
    assert by_gate["static"]["dispatch_flops"] == 2 * 2 * 16 * 10 * 20 * 32
    for row in by_gate.values():
        assert row["peak_bytes"] == pytest.approx(row["computed_bytes"], rel=0.05)
    assert result["weights"]["distinct_experts"] == 16


def test_the_papers_layers_scaled(hrm_json: Any) -> None:
    """A scaled layer keeps experts, top-k and capacity, and so the waste of the paper."""
    result = hrm_json(
        "experts", "gating", "--scale", "64", "--batch", "20", "--rounds", "1", "--gating", "dynamic,static"
    )
    assert result["shape"] == {
        "name": "lm", "num_experts": 512, "top_k": 2, "hidden": 16, "intermediate": 64, "capacity_factor": 0.05,
    }  # fmt: skip
    assert {row["gating"]: row["waste_factor"] for row in result["rows"]} == {"static": 12.8, "dynamic": 1}


def test_tables_and_files(hrm: Any, tmp_path: Path) -> None:
    """The table says who is how much faster; the folder gets JSON, CSV and a figure; a budget gives largest batches."""
    folder = tmp_path / "new" / "gating"
    args = [*_SMALL, "--batch", "8", "--budget", "100KiB", "--skew", "1", "--dtype", "bfloat16", "--out", folder]
    done = hrm("experts", "gating", *args)
    assert done.code == 0, done.err
    assert "8 tokens: dynamic gating has " in done.out and "within 100 KiB" in done.out
    assert {path.name for path in folder.iterdir()} == {f"gating-custom.{kind}" for kind in ("json", "csv", "png")}
    kept = json.loads((folder / "gating-custom.json").read_text())
    tokens = {name: at["tokens"] for name, at in kept["largest_batch"]["gatings"].items()}
    assert tokens["dynamic"] > tokens["tutel"] > tokens["static"] > 0


def test_the_benchmarks_ratios() -> None:
    """Ratios are taken round by round, so that a slow round does not count twice."""
    rows = [
        {"gating": name, "tokens": 4, "samples": samples, "peak_bytes": peak}
        for name, samples, peak in (("static", [2.0, 9.0, 4.0], 60), ("dynamic", [1.0, 3.0, 1.0], 20))
    ]
    assert ratios(rows) == [
        {"tokens": 4, "against": "static", "speedup": 3, "speedup_min": 2, "speedup_max": 4, "memory": 3}
    ]


@pytest.mark.parametrize("shape", ["lm", "mt"])
def test_predictions_for_a_machine(hrm: Any, hrm_json: Any, shape: str) -> None:
    """With --hardware the cost model speaks: waste of E·C/k, dynamic gating fastest and smallest."""
    args = ["--shape", shape, "--hardware", "v100-node-8x", "--batch", "1000", "--nodes", "2"]
    result = hrm_json("experts", "gating", *args)
    assert result["hardware"] == {"name": "v100-node-8x", "nodes": 2, "devices": 16}
    by_gate = {row["gating"]: row for row in result["rows"]}
    assert by_gate["static"]["waste_factor"] == pytest.approx({"lm": 12.8, "mt": 64}[shape])
    for name in ("static", "tutel"):
        assert by_gate["dynamic"]["seconds"] < by_gate[name]["seconds"]
        assert by_gate["dynamic"]["computed_bytes"] < by_gate[name]["computed_bytes"]
    assert by_gate["static"]["seconds"] == pytest.approx(sum(by_gate["static"]["terms"].values()))
    assert "predicted, one MoE layer" in hrm("experts", "gating", *args).out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--batch", "0"], "'0' must be whole numbers of tokens from 1 to"),
        (["--gating", "static,magic"], "'static,magic' must be of static, tutel, tutel-adaptive, dynamic"),
        (["--shape", "custom"], "--shape custom needs --experts"),
        (["--capacity-factor", "1.5"], "'capacity_factor' must be above 0 and at most 1: 1.5"),
        (["--capacity-factor", "nan"], "'capacity_factor' must be above 0 and at most 1: nan"),
        (["--experts", "1"], "'top_k' must be at most the 1 experts that there are: 2"),
        (["--experts", "99999"], "'num_experts' must be at most 65536: 99999"),
        (["--skew", "-1"], "--skew must be a number >= 0: -1.0"),
        (["--scale", "5000"], "--scale must be at most 1024"),
        (["--nodes", "2"], "--nodes belongs to --hardware"),
        (["--hardware", "v100-node-8y"], "v100-node-8x"),
        (["--hardware", "v100-node-8x", "--experts", "9"], "do not divide evenly over 8 devices"),
    ],
)
def test_bad_options_are_refused(refused: Any, args: list[str], line: str) -> None:
    """One line that names the option, the value and the way out."""
    assert line in refused("experts", "gating", *args)


def test_batches_that_do_not_fit_are_refused(refused: Any) -> None:
    """A static gate's masks grow with the square of the batch; where they pass memory the command says so first."""
    line = refused("experts", "gating", "--batch", "200000", code=3)
    assert "static gating of 200000 tokens needs" in line and "Lower --batch" in line
    assert "one expert takes" in refused("experts", "gating", "--weights-memory", "1KiB", code=3)
