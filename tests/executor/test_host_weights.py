"""Weights drawn without files, and weights that lie in host memory for one run after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executor.checkpoint import Checkpoint
from executor.families import Shard
from executor.generate import generate
from executor.host_weights import HostWeights
from executor.memory import DeviceMemory
from executor.random_checkpoint import RandomCheckpoint
from executor.weights import WeightStore
from hrm import Policy
from hrm.catalog import model_config
from hrm.errors import InvalidValue
from hrm.systems import SYSTEMS
from tests.executor.family_configs import CONFIGS

_PROMPTS = [[7 * i + 3 * j + 1 for j in range(n)] for i, n in enumerate((5, 2, 9, 4))]
_ON_GPU: dict[str, dict[str, Any]] = {
    "flexgen": {"attention_on_gpu": True, "kv_on_gpu": 0.5},
    "deepspeed-zero": {"attention_on_gpu": True, "kv_on_gpu": 1.0, "micro_batch_size": 4},
}


@pytest.fixture(scope="module")
def random() -> RandomCheckpoint:
    """A tiny Mixtral with clear-cut logits, without files."""
    return RandomCheckpoint.of(model_config("mixtral-tiny") | {"initializer_range": 0.08}, seed=3)


@pytest.fixture(scope="module")
def lying(random: RandomCheckpoint) -> HostWeights:
    return HostWeights(random, pinned=False, threads=2)


def _all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    checkpoint.read(list(checkpoint.expected()), lambda name, tensor: found.update({name: tensor.clone()}))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_random_tensors_are_the_same_at_each_reading(name: str) -> None:
    """By any reader, in any order; another seed draws others, and no two matrices are alike."""
    one, two = (RandomCheckpoint.of(CONFIGS[name], seed=4) for _ in range(2))
    first, again = _all(one), _all(two)
    assert first.keys() == one.expected().keys()
    for key, shape in one.expected().items():
        assert tuple(first[key].shape) == shape
        assert torch.equal(first[key], again[key])
    assert one.size_bytes == sum(tensor.nbytes for tensor in first.values())
    assert one.local is one.family.local and one.config is one.family.config and not one.entries
    other = _all(RandomCheckpoint.of(CONFIGS[name], seed=5))
    drawn = [key for key, tensor in first.items() if tensor.dim() > 1]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)
    starts = {tuple(first[key].flatten()[:8].tolist()) for key in drawn}
    assert len(starts) == len(drawn)
    scale = CONFIGS[name]["initializer_range"]
    assert all(0.7 * scale < float(first[key].float().std()) < 1.3 * scale for key in drawn)
    norms = [tensor for key, tensor in first.items() if key.endswith("layernorm.weight")]
    assert all(bool((tensor == 1).all()) for tensor in norms)


def _policies(system: str) -> list[Policy]:
    sizes: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2} | _ON_GPU.get(system, {})
    policies = [Policy(**sizes, weights_on_gpu=share) for share in (0.0, 0.37, 1.0)]
    if system == "moe-lightning":
        policies += [
            Policy(**sizes, attention_on_gpu=True, kv_on_gpu=0.5, weights_on_gpu=0.2),
            Policy(**sizes, ffn_on_gpu=False),
            Policy(**sizes, ffn_on_gpu=False, weights_on_gpu=0.5),
            Policy(**sizes, expert_slots=3),
        ]
    return policies


@pytest.mark.parametrize("system", SYSTEMS)
def test_tokens_are_those_of_weights_that_are_read(system: str, random: RandomCheckpoint, lying: HostWeights) -> None:
    """Every system and place, whatever stays on the device; and one run after the other leaves them as they were."""
    before = [lying.row(layer).clone() for layer in range(3)]
    for policy in _policies(system):
        options: dict[str, Any] = {"gen_len": 4, "policy": policy, "system": system, "link_bandwidth": None}
        usual = generate(random, _PROMPTS, device="cpu", **options)
        shared = generate(random, _PROMPTS, device="cpu", host_weights=lying, **options)
        assert shared.outputs == usual.outputs, policy
        assert shared.peak_memory["device_bytes"] == usual.peak_memory["device_bytes"]
        assert shared.peak_memory["host_bytes"] >= lying.nbytes
    assert all(torch.equal(row, lying.row(layer)) for layer, row in enumerate(before))


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt_oss"])
def test_other_families_and_checkpoints_with_files(family_folder: Callable[[str], Path], name: str) -> None:
    """Latent attention, shared experts, dense layers, biases."""
    checkpoint = Checkpoint.open(family_folder(name))
    weights = HostWeights(checkpoint, pinned=False)
    for system in ("moe-lightning", "flexgen-c"):
        options: dict[str, Any] = {"gen_len": 3, "system": system, "link_bandwidth": None, "device": "cpu"}
        options["policy"] = Policy(batch_size=4, micro_batch_size=2, weights_on_gpu=0.3)
        usual = generate(checkpoint, _PROMPTS, **options)
        assert generate(checkpoint, _PROMPTS, host_weights=weights, **options).outputs == usual.outputs


@pytest.mark.parametrize("system", SYSTEMS)
def test_nothing_is_copied_on_the_host(system: str, random: RandomCheckpoint, lying: HostWeights) -> None:
    """What travels are views of the rows: of experts alone, or of experts and matrices."""
    for policy in _policies(system):
        memory = DeviceMemory(1 << 40, torch.device("cpu"))
        store = WeightStore(random, memory, policy, system=system, positions=32, host_weights=lying)
        for layer, host in enumerate(store.host):
            row, plan = lying.row(layer), store.layers[layer]
            size = row.element_size()
            assert host.numel() == plan.streamed
            if plan.streamed:
                assert host.data_ptr() == row.data_ptr() + size * plan.resident
                assert host.data_ptr() + host.nbytes <= row.data_ptr() + row.nbytes
            assert store.resident[layer].untyped_storage().data_ptr() != row.untyped_storage().data_ptr()


def test_runs_that_the_weights_cannot_serve(random: RandomCheckpoint, lying: HostWeights) -> None:
    """One line each: popularity, another checkpoint, a process' part, a device that copies from unlocked memory."""
    options: dict[str, Any] = {
        "gen_len": 2,
        "policy": Policy(batch_size=4, micro_batch_size=2, ffn_on_gpu=False, weights_on_gpu=0.5),
        "device": "cpu",
        "host_weights": lying,
    }
    with pytest.raises(InvalidValue, match="leave popularity out"):
        generate(random, _PROMPTS, popularity=np.ones((3, 8)), **options)
    other = RandomCheckpoint.of(model_config("mixtral-tiny"), name="other")
    with pytest.raises(InvalidValue, match="another checkpoint"):
        generate(other, _PROMPTS, **options)
    with pytest.raises(InvalidValue, match="not page-locked"):
        lying.check(random, locked=True)
    random.family.shard, whole = Shard(0, 2), random.family.shard
    try:
        with pytest.raises(InvalidValue, match="leave --tp out"):
            HostWeights(random, pinned=False)
    finally:
        random.family.shard = whole
