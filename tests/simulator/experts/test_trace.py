"""Routing traces: what they hold, how they are read and written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.errors import InvalidConfig, InvalidValue
from simulator.experts.trace import RoutingTrace

SMALL = [[[1, 2], [0, 3]], [[0, 2], [3, 1]], [[0, 3], [2, 1]]]


def small(**changes: Any) -> RoutingTrace:
    """Three tokens, two layers, top-2 of 4."""
    return RoutingTrace(**({"experts": SMALL, "num_experts": 4} | changes))


def lines(path: Path, *layers: object) -> Path:
    """JSON lines with these 'layers'."""
    path.write_text("".join(json.dumps({"tok": n, "layers": ids}) + "\n" for n, ids in enumerate(layers, 1)))
    return path


# -- contents ------------------------------------------------------------------------------------------


def test_batches_and_counts() -> None:
    """Active sets, counts and popularity by batch, by size or as recorded."""
    trace = small(batch_starts=[0, 2])
    assert [a.tolist() for a in trace.active(layer=0)] == [[0, 1, 2], [0, 3]]
    assert [a.tolist() for a in trace.active(layer=1, batch=1)] == [[0, 3], [1, 3], [1, 2]]
    assert trace.counts()[:, 0].tolist() == [[1, 1, 2, 0], [1, 0, 0, 1]]
    assert trace.popularity()[1].tolist() == pytest.approx([1 / 6, 2 / 6, 1 / 6, 2 / 6])
    assert (trace.counts(batch=2).sum(axis=2) == [[4, 4], [2, 2]]).all()


def test_pieces() -> None:
    """A trace is cut between batches where they are known, and keeps them."""
    first, rest = small(batch_starts=[0, 2]).split()
    assert (first.num_tokens, rest.num_tokens) == (2, 1)
    assert small()[1:].experts.tolist() == SMALL[1:]
    again = RoutingTrace.concatenate([first, rest])
    assert again.experts.tolist() == SMALL and again.starts().tolist() == [0, 2]
    with pytest.raises(InvalidValue, match="cannot be cut"):
        small()[:1].split()
    with pytest.raises(InvalidValue, match="runs of tokens"):
        small()[::2]
    with pytest.raises(InvalidValue, match="trace 1 has"):
        RoutingTrace.concatenate([first, small(num_experts=5)])
    with pytest.raises(InvalidValue, match="no trace"):
        RoutingTrace.concatenate([])


def test_it_cannot_be_changed() -> None:
    """Ids and batch starts are read-only, and ids take as few bytes as they can."""
    trace = small(batch_starts=[0, 2])
    assert trace.experts.dtype == np.uint8
    assert small(num_experts=300).experts.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        trace.experts[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [[1, 2]]}, r"'experts' must be \[tokens, layers, k\]"),
        ({"experts": [[[1, 2]], [[1]]]}, "rows of different lengths"),
        ({"experts": [[[]]]}, "none of them 0"),
        ({"experts": [[[0.5]]]}, "must be integers"),
        ({"experts": [[[4]]]}, r"expert id 4 is not in 0..3 \(first bad id: token 0, layer 0\)"),
        ({"experts": [[[0]], [[-1]]]}, "expert id -1 is not in 0..3 .*token 1"),
        ({"experts": [[[0, 1], [2, 2]]]}, "token 0 chooses expert 2 twice in layer 1"),
        ({"experts": [[[0, *range(20)]]], "num_experts": 20}, "token 0 chooses expert 0 twice"),
        ({"num_experts": 0}, "'num_experts' must be between 1 and 65536: 0"),
        ({"layers": (1,)}, "'layers' names 1 layers"),
        ({"batch_starts": [1]}, "'batch_starts' must be integers that rise from 0"),
        ({"batch_starts": [0, 3]}, "less than 3 tokens"),
        ({"batch_starts": [0, 0]}, "'batch_starts'"),
        ({"batch_starts": [0.0, 1.5]}, "'batch_starts'"),
    ],
)
def test_bad_traces(changes: dict[str, Any], message: str) -> None:
    """Every way to be wrong has its line."""
    with pytest.raises(InvalidValue, match=message):
        small(**changes)


def test_unknown_batches() -> None:
    """Without recorded batches a size must be given, of at least one token."""
    with pytest.raises(InvalidValue, match="say how many tokens"):
        small().starts()
    with pytest.raises(InvalidValue, match="'batch' must be >= 1: 0"):
        small().starts(0)


# -- router logits -------------------------------------------------------------------------------------


class Tensor:
    """What a tensor of another library looks like from here."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def detach(self) -> Tensor:
        return self

    def float(self) -> Tensor:
        return Tensor(self.values.astype(np.float32))

    def cpu(self) -> Tensor:
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        assert self.values.dtype == np.float32
        return self.values


