"""A tiny Mixtral on disk, and transformers' own answers for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from executor.checkpoint import Checkpoint, make_checkpoint
from hrm.catalog import model_config

Prompts = Sequence[Sequence[int]]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint whose weights are large enough for clear-cut logits."""
    config = model_config("mixtral-tiny") | {"initializer_range": 0.08}
    return make_checkpoint(config, tmp_path_factory.mktemp("checkpoints") / "tiny", seed=3)


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Checkpoint:
    """The tiny checkpoint, opened."""
    return Checkpoint.open(tiny_path)


@pytest.fixture(scope="session")
def reference(tiny_path: Path) -> Callable[[Prompts, int], list[list[int]]]:
    """Greedy tokens by transformers' `generate`, one prompt at a time, so that nothing is padded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_path), dtype=torch.float32)
    known: dict[tuple[int, ...], list[int]] = {}

    def answer(prompts: Prompts, gen_len: int) -> list[list[int]]:
        for prompt in prompts:
            if len(known.get(tuple(prompt), [])) < gen_len:
                ids = torch.tensor([prompt])
                full = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=gen_len,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                known[tuple(prompt)] = full[0, len(prompt) :].tolist()
        return [known[tuple(prompt)][:gen_len] for prompt in prompts]

    return answer
