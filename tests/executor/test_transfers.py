"""Copies of the KV cache: as few as the rows allow, and no other rows than one copy per request moves."""

from __future__ import annotations

from itertools import pairwise
from threading import get_ident
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.checkpoint import Checkpoint, make_checkpoint
from executor.generate import generate
from executor.lanes import PacedLink
from executor.places import joined
from executor.transfers import Transfers
from hrm import Policy
from simulator.task import Op
from tests.executor.family_configs import CONFIGS

_RUNS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)), max_size=8)


@given(_RUNS, st.booleans())
def test_joined_runs_move_the_same_rows(gaps: list[tuple[int, int, int]], adjoin: bool) -> None:
    """Every row goes where it went, and no two runs are left that adjoin in both places."""
    here = there = 0
    runs = []
    for skip_here, skip_there, count in gaps:
        here, there = here + (0 if adjoin else skip_here), there + (0 if adjoin else skip_there)
        runs.append((here, there, count))
        here, there = here + count, there + count
    found = joined(runs)

    def pairs(source: slice, target: slice) -> list[tuple[int, int]]:
        return list(zip(range(source.start, source.stop), range(target.start, target.stop), strict=True))

    rows = [
        pair for here, there, count in runs for pair in pairs(slice(here, here + count), slice(there, there + count))
    ]
    assert [pair for source, target in found for pair in pairs(source, target)] == rows
    for (a, b), (c, d) in pairwise(found):
        assert a.stop != c.start or b.stop != d.start
    if adjoin:
        assert len(found) <= 1


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model some of whose layers see a short window."""
    folder = tmp_path_factory.mktemp("windowed") / "model"
    return Checkpoint.open(make_checkpoint(CONFIGS["gpt_oss"], folder, seed=2))


def test_full_windows_travel_in_one_copy(windowed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of requests one behind the other are one copy, and the tokens are those of attention on the CPU."""
    windows = [layer.attention.window for layer in windowed.model.layers]
    short = min(window for window in windows if window is not None)
    prompts = [[3 + i] * (short + 4) for i in range(4)]
    copies: list[int] = []
    load, copy = Transfers.load_kv, PacedLink.copy_pieces
    now: dict[int, int] = {}  # lanes are threads

    def loading(self: Transfers, step: int, layer: int, part: int, ready: float) -> None:
        now[get_ident()] = layer
        load(self, step, layer, part, ready)
        del now[get_ident()]

    def counted(self: PacedLink, pieces: list[Any], ready: float) -> None:
        copies.extend(now[get_ident()] for _ in pieces)
        copy(self, pieces, ready)

    monkeypatch.setattr(Transfers, "load_kv", loading)
    monkeypatch.setattr(PacedLink, "copy_pieces", counted)
    policy = Policy(batch_size=4, micro_batch_size=4, attention_on_gpu=True)
    result = generate(windowed, prompts, gen_len=4, policy=policy, device="cpu", link_bandwidth=None)
    [timeline] = result.timelines
    tasks = int(timeline.schedule.mask(Op.LOAD_KV).sum()) // windowed.model.num_layers
    for layer, window in enumerate(windows):
        assert copies.count(layer) / tasks == (4 if window is None else 1)
    monkeypatch.undo()
    on_cpu = generate(
        windowed, prompts, gen_len=4, policy=Policy(batch_size=4, micro_batch_size=4), device="cpu", link_bandwidth=None
    )
    assert result.outputs == on_cpu.outputs
