"""Gates in whole jobs: tokens stay where nothing is dropped, and what is dropped is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from executor.checkpoint import Checkpoint
from executor.gating import make_gating
from executor.generate import generate
from hrm import Policy
from hrm.errors import InvalidValue
from tests.executor.conftest import Prompts

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


@pytest.mark.parametrize(("name", "factor"), [("static", 1.0), ("tutel", None), ("tutel", 1.0), ("dynamic", None)])
@pytest.mark.parametrize("ffn_on_gpu", [True, False])
def test_uncapped_gates_give_the_same_tokens(
    tiny: Checkpoint, reference: Callable[[Prompts, int], list[list[int]]], name: str, factor: float | None,
    ffn_on_gpu: bool,
) -> None:  # fmt: skip
    """With room for every token all gates are transformers' answer, on one processor or two."""
    policy = Policy(batch_size=3, micro_batch_size=2, weights_on_gpu=0.5, ffn_on_gpu=ffn_on_gpu)
    result = generate(
        tiny, PROMPTS, gen_len=6, policy=policy, device="cpu", link_bandwidth=None,
        gating=make_gating(name, capacity_factor=factor),
    )  # fmt: skip
    assert result.outputs == reference(PROMPTS, 6)
    assert result.gating is not None and result.gating["dropped"] == 0
    passes = sum(len(p) for p in PROMPTS) + 5 * len(PROMPTS)
    assert result.gating["choices"] == passes * tiny.model.top_k * tiny.model.num_layers


def test_a_small_capacity_drops_and_counts(tiny: Checkpoint) -> None:
    """A capacity below the busiest expert's tokens loses choices, and says how many."""
    policy = Policy(batch_size=3, micro_batch_size=3)
    result = generate(
        tiny, PROMPTS, gen_len=4, policy=policy, device="cpu", link_bandwidth=None,
        gating=make_gating("static", capacity_factor=0.1),
    )  # fmt: skip
    assert result.gating is not None
    assert 0 < result.gating["dropped"] < result.gating["choices"]
    assert result.gating["rows"] == result.gating["choices"] - result.gating["dropped"] + result.gating["padded"]


def test_a_cache_has_its_own_dispatch(tiny: Checkpoint) -> None:
    """An expert cache refuses another gate in one line."""
    policy = Policy(batch_size=2, micro_batch_size=2, expert_slots=2)
    with pytest.raises(InvalidValue, match="gating"):
        generate(tiny, PROMPTS, gen_len=2, policy=policy, device="cpu", gating=make_gating("dynamic"))
