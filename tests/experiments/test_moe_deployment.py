"""Figures of "Towards MoE Deployment" beside ours."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from experiments.reproduce import FIGURES
from experiments.reproduce.moe_deployment import moe_buffering, moe_gating
from experiments.reproduce.moe_deployment_balancing import moe_balancing
from experiments.reproduce.moe_deployment_cases import (
    CASES,
    HOST_SPLIT,
    SPLIT,
    Assumptions,
    implied_launch,
    run,
    speedup,
)
from experiments.reproduce.moe_deployment_memory import moe_memory, moe_waste
from experiments.reproduce.result import COLUMNS, Reproduced

NAMES = ("moe-waste", "moe-gating", "moe-memory", "moe-buffering", "moe-balancing")


def find(result: Reproduced, setting: str, system: str, split: str | None = None) -> dict[str, Any]:
    rows = [line for line in result.rows if line["setting"].startswith(setting) and line["system"] == system]
    rows = [line for line in rows if split in (None, line["split"])]
    assert len(rows) == 1, rows
    return rows[0]


def test_all_are_offered() -> None:
    """The command knows them by name."""
    assert set(NAMES) <= set(FIGURES)


def test_waste_factors_and_parameters_are_exact() -> None:
    """12.8 and 64; 52B and 54.5B to their rounding."""
    result = moe_waste()
    assert {line["split"] for line in result.rows} == {"formula"}
    assert find(result, "LM", "waste factor")["predicted"] == pytest.approx(12.8)
    assert find(result, "MT", "waste factor")["predicted"] == 64
    assert abs(find(result, "LM", "parameters")["error"]) < 0.005
    assert abs(find(result, "MT", "parameters")["error"]) < 0.0005


def test_buffering_memory_is_exact_and_has_its_limits() -> None:
    """The published figures to their last digit; K = 16 saves nothing; more slots save less."""
    result = moe_buffering()
    for line in result.rows:
        if line["split"] == "formula":
            assert abs(line["error"]) < 0.005
    saved = result.frame["saved_gib"]
    assert saved.is_monotonic_decreasing
    assert saved.iloc[-1] == 0
    for nodes in (1, 2, 4):
        assert result.frame[f"over_static_{nodes}n"].is_monotonic_increasing


def test_gating_rows_say_what_they_are() -> None:
    """Model rows have a split of their own, so that the mean error of `hrm reproduce` does not count them."""
    result = moe_gating()
    assert {line["split"] for line in result.rows} == {SPLIT, HOST_SPLIT}
    assert all(tuple(line) == COLUMNS for line in result.rows)
    ratios = [line for line in result.rows if line["system"].startswith("dynamic over")]
    assert len(ratios) == 18
    assert all(line["predicted"] > 1 for line in ratios)
    for case in CASES:
        over_static = find(result, case.title, "dynamic over static", SPLIT)["predicted"]
        assert find(result, case.title, "dynamic over Tutel", SPLIT)["predicted"] <= over_static
        multi = find(result, case.title, "dynamic over static, best of 2 and 4 nodes", SPLIT)["predicted"]
        assert multi > over_static


def test_buffering_between_nodes_is_near_what_was_published() -> None:
    """About 80 slots on all GPUs: 10, 5 and 2.5 on each; within 30 % of the published throughput."""
    rows = [line for line in moe_buffering().rows if line["split"] == SPLIT]
    assert [line["workload"] for line in rows] == ["K=10 of 16", "K=5 of 8", "K=2.5 of 4"]
    assert all(abs(line["error"]) < 0.3 for line in rows)


def test_terms_add_up() -> None:
    """Seconds by term are the pass."""
    frame = moe_gating().frame
    terms = frame[frame["what"] == "terms"]
    names = [name for name in terms.columns if name.endswith("_s") and name not in ("dense_s", "static_s")]
    assert (terms[names].sum(axis=1) - terms["seconds"]).abs().max() < 1e-12


def test_memory_of_the_paper() -> None:
    """Totals per GPU within 15 % and the largest batches of static gating and of the language model."""
    result = moe_memory()
    for title in ("LM", "MT"):
        for gating in ("dense", "static"):
            assert abs(find(result, title, f"{gating}, GiB per GPU")["error"]) < 0.15
        assert find(result, title, "static, largest batch")["error"] == 0
    assert find(result, "LM", "dynamic, largest batch")["error"] == 0
    assert abs(find(result, "LM", "dynamic, activations, GiB")["error"]) < 0.1
    assert find(result, "LM", "static, activations, GiB")["split"] == "V100 assumption"


def test_host_time_from_the_dense_decoder() -> None:
    """With the launch that it implies, a dense step takes what was published."""
    launch = implied_launch(0.032, Assumptions())
    assert run(CASES[2], "dense", assume=Assumptions(launch_s=launch)).total == pytest.approx(0.032)


def test_an_even_load_helps_dynamic_gating_alone() -> None:
    """Without a busiest GPU dynamic gating is faster; static gating never cared."""
    even = Assumptions(lm_busiest=1.0)
    assert speedup(CASES[0], "static", assume=even) > speedup(CASES[0], "static")
    assert run(CASES[0], "static", assume=even).total == run(CASES[0], "static").total


def test_balancing_lowers_the_load_of_synthetic_traces() -> None:
    """Greedy lowers Avg Max Load on the paper's shapes, anti-correlation where experts differ by their groups alone."""
    frame = moe_balancing(batches=16).frame.set_index(["trace", "method"])
    shapes = ["lm", "mt-encoder", "mt-decoder"]
    before, after = (
        [frame.loc[(trace, method), "later_avg_max_load"] for trace in shapes] for method in ("even", "greedy")
    )
    assert min(after) >= 0.125
    assert sum(after) < sum(before)
    even, greedy, anti = (
        frame.loc[("correlated", method), "later_avg_max_load"] for method in ("even", "greedy", "anti-correlation")
    )
    assert abs(greedy / even - 1) < 0.03
    assert anti < 0.9 * greedy
    assert frame.loc[("correlated", "even"), "group_correlation"] > 0.5


@pytest.mark.parametrize("make", [moe_waste, moe_gating, moe_memory, moe_buffering])
def test_figures_leave_their_numbers_and_their_picture(make: Any, tmp_path: Path) -> None:
    """CSV with the frame's lines, PNG, and the rows beside what was published; a note that says what differs."""
    result = make()
    files = result.save(tmp_path)
    with files[0].open() as file:
        assert len(list(csv.DictReader(file))) == len(result.frame) > 0
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert len(files) == 3
    assert result.note


def test_the_command_keeps_its_mean_error(hrm_json: Any, tmp_path: Path) -> None:
    """Only the exact identities count in the summary."""
    result = hrm_json("reproduce", "moe-waste", "moe-gating", "--out", tmp_path)
    assert result["summary"]["worst_abs_error"] < 0.005
    assert max(abs(line["error"]) for line in result["rows"]) > 0.1
