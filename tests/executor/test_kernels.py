"""Kernels agree with transformers' modules and with plain attention, and stay within their workspace."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from executor.checkpoint import Checkpoint
from executor.generate import Executor
from executor.kernels import ExpertWeights, causal_attention, decode_attention, moe_ffn
from executor.memory import LayerPages
from executor.runtime import BatchRun
from hrm import MoEModel, Policy
from hrm.pipeline import workspace_bytes


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
    ours = moe_ffn(x, index, weight, experts, F.silu)
    torch.testing.assert_close(ours, module(x, index, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.77, 1.0])
def test_split_experts_compute_the_same(share: float) -> None:
    """An expert cut between resident and streamed weights gives the whole expert's result."""
    model = MoEModel.from_catalog("mixtral-tiny")
    torch.manual_seed(0)
    flat = torch.randn(model.num_experts * model.expert_parameters)
    pages = LayerPages.cut(model, share, 3)
    assert pages.resident <= share * flat.numel() + 1e-6
    assert share * flat.numel() - pages.resident < max(model.hidden_size, model.intermediate_size)
    cut = pages.experts(flat[: pages.resident].clone(), flat[pages.resident :].clone())
    whole = LayerPages(model, 0, 1).experts(flat[:0], flat)
    x = torch.randn(5, model.hidden_size)
    weight, index = torch.rand(5, model.num_experts).topk(2)
    torch.testing.assert_close(
        moe_ffn(x, index, weight, cut, F.silu), moe_ffn(x, index, weight, whole, F.silu), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("pages", [1, 2, 5, 64])
def test_pages_cover_the_streamed_part(pages: int) -> None:
    """Pages follow each other without gap or overlap, and each expert's pages hold all of it."""
    model = MoEModel.from_catalog("mixtral-tiny")
    cut = LayerPages.cut(model, 0.41, pages)
    bounds = [cut.bounds(p) for p in range(pages)]
    assert bounds[0][0] == 0 and bounds[-1][1] == cut.streamed
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert max(b - a for a, b in bounds) == cut.longest_page <= cut.streamed // pages + 1
    for expert in range(model.num_experts):
        first = max(0, expert * model.expert_parameters - cut.resident)
        last = max(0, (expert + 1) * model.expert_parameters - cut.resident)
        held = cut.pages_of(expert)
        if last > first:
            assert bounds[held[0]][0] <= first and bounds[held[-1]][1] >= last
        else:
            assert len(held) == 0


@pytest.mark.parametrize("groups", [1, 4])
def test_decode_attention_equals_plain_softmax(groups: int) -> None:
    """Folded grouped-query attention with a length mask equals softmax(QK)V written out."""
    torch.manual_seed(1)
    n, kv, d, context = 3, 2, 8, 11
    q = torch.randn(n, kv * groups, d)
    k, v = torch.randn(2, n, kv, context, d)
    lengths = torch.tensor([11, 4, 1])
    mask = torch.zeros(n, 1, 1, context)
    mask.masked_fill_(torch.arange(context)[None, None, None] >= lengths[:, None, None, None], float("-inf"))
    out = torch.empty_like(q)
    decode_attention(q, k, v, mask, out)
    for i in range(n):
        for head in range(kv * groups):
            keys, values = k[i, head // groups, : lengths[i]], v[i, head // groups, : lengths[i]]
            plain = (keys @ q[i, head] / d**0.5).softmax(0) @ values
            torch.testing.assert_close(out[i, head], plain)


def test_causal_attention_keeps_sequences_apart() -> None:
    """Packed sequences of different lengths attend to themselves only, causally."""
    torch.manual_seed(2)
    lengths = [5, 5, 3, 1]
    q, k, v = torch.randn(14, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    packed = causal_attention(q, k, v, lengths)
    start = 0
    for length in lengths:
        s = slice(start, start + length)
        for t in range(length):
            for head in range(4):
                keys, values = k[s][: t + 1, head // 2], v[s][: t + 1, head // 2]
                plain = (keys @ q[s][t, head] / 8**0.5).softmax(0) @ values
                torch.testing.assert_close(packed[s][t, head * 8 : head * 8 + 8], plain)
        start += length


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators allocate and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in inputs and key not in self._known:
                    self._known.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(tensor, self._drop, key, storage.nbytes())
        return out

    def _drop(self, key: int, size: int) -> None:
        if key in self._known:
            self._known.discard(key)
            self.live -= size


@pytest.mark.parametrize(("sequences", "length"), [(1, 1), (4, 3), (16, 24), (3, 90)])
def test_kernels_stay_within_the_workspace(tiny: Checkpoint, sequences: int, length: int) -> None:
    """Temporaries of every device task fit into what the footprint reserves for them."""
    policy = Policy(batch_size=sequences, micro_batch_size=sequences)
    executor = Executor(tiny, policy, max_tokens=length + 2, device=torch.device("cpu"))
    prompts = [[(7 * i + j) % 256 for j in range(length)] for i in range(sequences)]
    run = BatchRun(
        tiny,
        [prompts],
        2,
        memory=executor.memory,
        weights=executor.weights,
        dense=executor.dense,
        link_bandwidth=None,
    )
    with torch.no_grad(), LiveBytes() as live:
        run.prefill(0, 0, 0, 0.0)
        run.sample(0, 0, 0, 0.0)
        run.pre_attention(1, 0, 0, 0.0)
        run.post_attention(1, 0, 0, 0.0)
        run.sample(1, 0, 0, 0.0)
    room = float(workspace_bytes(tiny.model, sequences * length, sequences))
    assert 0 < live.peak <= room
