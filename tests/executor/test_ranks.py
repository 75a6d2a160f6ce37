"""Processes that work in step: a rank that ends is named, and all end with it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.generate import generate
from executor.ranks import Member, RankLost, environment_ranks, launch
from executor.tensor_parallel import generate_on
from hrm import Policy
from hrm.errors import InvalidValue


def test_a_killed_rank_ends_the_run(tiny_path: Path) -> None:
    """Rank 1 is killed in mid-run: within seconds one line says so, and what was answered before is right."""
    prompts = [[7 * i + j for j in range(n)] for i, n in enumerate((5, 9, 2, 7))]
    policy = Policy(batch_size=2, micro_batch_size=1, weights_on_gpu=0.3)
    whole = generate(str(tiny_path), prompts, gen_len=4, policy=policy, device="cpu", link_bandwidth=None)
    answers: dict[int, list[int]] = {}
    killed = 0.0

    def note(done: Any) -> None:
        nonlocal killed
        answers.update({answer.index: answer.output for answer in done})
        if done and not killed:
            killed = time.monotonic()
            os.kill(team.follower_ids[0], signal.SIGKILL)

    with launch(2, device="cpu", timeout_s=60) as team:
        with pytest.raises(RankLost, match=r"^rank 1 of 2 was killed by SIGKILL .* --resume goes on\.$") as caught:
            generate_on(team, tiny_path, prompts, gen_len=4, policy=policy, link_bandwidth=1e7, on_answers=note)
        assert time.monotonic() - killed < 15
        assert caught.value.exit_code == 2
        assert 0 < len(answers) < len(prompts)
        assert all(whole.outputs[i] == output for i, output in answers.items())
        with pytest.raises(RankLost, match="has ended"):
            team.call(_fail)


def _fail(member: Member) -> None:
    if member.rank == 2:
        raise InvalidValue("there is something that only rank 2 sees.")
    member.reduce(torch.ones(5))


def test_an_error_on_one_rank_is_named() -> None:
    """What one rank alone cannot do ends all of them, also those that do not talk with it directly."""
    with launch(4, device="cpu", timeout_s=60) as team:
        with pytest.raises(RankLost, match=r"^rank 2 of 4 ended: there is something that only rank 2 sees; all ranks"):
            team.call(_fail)
        pids = team.follower_ids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _wait(member: Member) -> None:
    if member.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    member.reduce(torch.ones(5))


def test_a_rank_that_does_not_answer() -> None:
    """A rank that lives and does not answer is waited for as long as was said."""
    with launch(2, device="cpu", timeout_s=3) as team, pytest.raises(RankLost, match="lost contact with the others"):
        team.call(_wait)


def test_ranks_that_a_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables of torchrun say which rank this is; several machines are refused."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment_ranks() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert environment_ranks() == (1, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InvalidValue, match="2 of 4 ranks"):
        environment_ranks()


def test_bad_sizes_of_a_team() -> None:
    """One rank is no team."""
    with pytest.raises(InvalidValue, match="at least 2 ranks: 1"), launch(1, device="cpu"):
        pass
