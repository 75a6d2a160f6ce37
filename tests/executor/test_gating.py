"""Gates: what they compute, what they drop and pad, and what memory they take."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.gating import (
    DynamicGating,
    Gating,
    GatingStats,
    StaticGating,
    TutelGating,
    gated_ffn,
    make_gating,
)
from executor.gating.bench import Layer, draw_choices, largest_batch, measure, variants
from executor.gating.live_bytes import LiveBytes, peak_bytes
from executor.gating.sizes import LM, MT, LayerShape, gating_sizes
from executor.kernels import ExpertWeights, moe_ffn
from hrm.errors import DoesNotFit, InvalidValue, UnknownName

UNCAPPED = [make_gating("static", capacity_factor=1), make_gating("tutel", capacity_factor=1), make_gating("tutel")]
ALL = [*UNCAPPED, make_gating("dynamic")]
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
_H, _I = 12, 20


def _silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _experts(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[ExpertWeights]:
    """Experts of two matrices with biases, as fairseq's."""
    g = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=g) * size[-1] ** -0.5).to(dtype)

    return [ExpertWeights([noise(_I, _H)], [noise(_H, _I)], noise(_I), noise(_H)) for _ in range(count)]


def _inputs(
    tokens: int, num_experts: int, top_k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, _H, generator=g).to(dtype)
    weight, index = torch.rand(tokens, num_experts, generator=g).softmax(-1).topk(top_k)
    return x, index, weight


def _token_by_token(
    x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, experts: list[ExpertWeights]
) -> torch.Tensor:
    out = torch.zeros_like(x, dtype=torch.float32)
    for s, row in enumerate(x.float()):
        for e, w in zip(index[s].tolist(), weight[s].float(), strict=True):
            up, down = experts[e].gate_up[0].float(), experts[e].down[0].float()
            up_bias, down_bias = experts[e].gate_up_bias, experts[e].down_bias
            assert up_bias is not None and down_bias is not None
            out[s] += w * (down @ (up @ row + up_bias.float()).relu() + down_bias.float())
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gating", ALL, ids=repr)
def test_uncapped_gates_compute_every_choice(gating: Gating, dtype: torch.dtype) -> None:
    """With room for all tokens every gate gives what a loop over tokens and experts gives."""
    experts = _experts(7, dtype)
    x, index, weight = _inputs(19, 7, 3, dtype)
    out, stats = gated_ffn(x, index, weight, experts, torch.relu, gating)
    assert (out.dtype, stats.dropped, stats.lost_tokens) == (dtype, 0, 0)
    expected = _token_by_token(x, index, weight, experts)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=_TOLERANCE[dtype] * 2)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    num_experts=st.integers(2, 9),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_dynamic_equals_uncapped(tokens: int, num_experts: int, top_k: int, seed: int, dtype: torch.dtype) -> None:
    """Dynamic gating, static gating at C = 1 and Tutel-like gating at C = 1 or adaptive agree to rounding."""
    top_k = min(top_k, num_experts)
    experts = _experts(num_experts, dtype, seed)
    inputs = _inputs(tokens, num_experts, top_k, dtype, seed)
    dynamic, stats = gated_ffn(*inputs, experts, torch.relu, DynamicGating())
    assert (stats.choices, stats.rows, stats.padded) == (tokens * top_k, tokens * top_k, 0)
    for gating in UNCAPPED:
        out, other = gated_ffn(*inputs, experts, torch.relu, gating)
        torch.testing.assert_close(out, dynamic, rtol=0, atol=_TOLERANCE[dtype])
        assert (other.dropped, other.padded) == (0, other.rows - tokens * top_k)


def test_dynamic_gating_is_that_of_the_executor() -> None:
    """The dynamic gate and `moe_ffn` give the same bits, for gated experts in blocks of rows, too."""
    torch.manual_seed(0)
    experts = []
    for _ in range(5):
        up, down = torch.randn(2 * _I, _H), torch.randn(_H, _I)
        experts.append(ExpertWeights([up[:11], up[11:]], [down[:5], down[5:]], torch.randn(2 * _I), torch.randn(_H)))
    inputs = _inputs(33, 5, 2)
    out, _ = gated_ffn(*inputs, experts, _silu_gate, DynamicGating())
    torch.testing.assert_close(out, moe_ffn(*inputs, experts, _silu_gate))


