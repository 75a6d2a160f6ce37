"""The benchmark of the executor runs to its end on a tiny checkpoint; its peer answers as the executor does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.checkpoint import Checkpoint, make_checkpoint
from hrm.catalog import model_config

pytest.importorskip("accelerate")
_BUDGET = 4 * 2**20
_POLICIES = {
    "cgopipe": "N=6,mu=3",
    "flexgen": "N=6,mu=2,A_g=1",
    "deepspeed-zero": "N=3,mu=3,A_g=1,r_c=1",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny checkpoint with clear-cut logits."""
    config = model_config("mixtral-tiny") | {"initializer_range": 0.08}
    return Checkpoint.open(make_checkpoint(config, tmp_path_factory.mktemp("checkpoints") / "tiny"))


@pytest.fixture(scope="module")
def results(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One round of three schedules and both peers; the JSON, and the folder."""
    from benchmarks.executor import main

    folder = tmp_path_factory.mktemp("benchmark")
    own = [f"--policy={entry}:{policy}" for entry, policy in _POLICIES.items()]
    parts = [f"--part={entry}" for entry in (*_POLICIES, "accelerate-cpu", "accelerate-disk")]
    case = ["--num-requests=6", "--gen-len=3", "--prompt-lens=3:9", "--device-memory=4MiB"]
    files = [f"--work={folder}", f"--out={folder / 'out.json'}", f"--figure={folder / 'out.png'}"]
    run = ["--rounds=1", "--hardware=cpu-2core", f"--checkpoint={checkpoint.path}", "--device=cpu"]
    main([*run, *case, *own, *parts, *files])
    return json.loads((folder / "out.json").read_text()), folder


def test_everybody_gives_the_same_answers_within_the_budget(results: tuple[dict[str, Any], Path]) -> None:
    """Every schedule and both kinds of offloading run, over a paced link and without pace."""
    found, folder = results
    links = found["cases"]["given"]["links"]
    assert set(links) == {"paced", "unpaced"} and found["finished"]
    for entries in links.values():
        assert list(entries) == [*_POLICIES, "accelerate-cpu", "accelerate-disk"]
        for entry in entries.values():
            assert entry["same_answers"] == 1.0
            assert 0 < entry["peak_device_bytes"] <= _BUDGET
            assert len(entry["tok_s"]) == 1 and entry["median_tok_s"] > 0
        assert all(entries[name]["predicted_tok_s"] > 0 for name in _POLICIES)
    assert (folder / "out.png").stat().st_size > 0


def test_a_later_call_takes_up_runs_that_have_ended(
    results: tuple[dict[str, Any], Path], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts leave their runs behind, and the next call does not run them again."""
    from benchmarks import executor_runs
    from benchmarks.executor import main

    found, folder = results
    monkeypatch.setattr(executor_runs, "generate", lambda *_, **__: pytest.fail("ran again"))
    command = [f"--checkpoint={checkpoint.path}", f"--work={folder}", f"--out={folder / 'again.json'}"]
    command += ["--num-requests=6", "--gen-len=3", "--prompt-lens=3:9", "--device-memory=4MiB", "--device=cpu"]
    command += [f"--policy={entry}:{policy}" for entry, policy in _POLICIES.items()]
    main([*command, "--rounds=1", "--hardware=cpu-2core", "--part=cgopipe", "--part=flexgen"])
    assert json.loads((folder / "again.json").read_text())["cases"] == found["cases"]


def test_the_peer_counts_what_it_fetches_and_drops_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Every pass fetches every weight once, and nothing stays on the device but the KV cache while it runs."""
    from benchmarks.accelerate_peer import Peer

    peer = Peer(checkpoint, "accelerate-cpu", device=torch.device("cpu"), folder=tmp_path)
    run = peer.run([[1, 2, 3], [4]], 3, batch_size=2, watch=True)
    assert run.fetched_bytes == 3 * checkpoint.model.num_parameters * checkpoint.model.dtype_bytes
    assert run.peak_device_bytes is not None and run.peak_device_bytes >= checkpoint.model.layer_expert_bytes
    assert peer.heap.used == 0


def test_weights_travel_no_faster_than_the_link(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A run over a paced link takes at least as long as its bytes do."""
    from benchmarks.accelerate_peer import Peer

    peer = Peer(checkpoint, "accelerate-disk", device=torch.device("cpu"), folder=tmp_path)
    run = peer.run([[1, 2, 3]], 2, batch_size=1, bandwidth=2e7)
    assert run.seconds >= run.fetched_bytes / 2e7


def test_the_quick_checkpoint_is_read_by_both_sides(tmp_path: Path) -> None:
    """Stacked experts, stored alike for all layers, are what the executor and transformers make of them."""
    from benchmarks.accelerate_peer import PEERS, Peer
    from benchmarks.executor_cases import CPU_CASES, open_checkpoint
    from executor.generate import generate
    from hrm import Policy

    case = replace(CPU_CASES["demo"], model="mixtral-tiny", changes={"initializer_range": 0.08})
    checkpoint = open_checkpoint(case, tmp_path, lambda _: None, quick=True)
    prompts = [[1, 2, 3], [4, 5]]
    mine = generate(
        checkpoint, prompts, gen_len=3, policy=Policy(batch_size=2, micro_batch_size=1), device="cpu"
    ).outputs
    for kind in PEERS:
        peer = Peer(checkpoint, kind, device=torch.device("cpu"), folder=tmp_path / "offloaded")
        assert peer.run(prompts, 3, batch_size=2).outputs == mine
