"""Weights: what stays on the device, what lies in host memory and travels, and the double buffer that it travels to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from executor.checkpoint import Checkpoint
from executor.families import DecoderLayer
from executor.grouped_experts import ExpertGroup
from executor.kernels import ExpertWeights
from executor.memory import DeviceMemory, host_tensor
from hrm.layers import FeedForward
from hrm.policy import Policy
from hrm.systems import check_system

__all__ = ["LayerWeights", "WeightStore"]

Named = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """How the weights of one layer that may travel lie in a row: its experts, then matrices of attention.

    Offsets count elements; the first `resident` stay on the device, the rest travels in pages.
    """

    ffn: FeedForward
    dense: Named
    """Name and shape of the matrices that travel with the experts."""
    resident: int

    @classmethod
    def cut(cls, ffn: FeedForward, dense: Named, weights_on_gpu: float, *, whole_experts: bool = False) -> LayerWeights:
        """Cut at the last matrix row that `weights_on_gpu` covers, or between experts.

        Matrices of attention are not cut, nor are biases.
        """
        size, experts = ffn.expert_parameters, ffn.experts_parameters
        wanted = math.floor(weights_on_gpu * (experts + _elements(dense)) + 1e-6)
        if wanted >= experts:
            end = experts
            for _, shape in dense:
                if end + math.prod(shape) > wanted:
                    break
                end += math.prod(shape)
            return cls(ffn, dense, end)
        expert, inside = divmod(wanted, size)
        if whole_experts:
            return cls(ffn, dense, expert * size)
        h, i = ffn.hidden_size, ffn.intermediate_size
        gate_up, matrices = 2 * i * h, 3 * i * h
        if inside < gate_up:
            inside = inside // h * h
        elif inside < matrices:
            inside = gate_up + (inside - gate_up) // i * i
        else:
            inside = matrices
        return cls(ffn, dense, expert * size + inside)

    @property
    def streamed(self) -> int:
        """Elements that travel."""
        return self.ffn.experts_parameters + _elements(self.dense) - self.resident

    def bounds(self, page: int, pages: int) -> tuple[int, int]:
        """Where a page lies in the streamed part."""
        return self.streamed * page // pages, self.streamed * (page + 1) // pages

    def longest_page(self, pages: int) -> int:
        """Elements of the longest page."""
        return max((stop - start for start, stop in (self.bounds(p, pages) for p in range(pages))), default=0)

    def pages_of(self, expert: int, pages: int) -> range:
        """Pages that carry some of an expert's weights."""
        size = self.ffn.expert_parameters
        first = max(0, expert * size - self.resident)
        last = max(0, (expert + 1) * size - self.resident)
        hit = [p for p in range(pages) if self.bounds(p, pages)[0] < last and self.bounds(p, pages)[1] > first]
        return range(hit[0], hit[-1] + 1) if hit else range(0)

    def experts(self, resident: torch.Tensor | None, rest: torch.Tensor | None) -> list[ExpertWeights | None]:
        """Views of every expert in the resident part and in what lies elsewhere.

        Parameters
        ----------
        resident, rest : Tensor or None
            None for a part that is not asked for: its experts are None.
        """
        ffn = self.ffn
        h, i, size = ffn.hidden_size, ffn.intermediate_size, ffn.expert_parameters

        def span(start: int, stop: int) -> list[torch.Tensor]:
            border = min(max(self.resident, start), stop)
            parts = []
            if border > start:
                assert resident is not None
                parts.append(resident[start:border])
            if stop > border:
                assert rest is not None
                parts.append(rest[border - self.resident : stop - self.resident])
            return parts

        views: list[ExpertWeights | None] = []
        for e in range(ffn.num_experts):
            start, stop = e * size, (e + 1) * size
            if (resident is None and start < self.resident) or (rest is None and stop > self.resident):
                views.append(None)
                continue
            down, other = start + 2 * i * h, start + 3 * i * h
            biased = ffn.expert_other_parameters > 0
            views.append(
                ExpertWeights(
                    [part.view(-1, h) for part in span(start, down)],
                    [part.view(-1, i) for part in span(down, other)],
                    span(other, other + 2 * i)[0] if biased else None,
                    span(other + 2 * i, stop)[0] if biased else None,
                )
            )
        return views

    def groups(self, resident: torch.Tensor | None, rest: torch.Tensor | None) -> list[ExpertGroup]:
        """The same experts as at most three groups: whole ones on either side of the border, and the cut one."""
        size, count = self.ffn.expert_parameters, self.ffn.num_experts
        whole, cut = divmod(min(self.resident, self.ffn.experts_parameters), size)
        found = []
        if resident is not None and whole:
            found.append(self._group(0, resident[: whole * size].view(whole, size)))
        if cut and resident is not None and rest is not None:
            view = self.experts(resident, rest)[whole]
            assert view is not None
            gate_up, down = ([block[None] for block in matrix] for matrix in (view.gate_up, view.down))
            biases = [None if bias is None else bias[None] for bias in (view.gate_up_bias, view.down_bias)]
            found.append(ExpertGroup(whole, gate_up, down, *biases))
        first = whole + (1 if cut else 0)
        if rest is not None and first < count:
            begin = first * size - self.resident
            flat = rest[begin : begin + (count - first) * size].view(count - first, size)
            found.append(self._group(first, flat))
        return found

    def _group(self, first: int, flat: torch.Tensor) -> ExpertGroup:
        h, i = self.ffn.hidden_size, self.ffn.intermediate_size
        gate_up, down = flat[:, : 2 * i * h].unflatten(1, (2 * i, h)), flat[:, 2 * i * h : 3 * i * h]
        other = flat[:, 3 * i * h :]
        biases = (other[:, : 2 * i], other[:, 2 * i :]) if self.ffn.expert_other_parameters else (None, None)
        return ExpertGroup(first, [gate_up], [down.unflatten(1, (h, i))], *biases)

    def matrices(self, resident: torch.Tensor, rest: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the matrices that travel with the experts, by name."""
        views = {}
        start = self.ffn.experts_parameters
        for name, shape in self.dense:
            stop = start + math.prod(shape)
            stays = stop <= self.resident
            flat = resident[start:stop] if stays else rest[start - self.resident : stop - self.resident]
            views[name] = flat.view(shape)
            start = stop
        return views


def _elements(dense: Named) -> int:
    return sum(math.prod(shape) for _, shape in dense)


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
    ) -> None:
        model = checkpoint.local
        self.family, self.model = checkpoint.family, model
        self._travels = check_system(system).streams_dense
        self._outer: dict[str, torch.Tensor] = {}

        def keep(name: str, tensor: torch.Tensor) -> None:
            self._outer[name] = memory.place("dense_weights", tensor)

        checkpoint.read_dense(None, keep)
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
        longest = max(layer.streamed for layer in self.layers)
        self.slots = [memory.empty("weight_buffers", (longest,), checkpoint.dtype) for _ in range(self.SLOTS)]
        self.host_bytes = sum(t.nbytes for t in self.host)
        self._groups: dict[tuple[int, int], list[ExpertGroup]] = {}
        self._experts: dict[tuple[int, int], list[ExpertWeights | None]] = {}
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
                dense[name] = tensor.clone()
            else:
                fixed[name] = memory.place("dense_weights", tensor)

        checkpoint.read_dense(layer, sort)
        names = tuple((name, tuple(tensor.shape)) for name, tensor in dense.items())
        share = policy.weights_on_gpu
        if policy.ffn_on_gpu:
            plan = LayerWeights.cut(ffn, names, share)
        else:
            # Counted in elements: experts of a dense layer are larger than those of the others.
            wanted = share * ffn.experts_parameters + owed
            least = math.floor(share * ffn.num_experts + 1e-9)
            whole = max(least, min(ffn.num_experts, math.floor(wanted / ffn.expert_parameters + 1e-9)))
            owed = wanted - whole * ffn.expert_parameters
            plan = LayerWeights.cut(ffn, names, whole / ffn.num_experts, whole_experts=True)
        flat = torch.empty(plan.resident + plan.streamed, dtype=checkpoint.dtype)
        checkpoint.read_experts(layer, flat[: ffn.experts_parameters])
        start = ffn.experts_parameters
        for tensor in dense.values():
            flat[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
            start += tensor.numel()
        kept = memory.empty("resident_experts", (plan.resident,), checkpoint.dtype)
        kept.copy_(flat[: plan.resident])
        host = host_tensor((plan.streamed,), checkpoint.dtype, pinned=pinned)
        host.copy_(flat[plan.resident :])
        self.layers.append(plan)
        self.resident.append(kept)
        self.host.append(host)
        self._fixed.append(fixed)
        return owed

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

    def experts(self, layer: int, visit: int) -> list[ExpertWeights | None]:
        """The experts of `layer` on the device, as layer visit number `visit` finds them."""
        key = (layer, visit % self.SLOTS)
        if key not in self._experts:
            self._experts[key] = self.layers[layer].experts(self.resident[layer], self.slots[key[1]])
        return self._experts[key]

    def groups(self, layer: int, visit: int | None) -> list[ExpertGroup]:
        """As `experts`, in groups; without a visit, as `resident_experts`."""
        key = (layer, -1 if visit is None else visit % self.SLOTS)
        if key not in self._groups:
            rest = None if visit is None else self.slots[key[1]]
            self._groups[key] = self.layers[layer].groups(self.resident[layer], rest)
        return self._groups[key]

    def resident_experts(self, layer: int) -> list[ExpertWeights | None]:
        """The experts of `layer` that stay on the device."""
        key = (layer, -2)
        if key not in self._experts:
            self._experts[key] = self.layers[layer].experts(self.resident[layer], None)
        return self._experts[key]

    def host_experts(self, layer: int) -> list[ExpertWeights | None]:
        """The experts of `layer` that lie in host memory."""
        key = (layer, -1)
        if key not in self._experts:
            self._experts[key] = self.layers[layer].experts(None, self.host[layer])
        return self._experts[key]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, [tokens, H]."""
        return self.family.embed(ids, self._outer)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, vocab]"""
        return self.family.logits(self._norm(hidden), self._outer)
