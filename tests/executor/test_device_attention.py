"""Decode attention through torch's operator agrees with the host's kernel, wherever runs lie in the arena."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.cpu_attention import decode_attention_torch
from executor.device_attention import _parts, device_attention
from executor.grouped_experts import grouped_ffn
from executor.kernels import moe_ffn
from executor.weight_layout import LayerWeights
from hrm.layers import FeedForward
from hrm.pipeline import attention_bytes_per_token
from tests.executor.live_bytes import LiveBytes

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def compare(device: str, dtype: torch.dtype, *, latent: bool, sinks: bool, even: bool, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    heads, kv_heads, dim = (6, 1, 40) if latent else (8, 2, 16)
    value_dim, offset = (32, 0) if latent else (16, kv_heads * dim)
    width = dim if latent else 2 * kv_heads * dim
    lengths = torch.randint(1, 20, (n,))
    rooms = torch.full((n,), 24) if even else lengths + torch.randint(0, 9, (n,))
    order = torch.arange(n) if even else torch.randperm(n)
    starts = torch.empty(n, dtype=torch.int64)
    starts[order] = torch.cat([torch.zeros(1, dtype=torch.int64), rooms[order].cumsum(0)[:-1]])
    kv = torch.randn(int(rooms.sum()) + 5, width).to(dtype)
    q, out = torch.randn(n, heads * dim).to(dtype), torch.empty(n, heads * value_dim, dtype=dtype)
    sink = torch.randn(heads) if sinks else None
    shape = {"num_kv_heads": kv_heads, "key_dim": dim, "value_dim": value_dim, "value_offset": offset, "scale": 0.2}
    decode_attention_torch(q, kv, starts, lengths, out, **shape, sinks=sink)
    found = torch.empty_like(out, device=device)
    on_device = None if sink is None else sink.to(device)
    device_attention(q.to(device), kv.to(device), starts, lengths, found, **shape, sinks=on_device)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.cpu(), out, rtol=tolerance, atol=tolerance)


@given(st.booleans(), st.booleans(), st.booleans(), st.integers(1, 9), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_agrees_with_the_host_kernel(latent: bool, sinks: bool, even: bool, n: int, seed: int) -> None:
    """Grouped and latent heads, sinks, runs at equal distances or anywhere, uneven lengths."""
    compare("cpu", torch.float32, latent=latent, sinks=sinks, even=even, n=n, seed=seed)


@pytest.mark.parametrize("chunk", [1, 10_000, 2**20])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_stays_within_its_memory(monkeypatch: pytest.MonkeyPatch, chunk: int, latent: bool, sinks: bool) -> None:
    """However little there is for temporaries, the results are the same; and it is as little as the footprint says."""
    monkeypatch.setattr("executor.device_attention.ATTENTION_CHUNK_BYTES", chunk)
    for even in (False, True):
        compare("cpu", torch.float32, latent=latent, sinks=sinks, even=even, n=9, seed=1)
    n, context, heads, kv_heads, dim = 12, 200, 8, 1 if latent else 2, 24
    row = dim if latent else 2 * kv_heads * dim
    starts, lengths = torch.arange(n) * (context + 1), torch.full((n,), context)
    starts[-1] += 1  # not at equal distances
    kv, out = torch.randn(n * (context + 2), row), torch.empty(n, heads * 16)
    one = context * attention_bytes_per_token(row, heads, 4, latent=latent)
    with LiveBytes() as live:
        device_attention(
            torch.randn(n, heads * dim), kv, starts, lengths, out,
            num_kv_heads=kv_heads, key_dim=dim, value_dim=16, value_offset=0 if latent else kv_heads * dim, scale=0.2,
            sinks=torch.randn(heads) if sinks else None,
        )  # fmt: skip
    inputs = 4 * (n * heads * dim + heads)
    assert live.peak <= inputs + min(n * one, max(one, chunk)) + 2**16


@pytest.mark.parametrize(("lengths", "room", "expected"), [
    ([5, 5, 5], None, [3]),
    ([5, 5, 5], 10, [2, 1]),
    ([9, 1, 1, 8], 4, [1, 2, 1]),
    ([1, 9], 10, [1, 1]),
])  # fmt: skip
def test_parts_have_room(lengths: list[int], room: float | None, expected: list[int]) -> None:
    """As many sequences as have room when all are as long as the longest of them; one that has not goes alone."""
    assert [part.stop - part.start for part in _parts(lengths, room)] == expected


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_agrees_on_a_gpu(dtype: torch.dtype, latent: bool, even: bool) -> None:
    """The same on a GPU, in both types."""
    for seed, sinks in enumerate((False, True)):
        compare("cuda", dtype, latent=latent, sinks=sinks, even=even, n=7, seed=seed)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 1.0])
def test_grouped_experts_agree_on_a_gpu(share: float) -> None:
    """Grouped GEMM in bfloat16 gives what one GEMM per expert gives, with the border anywhere."""
    torch.manual_seed(0)
    ffn = FeedForward(hidden_size=256, intermediate_size=128, num_experts=8, top_k=2)
    plan = LayerWeights.cut(ffn, (), share)
    flat = (torch.randn(ffn.experts_parameters, device="cuda") * 0.05).bfloat16()
    parts = flat[: plan.resident], flat[plan.resident :]
    x = torch.randn(300, 256, device="cuda").bfloat16()
    index = torch.rand(300, 8, device="cuda").topk(2).indices
    weight = torch.rand(300, 2, device="cuda")

    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    found = grouped_ffn(x, index, weight, plan.groups(*parts), 8, gated)
    expected = moe_ffn(x, index, weight, plan.experts(*parts), gated)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
