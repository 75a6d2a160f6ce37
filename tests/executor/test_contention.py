"""Calls of several lanes timed at once: rates, and errors that end all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from executor.contention import together
from simulator.task import Lane


def fails_at(turn: int) -> Callable[[], None]:
    """A call that raises when it is called for the `turn`-th time."""
    turns = iter(range(1, turn + 1))

    def call() -> None:
        if next(turns) == turn:
            raise RuntimeError(f"turn {turn} failed")

    return call


def test_every_call_gets_its_rate() -> None:
    """One rate per call, in the calls' order."""
    rates = together({Lane.GPU: lambda: None, Lane.CPU: lambda: None}, 0.02, cuda=False)
    assert len(rates) == 2 and min(rates) > 0


@pytest.mark.parametrize("turn", [1, 3])
@pytest.mark.parametrize("first", [False, True])
def test_an_error_ends_all_calls(turn: int, first: bool) -> None:
    """Whether a call fails before all have begun or between others, the error comes out and no thread is left."""
    calls = {Lane.GPU: fails_at(turn), Lane.CPU: lambda: None}
    before, outcome = threading.active_count(), []

    def measure() -> None:
        try:
            together(calls if first else dict(reversed(calls.items())), 60.0, cuda=False)
        except RuntimeError as error:
            outcome.append(str(error))

    # In a thread of its own, so that a hang fails this test alone.
    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome == [f"turn {turn} failed"]
    assert threading.active_count() == before