# -- capacity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [StaticGating, TutelGating])
def test_first_tokens_win_the_slots(make: Callable[[float], Gating]) -> None:
    """Two slots per expert: first choices in order of tokens, then second ones; the rest adds nothing."""
    # Expert 0 is the first choice of tokens 0, 1, 2 and the second of 3; expert 1 the first of 3, the second of 0 to 2.
    index = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    weight = torch.tensor([[1.0, 10.0]] * 4)
    x = torch.arange(1.0, 5.0)[:, None].expand(4, 3).contiguous()
    out, stats = make(0.5)(x, index, weight, lambda rows, counts: rows, 2)
    # Kept: tokens 0 and 1 on expert 0; token 3, then token 0 on expert 1.
    assert out[:, 0].tolist() == [1 + 10, 2, 0, 4]
    assert (stats.choices, stats.dropped, stats.lost_tokens) == (8, 4, 1)
    assert (stats.capacity, stats.rows, stats.padded) == (2, 4, 0)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    num_experts=st.integers(1, 9),
    factor=st.sampled_from([0.05, 0.1, 0.25, 0.4, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_drops_equal_a_hand_count(tokens: int, num_experts: int, factor: float, seed: int) -> None:
    """Static and Tutel-like gating drop, per expert, what comes after its capacity, and agree on all outputs."""
    top_k = min(2, num_experts)
    x, index, weight = _inputs(tokens, num_experts, top_k, seed=seed)
    results = {}
    for gating in (StaticGating(factor), TutelGating(factor)):
        results[gating.name] = gating(x, index, weight, lambda rows, counts: rows * 2, num_experts)
    capacity = int(np.ceil(factor * tokens - 1e-9))
    taken, dropped = [0] * num_experts, np.zeros((tokens, top_k), dtype=bool)
    for rank in range(top_k):
        for s in range(tokens):
            e = int(index[s, rank])
            dropped[s, rank] = taken[e] == capacity
            taken[e] += not dropped[s, rank]
    expected = 2 * x * (weight * torch.from_numpy(~dropped)).sum(dim=1, keepdim=True)
    for out, stats in results.values():
        assert (stats.dropped, stats.lost_tokens) == (dropped.sum(), dropped.all(axis=1).sum())
        assert (stats.capacity, stats.rows) == (capacity, num_experts * capacity)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("shape", "factor"), [(LM, 12.8), (MT, 64.0)])
def test_waste_factors_of_the_paper(shape: LayerShape, factor: float) -> None:
    """E·C/k is 12.8 for LM and 64 for MT, by arithmetic and as a static gate counts its rows."""
    assert shape.waste_factor == pytest.approx(factor)
    tokens = 20
    index, weight = draw_choices(shape, tokens)
    _, stats = StaticGating(shape.capacity_factor)(
        torch.ones(tokens, 1), index, weight, lambda rows, counts: rows, shape.num_experts
    )
    assert stats.waste_factor == pytest.approx(factor)
    assert (
        gating_sizes(StaticGating(shape.capacity_factor), shape, tokens, fullest=1).waste_factor == stats.waste_factor
    )


@pytest.mark.parametrize("gating", [*ALL, StaticGating(0.1), TutelGating(0.1)], ids=repr)
def test_an_empty_batch(gating: Gating) -> None:
    """No tokens: nothing comes out, nothing is counted."""
    out, stats = gated_ffn(*_inputs(0, 4, 2), _experts(4), torch.relu, gating)
    assert out.shape == (0, _H)
    assert (stats.tokens, stats.choices, stats.dropped, stats.rows, stats.padded) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(("factor", "dropped"), [(1.0, 0), (0.25, 9)])
def test_one_expert_gets_everything(factor: float, dropped: int) -> None:
    """All twelve tokens choose one expert: uncapped gates serve all, a capacity of three drops nine."""
    experts, (x, _, _) = _experts(4), _inputs(12, 4, 1)
    index, weight = torch.full((12, 1), 2), torch.ones(12, 1)
    whole, _ = gated_ffn(x, index, weight, experts, torch.relu, DynamicGating())
    for gating in (StaticGating(factor), TutelGating(factor)):
        out, stats = gated_ffn(x, index, weight, experts, torch.relu, gating)
        assert (stats.dropped, stats.lost_tokens) == (dropped, dropped)
        torch.testing.assert_close(out[: 12 - dropped], whole[: 12 - dropped])
        assert not out[12 - dropped :].any()
    _, adaptive = gated_ffn(x, index, weight, experts, torch.relu, TutelGating())
    assert (adaptive.capacity, adaptive.rows, adaptive.padded) == (12, 48, 36)


# -- experts that are elsewhere, or only one -----------------------------------------------------------


@pytest.mark.parametrize("gating", [*ALL, StaticGating(0.1), TutelGating(0.1)], ids=repr)
def test_experts_elsewhere_add_nothing(gating: Gating) -> None:
    """What two halves of the experts give adds up to the whole; nobody computes rows for the other half's experts."""
    experts, inputs = _experts(6), _inputs(40, 6, 2)
    whole, of_all = gated_ffn(*inputs, experts, torch.relu, gating)
    halves = [[e if (n % 2 == half) else None for n, e in enumerate(experts)] for half in (0, 1)]
    outs, stats = zip(*(gated_ffn(*inputs, half, torch.relu, gating) for half in halves), strict=True)
    torch.testing.assert_close(outs[0] + outs[1], whole)
    both = stats[0] + stats[1]
    assert (both.choices, both.elsewhere, both.dropped) == (80, 80, of_all.dropped)
    if gating.name != "tutel" or gating.capacity_factor:  # type: ignore[attr-defined]
        assert both.rows == of_all.rows
    out, none = gated_ffn(*inputs, [None] * 6, torch.relu, gating)
    assert not out.any() and (none.rows, none.elsewhere) == (0, 80)


@pytest.mark.parametrize("gating", ALL, ids=repr)
def test_a_dense_layer_needs_no_gate(gating: Gating) -> None:
    """An only expert gets every token, as in the executor's own kernel."""
    x, experts = torch.randn(5, _H), _experts(1)
    index, weight = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    out, stats = gated_ffn(x, index, weight, experts, torch.relu, gating)
    torch.testing.assert_close(out, moe_ffn(x, index, weight, experts, torch.relu))
    assert (stats.choices, stats.rows, stats.padded) == (5, 5, 0)


def test_counts_of_several_calls_add_up() -> None:
    """Totals of a run: numbers add up, of capacities and bytes the largest counts."""
    gating, experts = StaticGating(0.25), _experts(4)
    parts = [gated_ffn(*_inputs(tokens, 4, 2), experts, torch.relu, gating)[1] for tokens in (8, 12)]
    total = parts[0] + parts[1]
    assert (total.tokens, total.choices, total.rows) == (20, 40, 4 * (2 + 3))
    assert total.padded == parts[0].padded + parts[1].padded
    assert (total.capacity, total.buffer_bytes) == (3, parts[1].buffer_bytes)
    assert isinstance(total, GatingStats)


# -- memory --------------------------------------------------------------------------------------------


def test_live_bytes_of_known_tensors() -> None:
    """Tensors count while they are held: views and work in place add nothing, what is freed does not stay."""
    x = torch.ones(1000)
    with LiveBytes() as live:
        y = x + 1
        y.view(10, 100).t().mul_(2)
        assert live.now == 4000
        z = [torch.cat([y, y]), x.double()]
        assert live.now == 4000 + 8000 + 8000
        del y
        z.clear()
    assert (live.now, live.peak) == (0, 20000)


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["static", "tutel", "tutel-adaptive", "dynamic"])
def test_peaks_are_as_computed(name: str, dtype: torch.dtype, skew: float) -> None:
    """The measured peak of activations is the computed one to a few percent, whichever phase it falls in."""
    for hidden, intermediate, factor in ((256, 64, 0.1), (64, 1024, 0.5)):
        shape = LayerShape(
            name="x", num_experts=16, top_k=2, hidden=hidden, intermediate=intermediate, capacity_factor=factor
        )
        layer = Layer.random(shape, max_bytes=10**8, dtype=dtype)
        (row,) = measure(layer, 100, variants(shape, [name]), rounds=0, skew=skew)
        assert row["peak_bytes"] == pytest.approx(row["computed_bytes"], rel=0.02)
        assert row["seconds"] is None and layer.distinct == 16


