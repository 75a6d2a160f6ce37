"""The calls that a probe times, with the memory that they work on."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from executor.checkpoint import TORCH_DTYPES
from executor.cpu_attention import decode_attention
from executor.device_attention import device_attention
from executor.grouped_experts import grouped_kernel
from executor.kernels import ExpertWeights, add_runs, causal_attention, moe_ffn
from executor.lanes import PacedLink, lane_cores, lane_threads, settle
from executor.machine import ram_bytes
from executor.weight_layout import LayerWeights
from hrm.errors import DoesNotFit
from hrm.model import MoEModel
from simulator.task import Lane

__all__ = ["GEMM_ROWS", "HOST_EXPERT_ROWS", "HOST_ROWS", "SINGLE_ROWS", "Bench", "Key", "typical"]

_COLD_BYTES = 160 * 2**20
GEMM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_EXPERT_ROWS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SINGLE_ROWS = (1.0, 4.0)
_PROMPTS = (8, 16, 32, 64, 128, 256, 512)
_CONTEXTS = (16, 32, 64, 128, 256, 512, 1024)
_TIME_PER_POINT = 0.04
_LONGEST_CALL = 0.25
_SAMPLES = 8
_SWEEP_BYTES, _FLOOD_BYTES = 16 * 2**20, 64 * 2**20
_OVERHEADS = ("dispatch", "transfer", "attention call")
"""Calls that stand for what a task costs however small: in a run a layer's weights have passed the caches since the
last one, so that even their code comes from memory."""
_PIECE = 8 * 2**20
HOST_ROWS = 256
HOST_EXPERT_ROWS = (1, 4, 16, 64)
_HOST = torch.device("cpu")

Call = Callable[[], Any]
Key = tuple[str, float]


class Bench:
    """The calls that are timed, with the memory that they work on."""

    piece_bytes = _PIECE
    """What one call of a copy moves."""

    def __init__(self, model: MoEModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.cuda = device.type == "cuda"
        self.threads = lane_threads(cuda=self.cuda)
        self.apart = not self.cuda and bool(lane_cores()[Lane.GPU])
        self.dtype = TORCH_DTYPES[model.dtype]
        self.generator = torch.Generator().manual_seed(0)
        # As many experts of the model's shape as overflow the caches stand for all of them.
        self.experts = max(model.top_k, min(model.num_experts, round(2 * _COLD_BYTES / model.expert_bytes)))
        layer = self.experts * model.expert_bytes
        pool_bytes = max(2 * layer if layer < 4 * _COLD_BYTES else layer, 2 * _COLD_BYTES)
        room = torch.cuda.mem_get_info(device)[0] if self.cuda else ram_bytes()
        if pool_bytes > 0.5 * room:
            raise DoesNotFit(f"a few experts of {model.name} are too large to be probed on this machine.")
        self.pool = self.random(int(pool_bytes) // self.dtype.itemsize)
        self.sweep = torch.ones(_FLOOD_BYTES // 4)
        self.host_pool = self.random(_COLD_BYTES // 2, device=_HOST) if self.cuda else self.pool
        self.prepare()

    def random(self, *shape: int, device: torch.device | None = None) -> torch.Tensor:
        # Repeated blocks: fresh random numbers for hundreds of megabytes would take longer than measuring.
        count = int(np.prod(shape))
        block = torch.empty(min(count, 2**20)).normal_(0, 0.02, generator=self.generator).to(self.dtype)
        flat = block.repeat(-(-count // block.numel()))[:count].contiguous()
        return flat.view(shape).to(device or self.device)

    def views(self, *shape: int, host: bool = False) -> Callable[[], torch.Tensor]:
        """A source of equal tensors that lie one after the other in a pool larger than the caches."""
        pool, size = self.host_pool if host else self.pool, int(np.prod(shape))
        count = max(1, pool.numel() // size)
        state = {"next": 0}

        def take() -> torch.Tensor:
            first = state["next"] * size
            state["next"] = (state["next"] + 1) % count
            return pool[first : first + size].view(shape)

        return take

    # -- timing ------------------------------------------------------------------------------------

    def seconds(self, call: Call, *, on_device: bool = True, flood: bool = False) -> float:
        """Mean time of a call as a pipeline makes it: after other work has filled the caches, with `flood` all.

        On CUDA the device is synchronised before and after.
        """
        sweep = self.sweep if flood else self.sweep[: _SWEEP_BYTES // 4]
        sync = torch.cuda.synchronize if self.cuda and on_device else (lambda: None)
        samples: list[float] = []
        spent = 0.0
        while len(samples) < 2 or (spent < _TIME_PER_POINT and len(samples) < _SAMPLES):
            if not (self.cuda and on_device):
                sweep.sum()
            sync()
            begin = time.perf_counter()
            call()
            sync()
            samples.append(time.perf_counter() - begin)
            spent += samples[-1]
            if samples[-1] > _LONGEST_CALL:
                break
        return typical(samples)

    # -- kernels: calls by size --------------------------------------------------------------------

    def gemm_calls(self) -> dict[float, Call]:
        """A dense projection, by rows."""
        h, wide = self.model.hidden_size, self.model.q_size
        take = self.views(wide, h)
        inputs = {rows: self.random(rows, h) for rows in GEMM_ROWS}
        return {rows: partial(lambda x: F.linear(x, take()), x) for rows, x in inputs.items()}

    def expert_call(self, tokens: int) -> Call:
        """The MoE kernel on `tokens` tokens with uniform random routing."""
        m = self.model
        h, i = m.hidden_size, m.intermediate_size
        x, choices, weight = self._routed(tokens)
        grouped = grouped_kernel(self.device, self.dtype, h, i)
        ffn = replace(m.main_layer.ffn, num_experts=self.experts, expert_other_parameters=0, routing=None)
        whole, layers = LayerWeights(ffn, (), self.experts * 3 * i * h), self._expert_layers()
        groups = [whole.groups(self.pool[n * ffn.experts_parameters :], None) for n in range(len(layers))]
        turns = itertools.count()

        def call() -> Any:
            turn = next(turns)
            if grouped is not None:
                group = groups[turn % len(layers)]
                return grouped(x, choices[turn % len(choices)], weight, group, self.experts, _gated)
            return moe_ffn(x, choices[turn % len(choices)], weight, layers[turn % len(layers)], _gated)

        return call

    def single_experts_call(self, tokens: int) -> Call:
        """The same by calls of its own for every expert, as those of an expert cache are computed."""
        x, choices, weight = self._routed(tokens)
        layers, turns = self._expert_layers(), itertools.count()

        def call() -> torch.Tensor:
            turn, out = next(turns), torch.zeros_like(x)
            flat, experts = choices[turn % len(choices)].reshape(-1), layers[turn % len(layers)]
            ends = np.cumsum(torch.bincount(flat, minlength=self.experts).tolist())
            bounds = zip(experts, [0, *ends[:-1].tolist()], ends.tolist(), strict=True)
            runs = [(expert, start, stop) for expert, start, stop in bounds if stop > start]
            add_runs(out, x, flat.argsort(stable=True), weight, runs, _gated)
            return out

        return call

    def _routed(self, tokens: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """States, several draws of choices, and weights."""
        m = self.model
        draws = [torch.rand(tokens, self.experts, generator=self.generator).topk(m.top_k).indices for _ in range(8)]
        weight = torch.full((tokens, m.top_k), 1 / m.top_k, device=self.device)
        return self.random(tokens, m.hidden_size), [draw.to(self.device) for draw in draws], weight

    def _expert_layers(self) -> list[list[ExpertWeights]]:
        """The experts of several layers, one behind the other in the pool."""
        h, i = self.model.hidden_size, self.model.intermediate_size
        size = 3 * i * h
        layers = []
        for first in range(0, self.pool.numel() - self.experts * size + 1, self.experts * size):
            flat = self.pool[first : first + self.experts * size].view(self.experts, size)
            layers.append([ExpertWeights([w[: 2 * i * h].view(2 * i, h)], [w[2 * i * h :].view(h, i)]) for w in flat])
        return layers

    def expert_calls(self) -> tuple[dict[float, Call], dict[float, float]]:
        """The MoE kernel by tokens per active expert, and the FLOPs of each."""
        m = self.model
        calls: dict[float, Call] = {}
        flops: dict[float, float] = {}
        for wanted in _EXPERT_ROWS:
            tokens = self.tokens_for(wanted)
            rows = tokens * m.top_k / self.expected_active(tokens)
            calls[rows] = self.expert_call(tokens)
            flops[rows] = 6.0 * tokens * m.top_k * m.hidden_size * m.intermediate_size
        return calls, flops

    def tokens_for(self, rows: float) -> int:
        """Tokens that come to about so many for every expert."""
        return max(1, round(rows * self.experts / self.model.top_k))

    def expected_active(self, tokens: int) -> float:
        """Experts that they are expected to choose."""
        return self.experts * (1 - (1 - self.model.top_k / self.experts) ** tokens)

    def host_expert_call(self, tokens: int) -> Call:
        """Two experts in host memory, each on half of the tokens."""
        m = self.model
        h, i = m.hidden_size, m.intermediate_size
        flat = self.random(2, 3 * i * h, device=_HOST)
        experts = [ExpertWeights([w[: 2 * i * h].view(2 * i, h)], [w[2 * i * h :].view(h, i)]) for w in flat]
        x, index = self.random(2 * tokens, h, device=_HOST), (torch.arange(2 * tokens) % 2)[:, None]
        weight = torch.ones(2 * tokens, 1)
        return lambda: moe_ffn(x, index, weight, experts, _gated)

    def causal_calls(self) -> tuple[dict[float, Call], dict[float, float]]:
        """Prefill attention by prompt length, and the FLOPs of each."""
        m = self.model
        calls: dict[float, Call] = {}
        flops: dict[float, float] = {}
        for s in _PROMPTS:
            n = max(1, 512 // s)
            q = self.random(n * s, m.num_heads, m.head_dim)
            k, v = (self.random(n * s, m.num_kv_heads, m.head_dim) for _ in range(2))
            calls[s] = partial(causal_attention, q, k, v, [s] * n)
            flops[s] = 4 * n * s * (s + 1) / 2 * m.q_size
        return calls, flops

    def attention_call(self, sequences: int, context: int, *, host: bool = True) -> Call:
        """Decode attention, new rows appended, on the CPU or on the device."""
        a = self.model.main_layer.attention
        device = _HOST if host else self.device
        room = context + 1
        take = self.views(sequences * room, a.kv_elements, host=host)
        q = self.random(sequences, a.query_size, device=device)
        new = self.random(sequences, a.kv_elements, device=device)
        out = self.random(sequences, a.attended_size, device=device)
        starts = torch.arange(sequences) * room
        lengths = torch.full((sequences,), context)
        rows = (starts + context - 1).to(device)
        kernel = device_attention if device.type == "cuda" else decode_attention
        latent = a.kv_rank is not None

        def call() -> None:
            arena = take()
            arena[rows] = new
            kernel(
                q, arena, starts, lengths, out,
                num_kv_heads=1 if latent else a.num_kv_heads,
                key_dim=a.kv_elements if latent else a.head_dim,
                value_dim=a.kv_rank if a.kv_rank is not None else a.value_dim,
                value_offset=0 if latent else a.num_kv_heads * a.head_dim,
                scale=a.head_dim**-0.5,
            )  # fmt: skip

        return call

    def attention_calls(self, *, host: bool = True) -> tuple[dict[float, Call], dict[float, float]]:
        """Decode attention by context, on the CPU or on the device, and the KV bytes of each."""
        calls: dict[float, Call] = {}
        sizes: dict[float, float] = {}
        for context in _CONTEXTS:
            per_sequence = context * self.model.kv_token_bytes
            sequences = max(1, min(64, round(4 * 2**20 / per_sequence)))
            calls[context] = self.attention_call(sequences, context, host=host)
            sizes[context] = sequences * per_sequence
        return calls, sizes

    # -- copies and hand-overs ---------------------------------------------------------------------

    def copy_call(self, source: torch.Tensor, target: torch.Tensor, pace: float | None = None) -> Call:
        """A copy of a megabyte-sized piece of a buffer, another piece each time."""
        count = source.numel() // _PIECE
        link = PacedLink(pace)
        state = {"next": 0}

        def call() -> Any:
            first = state["next"] * _PIECE
            state["next"] = (state["next"] + 1) % count
            here, there = source[first : first + _PIECE], target[first : first + _PIECE]
            return there.copy_(here, non_blocking=True) if self.cuda else link.copy(there, here)

        return call

    # -- all of it ---------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Set up every call, and run each once."""
        causal, self.causal_flops = self.causal_calls()
        experts, self.expert_flops = self.expert_calls()
        attention, self.attention_bytes = self.attention_calls()
        self.host = [torch.ones(_COLD_BYTES, dtype=torch.uint8) for _ in range(2)]
        self.calls: dict[Key, Call] = {("gemm", k): v for k, v in self.gemm_calls().items()}
        self.calls |= {("experts", k): v for k, v in experts.items()}
        self.calls |= {("causal", k): v for k, v in causal.items()}
        self.calls |= {("single experts", k): self.single_experts_call(self.tokens_for(k)) for k in SINGLE_ROWS}
        self.calls[("dispatch", 0)] = _dispatch_probe(self.device, self.dtype)
        self.calls[("read", 0)] = self.pool.sum
        self.host_calls: dict[Key, Call] = {("attention", k): v for k, v in attention.items()}
        self.host_calls[("attention call", 0)] = self.attention_call(1, 1)
        square = self.random(HOST_ROWS, self.model.hidden_size, device=_HOST)
        weight = self.random(self.model.q_size, self.model.hidden_size, device=_HOST)
        self.host_calls[("host gemm", 0)] = lambda: F.linear(square, weight)
        if self.cuda:
            pinned = self.host[0].pin_memory()
            there = torch.empty(_COLD_BYTES, dtype=torch.uint8, device=self.device)
            little, mark = pinned[:64], there[:64]
            self.calls[("h2d", 0)] = self.copy_call(pinned, there)
            self.calls[("d2h", 0)] = self.copy_call(there, pinned)
            self.calls[("transfer", 0)] = lambda: mark.copy_(little, non_blocking=True)
            for context, call in self.attention_calls(host=False)[0].items():
                self.calls[("device attention", context)] = call
            for rows in HOST_EXPERT_ROWS:
                self.host_calls[("host experts", rows)] = self.host_expert_call(rows)
            self.host_calls[("staging", 0)] = self.copy_call(self.host[1], pinned)
        else:
            small, link = [torch.zeros(64, dtype=torch.uint8) for _ in range(2)], PacedLink(None)
            self.host_calls[("staging", 0)] = self.copy_call(self.host[0], self.host[1])
            self.host_calls[("transfer", 0)] = lambda: link.copy(small[1], small[0])
        for call in [*self.calls.values(), *self.host_calls.values()]:
            call()

    def one_pass(self) -> dict[Key, float]:
        """Seconds of every call, alone, each where its lane runs."""
        alone: dict[Key, float] = {}

        def kernels() -> None:
            alone.update((key, self.seconds(call, flood=key[0] in _OVERHEADS)) for key, call in self.calls.items())

        def host() -> None:
            for key, call in self.host_calls.items():
                torch.set_num_threads(self.threads[Lane.PIN if key[0] in ("staging", "transfer") else Lane.CPU])
                alone[key] = self.seconds(call, on_device=False, flood=key[0] in _OVERHEADS)

        self._as_lane(Lane.GPU, kernels)
        self._as_lane(Lane.CPU, host)
        return alone

    def _as_lane(self, lane: Lane, work: Call) -> None:
        """Run in a thread that has the lane's cores."""

        def run() -> None:
            settle(lane, cuda=self.cuda)
            with torch.inference_mode():
                torch.get_num_threads()
                torch.set_num_threads(self.threads[lane])
                work()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()

    def two_copies(self, pace: float | None) -> dict[Lane, Call]:
        """Copies between different halves of the host buffers, at a pace or without."""
        half = _COLD_BYTES // 2
        source, target = self.host
        return {
            Lane.H2D: self.copy_call(source[:half], target[:half], pace),
            Lane.D2H: self.copy_call(source[half:], target[half:], pace),
        }


