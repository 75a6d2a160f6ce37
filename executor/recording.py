"""Every token's choice of experts, kept while a job runs: a routing trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hrm.errors import InvalidValue
from hrm.model import MoEModel
from simulator.experts.trace import RoutingTrace

__all__ = ["RouteRecorder"]


class RouteRecorder:
    """Collects the router's choices pass by pass; a pass is one micro-batch in prefill or in a decode step.

    Parameters
    ----------
    model : MoEModel
    """

    def __init__(self, model: MoEModel) -> None:
        self._model = model
        self._layers = [number for number, layer in enumerate(model.layers) if layer.ffn.routed]
        self._narrow = np.uint8 if model.num_experts <= 256 else np.uint16
        self._passes: dict[tuple[int, int, int], list[np.ndarray]] = {}
        self._segment = 0

    def begin(self) -> None:
        """A new segment, whose steps count from its own beginning."""
        self._segment += 1

    def add(self, step: int, layer: int, part: int, index: torch.Tensor) -> None:
        """Keep the choices [tokens, k] of a micro-batch; layers come in order."""
        choices = index.to("cpu").numpy().astype(self._narrow)
        self._passes.setdefault((self._segment, step, part), []).append(choices)

    def save(self, path: Path, *, append: bool = False) -> None:
        """Write what was kept, if any pass was whole; with `append`, behind what the file has."""
        if not self._whole():
            return
        trace = self.trace()
        if append and path.exists():
            trace = RoutingTrace.concatenate([RoutingTrace.load(path), trace], name=trace.name)
        trace.save(path)

    def _whole(self) -> list[list[np.ndarray]]:
        """The passes that all layers have seen, in the order in which they ran."""
        return [layers for _, layers in sorted(self._passes.items()) if len(layers) == len(self._layers)]

    def trace(self) -> RoutingTrace:
        """What was kept: one batch per micro-batch and pass, in the order in which they ran.

        Requests that have ended, whose places wait for the segment's end, are among the tokens: experts compute them.
        """
        whole = self._whole()
        if not whole:
            raise InvalidValue("nothing was routed: there is no trace to write.")
        sizes = [len(layers[0]) for layers in whole]
        return RoutingTrace(
            experts=np.concatenate([np.stack(layers, axis=1) for layers in whole]),
            num_experts=self._model.num_experts,
            batch_starts=np.cumsum([0, *sizes[:-1]]),
            layers=tuple(self._layers),
            name=self._model.name,
        )
