"""Every family under every system: the tokens are transformers' own, in float32."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.checkpoint import Checkpoint
from executor.generate import generate
from executor.jobs import batches
from hrm import BatchShape, Policy
from hrm.memory import batch_footprint
from tests.executor.family_configs import CONFIGS
from tests.executor.reference_loop import from_pretrained

GEN_LEN = 6
PLACES: dict[str, dict[str, Any]] = {
    "moe-lightning": {},
    "moe-lightning, GPU attention": {"attention_on_gpu": True, "kv_on_gpu": 0.5},
    "moe-lightning, CPU experts": {"ffn_on_gpu": False},
    "moe-lightning, expert cache": {"expert_slots": 2},
    "moe-lightning, expert cache, GPU attention": {"expert_slots": 3, "attention_on_gpu": True, "kv_on_gpu": 0.5},
    "fastdecode": {},
    "flexgen-c": {},
    "flexgen": {"attention_on_gpu": True, "kv_on_gpu": 0.3},
    "deepspeed-zero": {"attention_on_gpu": True, "kv_on_gpu": 1.0},
}


@lru_cache(maxsize=2)
def answers(folder: Path, prompts: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """Greedy tokens by transformers' `generate`, one prompt at a time."""
    model, _ = from_pretrained(folder, torch.float32)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        full = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GEN_LEN,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found.append(full[0, len(prompt) :].tolist())
    return found


def until(outputs: Sequence[list[int]], end: int) -> list[list[int]]:
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in outputs]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_equal_transformers(family_folder: Callable[[str], Path], family: str, place: str) -> None:
    """Uneven prompts, a queue longer than a batch, an end token, any share of the weights on the device."""
    folder = family_folder(family)
    rng = random.Random(family)
    checkpoint = Checkpoint.open(folder)
    vocabulary = checkpoint.model.vocab_size
    prompts = tuple(tuple(rng.randrange(vocabulary) for _ in range(rng.randint(1, 24))) for _ in range(7))
    expected = answers(folder, prompts)
    end = expected[2][3]
    system = place.split(",")[0]
    single = system == "deepspeed-zero"
    share = random.Random(family + place).choice((0.0, 0.2, 0.45, 0.8))
    share = 0.0 if "cache" in place else share
    policy = Policy(batch_size=5, micro_batch_size=5 if single else 2, weights_on_gpu=share, **PLACES[place])
    result = generate(
        checkpoint, prompts, gen_len=GEN_LEN, policy=policy, system=system, device="cpu", link_bandwidth=None,
        eos_token_ids=[end],
    )  # fmt: skip
    assert result.outputs == until(expected, end)


@pytest.mark.parametrize("family", CONFIGS)
def test_one_batch_fits_the_memory_that_is_foretold(family_folder: Callable[[str], Path], family: str) -> None:
    """To the byte: a run whose budget is its footprint is not refused, whatever streams and whatever stays.

    Parts of the KV cache are left out: they are whole requests, of which a longer one may stay.
    """
    checkpoint = Checkpoint.open(family_folder(family))
    lengths = (3, 9, 5, 7)
    prompts = [list(range(1, length + 1)) for length in lengths]
    for place, given in PLACES.items():
        options = given | ({"kv_on_gpu": 1.0} if given.get("kv_on_gpu") else {})
        system = place.split(",")[0]
        whole = system == "deepspeed-zero"
        for share in (0.0,) if "cache" in place else (0.0, 0.3, 1.0):
            policy = Policy(batch_size=4, micro_batch_size=4 if whole else 2, weights_on_gpu=share, **options)
            [groups] = batches(lengths, policy)
            shape = BatchShape(tuple(tuple(lengths[i] for i in group) for group in groups), 2)
            budget = math.ceil(batch_footprint(checkpoint.model, shape, policy, system=system).gpu_bytes)
            result = generate(
                checkpoint, prompts, gen_len=2, policy=policy, system=system, device="cpu", link_bandwidth=None,
                device_memory=budget,
            )  # fmt: skip
            assert result.peak_memory["device_bytes"] <= budget, (place, share)
