"""Weights: what stays on the device, what lies in host memory and travels, and what it travels to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum

import numpy as np
import torch

from executor.checkpoint import Checkpoint
from executor.expert_cache import DeviceExperts
from executor.families import DecoderLayer
from executor.grouped_experts import ExpertGroup
from executor.host_weights import HostWeights
from executor.kernels import ExpertWeights
from executor.memory import DeviceMemory, host_tensor
from executor.weight_layout import LayerWeights
from hrm.errors import InvalidValue
from hrm.model import MoEModel
from hrm.policy import Policy
from hrm.systems import check_system
from simulator.experts.cache import DEFAULT_POLICY

__all__ = ["Held", "WeightStore", "Where"]


class Held(Enum):
    """Experts that stay where they are."""

    RESIDENT = "on the device"
    HOST = "in host memory"


Where = int | Held
"""The number of a layer visit, which finds all experts on the device; or those that are held in one place."""

_Key = tuple[int, Where]


class WeightStore:
    """All weights of a model where a policy and a system want them.

    Parameters
    ----------
    checkpoint : Checkpoint
    memory : DeviceMemory
    policy : Policy
        Its ``weights_on_gpu`` and ``ffn_on_gpu``.
    system : str
        Says whether matrices of attention travel with the experts.
    pinned : bool
        Put what travels into page-locked memory, from where it can travel without a staging copy.
    positions : int
        Rotary positions to prepare: longest prompt and generation.
    cache_policy : str
        With ``policy.expert_slots``: which expert makes room for another, see `simulator.experts.cache`.
    popularity : ndarray, [MoE layers, E], optional
        How often each expert is chosen: where only a share of them stays on the device, the most popular do.
    host_weights : HostWeights, optional
        Where this checkpoint's weights lie already: what travels are views of them, and nothing is read.
    """

    SLOTS = 2

    def __init__(
        self,
        checkpoint: Checkpoint,
        memory: DeviceMemory,
        policy: Policy,
        *,
        system: str = "moe-lightning",
        pinned: bool = False,
        positions: int,
        cache_policy: str = DEFAULT_POLICY,
        popularity: np.ndarray | None = None,
        host_weights: HostWeights | None = None,
    ) -> None:
        model = checkpoint.local
        if host_weights is not None:
            host_weights.check(checkpoint, ranked=popularity is not None, locked=pinned)
        self._lying = host_weights
        self._ranking = _ranking(model, popularity)
        self._positions: dict[int, torch.Tensor] = {}
        self.experts_cached: DeviceExperts | None = None
        self.family, self.model, self._device = checkpoint.family, model, memory.device
        self._travels = check_system(system).streams_dense
        self._outer: dict[str, torch.Tensor] = {}

        def keep(name: str, tensor: torch.Tensor) -> None:
            self._outer[name] = memory.place("dense_weights", tensor)

        self._read_dense(checkpoint, None, keep)
        self._norm = self.family.final_norm(self._outer)
        with torch.inference_mode():
            self.rotary = self.family.rotary_tables(positions, memory.device, checkpoint.dtype)
        memory.reserve("rotary_table", sum(table.nbytes for table in self.rotary))
        self.layers: list[LayerWeights] = []
        self.resident: list[torch.Tensor] = []
        self.host: list[torch.Tensor] = []
        self._fixed: list[dict[str, torch.Tensor]] = []
        owed = self._buffer_excess(policy)
        for layer in range(model.num_layers):
            owed = self._load(checkpoint, memory, policy, layer, owed, pinned)
        self.host_bytes = sum(t.nbytes for t in self.host) if host_weights is None else host_weights.nbytes
        longest = max(layer.streamed for layer in self.layers)
        if policy.expert_slots is not None:
            longest = 0  # nothing comes as a whole layer
            self.experts_cached = DeviceExperts(
                model, memory, checkpoint.dtype, slots=policy.expert_slots, policy=cache_policy, host=self.host
            )
        self.slots = [memory.empty("weight_buffers", (longest,), checkpoint.dtype) for _ in range(self.SLOTS)]
        self._groups: dict[_Key, list[ExpertGroup]] = {}
        self._experts: dict[_Key, list[ExpertWeights | None]] = {}
        self._layers: dict[tuple[int, int], DecoderLayer] = {}

    def _buffer_excess(self, policy: Policy) -> float:
        """Elements, as a negative number, that rounding to whole experts adds to the two buffers.

        Later layers keep so much less than their share, so that all of it stays within the footprint.
        """
        if policy.ffn_on_gpu:
            return 0.0
        largest = max((self.model.kinds[kind].ffn for kind in self.model.order), key=lambda x: x.experts_parameters)
        share = policy.weights_on_gpu * largest.num_experts
        return -self.SLOTS * (share - math.floor(share + 1e-9)) * largest.expert_parameters

    def _read_dense(self, checkpoint: Checkpoint, layer: int | None, sink: Callable[[str, torch.Tensor], None]) -> None:
        if self._lying is None:
            checkpoint.read_dense(layer, sink)
        else:
            for name, tensor in self._lying.dense(layer).items():
                sink(name, tensor)

    def _load(
        self, checkpoint: Checkpoint, memory: DeviceMemory, policy: Policy, layer: int, owed: float, pinned: bool
    ) -> float:
        """Read a layer; with whole experts, what rounding leaves of the share is given to later layers."""
        model = self.model
        ffn = model.kinds[model.order[layer]].ffn
        dense: dict[str, torch.Tensor] = {}
        fixed: dict[str, torch.Tensor] = {}

        def sort(name: str, tensor: torch.Tensor) -> None:
            if self._travels and tensor.dim() > 1:
                dense[name] = tensor.clone() if self._lying is None else tensor
            else:
                fixed[name] = memory.place("dense_weights", tensor)

        self._read_dense(checkpoint, layer, sort)
        names = tuple((name, tuple(tensor.shape)) for name, tensor in dense.items())
        share = policy.weights_on_gpu
        if policy.expert_slots is not None and not ffn.routed:
            share = 1.0
        if policy.ffn_on_gpu:
            plan = LayerWeights.cut(ffn, names, share)
        else:
            # Counted in elements: experts of a dense layer are larger than those of the others.
            wanted = share * ffn.experts_parameters + owed
            least = math.floor(share * ffn.num_experts + 1e-9)
            whole = max(least, min(ffn.num_experts, math.floor(wanted / ffn.expert_parameters + 1e-9)))
            owed = wanted - whole * ffn.expert_parameters
            plan = LayerWeights.cut(ffn, names, whole / ffn.num_experts, whole_experts=True)
        if self._lying is None:
            flat = self._row(checkpoint, layer, plan, dense)
        else:
            flat = self._lying.row(layer)[: plan.resident + plan.streamed]
        kept = memory.empty("resident_experts", (plan.resident,), checkpoint.dtype)
        kept.copy_(flat[: plan.resident])
        host = flat[plan.resident :]
        if self._lying is None:
            host = host_tensor((plan.streamed,), checkpoint.dtype, pinned=pinned).copy_(host)
        self.layers.append(plan)
        self.resident.append(kept)
        self.host.append(host)
        self._fixed.append(fixed)
        return owed

    def _row(
        self, checkpoint: Checkpoint, layer: int, plan: LayerWeights, dense: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """What of a layer may travel, read and laid out in a row."""
        ffn = plan.ffn
        flat = torch.empty(plan.resident + plan.streamed, dtype=checkpoint.dtype)
        checkpoint.read_experts(layer, flat[: ffn.experts_parameters])
        ranking = self._ranking.get(layer)
        if ranking is not None:
            experts = flat[: ffn.experts_parameters].view(ffn.num_experts, -1)
            experts.copy_(experts[ranking])
            self._positions[layer] = ranking.argsort().to(self._device)
        start = ffn.experts_parameters
        for tensor in dense.values():
            flat[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
            start += tensor.numel()
        return flat

    def longest_page(self, pages: int) -> int:
        """Elements of the longest page of any layer."""
        return max(layer.longest_page(pages) for layer in self.layers)

    def layer(self, layer: int, visit: int) -> DecoderLayer:
        """A layer without its experts, as layer visit number `visit` finds it."""
        slot = visit % self.SLOTS if self._travels else 0
        key = (layer, slot)
        if key not in self._layers:
            tensors: Mapping[str, torch.Tensor] = self._fixed[layer]
            if self._travels:
                tensors = {**tensors, **self.layers[layer].matrices(self.resident[layer], self.slots[slot])}
            self._layers[key] = self.family.build_layer(layer, tensors)
        return self._layers[key]

    def experts(self, layer: int, where: Where) -> list[ExpertWeights | None]:
        """Views of the experts of `layer` that lie there; None for those that do not."""
        key, parts = self._parts(layer, where)
        if key not in self._experts:
            self._experts[key] = self.layers[layer].experts(*parts)
        return self._experts[key]

    def groups(self, layer: int, where: Where) -> list[ExpertGroup]:
        """As `experts`, in groups."""
        key, parts = self._parts(layer, where)
        if key not in self._groups:
            self._groups[key] = self.layers[layer].groups(*parts)
        return self._groups[key]

    def _parts(self, layer: int, where: Where) -> tuple[_Key, tuple[torch.Tensor | None, torch.Tensor | None]]:
        """The resident part and the rest of a layer's experts, as far as they are meant, and what both go by."""
        if where is Held.RESIDENT:
            return (layer, where), (self.resident[layer], None)
        if where is Held.HOST:
            return (layer, where), (None, self.host[layer])
        slot = where % self.SLOTS
        return (layer, slot), (self.resident[layer], self.slots[slot])

    def places(self, layer: int, index: torch.Tensor) -> torch.Tensor:
        """Where the chosen experts stand among the layer's weights: by popularity, if that is known."""
        position = self._positions.get(layer)
        return index if position is None else position[index]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, [tokens, H]."""
        return self.family.embed(ids, self._outer)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, vocab]"""
        return self.family.logits(self._norm(hidden), self._outer)


def _ranking(model: MoEModel, popularity: np.ndarray | None) -> dict[int, torch.Tensor]:
    """The experts of every routed layer, the most popular first."""
    if popularity is None:
        return {}
    routed = [number for number, layer in enumerate(model.layers) if layer.ffn.routed]
    shape = (len(routed), model.num_experts)
    if popularity.shape != shape:
        raise InvalidValue(f"popularity is of {popularity.shape} (layers, experts); {model.name} has {shape}.")
    order = np.argsort(-popularity, axis=1, kind="stable")
    return {number: torch.from_numpy(np.ascontiguousarray(row)) for number, row in zip(routed, order, strict=True)}
