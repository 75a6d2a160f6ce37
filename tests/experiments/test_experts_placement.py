"""``hrm experts placement``: its table, its JSON, its files, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator.experts.placement import Placement
from simulator.experts.trace import RoutingTrace


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """A trace of 40 batches in which experts 0 to 3 are hot."""
    rng = np.random.default_rng(0)
    weights = np.where(np.arange(16) < 4, 5.0, 1.0)
    chosen = rng.choice(16, size=(40 * 32, 2, 1), p=weights / weights.sum())
    trace = RoutingTrace(experts=chosen, num_experts=16, batch_starts=np.arange(40) * 32, name="hot")
    return trace.save(tmp_path / "trace.npz")


def test_rows_of_every_method(hrm_json: Any, trace_file: Path) -> None:
    """One row per method under stable keys; greedy evens out what placing in order leaves on one device."""
    result = hrm_json("experts", "placement", "--trace", trace_file, "--devices", 4, "--method", "all")
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["even", "greedy", "anti-correlation", "refined", "optimal", "greedy-replicated"]
    keys = {"devices", "history_max_load", "history_avg_max_load", "later_max_load", "later_avg_max_load", "seconds"}
    for row in rows.values():
        assert keys < set(row)
        assert row["ideal"] == 0.25
        assert row["later_max_load"] >= row["later_avg_max_load"] >= 0.25
    assert rows["even"]["later_avg_max_load"] > 0.5
    assert rows["greedy"]["later_avg_max_load"] < 0.4
    assert rows["optimal"]["history_mean_load"] <= rows["greedy"]["history_mean_load"] + 1e-9
    assert rows["optimal"]["gap"] >= 0
    assert rows["greedy-replicated"]["slots_per_device"] == 5
    assert result["trace"]["batches"] == 40
    assert result["trace"]["history_batches"] == 20


def test_files(hrm_json: Any, trace_file: Path, tmp_path: Path) -> None:
    """Placements that load again, a table, and a picture."""
    out = tmp_path / "out"
    result = hrm_json(
        "experts", "placement", "--trace", trace_file, "--devices", 4, "--method", "even,greedy", "--out", out
    )
    assert {Path(name).name for name in result["files"]} == {
        "placement-even.json", "placement-greedy.json", "placement.csv", "placement.png",
    }  # fmt: skip
    placement = Placement.load(out / "placement-greedy.json")
    assert (placement.num_devices, placement.num_layers, placement.num_experts) == (4, 2, 16)
    with (out / "placement.csv").open() as file:
        assert [line["method"] for line in csv.DictReader(file)] == ["even", "greedy"]
    assert (out / "placement.png").read_bytes().startswith(b"\x89PNG")


def test_table_for_reading(hrm: Any, trace_file: Path) -> None:
    """Without --json a table, with the trace above it."""
    done = hrm("experts", "placement", "--trace", trace_file, "--devices", 4, "--batch", 64)
    assert done.code == 0, done.err
    assert "20 batches" in done.out
    assert "anti-correlation" in done.out
    assert "Avg Max Load" in done.out


def test_a_synthetic_trace(hrm_json: Any) -> None:
    """The presets can be placed without a file."""
    result = hrm_json(
        "experts", "placement", "--synthetic", "mt-decoder", "--batches", 8, "--devices", 8, "--method", "greedy"
    )
    assert result["trace"]["experts"] == 128
    assert result["rows"][0]["slots_per_device"] == 16


def test_replicas_take_as_many_slots_as_are_given(hrm_json: Any, trace_file: Path) -> None:
    """--slots counts experts and replicas."""
    result = hrm_json(
        "experts", "placement", "--trace", trace_file, "--devices", 4, "--method", "greedy-replicated", "--slots", 28
    )
    assert result["rows"][0]["slots_per_device"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", 3), "'devices' must divide the 16 experts evenly: 3"),
        (("--devices", 0), "'devices' must be an integer >= 1"),
        (("--devices", 32), "at most the number of experts"),
        (("--devices", 4, "--method", "gredy"), "Did you mean 'greedy'"),
        (("--devices", 4, "--method", ","), "names no method"),
        (("--devices", 4, "--batch", "many"), "'--batch' must be a number of tokens or 'recorded'"),
        (("--devices", 4, "--batch", 10**6), "'--batch' must be between 1 and half"),
        (("--devices", 4, "--train-share", 1.0), "'--train-share' must lie between 0 and 1"),
        (("--devices", 4, "--synthetic", "lm"), "either '--trace FILE' or '--synthetic NAME'"),
        (("--devices", 4, "--method", "greedy-replicated", "--slots", 18), "'devices' must divide the 18 slots"),
        (("--devices", 4, "--method", "optimal", "--time-limit", 0), "'time_limit' must be > 0"),
    ],
)
def test_bad_input_is_one_line(hrm: Any, trace_file: Path, arguments: tuple[Any, ...], message: str) -> None:
    """Every refusal exits with 2 and names what is wrong."""
    done = hrm("experts", "placement", "--trace", trace_file, *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not done.out


def test_a_trace_is_needed(hrm: Any, tmp_path: Path) -> None:
    """Neither a file nor a name, or a file that is not there."""
    assert "either '--trace FILE'" in hrm("experts", "placement", "--devices", 4).err
    assert "cannot read the trace" in hrm("experts", "placement", "--trace", tmp_path / "no", "--devices", 4).err
    assert "unknown synthetic trace" in hrm("experts", "placement", "--synthetic", "zzz", "--devices", 4).err
