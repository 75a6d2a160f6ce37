"""The part ``exact``: tokens on the device beside transformers' own greedy generation there, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_proof import Proof, without_result
from executor.checkpoint import Checkpoint, make_checkpoint
from executor.generate import generate
from experiments.records import say
from experiments.resizing import resized
from hrm import Policy
from hrm.catalog import model_config
from hrm.systems import SYSTEMS

__all__ = ["exact", "tiny_checkpoint"]

_GEN_LEN = 12
_LENGTHS = (13, 5, 20, 1, 9, 33)
_SIZES: dict[str, int | None] = {
    "layers": 3, "hidden": 128, "intermediate": 96, "heads": 4, "kv_heads": None, "head_dim": 32, "experts": 8,
    "top_k": 2, "vocab": 512,
}  # fmt: skip
_MODELS = {"mixtral": "mixtral-8x7b", "deepseek-v2": "deepseek-v2-lite"}
"""A plain family, and one with latent attention, shared experts and a dense layer."""


def tiny_checkpoint(folder: Path, name: str = "mixtral", *, dtype: str = "float32") -> Path:
    """A small checkpoint of a family, with clear-cut logits; made if it is not there."""
    path = folder / f"tiny-{name}-{dtype}"
    if not (path / "config.json").exists():
        sizes = _SIZES | ({"kv_heads": 2} if name == "mixtral" else {})
        config = resized(model_config(_MODELS[name]), sizes) | {"initializer_range": 0.08}
        make_checkpoint(config, path, dtype=dtype, seed=3)
    return path


def exact(proof: Proof) -> None:
    """One record per family, system and policy."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for family in _MODELS:
        folder = tiny_checkpoint(proof.options.out, family)
        answers = cache(partial(_reference, folder, proof.options.device))
        for system in SYSTEMS:
            for name, policy in _policies(system, len(_LENGTHS)).items():
                keys = {"kind": "exact", "family": family, "system": system, "policy": name}
                row = proof.once(partial(_compare, proof, folder, system, policy, answers), **keys)
                equal = without_result(row) or f"{row['equal']} of {row['requests']} answers equal"
                say(f"exact: {family}, {system}, {name}: {equal}")


def _policies(system: str, batch: int) -> dict[str, Policy]:
    """What stays where: nothing, a part, everything; and for our own schedules every place of the work."""
    traits = SYSTEMS[system]
    sizes: dict[str, Any] = {"batch_size": batch, "micro_batch_size": batch if traits.single_batch else 2}
    if traits.attention_on_gpu:
        sizes |= {"attention_on_gpu": True, "kv_on_gpu": 1.0 if traits.single_batch else 0.5}
    found = {f"r_w={share:g}": Policy(**sizes, weights_on_gpu=share) for share in (0.0, 0.4, 1.0)}
    if system == "moe-lightning":
        found["attention on the GPU"] = Policy(**sizes, attention_on_gpu=True, kv_on_gpu=0.5, weights_on_gpu=0.3)
        found["experts on both"] = Policy(**sizes, ffn_on_gpu=False, weights_on_gpu=0.5)
        found["expert cache"] = Policy(**sizes, expert_slots=3)
    return found


def _prompts(vocabulary: int) -> list[list[int]]:
    return [[(29 * i + 7 * j * j + 3) % vocabulary for j in range(n)] for i, n in enumerate(_LENGTHS)]


def _reference(folder: Path, device: torch.device) -> list[list[int]]:
    """Greedy tokens by transformers, one prompt at a time, so that nothing is padded."""
    from transformers import AutoModelForCausalLM

    say(f"exact: transformers' own answers of {folder.name}")
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
    model = model.eval().to(device)
    answers = []
    for prompt in _prompts(model.config.vocab_size):
        ids = torch.tensor([prompt], device=device)
        full = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_GEN_LEN,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(full[0, len(prompt) :].tolist())
    return answers


def _compare(
    proof: Proof, folder: Path, system: str, policy: Policy, answers: Callable[[], list[list[int]]]
) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    outputs = generate(
        checkpoint,
        _prompts(checkpoint.model.vocab_size),
        gen_len=_GEN_LEN,
        policy=policy,
        system=system,
        device=proof.options.device.type,
        link_bandwidth=None,
    ).outputs
    pairs = list(zip(outputs, answers(), strict=True))
    first = [
        next((k for k, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None) for mine, theirs in pairs
    ]
    return {
        "equal": sum(step is None for step in first),
        "requests": len(pairs),
        "first_difference": first,
        "described": str(policy),
    }
