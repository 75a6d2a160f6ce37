"""The part ``upper``: what the device does without any offloading, by transformers' own model and by the executor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from benchmarks.gpu_proof import Proof, with_layers, without_result
from executor.generate import generate
from executor.host_weights import HostWeights
from executor.machine import ram_bytes
from executor.random_checkpoint import RandomCheckpoint
from experiments.records import say
from hrm import MoEModel, Policy

__all__ = ["layers_on_device", "upper"]

_DEVICE_SHARE, _HOST_SHARE = 0.75, 0.6
"""Of the device's memory (and, while the executor reads them, of the host's) that weights may take."""
_PROMPT, _STEPS = 64, 16
_LEAST_CUDA_S = 60.0
"""Seconds that making the model and a few steps may take."""


def layers_on_device(model: MoEModel, room: float) -> int:
    """Layers of a model whose weights fit `room` bytes beside those outside all layers; at least one."""
    outside = 2.0 * model.vocab_size * model.hidden_size * model.dtype_bytes
    each = (model.weight_bytes - outside) / model.num_layers
    return max(1, min(model.num_layers, math.floor((room - outside) / each)))


def upper(proof: Proof) -> None:
    """Records of decode tokens/s by batch size, for both, with the same layers on the device."""
    options = proof.options
    proof.drop()
    room = _HOST_SHARE * ram_bytes()
    if options.cuda:
        total = torch.cuda.get_device_properties(options.device).total_memory
        room = min(room, _DEVICE_SHARE * total)
    layers = layers_on_device(proof.model, room)
    config = with_layers(proof.model_config, layers)
    say(f"upper: {layers} layers on the device")
    for who, make in (("transformers", _Theirs), ("executor", _Ours)):
        runner = cache(partial(make, proof, config))
        for batch in options.batch_sizes:
            keys = {"kind": "upper", "who": who, "batch_size": batch}
            least = _LEAST_CUDA_S if options.cuda else 0.0
            row = proof.once(partial(_decode, proof, runner, batch, layers), expected=least, **keys)
            say(f"upper: {who}, batch {batch}: " + (without_result(row) or f"{row['decode_tok_s']:.1f} tok/s"))
        del runner
        proof.drop()


def _decode(proof: Proof, runner: Callable[[], _Theirs | _Ours], batch: int, layers: int) -> dict[str, Any]:
    made = runner()
    proof.make_room()
    return {"layers": layers, **made.decode(batch)}


def _ids(batch: int, vocabulary: int) -> list[list[int]]:
    return [[(29 * i + 7 * j * j + 3) % vocabulary for j in range(_PROMPT)] for i in range(batch)]


class _Theirs:
    """Transformers' own model with random weights made on the device."""

    def __init__(self, proof: Proof, config: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM

        checkpoint = RandomCheckpoint.of(config, name=proof.options.model)
        self._device, self._vocabulary = proof.options.device, checkpoint.model.vocab_size
        with torch.device(self._device):
            self._model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=checkpoint.dtype).eval()

    def _sync(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def decode(self, batch: int) -> dict[str, Any]:
        """Tokens/s of greedy decode steps after one prefill; the first step is not counted."""
        ids = torch.tensor(_ids(batch, self._vocabulary), device=self._device)
        out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        began = 0.0
        for step in range(_STEPS + 1):
            if step == 1:
                self._sync()
                began = time.perf_counter()
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        self._sync()
        seconds = time.perf_counter() - began
        return {"decode_tok_s": batch * _STEPS / seconds, "step_s": seconds / _STEPS}


class _Ours:
    """The executor with everything on the device."""

    def __init__(self, proof: Proof, config: dict[str, Any]) -> None:
        self._checkpoint = RandomCheckpoint.of(config, name=proof.options.model)
        self._device = proof.options.device
        self._weights = HostWeights(self._checkpoint, pinned=False)

    def decode(self, batch: int) -> dict[str, Any]:
        """Tokens/s of decode, as its timeline has it."""
        policy = Policy(
            batch_size=batch, micro_batch_size=batch, attention_on_gpu=True, weights_on_gpu=1.0, kv_on_gpu=1.0
        )
        result = generate(
            self._checkpoint,
            _ids(batch, self._checkpoint.model.vocab_size),
            gen_len=_STEPS + 2,
            policy=policy,
            device=self._device.type,
            link_bandwidth=None,
            pinned_weights=False,
            host_weights=self._weights,
        )
        first, last = result.timelines[0].decode_window()
        steps = len(result.timelines[0].steady_steps())
        return {"decode_tok_s": batch * steps / (last - first), "step_s": (last - first) / steps}
