"""A plain loop over a checkpoint's layers, and transformers' answers to set beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor.checkpoint import Checkpoint
from executor.families import DecoderLayer, ExpertViews, Shard
from executor.kernels import ExpertWeights, moe_ffn

__all__ = ["GEN_LEN", "PROMPTS", "Answer", "Part", "attend", "errors", "from_pretrained", "reference", "run", "worst"]

PROMPTS = [[(29 * i + 7 * j * j + 3) % 160 for j in range(length)] for i, length in enumerate((13, 5, 20))]
GEN_LEN = 6


def from_pretrained(path: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Transformers' model, and what its loader found missing or unexpected."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    return model.eval(), info


@dataclass
class Part:
    """What one process holds of a checkpoint."""

    checkpoint: Checkpoint
    dense: dict[str, torch.Tensor]
    layers: list[DecoderLayer]
    experts: list[list[ExpertWeights]]

    @classmethod
    def load(cls, path: Path, shard: Shard) -> Part:
        checkpoint = Checkpoint.open(path, shard=shard)
        family, layers, experts = checkpoint.family, [], []
        dense: dict[str, torch.Tensor] = {}
        checkpoint.read_dense(None, lambda name, tensor: dense.update({name: tensor.clone()}))
        for number in range(checkpoint.model.num_layers):
            tensors: dict[str, torch.Tensor] = {}
            checkpoint.read_dense(number, lambda name, tensor, into=tensors: into.update({name: tensor.clone()}))
            layers.append(family.build_layer(number, tensors))
            ffn = checkpoint.local.layers[number].ffn
            flat = torch.full((ffn.experts_parameters,), torch.nan, dtype=checkpoint.dtype)
            checkpoint.read_experts(number, flat)
            assert not flat.isnan().any()
            views = ExpertViews.of(flat.view(ffn.num_experts, -1), ffn)
            biased = ffn.expert_other_parameters > 0
            experts.append(
                [
                    ExpertWeights(
                        [views.gate[e], views.up[e]],
                        [views.down[e]],
                        torch.cat([views.gate_bias[e], views.up_bias[e]]) if biased else None,
                        views.down_bias[e] if biased else None,
                    )
                    for e in range(ffn.num_experts)
                ]
            )
        return cls(checkpoint, dense, layers, experts)


def attend(layer: DecoderLayer, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Attention of one token, ``[query_size]``, over the rows of its cache, ``[context, kv_elements]``, written out."""
    a = layer.attention
    if a.window is not None:
        rows = rows[-a.window :]
    if a.kv_rank is not None:
        keys, values = rows[:, None], rows[:, None, : a.kv_rank]
    else:
        keys, values = rows.split([a.num_kv_heads * a.head_dim, a.num_kv_heads * a.value_dim], dim=1)
        keys, values = keys.unflatten(1, (a.num_kv_heads, -1)), values.unflatten(1, (a.num_kv_heads, -1))
    groups = a.num_heads // keys.shape[1]
    q = query.view(keys.shape[1], groups, -1)
    scores = torch.einsum("kgd,ckd->kgc", q, keys).float() * layer.scale
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks.float().view(-1, groups, 1)], dim=2)
    chances = scores.softmax(dim=2)[..., : rows.shape[0]].to(values.dtype)
    return torch.einsum("kgc,ckd->kgd", chances, values).flatten()


@dataclass
class Answer:
    """Of one batch: logits of all prompt tokens, logits of each step, tokens."""

    prompt: list[torch.Tensor]
    steps: list[torch.Tensor]
    tokens: list[list[int]]


