"""Policies and their checks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm import Policy
from hrm.errors import InvalidValue


@given(batch=st.integers(1, 10_000), micro=st.integers(1, 10_000))
def test_micro_batches_cover_the_batch(batch: int, micro: int) -> None:
    """G is the least number of micro-batches of μ that hold N."""
    micro = min(micro, batch)
    g = Policy(batch_size=batch, micro_batch_size=micro).num_micro_batches
    assert (g - 1) * micro < batch <= g * micro


@pytest.mark.parametrize("name", ["batch_size", "micro_batch_size"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4", None])
def test_sizes_must_be_positive_integers(name: str, value: object) -> None:
    """A batch size that is no positive integer is refused with its name and value."""
    sizes = {"batch_size": 8, "micro_batch_size": 1, name: value}
    with pytest.raises(InvalidValue) as caught:
        Policy(**sizes)
    assert str(caught.value) == f"{name!r} must be an integer >= 1: {value!r}"


@pytest.mark.parametrize("value", [10**9 + 1, pytest.param(10**400, id="1e400"), pytest.param(10**5000, id="1e5000")])
def test_sizes_have_a_limit(value: int) -> None:
    """More sequences than a billion are refused in one short line."""
    with pytest.raises(InvalidValue, match="'batch_size' must be <= 1000000000: ") as caught:
        Policy(batch_size=value, micro_batch_size=1)
    assert len(str(caught.value)) < 120


def test_micro_batch_cannot_exceed_the_batch() -> None:
    """μ above N is refused with both numbers."""
    with pytest.raises(InvalidValue, match=r"'micro_batch_size' must be <= batch_size=4: 5"):
        Policy(batch_size=4, micro_batch_size=5)


@pytest.mark.parametrize("name", ["weights_on_gpu", "kv_on_gpu"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_fractions_lie_between_0_and_1(name: str, value: float) -> None:
    """A fraction out of [0, 1] is refused with its value."""
    with pytest.raises(InvalidValue, match=f"'{name}' must be between 0 and 1: {value}"):
        Policy(batch_size=4, micro_batch_size=2, **{name: value})


def test_plain_form() -> None:
    """The plain form has the keys of the command contract and the text form the paper's symbols."""
    policy = Policy(batch_size=10, micro_batch_size=4, weights_on_gpu=0.25)
    assert policy.to_dict() == {
        "batch_size": 10,
        "micro_batch_size": 4,
        "attention_on_gpu": False,
        "ffn_on_gpu": True,
        "weights_on_gpu": 0.25,
        "kv_on_gpu": 0.0,
        "expert_slots": None,
        "num_micro_batches": 3,
    }
    assert str(policy) == "N=10 mu=4 G=3 r_w=0.250 r_c=0.00 attention=CPU experts=GPU"
