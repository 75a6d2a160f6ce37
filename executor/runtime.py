"""Walks a schedule and runs it: every task class has a method here, every buffer a name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from executor.checkpoint import Checkpoint
from executor.families import DenseModel
from executor.kernels import causal_attention, decode_attention, moe_ffn
from executor.lanes import Handler, PacedLink, run_lanes
from executor.memory import DeviceMemory, KVCache, LayerPages, WeightStore, host_tensor
from hrm.pipeline import ACTIVATION_SLOTS, PINNED_PAGES, BatchShape, workspace_bytes
from simulator.costs import task_work
from simulator.task import Op, Schedule
from simulator.timeline import Timeline

__all__ = ["BATCH_ITEMS", "BatchRun", "execute"]

BATCH_ITEMS = ("hidden_states", "token_ids", "decode_slots", "prefill_slots", "workspace")
"""Names under which a batch takes device memory; given back when it ends."""


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """Buffers of one micro-batch in flight on one side of the link."""

    qkv: torch.Tensor
    """Flat: queries, keys, values."""
    attended: torch.Tensor


class BatchRun:
    """Buffers and task methods for one batch; the lanes call the methods.

    Parameters
    ----------
    prompts : sequence of sequence of sequence of int
        Token ids by micro-batch, longest prompt first within each.
    weights : WeightStore
    dense : DenseModel
    link : (PacedLink, PacedLink) or None
        Host to device and device to host; None on CUDA, where copies are asynchronous.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: Sequence[Sequence[Sequence[int]]],
        gen_len: int,
        *,
        memory: DeviceMemory,
        weights: WeightStore,
        dense: DenseModel,
        link_bandwidth: float | None,
    ) -> None:
        model, dtype, device = checkpoint.model, checkpoint.dtype, memory.device
        self.model, self.memory, self.weights, self.dense = model, memory, weights, dense
        self.cuda = device.type == "cuda"
        self.shape = BatchShape(tuple(tuple(len(p) for p in part) for part in prompts), gen_len)
        self.parts = self.shape.num_micro_batches
        self.pages = LayerPages(model, weights.whole.resident, self.parts)
        self.up, self.down = PacedLink(link_bandwidth), PacedLink(link_bandwidth)
        most, most_tokens = max(self.shape.sequences), max(self.shape.prompt_tokens)
        wide = model.q_size + 2 * model.kv_size

        def device_tensor(name: str, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return memory.empty(name, shape, dtype)

        def host(*shape: int) -> torch.Tensor:
            return host_tensor(shape, dtype, pinned=self.cuda)

        self.hidden = [device_tensor("hidden_states", n, model.hidden_size) for n in self.shape.sequences]
        self.next_ids = [device_tensor("hidden_states", n, dtype=torch.int64) for n in self.shape.sequences]
        self.device_slots = [
            _Slot(
                qkv=device_tensor("decode_slots", most * wide),
                attended=device_tensor("decode_slots", most * model.q_size),
            )
            for _ in range(ACTIVATION_SLOTS)
        ]
        self.prompt_slots = [
            device_tensor("prefill_slots", most_tokens * model.hidden_size) for _ in range(ACTIVATION_SLOTS)
        ]
        self.kv_slots = [
            device_tensor("prefill_slots", most_tokens * 2 * model.kv_size) for _ in range(ACTIVATION_SLOTS)
        ]
        memory.reserve("workspace", int(workspace_bytes(model, most_tokens, most)))
        self.host_slots = [
            _Slot(qkv=host(most * wide), attended=host(most * model.q_size)) for _ in range(ACTIVATION_SLOTS)
        ]
        self.pinned = [host(self.pages.longest_page) for _ in range(PINNED_PAGES)]
        self.prompt_hidden = [host(n * model.hidden_size) for n in self.shape.prompt_tokens]
        self.prompt_kv = host(most_tokens * 2 * model.kv_size)
        self.cache = KVCache(model, self.shape, dtype)
        self.host_bytes = self.cache.nbytes + sum(
            t.nbytes
            for t in [*self.pinned, *self.prompt_hidden, self.prompt_kv]
            + [buffer for slot in self.host_slots for buffer in (slot.qkv, slot.attended)]
        )

        def ids(values: Sequence[int]) -> torch.Tensor:
            return memory.place("token_ids", torch.tensor(values, dtype=torch.int64))

        self.prompt_ids = [ids([token for prompt in part for token in prompt]) for part in prompts]
        self.prompt_positions = [ids([i for prompt in part for i in range(len(prompt))]) for part in prompts]
        self.lengths = [torch.tensor([len(prompt) for prompt in part]) for part in prompts]
        self.device_lengths = [memory.place("token_ids", lengths) for lengths in self.lengths]
        self.last_rows = [memory.place("token_ids", lengths.cumsum(0) - 1) for lengths in self.lengths]
        self.output = [device_tensor("token_ids", n, gen_len, dtype=torch.int64) for n in self.shape.sequences]
        self._masks: dict[tuple[int, int], list[tuple[torch.Tensor | None, torch.Tensor | None]]] = {}
        self._rotary: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._bytes_per = dtype.itemsize

    def handlers(self) -> Mapping[Op, Handler]:
        """What each task class does."""
        return {
            Op.STAGE_W: self.stage_weights,
            Op.LOAD_W: self.load_weights,
            Op.LOAD_X: self.load_prompt,
            Op.PREFILL: self.prefill,
            Op.OFFLOAD_KV: self.offload_kv,
            Op.PRE_ATTN: self.pre_attention,
            Op.OFFLOAD_QKV: self.offload_qkv,
            Op.CPU_ATTN: self.cpu_attention,
            Op.LOAD_H: self.load_attended,
            Op.POST_ATTN: self.post_attention,
            Op.SAMPLE: self.sample,
        }

    # -- transfers ---------------------------------------------------------------------------------

    def _copy(self, link: PacedLink, target: torch.Tensor, source: torch.Tensor, ready: float) -> None:
        if self.cuda:
            target.copy_(source, non_blocking=True)
        else:
            link.copy(target, source, ready)

    def _visit(self, step: int, layer: int) -> int:
        return step * self.model.num_layers + layer

    def _pin(self, step: int, layer: int, page: int) -> torch.Tensor:
        start, stop = self.pages.bounds(page)
        slot = (self._visit(step, layer) * self.parts + page) % PINNED_PAGES
        return self.pinned[slot][: stop - start]

    def stage_weights(self, step: int, layer: int, page: int, ready: float) -> None:
        """W_CtoPin: a page from pageable to pinned host memory."""
        start, stop = self.pages.bounds(page)
        self._pin(step, layer, page).copy_(self.weights.host[layer][start:stop])

    def load_weights(self, step: int, layer: int, page: int, ready: float) -> None:
        """W_PinToG: a page from pinned memory into its place in the buffer slot of its layer visit."""
        start, stop = self.pages.bounds(page)
        slot = self.weights.slots[self._visit(step, layer) % WeightStore.SLOTS]
        self._copy(self.up, slot[start:stop], self._pin(step, layer, page), ready)

    def load_prompt(self, step: int, layer: int, part: int, ready: float) -> None:
        """LoadX: prompt hidden states of a micro-batch to the device."""
        source = self.prompt_hidden[part]
        self._copy(self.up, self._prompt_slot(layer, part)[0].view(-1), source, ready)

    def offload_kv(self, step: int, layer: int, part: int, ready: float) -> None:
        """OffloadKV: prompt keys and values to the cache, hidden states to host memory."""
        hidden, kv = self._prompt_slot(layer, part)
        if layer < self.model.num_layers - 1:
            self._copy(self.down, self.prompt_hidden[part], hidden.view(-1), ready)
            ready = 0.0
        landed = self.prompt_kv[: kv.numel()]
        self._copy(self.down, landed, kv.view(-1), ready)
        if self.cuda:
            torch.cuda.current_stream().synchronize()
        keys, values = landed.view(2, -1, self.model.num_kv_heads, self.model.head_dim)
        self.cache.put_prompt(layer, part, keys, values)

    def offload_qkv(self, step: int, layer: int, part: int, ready: float) -> None:
        """OffloadQKV (D1)."""
        used = self.shape.sequences[part] * (self.model.q_size + 2 * self.model.kv_size)
        slot = self._slot(step, layer, part)
        self._copy(self.down, self.host_slots[slot].qkv[:used], self.device_slots[slot].qkv[:used], ready)

    def load_attended(self, step: int, layer: int, part: int, ready: float) -> None:
        """LoadH (D2)."""
        used = self.shape.sequences[part] * self.model.q_size
        slot = self._slot(step, layer, part)
        self._copy(self.up, self.device_slots[slot].attended[:used], self.host_slots[slot].attended[:used], ready)

    # -- device compute ----------------------------------------------------------------------------

    def _slot(self, step: int, layer: int, part: int) -> int:
        return (self._visit(step, layer) * self.parts + part) % ACTIVATION_SLOTS

    def _prompt_slot(self, layer: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [tokens, H] and keys and values [2, tokens, n_kv * d] of a micro-batch in prefill."""
        slot = self._slot(0, layer, part)
        tokens = self.shape.prompt_tokens[part]
        hidden = self.prompt_slots[slot][: tokens * self.model.hidden_size]
        kv = self.kv_slots[slot][: tokens * 2 * self.model.kv_size]
        return hidden.view(tokens, -1), kv.view(2, tokens, -1)

    def _split_qkv(self, flat: torch.Tensor, sequences: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        m = self.model
        q_end, k_end = sequences * m.q_size, sequences * (m.q_size + m.kv_size)
        q = flat[:q_end].view(sequences, m.num_heads, m.head_dim)
        k = flat[q_end:k_end].view(sequences, m.num_kv_heads, m.head_dim)
        v = flat[k_end : k_end + sequences * m.kv_size].view(sequences, m.num_kv_heads, m.head_dim)
        return q, k, v

    def _feed_forward(self, step: int, layer: int, hidden: torch.Tensor) -> None:
        x, index, weight = self.dense.layers[layer].route(hidden)
        experts = self.weights.experts(layer, self._visit(step, layer))
        hidden.add_(moe_ffn(x, index, weight, experts, self.dense.activation))

    def prefill(self, step: int, layer: int, part: int, ready: float) -> None:
        """Prefill: one layer on all prompt tokens of a micro-batch."""
        hidden, kv = self._prompt_slot(layer, part)
        if layer == 0:
            hidden.copy_(self.dense.embed(self.prompt_ids[part]))
        positions = self.prompt_positions[part]
        dense = self.dense.layers[layer]
        q, k, v = dense.project(hidden, self.dense.cos[positions], self.dense.sin[positions])
        kv[0].copy_(k.reshape(k.shape[0], -1))
        kv[1].copy_(v.reshape(v.shape[0], -1))
        hidden.add_(dense.attention_output(causal_attention(q, k, v, self.shape.micro_batches[part])))
        del q, k, v
        self._feed_forward(step, layer, hidden)

    def pre_attention(self, step: int, layer: int, part: int, ready: float) -> None:
        """PreAttn: norm, Q/K/V projections, rotary; the result lies ready for OffloadQKV."""
        hidden = self.hidden[part]
        if layer == 0:
            hidden.copy_(self.dense.embed(self.next_ids[part]))
        if part not in self._rotary or self._rotary[part][0] != step:
            positions = self.device_lengths[part] + (step - 1)
            self._rotary[part] = (step, self.dense.cos[positions], self.dense.sin[positions])
        _, cos, sin = self._rotary[part]
        slot = self.device_slots[self._slot(step, layer, part)].qkv
        for target, value in zip(
            self._split_qkv(slot, hidden.shape[0]),
            self.dense.layers[layer].project(hidden, cos, sin),
            strict=True,
        ):
            target.copy_(value)

    def post_attention(self, step: int, layer: int, part: int, ready: float) -> None:
        """PostAttn: O projection, router, experts."""
        hidden = self.hidden[part]
        used = hidden.shape[0] * self.model.q_size
        attended = self.device_slots[self._slot(step, layer, part)].attended[:used].view(hidden.shape[0], -1)
        hidden.add_(self.dense.layers[layer].attention_output(attended))
        self._feed_forward(step, layer, hidden)

    def sample(self, step: int, layer: int, part: int, ready: float) -> None:
        """Sample: final norm, LM head, greedy choice."""
        hidden = self._prompt_slot(layer, part)[0][self.last_rows[part]] if step == 0 else self.hidden[part]
        torch.argmax(self.dense.logits(hidden), dim=-1, out=self.next_ids[part])
        self.output[part][:, step].copy_(self.next_ids[part])

    # -- host compute ------------------------------------------------------------------------------

    def _attention_masks(self, step: int, part: int) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Per block: additive mask and position of each sequence's new token; None where all are equal."""
        key = (part, step)
        if key not in self._masks:
            self._masks.pop((part, step - 1), None)
            masks: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
            for start, stop, longest in self.shape.blocks[part]:
                position = self.lengths[part][start:stop] + (step - 1)
                if int(position.min()) == longest + step - 1:
                    masks.append((None, None))
                    continue
                hidden = torch.arange(longest + step)[None] > position[:, None]
                mask = torch.zeros(hidden.shape, dtype=self.hidden[part].dtype).masked_fill_(hidden, float("-inf"))
                masks.append((mask[:, None, None], position))
            self._masks[key] = masks
        return self._masks[key]

    def cpu_attention(self, step: int, layer: int, part: int, ready: float) -> None:
        """CPUAttn: append the new keys and values, attend over the cache."""
        sequences = self.shape.sequences[part]
        slot = self.host_slots[self._slot(step, layer, part)]
        q, k, v = self._split_qkv(slot.qkv, sequences)
        out = slot.attended[: sequences * self.model.q_size].view_as(q)
        blocks = zip(
            self.shape.blocks[part],
            self.cache.blocks(layer, part),
            self._attention_masks(step, part),
            strict=True,
        )
        for (start, stop, longest), (keys, values), (mask, position) in blocks:
            context = longest + step
            if position is None:
                keys[:, :, context - 1].copy_(k[start:stop])
                values[:, :, context - 1].copy_(v[start:stop])
            else:
                rows = torch.arange(stop - start)
                keys[rows, :, position] = k[start:stop]
                values[rows, :, position] = v[start:stop]
            decode_attention(q[start:stop], keys[:, :, :context], values[:, :, :context], mask, out[start:stop])

    # -- accounts ----------------------------------------------------------------------------------

    def work(self, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and FLOPs of each task, counted as for a prediction."""
        return task_work(schedule, self.model, self.shape, streamed=self.pages.streamed * self._bytes_per)


def execute(
    schedule: Schedule,
    run: BatchRun,
    *,
    on_done: Callable[[Op, int], None] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Timeline:
    """Run a schedule with the buffers of `run` and return the measured timeline.

    The tokens are in ``run.output`` afterwards.
    """
    started = time.time()
    start, end = run_lanes(schedule, run.handlers(), device=run.memory.device, on_done=on_done)
    moved, flops = run.work(schedule)
    return Timeline(schedule, start, end, moved, flops, source="measured", facts={"started": started, **(facts or {})})