@settings(deadline=None)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 9), experts=st.integers(1, 9), data=st.data())
def test_router_logits(seed: int, tokens: int, experts: int, data: st.DataObject) -> None:
    """The k greatest logits, greatest first; layers without experts are skipped, and any leading dimensions count."""
    k = data.draw(st.integers(1, experts))
    logits = np.random.default_rng(seed).standard_normal((2, tokens, experts))
    given_ = (None, Tensor(logits[0]), np.zeros(0), logits[1].reshape(1, tokens, experts))
    trace = RoutingTrace.from_router_logits(given_, k)
    assert trace.layers == (1, 3) and trace.num_experts == experts
    for layer in range(2):
        for token in range(tokens):
            row = logits[layer, token]
            assert trace.experts[token, layer].tolist() == sorted(range(experts), key=lambda e: -row[e])[:k]
    assert trace.starts().tolist() == [0]


def test_router_logits_of_a_real_model() -> None:
    """What transformers' Mixtral returns, with batch starts of one's own."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        out = model(torch.arange(10).reshape(2, 5), output_router_logits=True)
    trace = RoutingTrace.from_router_logits(out.router_logits, 2, batch_starts=[0, 5], name="tiny")
    assert repr(trace) == "<RoutingTrace 'tiny': 10 tokens, 2 layers, top-2 of 4 experts, 2 batches>"
    expected = torch.stack([layer.topk(2).indices for layer in out.router_logits], dim=1)
    assert trace.experts.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        ((), 1, "no layer has router logits"),
        ((np.zeros(3),), 1, "must be \\[tokens, E\\]"),
        ((np.array([["a", "b"]]),), 1, "must be \\[tokens, E\\]"),
        ((np.zeros((2, 3)), np.zeros((2, 4))), 1, "router logits of layer 1 are"),
        ((np.zeros((2, 3)), np.zeros((1, 3))), 1, "router logits of layer 1 are"),
        ((np.zeros((2, 3)),), 4, "'top_k' must be between 1 and 3 experts: 4"),
        ((np.full((2, 3), np.nan),), 1, "hold NaN"),
    ],
)
def test_bad_router_logits(logits: Any, k: int, message: str) -> None:
    """Missing, ragged or impossible logits are refused in one line."""
    with pytest.raises(InvalidValue, match=message):
        RoutingTrace.from_router_logits(logits, k)


# -- files ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), experts=st.sampled_from([3, 256, 257]), known=st.booleans())
def test_columns_come_back(tmp_path_factory: pytest.TempPathFactory, seed: int, experts: int, known: bool) -> None:
    """What is saved is what is loaded."""
    random = np.random.default_rng(seed)
    trace = RoutingTrace(
        experts=random.permuted(np.tile(np.arange(experts), (5, 2, 1)), axis=2)[:, :, :2],
        num_experts=experts,
        batch_starts=[0, 3] if known else None,
        layers=(1, 3),
        name="some",
    )
    again = RoutingTrace.load(trace.save(tmp_path_factory.mktemp("trace") / "t.npz"))
    assert repr(again) == repr(trace) and again.layers == trace.layers
    assert (again.experts == trace.experts).all()


def test_json_lines(tmp_path: Path) -> None:
    """The public form: one token per line; the number of experts is the next power of two, or as told."""
    path = lines(tmp_path / "t.jsonl", *SMALL)
    path.write_text("\ufeff" + path.read_text() + "\n")
    trace = RoutingTrace.load(path)
    assert trace.experts.tolist() == SMALL and trace.num_experts == 4
    assert RoutingTrace.load(path, num_experts=6).num_experts == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no tokens"),
        ("\n\n", "has no tokens"),
        ("{", "line 1: expected"),
        ("[1]", "line 1: expected"),
        ('{"tok": 1}', "line 1: expected"),
        ('{"layers": 3}', "line 1: expected"),
        ('{"layers": "ab"}', "line 1: expected"),
        ('{"layers": [[true]]}', "line 1: expected"),
        ('{"layers": [["1"]]}', "line 1: expected"),
        ('{"layers": [[0.5]]}', "line 1: expected"),
        ("[" * 100_000, "line 1: expected"),
        ('{"layers": []}', "line 1: no expert ids"),
        ('{"layers": [[1, 2]]}\n{"layers": [[1, 2], [1, 2]]}', "line 2: 2 layers, the lines before have 1"),
        ('{"layers": [[1, 2]]}\n{"layers": [[1]]}', "line 2: layer 0 has 1 expert ids, others have 2"),
        ('{"layers": [[1, 2], [1]]}', "line 1: layer 1 has 1 expert ids"),
        ('{"layers": [[1, -2]]}', "line 1: expert id -2 of layer 0 is not in 0..65535"),
        ('{"layers": [[99999999999999999999]]}', "line 1: expert id 99999999999999999999"),
        ('{"layers": [[3, 3]]}', "line 1: layer 0 names an expert twice"),
        ("\x00\xff binary", "line 1: expected"),
    ],
)
def test_damaged_json_lines(tmp_path: Path, text: str, message: str) -> None:
    """The line and what is wrong with it."""
    path = tmp_path / "t.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidConfig, match=message):
        RoutingTrace.load(path)


def test_ids_beyond_what_was_told(tmp_path: Path) -> None:
    """An id that is not one of the experts that were told is named with its line."""
    path = lines(tmp_path / "t.jsonl", [[1, 2]], [[1, 5]])
    with pytest.raises(InvalidConfig, match=r"line 2: expert id 5 of layer 0 is not in 0..3"):
        RoutingTrace.load(path, num_experts=4)


def test_damaged_columns(tmp_path: Path) -> None:
    """A file that is cut off, of another kind, or holds impossible ids is refused."""
    path = small(batch_starts=[0, 2]).save(tmp_path / "t.npz")
    whole = path.read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidConfig, match=r"t\.npz"):
            RoutingTrace.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(InvalidConfig, match="not a whole routing trace"):
        RoutingTrace.load(path)
    about = {"format": "hrm-routing-1", "num_experts": 2, "layers": [0, 1], "name": ""}
    columns = {"experts": np.asarray(SMALL).transpose(1, 2, 0), "batch_starts": np.zeros(0, dtype=int)}
    for changes, message in (
        ({}, "expert id 2"),
        ({"format": "hrm-routing-9"}, "hrm-routing-9"),
        ({"layers": ["a", "b"], "num_experts": 4}, "damaged"),
    ):
        np.savez(path, about=np.array(json.dumps(about | changes)), **columns)
        with pytest.raises(InvalidConfig, match=message):
            RoutingTrace.load(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """No file, a folder, and a number of experts that the file contradicts."""
    with pytest.raises(InvalidConfig, match="cannot read the trace"):
        RoutingTrace.load(tmp_path / "none")
    with pytest.raises(InvalidConfig, match="cannot read the trace"):
        RoutingTrace.load(tmp_path)
    with pytest.raises(InvalidConfig, match="a trace of 4 experts, not of 8"):
        RoutingTrace.load(small().save(tmp_path / "t.npz"), num_experts=8)
