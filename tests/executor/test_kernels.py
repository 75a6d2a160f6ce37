"""Kernels agree with transformers' modules and with attention written out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from executor.kernels import ExpertWeights, add_runs, causal_attention, moe_ffn


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("tokens", [1, 3, 17, 200])
def test_dynamic_gating_equals_transformers_experts(tokens: int) -> None:
    """Sorted, index-based dispatch gives what transformers' expert module gives; nothing is dropped."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(tokens)
    config = MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=6, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    module = MixtralExperts(config).requires_grad_(False)
    torch.nn.init.normal_(module.gate_up_proj)
    torch.nn.init.normal_(module.down_proj)
    x = torch.randn(tokens, 24)
    weight, index = torch.rand(tokens, 6).softmax(-1).topk(3)
    experts = [ExpertWeights([module.gate_up_proj[e]], [module.down_proj[e]]) for e in range(6)]
    ours = moe_ffn(x, index, weight, experts, silu_gate)
    torch.testing.assert_close(ours, module(x, index, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_experts_in_blocks_compute_the_same(biased: bool) -> None:
    """An expert whose matrices are cut between rows gives the whole expert's result, with and without biases."""
    torch.manual_seed(0)
    whole, cut = [], []
    for _ in range(4):
        gate_up, down = torch.randn(20, 12), torch.randn(12, 10)
        biases = (torch.randn(20), torch.randn(12)) if biased else (None, None)
        whole.append(ExpertWeights([gate_up], [down], *biases))
        cut.append(ExpertWeights([gate_up[:13], gate_up[13:]], [down[:5], down[5:]], *biases))
    x = torch.randn(9, 12)
    weight, index = torch.rand(9, 4).topk(2)
    ours, theirs = (moe_ffn(x, index, weight, experts, silu_gate) for experts in (cut, whole))
    torch.testing.assert_close(ours, theirs)


def test_experts_elsewhere_add_nothing() -> None:
    """What two halves of the experts compute adds up to the result of all."""
    torch.manual_seed(1)
    experts = [ExpertWeights([torch.randn(20, 12)], [torch.randn(12, 10)]) for _ in range(4)]
    x = torch.randn(9, 12)
    weight, index = torch.rand(9, 4).topk(2)
    halves = [
        moe_ffn(x, index, weight, [e if i % 2 == odd else None for i, e in enumerate(experts)], silu_gate)
        for odd in (0, 1)
    ]
    torch.testing.assert_close(halves[0] + halves[1], moe_ffn(x, index, weight, experts, silu_gate))


@pytest.mark.parametrize("biased", [False, True])
def test_experts_run_by_run(biased: bool) -> None:
    """Runs of some experts, then of the others, add up to all of them; a cut expert is one among whole ones."""
    torch.manual_seed(3)
    experts = []
    for e in range(6):
        gate_up, down = torch.randn(20, 12), torch.randn(12, 10)
        cut = ([gate_up[:7], gate_up[7:]], [down[:5], down[5:]]) if e == 2 else ([gate_up], [down])
        experts.append(ExpertWeights(*cut, *((torch.randn(20), torch.randn(12)) if biased else (None, None))))
    x = torch.randn(9, 12)
    weight, index = torch.rand(9, 6).topk(2)
    order = index.reshape(-1).argsort(stable=True)
    stops = torch.bincount(index.reshape(-1), minlength=6).cumsum(0).tolist()
    runs = [run for run in zip(experts, [0, *stops[:-1]], stops, strict=True) if run[2] > run[1]]
    out = torch.zeros_like(x)
    for some in (runs[1::2], runs[:1], runs[2::2]):
        add_runs(out, x, order, weight, some, silu_gate)
    torch.testing.assert_close(out, moe_ffn(x, index, weight, experts, silu_gate))


def test_a_dense_ffn_is_one_expert() -> None:
    """One expert gets every token with weight one, also more tokens than it takes at a time."""
    torch.manual_seed(2)
    expert = ExpertWeights([torch.randn(20, 12)], [torch.randn(12, 10)])
    x = torch.randn(4100, 12)
    index, weight = torch.zeros(4100, 1, dtype=torch.long), torch.ones(4100, 1)
    plain = silu_gate(x @ expert.gate_up[0].T) @ expert.down[0].T
    torch.testing.assert_close(moe_ffn(x, index, weight, [expert], silu_gate), plain, rtol=1e-4, atol=1e-4)


def written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax over what each token sees, in double precision."""
    out, start, groups = [], 0, q.shape[1] // k.shape[1]
    for length in lengths:
        part = slice(start, start + length)
        keys, values = (t[part].double().repeat_interleave(groups, dim=1).transpose(0, 1) for t in (k, v))
        back = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (back < 0) | (back >= (window or length))
        scores = (q[part].double().transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, length, 1)], dim=2)
        chances = scores.softmax(dim=2)[..., :length]
        out.append((chances @ values).transpose(0, 1).reshape(length, -1))
        start += length
    return torch.cat(out)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 300])
@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (24, 16)])
def test_causal_attention(dim: int, value_dim: int, window: int | None, with_sinks: bool) -> None:
    """Packed sequences of different lengths attend to themselves, causally, within the window, with a sink or not."""
    torch.manual_seed(3)
    lengths = [700, 5, 5, 4, 3, 1]
    q, k, v = (torch.randn(sum(lengths), *shape) for shape in ((6, dim), (2, dim), (2, value_dim)))
    sinks = torch.randn(6) * 2 if with_sinks else None
    ours = causal_attention(q, k, v, lengths, scale=0.4, window=window, sinks=sinks)
    theirs = written_out(q, k, v, lengths, 0.4, window, sinks)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_causal_attention_scales_by_the_width_of_keys() -> None:
    """Without a scale the scores are divided by the square root of d, whatever the width of the values."""
    torch.manual_seed(4)
    q, k, v = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 8)
    theirs = written_out(q, k, v, [7], 0.25, None, None)
    torch.testing.assert_close(causal_attention(q, k, v, [7]).double(), theirs, rtol=1e-4, atol=1e-5)