@torch.inference_mode()
def run(path: Path, prompts: Sequence[Sequence[int]] = PROMPTS, gen_len: int = GEN_LEN, world: int = 1) -> Answer:
    """A plain loop over the layers of all parts, whose partial sums are added."""
    parts = [Part.load(path, Shard(rank, world)) for rank in range(world)]
    first = parts[0].checkpoint
    family = first.family
    norm, dense = family.final_norm(parts[0].dense), parts[0].dense
    lengths = [len(prompt) for prompt in prompts]
    tables = family.rotary_tables(max(lengths) + gen_len, torch.device("cpu"), first.dtype)
    caches: list[list[list[torch.Tensor]]] = [[[] for _ in part.layers] for part in parts]

    def ffn(number: int, hidden: torch.Tensor) -> torch.Tensor:
        added = torch.zeros_like(hidden)
        for part in parts:
            layer = part.layers[number]
            routed = layer.route(hidden)
            added += moe_ffn(routed.x, routed.index, routed.weight, part.experts[number], family.activation)
            shared = layer.shared(routed.x)
            if shared is not None:
                added += shared
        return hidden + added

    positions = torch.cat([torch.arange(length) for length in lengths])
    turn = [table[positions] for table in tables]
    hidden = family.embed(torch.tensor([token for prompt in prompts for token in prompt]), dense)
    for number in range(first.model.num_layers):
        added = torch.zeros_like(hidden)
        for part, cache in zip(parts, caches, strict=True):
            layer = part.layers[number]
            rows = hidden.new_empty(hidden.shape[0], layer.attention.kv_elements)
            added += layer.prefill(hidden, turn, lengths, rows)
            cache[number] = list(rows.split(lengths))
        hidden = ffn(number, hidden + added)
    logits = family.logits(norm(hidden), dense).split(lengths)
    steps = [torch.stack([x[-1] for x in logits])]
    tokens = [steps[0].argmax(dim=1)]
    for step in range(gen_len - 1):
        turn = [table[torch.tensor(lengths) + step] for table in tables]
        hidden = family.embed(tokens[-1], dense)
        for number in range(first.model.num_layers):
            added = torch.zeros_like(hidden)
            for part, cache in zip(parts, caches, strict=True):
                layer = part.layers[number]
                a = layer.attention
                queries = hidden.new_empty(len(prompts), a.query_size)
                rows = hidden.new_empty(len(prompts), a.kv_elements)
                layer.decode_inputs(hidden, turn, queries, rows)
                cache[number] = [torch.cat([c, row[None]]) for c, row in zip(cache[number], rows, strict=True)]
                attended = [attend(layer, q, c) for q, c in zip(queries, cache[number], strict=True)]
                assert attended[0].shape == (a.attended_size,)
                added += layer.decode_output(torch.stack(attended))
            hidden = ffn(number, hidden + added)
        steps.append(family.logits(norm(hidden), dense))
        tokens.append(steps[-1].argmax(dim=1))
    return Answer(list(logits), steps, torch.stack(tokens, dim=1).tolist())


@torch.inference_mode()
def reference(path: Path, dtype: torch.dtype = torch.float32) -> Answer:
    """Transformers' answer, one prompt at a time, so that nothing is padded."""
    model, _ = from_pretrained(path, dtype)
    prompt, steps, tokens = [], [], []
    for ids in (torch.tensor([prompt]) for prompt in PROMPTS):
        prompt.append(model(ids).logits[0])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GEN_LEN,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps.append(torch.stack([x[0] for x in out.logits]))
        tokens.append(out.sequences[0, ids.shape[1] :].tolist())
    return Answer(prompt, list(torch.stack(steps, dim=1)), tokens)


def worst(ours: Answer, theirs: Answer) -> float:
    """Largest difference between logits, relative to the largest logit of the same tensor."""
    pairs = zip(ours.prompt + ours.steps, theirs.prompt + theirs.steps, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def errors(ours: Answer, theirs: Answer) -> torch.Tensor:
    """Relative error of the logits of each token, as long as the tokens before it are the same."""
    pairs = [(a, b) for x, y in zip(ours.prompt, theirs.prompt, strict=True) for a, b in zip(x, y, strict=True)]
    for i, (mine, yours) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        for step in range(GEN_LEN):
            if mine[:step] == yours[:step]:
                pairs.append((ours.steps[step][i], theirs.steps[step][i]))
    return torch.stack([(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs])
