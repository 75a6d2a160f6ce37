"""Plans for a whole grid in one call: complete, in order, resumable, on any joblib backend."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from hrm import Hardware, MoEModel, Workload, plan, plan_grid
from hrm.errors import HrmError

MODELS = ["mixtral-8x7b", "olmoe-1b-7b"]
MACHINES = ["gcp-t4-1x", "gcp-l4-1x", "cpu-2core"]
LOADS = ["77,32", "mtbench"]


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """A small sweep in this process."""
    return plan_grid(MODELS, MACHINES, LOADS, n_jobs=1)


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The table without how long planning took."""
    return table.drop(columns="seconds")


def test_every_combination_is_a_row_in_order(frame: pd.DataFrame) -> None:
    """The table has one row per combination, the last axis fastest."""
    assert len(frame) == 12
    assert list(frame["model"][:6]) == ["mixtral-8x7b"] * 6
    assert list(frame["hardware"][:4]) == ["gcp-t4-1x", "gcp-t4-1x", "gcp-l4-1x", "gcp-l4-1x"]


def test_a_row_is_the_plan(frame: pd.DataFrame) -> None:
    """A row holds what planning that combination alone gives."""
    row = frame.iloc[2]
    model, machine = MoEModel.from_catalog(row["model"]), Hardware.from_catalog(row["hardware"])
    alone = plan(model, machine, Workload.parse("77,32"), resolution="coarse")
    assert row["throughput_tok_s"] == alone.estimate.throughput
    assert row["batch_size"] == alone.policy.batch_size
    assert row["bottleneck"] == alone.estimate.bottleneck


def test_what_does_not_fit_says_so(frame: pd.DataFrame) -> None:
    """A combination that fits nowhere has no numbers and the reason."""
    row = frame[(frame["model"] == "mixtral-8x7b") & (frame["hardware"] == "cpu-2core")].iloc[0]
    assert pd.isna(row["throughput_tok_s"])
    assert "does not fit" in row["error"]


def test_several_processes_give_the_same(frame: pd.DataFrame) -> None:
    """Two workers give the rows of one."""
    pd.testing.assert_frame_equal(numbers(plan_grid(MODELS, MACHINES, LOADS, n_jobs=2)), numbers(frame))


def test_a_dask_cluster_gives_the_same(frame: pd.DataFrame) -> None:
    """On a local Dask cluster the sweep gives the rows of one process."""
    distributed = pytest.importorskip("distributed")
    joblib = pytest.importorskip("joblib")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        again = plan_grid(MODELS, MACHINES, LOADS)
    pd.testing.assert_frame_equal(numbers(again), numbers(frame))


def test_an_interrupted_sweep_goes_on(frame: pd.DataFrame, tmp_path) -> None:
    """Rows that a killed sweep left, but for a line it cut, are not planned again."""
    store = tmp_path / "sweep.jsonl"
    plan_grid(MODELS, MACHINES, LOADS, n_jobs=1, out=store)
    lines = store.read_text().splitlines(keepends=True)
    marked = json.loads(lines[0]) | {"seconds": 1234.5}
    store.write_text(json.dumps(marked) + "\n" + "".join(lines[1:5]) + lines[5][:40])
    steps: list[int] = []
    again = plan_grid(MODELS, MACHINES, LOADS, n_jobs=1, out=store, progress=steps.append)
    assert again["seconds"][0] == 1234.5
    assert steps[0] == 5
    assert sum(steps) == 12
    pd.testing.assert_frame_equal(numbers(again), numbers(frame))
    assert len(store.read_text().splitlines()) == 12


def test_a_store_made_otherwise_is_refused(tmp_path) -> None:
    """A store with other options, or with a damaged line, is refused with its line and left alone."""
    store = tmp_path / "sweep.jsonl"
    plan_grid(MODELS[0], MACHINES[0], LOADS[0], n_jobs=1, out=store)
    before = store.read_text()
    with pytest.raises(HrmError, match="line 1, was made with other options"):
        plan_grid(MODELS[0], MACHINES[0], LOADS[0], n_jobs=1, out=store, efficiency="spec")
    assert store.read_text() == before
    store.write_text("{broken\n" + before)
    with pytest.raises(HrmError, match="line 1, is not JSON"):
        plan_grid(MODELS[0], MACHINES[0], LOADS[0], n_jobs=1, out=store)


def test_names_must_be_told_apart() -> None:
    """Two machines of one name, an unknown name and an empty axis are refused."""
    l4 = Hardware.from_catalog("gcp-l4-1x")
    with pytest.raises(HrmError, match="'gcp-l4-1x' occurs twice"):
        plan_grid(MODELS[0], [l4, l4.scaled(link=2)], LOADS[0], n_jobs=1)
    with pytest.raises(HrmError, match="Did you mean 'gcp-l4-1x'"):
        plan_grid(MODELS[0], "gcp-l4-1", LOADS[0], n_jobs=1)
    with pytest.raises(HrmError, match="'workloads' of a sweep must not be empty"):
        plan_grid(MODELS[0], l4, [], n_jobs=1)
