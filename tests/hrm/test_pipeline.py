"""What planner, simulator and executor agree on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm import BatchShape, MoEModel
from hrm.errors import InvalidValue
from hrm.pipeline import (
    ACTIVATION_SLOTS,
    ATTENTION_CHUNK_BYTES,
    LOOKAHEAD,
    PINNED_PAGES,
    activation_bytes,
    attention_bytes_per_token,
    page_bytes,
    prefill_slot_bytes,
    workspace_bytes,
)

MIXTRAL = MoEModel.from_catalog("mixtral-8x7b")
descending = st.lists(st.integers(1, 3000), min_size=1, max_size=40).map(lambda x: tuple(sorted(x, reverse=True)))


@given(st.lists(descending, min_size=1, max_size=5), st.integers(1, 64))
def test_shape_totals(parts, gen_len: int) -> None:
    """The totals of a batch follow from its prompt lengths."""
    shape = BatchShape(tuple(parts), gen_len)
    assert shape.batch_size == sum(len(part) for part in parts)
    assert shape.num_micro_batches == len(parts)
    assert shape.prompt_tokens == [sum(part) for part in parts]
    assert shape.longest == [max(part) for part in parts]
    assert shape.pairs == [sum(sum(range(1, s + 1)) for s in part) for part in parts]


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 100))
def test_uniform_shape(batch: int, micro: int, prompt: int) -> None:
    """N prompts fill micro-batches of μ, the last of which may be smaller."""
    shape = BatchShape.uniform(batch, micro, prompt, 4)
    assert sum(shape.sequences) == batch
    assert all(n == micro for n in shape.sequences[:-1])
    assert 1 <= shape.sequences[-1] <= micro
    assert set(shape.longest) == {prompt}


@pytest.mark.parametrize(
    ("parts", "gen_len", "message"),
    [
        ((), 4, "at least one request"),
        (((3,), ()), 4, "at least one request"),
        (((3,),), 0, "'gen_len' must be >= 1: 0"),
        (((3, 0),), 4, r"must be >= 1 and longest first: \[3, 0\]"),
        (((3, 5),), 4, r"must be >= 1 and longest first: \[3, 5\]"),
    ],
)
def test_shape_is_checked(parts, gen_len: int, message: str) -> None:
    """Empty micro-batches, nothing to generate, and lengths out of order are refused with the value."""
    with pytest.raises(InvalidValue, match=message):
        BatchShape(parts, gen_len)


def test_uniform_of_nothing_is_refused() -> None:
    """A batch of no requests is refused."""
    with pytest.raises(InvalidValue):
        BatchShape.uniform(0, 4, 10, 2)


def test_uniform_checks_the_micro_batch() -> None:
    """Micro-batches of no requests are refused."""
    with pytest.raises(InvalidValue):
        BatchShape.uniform(4, 0, 10, 2)


def test_depths_fit_together() -> None:
    """Slots and pinned pages follow from how far PreAttn runs ahead."""
    assert LOOKAHEAD == 2
    assert ACTIVATION_SLOTS > LOOKAHEAD
    assert PINNED_PAGES >= LOOKAHEAD + 2


def test_buffer_sizes() -> None:
    """Slot sizes are the tensors that lie in them: Q, K, V and attended; hidden states, K and V."""
    assert activation_bytes(MIXTRAL, 10) == 10 * (4096 + 1024 + 1024 + 4096) * 2
    assert prefill_slot_bytes(MIXTRAL, 10) == 10 * (4096 + 1024 + 1024) * 2
    assert page_bytes(100.0, 8) == 12.5


@given(st.integers(1, 50_000), st.integers(1, 2000), st.integers(1, 1000))
def test_workspace_never_shrinks(tokens: int, sequences: int, more: int) -> None:
    """More tokens or sequences never need less workspace."""
    base = workspace_bytes(MIXTRAL, tokens, sequences)
    assert base <= workspace_bytes(MIXTRAL, tokens + more, sequences)
    assert base <= workspace_bytes(MIXTRAL, tokens, sequences + more)
    assert base >= sequences * MIXTRAL.vocab_size * 2  # the logits alone


def test_attention_on_a_gpu_takes_workspace_up_to_a_chunk() -> None:
    """Temporaries of decode attention grow with sequences until they fill a chunk, then only with the context."""
    few, some, many, longer = (
        workspace_bytes(MIXTRAL, 1, sequences, context)
        for sequences, context in ((1, 1000), (2, 1000), (500, 1000), (500, 10_000))
    )
    one = 1000 * attention_bytes_per_token(2048, 32, 2, latent=False)
    assert few == one + 2**16
    assert some == 2 * one + 2**16
    assert many == max(ATTENTION_CHUNK_BYTES + 2**16, workspace_bytes(MIXTRAL, 1, 500))
    assert longer == 10 * one + 2**16
