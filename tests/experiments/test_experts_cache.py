"""``hrm experts cache``: its table, JSON, files, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator.experts.cache import CACHE_POLICIES, ExpertCache
from simulator.experts.placement import Placement, place
from simulator.experts.synthesis import Knobs, Routing, synthesize
from simulator.experts.trace import RoutingTrace

ROUTING = Routing(num_layers=2, num_experts=8, top_k=2, batch_tokens=3)


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """A small trace of 60 tokens in 20 batches."""
    return synthesize(ROUTING, batches=20, knobs=Knobs(spread=1.0, memory=0.5))


@pytest.fixture(scope="module")
def file(trace: RoutingTrace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a file."""
    return trace.save(tmp_path_factory.mktemp("trace") / "t.npz")


def test_rows_are_those_of_the_caches(hrm_json: Any, file: Path, trace: RoutingTrace) -> None:
    """Every batch, policy and number of slots has a row with the rates of caches that were played by hand."""
    result = hrm_json("experts", "cache", "--trace", file, "--batch", "4,7", "--slots", "2,5", "--policy", "all")
    rows = result["rows"]
    assert len(rows) == 2 * 2 * len(CACHE_POLICIES) and result["devices"] == 1
    for row in rows:
        rates = []
        total = np.zeros(2, dtype=int)
        for layer in range(2):
            sets = [active.tolist() for active in trace.active(layer=layer, batch=row["batch"])][: 60 // row["batch"]]
            cache = ExpertCache(row["policy"], row["slots"], 8, future=sets)
            hits = [access.hit for active in sets for access in cache.batch(active)]
            rates.append(1 - sum(hits) / len(hits))
            total += (len(hits) - sum(hits), len(hits))
        assert row["miss_rate"] == pytest.approx(total[0] / total[1])
        assert row["accesses"] == total[1]
        assert row["worst_layer_miss_rate"] == pytest.approx(max(rates))
        assert row["mean_layer_miss_rate"] == pytest.approx(sum(rates) / 2)
        assert row["seconds"] >= 0


def test_recorded_batches_are_the_default(hrm_json: Any, hrm: Any, file: Path) -> None:
    """Without --batch the trace's own batches count; the table says so."""
    plain = hrm_json("experts", "cache", "--trace", file, "--slots", "3")["rows"]
    recorded = hrm_json("experts", "cache", "--trace", file, "--slots", "3", "--batch", "recorded,3")["rows"]
    assert [row["batch"] for row in recorded] == ["recorded", 3]
    assert plain[0]["miss_rate"] == recorded[0]["miss_rate"] == recorded[1]["miss_rate"]
    assert plain[0]["policy"] == "inactive-first-lifo"
    text = hrm("experts", "cache", "--trace", file, "--slots", "1-3").out
    assert text.count("inactive-first-lifo") == 3 and "worst layer" in text


def test_devices(hrm_json: Any, file: Path, trace: RoutingTrace, tmp_path: Path) -> None:
    """Every device has slots of its own; a placement file gives what its own devices give."""
    even = hrm_json("experts", "cache", "--trace", file, "--slots", "4", "--devices", "2")
    assert even["devices"] == 2
    [row] = even["rows"]
    assert row["misses"] == 2 * 2 * 4  # four slots for four experts: only the first loads miss
    greedy = place(trace, 4, "greedy").save(tmp_path / "p.json")
    [row] = hrm_json("experts", "cache", "--trace", file, "--slots", "1", "--placement", greedy)["rows"]
    assert row["placement"] == "greedy" and row["worst_device_miss_rate"] >= row["worst_layer_miss_rate"]


def test_balance_is_judged_on_the_second_half(hrm_json: Any, file: Path, trace: RoutingTrace) -> None:
    """The even placement and the balanced one see the same accesses, those of the second half."""
    options = ["--slots", "1,2", "--devices", "2", "--balance", "greedy"]
    result = hrm_json("experts", "cache", "--trace", file, *options)
    assert [row["placement"] for row in result["rows"]] == ["even", "even", "greedy", "greedy"]
    assert result["trace"]["tokens"] == trace.split()[1].num_tokens
    assert len({row["accesses"] for row in result["rows"]}) == 1


def test_files(hrm_json: Any, trace: RoutingTrace, tmp_path: Path) -> None:
    """A synthetic trace gives a table and a picture; the numbers are those of the rows."""
    import pandas as pd

    result = hrm_json(
        "experts", "cache", "--synthetic", "uniform", "--synthetic-batches", 10, "--slots", "4,8",
        "--policy", "min,next-use", "--out", tmp_path / "out",
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "out" / "cache.csv")
    assert table["miss_rate"].tolist() == pytest.approx([row["miss_rate"] for row in result["rows"]])
    assert (tmp_path / "out" / "cache.png").stat().st_size > 10_000
    assert [Path(name).name for name in result["files"]] == ["cache.csv", "cache.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "0"], "'--slots' must be whole numbers >= 1"),
        (["--slots", "x"], "'--slots' must be whole numbers >= 1 with commas between them: 'x'"),
        (["--slots", "5-2"], "a range that does not rise"),
        (["--slots", "1", "--batch", "-3"], "'--batch' must be whole numbers >= 1"),
        (["--slots", "1", "--batch", "61"], "'batch' must be at most the trace's 60 tokens: 61"),
        (["--slots", "1", "--policy", "lfo"], "unknown cache policy 'lfo'"),
        (["--slots", "1", "--policy", ","], "'--policy' names no policy"),
        (["--slots", "1", "--devices", "3"], "must divide the 8 experts evenly: 3"),
        (["--slots", "1", "--synthetic", "lm"], "either --trace FILE or --synthetic NAME"),
        (["--slots", "1", "--balance", "greedy"], "--balance needs --devices"),
        (["--slots", "1", "--devices", "2", "--balance", "gredy"], "unknown placement method 'gredy'"),
        (["--slots", "1", "--num-experts", "9"], "a trace of 8 experts, not of 9"),
        (["--slots", "1", "--placement", "none.json"], "cannot read the placement"),
    ],
)
def test_bad_options(refused: Any, file: Path, options: list[str], message: str) -> None:
    """One line that names the option, the value and the way out."""
    assert message in refused("experts", "cache", "--trace", file, *options)


def test_other_refusals(refused: Any, trace: RoutingTrace, file: Path, tmp_path: Path) -> None:
    """No trace at all, unknown presets, damaged files, traces without batches, placements that contradict."""
    assert "either --trace" in refused("experts", "cache", "--slots", "1")
    assert "unknown synthetic trace" in refused("experts", "cache", "--synthetic", "ml", "--slots", "1")
    (tmp_path / "bad").write_text("no trace")
    assert "line 1: expected" in refused("experts", "cache", "--trace", tmp_path / "bad", "--slots", "1")
    bare = RoutingTrace(experts=trace.experts, num_experts=8).save(tmp_path / "bare.npz")
    assert "say how many tokens" in refused("experts", "cache", "--trace", bare, "--slots", "1")
    placed = place(trace, 2, "greedy").save(tmp_path / "p.json")
    line = refused("experts", "cache", "--trace", file, "--slots", "1", "--placement", placed, "--devices", "4")
    assert "'--devices' is 4, but the placement has 2" in line
    other = Placement.of_devices([[0, 1]]).save(tmp_path / "q.json")
    assert "does not fit" in refused("experts", "cache", "--trace", file, "--slots", "1", "--placement", other)