def typical(samples: Sequence[float]) -> float:
    """The mean, in which no sample counts for more than twice the median.

    A run pays for every slow call, so that a median would promise too much where a machine's speed is uneven; one
    that was held up for long should not decide either.

    Examples
    --------
    >>> typical([1.0, 1.0, 1.0, 9.0])
    1.25
    """
    most = 2 * statistics.median(samples)
    return statistics.fmean(min(sample, most) for sample in samples)


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _dispatch_probe(device: torch.device, dtype: torch.dtype) -> Call:
    """A PreAttn too small to compute anything: what its operators cost to be called at all."""
    from transformers import MixtralConfig

    from executor.families import family_of

    config = {
        "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 16,
        "num_hidden_layers": 1, "max_position_embeddings": 16,
    }  # fmt: skip
    model = MoEModel.from_config(config, name="dispatch")
    family = family_of(model, MixtralConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    tensors = {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in family.dense_shapes(0).items()}
    layer = family.build_layer(0, tensors)
    hidden = torch.zeros(1, 16, device=device, dtype=dtype)
    turn = [torch.ones(1, 8, device=device, dtype=dtype)] * 2
    queries, cached = hidden.new_zeros(1, 16), hidden.new_zeros(1, 16)
    return lambda: layer.decode_inputs(hidden, turn, queries, cached)