def test_buffer_bytes_are_what_is_held() -> None:
    """A gate's own count of masks and buffers is what it holds when it calls the experts, answers to inputs aside."""
    x, index, weight = _inputs(50, 6, 2)
    held = {}
    for gating in (StaticGating(0.5), DynamicGating()):
        with LiveBytes() as live:

            def experts(rows: torch.Tensor, counts: object, live: LiveBytes = live) -> torch.Tensor:
                held["then"] = live.now
                return rows

            _, stats = gating(x, index, weight, experts, 6)
        small = 20 * index.nbytes
        mask = 4 * 6 * 25 * 50 if gating.name == "static" else 0
        assert stats.buffer_bytes - mask <= held["then"] <= stats.buffer_bytes - mask + small


def test_dynamic_gating_takes_least_memory() -> None:
    """At the LM layer's waste, peaks fall from static over Tutel-like to dynamic gating."""
    shape = LayerShape(name="x", num_experts=64, top_k=2, hidden=64, intermediate=64, capacity_factor=0.4)
    layer = Layer.random(shape, max_bytes=10**8)
    rows = measure(layer, 64, variants(shape), rounds=1)
    peaks = {row["gating"]: row["peak_bytes"] for row in rows}
    assert peaks["static"] > peaks["tutel"] > peaks["tutel-adaptive"] > peaks["dynamic"]
    assert all(row["seconds"] > 0 and len(row["samples"]) == 1 for row in rows)


