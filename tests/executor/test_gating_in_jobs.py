"""Gates in whole jobs: tokens stay where nothing is dropped, and what is dropped is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from executor.checkpoint import Checkpoint
from executor.gating import make_gating
from executor.gating.ffn import gated_ffn
from executor.gating.live_bytes import peak_bytes
from executor.generate import generate
from executor.kernels import ExpertWeights
from executor.placements import auto_policy
from hrm import Hardware, Policy
from hrm.errors import DoesNotFit, InvalidValue
from hrm.memory import batch_footprint
from hrm.pipeline import BatchShape
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


GATES = [("static", 1.0), ("static", 0.3), ("tutel", None), ("tutel", 0.5), ("dynamic", None)]


@pytest.mark.parametrize(("name", "factor"), GATES)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_a_gate_needs_no_more_than_is_reserved(tiny: Checkpoint, name: str, factor: float | None, tokens: int) -> None:
    """What a gate really allocates, stays within what planning counts, with all on one expert, too."""
    ffn, gate = tiny.model.main_layer.ffn, make_gating(name, capacity_factor=factor)
    torch.manual_seed(tokens)
    experts = [
        ExpertWeights(
            [torch.randn(2 * ffn.intermediate_size, ffn.hidden_size)],
            [torch.randn(ffn.hidden_size, ffn.intermediate_size)],
        )
        for _ in range(ffn.num_experts)
    ]
    x, weight = torch.randn(tokens, ffn.hidden_size), torch.rand(tokens, ffn.top_k)
    even = torch.rand(tokens, ffn.num_experts).topk(ffn.top_k).indices
    planned = gate.planned
    assert planned is not None
    for index in (even, even[:1].repeat(tokens, 1)):
        used = peak_bytes(lambda index=index: gated_ffn(x, index, weight, experts, _silu_gate, gate))
        assert used <= planned.bytes(tiny.model, tokens) * 1.02 + 4096


@pytest.mark.parametrize(("name", "factor"), GATES)
def test_a_run_with_a_gate_fits_its_footprint(tiny: Checkpoint, name: str, factor: float | None) -> None:
    """The footprint with the gate is enough as a budget and is what the run takes; less is refused in one line."""
    gating = make_gating(name, capacity_factor=factor)
    policy = Policy(batch_size=4, micro_batch_size=2)
    prompts = [[1 + i] * 30 for i in range(4)]
    shape = BatchShape(((30, 30), (30, 30)), 4)
    need = batch_footprint(tiny.model, shape, policy, gate=gating.planned)
    plain = batch_footprint(tiny.model, shape, policy)
    assert need.gpu_bytes - plain.gpu_bytes == need.gpu["gating"] > 0
    budget = int(np.ceil(need.gpu_bytes))
    options: dict[str, Any] = {
        "gen_len": 4,
        "policy": policy,
        "device": "cpu",
        "link_bandwidth": None,
        "gating": gating,
    }
    result = generate(tiny, prompts, device_memory=budget, **options)
    assert 0.95 * budget <= result.peak_memory["device_bytes"] <= budget
    with pytest.raises(DoesNotFit, match="--gating out" if name != "dynamic" else "--micro-batch-size") as refused:
        generate(tiny, prompts, device_memory=budget - 2**14, **options)
    assert "\n" not in str(refused.value)


def test_the_planner_leaves_room_for_a_gate(tiny: Checkpoint) -> None:
    """With a static gate smaller micro-batches are chosen, which run within the budget."""
    prompts, budget = [[1 + i % 90] * 40 for i in range(32)], 3_000_000
    machine = Hardware.from_catalog("cpu-2core")
    gating = make_gating("static", capacity_factor=1.0)
    options: dict[str, Any] = {"device_memory": budget, "link_bandwidth": 2e9, "may_cache": False}
    free, tight = (
        auto_policy(tiny, [40] * 32, 3, hardware=machine, device=torch.device("cpu"), gate=gate, **options)
        for gate in (None, gating.planned)
    )
    assert tight.micro_batch_size < free.micro_batch_size
    result = generate(
        tiny, prompts, gen_len=3, policy=tight, device="cpu", device_memory=budget, link_bandwidth=None, gating=gating
    )
    assert result.peak_memory["device_bytes"] <= budget
    with pytest.raises(DoesNotFit, match="static gating"):
        generate(tiny, prompts, gen_len=3, policy=free, device="cpu", device_memory=budget, gating=gating)


def _silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
