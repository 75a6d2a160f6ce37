"""Synthetic traces: they have the statistics that were asked for, and the same seed makes the same trace."""

from __future__ import annotations

import numpy as np
import pytest

from hrm.errors import InvalidValue, UnknownName
from simulator.experts.statistics import asked_and_obtained, trace_statistics, zipf_exponent
from simulator.experts.synthesis import SYNTHETIC, Knobs, Routing, find_knobs, synthesize, synthetic_trace
from simulator.experts.trace import RoutingTrace

SHAPE = {"num_layers": 3, "num_experts": 32, "top_k": 2, "batch_tokens": 16}


def test_the_decoder_of_the_paper() -> None:
    """Asked and obtained agree for the machine-translation decoder: three quarters of the experts are inactive."""
    trace = synthetic_trace("mt-decoder", batches=300)
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (6, 128, 2)
    frame = asked_and_obtained(SYNTHETIC["mt-decoder"], trace)
    assert frame.loc["inactive_share", "obtained"] == pytest.approx(0.75, abs=0.02)
    asked = frame.dropna(subset="asked")
    assert set(asked.index) == {"inactive_share", "zipf", "stickiness", "group_correlation"}
    assert ((asked["asked"] - asked["obtained"]).abs() < 0.06).all()
    assert ((frame["least"] <= frame["obtained"]) & (frame["obtained"] <= frame["most"]))[asked.index].all()


@pytest.mark.parametrize(
    ("asked", "value"),
    [("zipf", 0.3), ("zipf", 1.2), ("inactive_share", 0.6), ("stickiness", 0.25), ("group_correlation", 0.3)],
)
def test_one_statistic_at_a_time(asked: str, value: float) -> None:
    """Each statistic can be asked for alone."""
    routing = Routing(**SHAPE, group_size=4, **{asked: value})
    obtained = trace_statistics(synthesize(routing, batches=500, seed=3), group_size=4)[asked].mean()
    assert obtained == pytest.approx(value, abs=0.06)


def test_seeds() -> None:
    """The same seed makes the same trace, another one another; layers do not depend on how many there are."""
    routing = Routing(**SHAPE)
    one, same, other = (synthesize(routing, batches=5, seed=seed) for seed in (1, 1, 2))
    assert (one.experts == same.experts).all() and not (one.experts == other.experts).all()
    fewer = synthesize(Routing(**(SHAPE | {"num_layers": 2})), batches=5, seed=1)
    assert (fewer.experts == one.experts[:, :2]).all()


def test_uniform_routing_is_uniform() -> None:
    """Nothing asked: every expert as likely as any other, and no batch knows the one before it."""
    trace = synthetic_trace("uniform", batches=2000, batch_tokens=2)
    found = trace_statistics(trace)
    expected = (1 - 8 / 64) ** 2
    assert found["inactive_share"].mean() == pytest.approx(expected, abs=0.005)
    assert found["zipf"].max() < 0.1
    assert found["stickiness"].abs().max() < 0.05
    assert found["mean_correlation"].mean() == pytest.approx(-1 / 63, abs=0.001)
    assert found["group_correlation"].isna().all()


def test_extreme_weights_still_choose_distinct_experts() -> None:
    """Where a few experts have nearly all the weight, every token still chooses k distinct ones."""
    routing = Routing(num_layers=1, num_experts=16, top_k=8, batch_tokens=4)
    trace = synthesize(routing, batches=30, knobs=Knobs(spread=20.0, skew=4.0))
    assert trace.num_tokens == 120
    assert synthesize(Routing(num_layers=1, num_experts=2, top_k=2, batch_tokens=1), batches=3).counts().min() == 1


def test_zipf_exponent() -> None:
    """Exact counts give their exponent, equal counts none, and a single expert has no exponent at all."""
    for s in (0.2, 1.0, 2.5):
        assert zipf_exponent(np.arange(1, 40) ** -s) == pytest.approx(s)
    assert zipf_exponent(np.full(9, 7)) == 0
    assert zipf_exponent(np.array([5])) == 0
    assert zipf_exponent(np.array([5, 0, 0])) == 20


def test_stickiness_by_hand() -> None:
    """A set that alternates is less alike its neighbour than chance, one that changes once is more."""

    def sticky(*sets: int) -> float:
        trace = RoutingTrace(experts=np.array(sets).reshape(-1, 1, 1), num_experts=2)
        return float(trace_statistics(trace, batch=1)["stickiness"][0])

    # Size 1; overlap 0; chance 2 x 2 x 1 / (4 x 3).
    assert sticky(0, 1, 0, 1) == pytest.approx((0 - 1 / 3) / (1 - 1 / 3))
    assert sticky(0, 0, 1, 1) == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
    assert sticky(0, 0, 0, 0) == 0
    assert np.isnan(sticky(0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "'num_layers' must be >= 1: 0"),
        ({"top_k": 33}, "'top_k' must be at most the 32 experts: 33"),
        ({"group_size": 5}, "'group_size' must divide the 32 experts: 5"),
        ({"inactive_share": 1.0}, "'inactive_share' must be at least 0 and below 1: 1.0"),
        ({"inactive_share": 0.99}, "leaves fewer than the 2 experts"),
        ({"stickiness": -0.1}, "'stickiness' must be at least 0"),
        ({"zipf": 5.0}, "'zipf' must be between 0 and 4: 5.0"),
        ({"zipf": float("nan")}, "'zipf' must be between 0 and 4: nan"),
    ],
)
def test_bad_routing(changes: dict[str, float], message: str) -> None:
    """Every field has its range."""
    with pytest.raises(InvalidValue, match=message):
        Routing(**(SHAPE | changes))  # type: ignore[arg-type]


def test_what_cannot_be_had() -> None:
    """Two tokens cannot make all of 32 experts active; the line says what they give."""
    with pytest.raises(InvalidValue, match=r"'inactive_share' 0\.1 cannot be had: 2 tokens a batch"):
        find_knobs(Routing(**(SHAPE | {"batch_tokens": 2}), inactive_share=0.1))


def test_bad_arguments() -> None:
    """Unknown presets and statistics, no batches, a negative seed, groups that do not divide."""
    with pytest.raises(UnknownName, match=r"unknown synthetic trace 'mt-dekoder'.*Did you mean 'mt-decoder'"):
        synthetic_trace("mt-dekoder")
    with pytest.raises(InvalidValue, match="'batches' must be >= 1: 0"):
        synthesize(Routing(**SHAPE), batches=0)
    with pytest.raises(InvalidValue, match="'seed' must be >= 0: -1"):
        synthesize(Routing(**SHAPE), batches=1, seed=-1)
    trace = synthesize(Routing(**SHAPE), batches=3)
    with pytest.raises(InvalidValue, match="unknown statistic 'skew'"):
        trace_statistics(trace, only=("skew",))
    with pytest.raises(InvalidValue, match="'group_size' must divide the 32 experts: 5"):
        trace_statistics(trace, group_size=5)
