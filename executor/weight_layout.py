"""How the weights of a layer that may travel lie in a row, and views of them as experts and matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from executor.grouped_experts import ExpertGroup
from executor.kernels import ExpertWeights
from hrm.layers import FeedForward

__all__ = ["LayerWeights"]

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
