"""A tiny Mixtral on disk, transformers' own answers for it, and tiny models of every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from executor.checkpoint import Checkpoint, make_checkpoint
from hrm.catalog import model_config
from tests.executor.family_configs import CONFIGS
from tests.executor.reference_loop import from_pretrained

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


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A float32 checkpoint per config, as transformers saves it, with norms and biases that are not all alike."""
    base = tmp_path_factory.mktemp("families")
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            made = make_checkpoint(CONFIGS[name], base / f"{name}-made", seed=5)
            model, info = from_pretrained(made, torch.float32)
            assert not any(info.values())
            generator = torch.Generator().manual_seed(11)
            with torch.no_grad():
                for key, weight in model.state_dict().items():
                    if "norm" in key.split(".")[-2]:
                        weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
                    elif weight.dim() == 1:
                        weight.mul_(3)
            model.save_pretrained(base / name)
            known[name] = base / name
        return known[name]

    return folder
