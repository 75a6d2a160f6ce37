"""Plans for a whole grid in one call: complete, in order, resumable, on any joblib backend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hrm import Hardware, MoEModel, Workload, plan, plan_grid
from hrm.errors import HrmError, InvalidConfig, InvalidValue, UnknownName

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


def sweep(store: Path, machine: Hardware | str = "gcp-l4-1x", load: Workload | str = "77,32") -> pd.DataFrame:
    """One combination, kept in a store."""
    return plan_grid("mixtral-8x7b", machine, load, n_jobs=1, out=store)


def test_a_row_of_another_machine_of_the_name_is_refused(tmp_path: Path) -> None:
    """A machine, a model or a workload that changed under its name is named with the line, and the file stays."""
    store = tmp_path / "sweep.jsonl"
    l4, model = Hardware.from_catalog("gcp-l4-1x"), MoEModel.from_catalog("mixtral-8x7b")
    load = Workload.parse("77,32")
    sweep(store)
    before = store.read_bytes()
    paper = {"paper": l4.rates("paper").with_link(1e9)}
    others: list[tuple[Any, Any, Any, str]] = [
        (model, l4.scaled(link=2), load, "another 'gcp-l4-1x'"),
        (model, replace(l4, rate_sets=paper), load, "another 'gcp-l4-1x'"),
        (model.with_layers(8), l4, load, "another 'mixtral-8x7b'"),
        (model, l4, replace(load, prompt_max=99), "another '77,32'"),
    ]
    for *job, words in others:
        with pytest.raises(InvalidConfig, match=f"line 1, was made for {words}.*use another file"):
            plan_grid(*job, n_jobs=1, out=store)
        assert store.read_bytes() == before


def test_what_says_nothing_of_a_machine_does_not_matter(tmp_path: Path) -> None:
    """Facts of a file, and rows of machines that this sweep does not have, are no reason to refuse a store."""
    store = tmp_path / "sweep.jsonl"
    sweep(store)
    l4 = Hardware.from_catalog("gcp-l4-1x")
    sweep(store, replace(l4, facts={"date": "today"}))
    steps: list[int] = []
    plan_grid("mixtral-8x7b", "gcp-t4-1x", "77,32", n_jobs=1, out=store, progress=steps.append)
    assert (sum(steps), len(store.read_text().splitlines())) == (1, 2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": []}, "needs str as 'model'"),
        ({"batch_size": None}, "needs int or float as 'batch_size'"),
        ({"batch_size": "4"}, "needs int or float as 'batch_size'"),
        ({"attention_on_gpu": 1}, "needs bool as 'attention_on_gpu'"),
        ({"error": 3}, "needs str or null as 'error'"),
        ({"error": "does not fit"}, "needs null as"),
        ({"digest": "0"}, "needs dict as 'digest'"),
        ({"colour": 1}, "has an unknown key 'colour'"),
    ],
)
def test_a_row_of_the_wrong_shape_is_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    """A value of the wrong type is refused with its line and key, and the file stays as it is."""
    store = tmp_path / "sweep.jsonl"
    sweep(store)
    good = store.read_text()
    store.write_text(good + json.dumps(json.loads(good) | changed) + "\n" + good[:50])
    before = store.read_bytes()
    with pytest.raises(InvalidConfig, match=f"line 2, {words}"):
        sweep(store)
    assert store.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]\n", "line 1, is not a row of a sweep"),
        (b"3\n", "line 1, is not a row of a sweep"),
        (b"{}\n", "line 1, lacks 'attention_on_gpu'"),
        (b"\n", "line 1, is not JSON"),
        (b"\xff\xfe\n", "line 1, is not text"),
        pytest.param(b"9" * 5000 + b"\n", "line 1, is not JSON", id="digits"),
        pytest.param(b"[" * 100_000 + b"\n", "line 1, is not JSON", id="nesting"),
        (b"notes of mine", "line 1, is not a row of a sweep"),
        (b"\x00\x01\x02", "line 1, is not a row of a sweep"),
    ],
)
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: bytes, words: str) -> None:
    """A file that no sweep wrote is refused by its first line, and nothing is cut from it or added to it."""
    store = tmp_path / "sweep.jsonl"
    store.write_bytes(content)
    with pytest.raises(InvalidConfig, match=words):
        sweep(store)
    assert store.read_bytes() == content


@pytest.mark.parametrize("n_jobs", [0, -2, 257, 1_000_000, 1.5, True, None, "2"])
def test_the_number_of_processes_is_checked(n_jobs: Any) -> None:
    """A number of processes that is none, or too many, is refused with its value."""
    with pytest.raises(InvalidValue, match=f"'n_jobs' must be -1 .* or 1 to 256: {n_jobs!r}"):
        plan_grid("mixtral-8x7b", "gcp-l4-1x", "77,32", n_jobs=n_jobs)


def test_what_is_no_machine_is_refused(tmp_path: Path) -> None:
    """A number or another kind of object among the machines is refused with its axis; a path is read."""
    l4 = Hardware.from_catalog("gcp-l4-1x")
    with pytest.raises(InvalidValue, match="'hardware' of a sweep must be names, paths or Hardware objects: 3"):
        plan_grid("mixtral-8x7b", ["gcp-l4-1x", 3], "77,32", n_jobs=1)
    with pytest.raises(InvalidValue, match="'models' of a sweep must be names, paths or MoEModel objects"):
        plan_grid(l4, l4, "77,32", n_jobs=1)
    l4.save(tmp_path / "mine.json")
    assert plan_grid("mixtral-8x7b", tmp_path / "mine.json", "77,32", n_jobs=1)["error"][0] is None


def test_unknown_options_and_rate_sets_are_refused() -> None:
    """An option that plan does not have and a misspelt rate set are refused before anything is planned."""
    with pytest.raises(InvalidValue, match=r"unknown option 'resolutoin' of a sweep; known: .*resolution"):
        plan_grid("mixtral-8x7b", "gcp-l4-1x", "77,32", n_jobs=1, resolutoin="fine")
    with pytest.raises(InvalidValue, match="unknown option 'model'"):
        plan_grid("mixtral-8x7b", "gcp-l4-1x", "77,32", n_jobs=1, model="mixtral-8x7b")
    with pytest.raises(UnknownName, match=r"unknown efficiency 'papper'. Did you mean 'paper'"):
        plan_grid("mixtral-8x7b", "gcp-l4-1x", "77,32", n_jobs=1, efficiency="papper")


def test_a_rate_set_that_a_machine_lacks_is_that_rows_error() -> None:
    """A set that only some machines have leaves the others' rows without numbers."""
    rows = plan_grid("mixtral-tiny", ["gcp-l4-1x", "cpu-2core"], "77,32", n_jobs=1, efficiency="paper")
    assert pd.isna(rows["error"][0])
    assert "Known: " in rows["error"][1]
