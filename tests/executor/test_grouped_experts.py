"""Grouped GEMM gives what one GEMM per expert gives, wherever the border between resident and streamed weights lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from executor.grouped_experts import grouped_ffn, grouped_kernel, sorted_ffn
from executor.kernels import moe_ffn
from executor.weight_layout import LayerWeights
from hrm.layers import FeedForward

HIDDEN, INNER = 32, 16


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@given(
    st.integers(2, 9), st.integers(1, 3), st.integers(1, 40), st.floats(0, 1), st.booleans(), st.sampled_from([0, 1, 2])
)
@example(experts=4, k=1, tokens=7, share=0.2578125, bias=False, part=0)  # a block of one row
@settings(deadline=None, max_examples=60)
def test_groups_equal_single_experts(experts: int, k: int, tokens: int, share: float, bias: bool, part: int) -> None:
    """All experts, only the resident ones, or only the others: the same sums."""
    ffn = FeedForward(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_experts=experts,
        top_k=min(k, experts),
        expert_other_parameters=2 * INNER + HIDDEN if bias else 0,
    )
    generator = torch.Generator().manual_seed(experts * tokens)
    plan = LayerWeights.cut(ffn, (), share, whole_experts=part > 0)
    flat = torch.randn(ffn.experts_parameters, generator=generator) * 0.3
    resident = flat[: plan.resident] if part in (0, 1) else None
    rest = flat[plan.resident :] if part in (0, 2) else None
    x = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.rand(tokens, experts, generator=generator).topk(ffn.top_k).indices
    weight = torch.rand(tokens, ffn.top_k, generator=generator)
    expected = moe_ffn(x, index, weight, plan.experts(resident, rest), gated)
    found = grouped_ffn(x, index, weight, plan.groups(resident, rest), experts, gated)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found = sorted_ffn(x, index, weight, plan.groups(resident, rest), experts, gated)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sorted_rows_in_every_type(dtype: torch.dtype) -> None:
    """As near as each type rounds, with widths that fill no whole vector."""
    torch.manual_seed(0)
    ffn = FeedForward(hidden_size=64, intermediate_size=40, num_experts=5, top_k=3)
    plan = LayerWeights.cut(ffn, (), 0.3)
    flat = (torch.randn(ffn.experts_parameters) * 0.1).to(dtype)
    parts = flat[: plan.resident], flat[plan.resident :]
    x, weight, index = torch.randn(33, 64).to(dtype), torch.rand(33, 3), torch.rand(33, 5).topk(3).indices
    expected = moe_ffn(x, index, weight, plan.experts(*parts), gated)
    found = sorted_ffn(x, index, weight, plan.groups(*parts), 5, gated)
    near = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_many_tokens_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of tokens give the same as all of them at once."""
    from executor import grouped_experts

    ffn = FeedForward(hidden_size=HIDDEN, intermediate_size=INNER, num_experts=4, top_k=2)
    plan = LayerWeights.cut(ffn, (), 0.4)
    flat = torch.randn(ffn.experts_parameters)
    groups = plan.groups(flat[: plan.resident], flat[plan.resident :])
    x, weight = torch.randn(50, HIDDEN), torch.rand(50, 2)
    index = torch.rand(50, 4).topk(2).indices
    whole = [kernel(x, index, weight, groups, 4, gated) for kernel in (grouped_ffn, sorted_ffn)]
    monkeypatch.setattr(grouped_experts, "FFN_CHUNK_ROWS", 14)
    for kernel, expected in zip((grouped_ffn, sorted_ffn), whole, strict=True):
        torch.testing.assert_close(kernel(x, index, weight, groups, 4, gated), expected, rtol=1e-3, atol=1e-3)


def test_where_experts_run_in_one_call() -> None:
    """On the host in every type of weights; on a GPU in bfloat16; nowhere with unaligned widths."""
    host, gpu = torch.device("cpu"), torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        assert grouped_kernel(host, dtype, 64, 128) is sorted_ffn
    assert grouped_kernel(host, torch.float64, 64) is None
    assert grouped_kernel(host, torch.bfloat16, 60, 64) is None
    assert grouped_kernel(gpu, torch.float32, 64) is None
    assert grouped_kernel(gpu, torch.bfloat16, 60, 64) is None
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        assert grouped_kernel(gpu, torch.bfloat16, 64, 128) is grouped_ffn