@pytest.mark.parametrize("name", ["static", "tutel-adaptive", "dynamic"])
def test_largest_batch_is_the_border(name: str) -> None:
    """The found batch fits the budget and one more token does not, as measured."""
    shape = LayerShape(name="x", num_experts=16, top_k=2, hidden=32, intermediate=64, capacity_factor=0.25)
    layer = Layer.random(shape, max_bytes=10**8)
    gating = variants(shape)[name]
    found = largest_batch(layer, gating, 200_000, limit=5000)
    assert found["peak_bytes"] <= 200_000 < found["next_peak_bytes"]
    assert found["passes"] < 20
    inputs = layer.inputs(found["tokens"])
    with torch.no_grad():
        assert peak_bytes(lambda: layer.run(*inputs, gating)) == found["peak_bytes"]


def test_shared_weights_are_said() -> None:
    """Where memory holds fewer experts than there are, they share weights in turn; not one is an error."""
    shape = LayerShape(name="x", num_experts=6, top_k=2, hidden=8, intermediate=16, capacity_factor=1)
    layer = Layer.random(shape, max_bytes=4 * shape.expert_parameters * 4)
    assert layer.distinct == 4 and layer.weight_bytes == 4 * shape.expert_parameters * 4
    assert layer.experts[5] is layer.experts[1]
    with pytest.raises(DoesNotFit, match="one expert takes") as caught:
        Layer.random(shape, max_bytes=100)
    assert caught.value.exit_code == 3


def test_smaller_batches_begin_larger_ones() -> None:
    """Drawn choices differ within a token, do not depend on the size of the batch, and follow the skew."""
    shape = LayerShape(name="x", num_experts=20, top_k=3, hidden=1, intermediate=1, capacity_factor=1)
    long, weight = draw_choices(shape, 700, seed=3)
    assert torch.equal(draw_choices(shape, 300, seed=3)[0], long[:300])
    assert all(len(set(row)) == 3 for row in long.tolist())
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(700))
    even, skewed = (torch.bincount(draw_choices(shape, 700, skew=s)[0].flatten()).max() for s in (0.0, 1.5))
    assert skewed > 2 * even


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gating", [*ALL, StaticGating(0.1), TutelGating(0.1)], ids=repr)
def test_gates_agree_on_a_gpu(gating: Gating) -> None:
    """On a GPU every gate gives what it gives on the CPU, and counts the same."""
    shape = LayerShape(name="x", num_experts=16, top_k=2, hidden=64, intermediate=128, capacity_factor=0.1)
    results = {}
    for device in ("cpu", "cuda"):
        layer = Layer.random(shape, max_bytes=10**8, device=device)
        out, stats = layer.run(*layer.inputs(100), gating)
        results[device] = out.cpu(), stats
    torch.testing.assert_close(results["cuda"][0], results["cpu"][0], rtol=1e-3, atol=1e-3)
    assert results["cuda"][1] == results["cpu"][1]


# -- what is refused -----------------------------------------------------------------------------------


def test_bad_gates_are_refused() -> None:
    """One line that names the field, the value and the way out."""
    with pytest.raises(UnknownName, match=r"unknown gating 'dinamic'\. Did you mean 'dynamic'\?"):
        make_gating("dinamic")
    with pytest.raises(InvalidValue, match="static gating needs a 'capacity_factor'"):
        make_gating("static")
    with pytest.raises(InvalidValue, match="dynamic gating has no capacity"):
        make_gating("dynamic", capacity_factor=0.5)
    for factor in (0, -1, 1.5, float("nan"), True, "0.5"):
        with pytest.raises(InvalidValue, match="'capacity_factor' must be above 0 and at most 1"):
            make_gating("tutel", capacity_factor=factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("gating", ALL, ids=repr)
def test_experts_that_are_not_there_are_refused(gating: Gating) -> None:
    """An expert id beyond the layer's experts is named."""
    x, index, weight = _inputs(5, 4, 2)
    index[3, 1] = 9
    with pytest.raises(InvalidValue, match=r"'expert_index' names expert 9; there are 0\.\.3\."):
        gating(x, index, weight, lambda rows, counts: rows, 4)
