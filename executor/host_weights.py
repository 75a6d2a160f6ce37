"""All weights of a checkpoint in host memory, once for any number of runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from executor.checkpoint import Checkpoint
from executor.machine import core_count
from executor.memory import host_tensor
from executor.weight_layout import LayerWeights
from hrm.errors import InvalidValue

__all__ = ["HostWeights"]


class HostWeights:
    """Every layer's weights in a row of their own, as `LayerWeights` lays them out: experts, then matrices.

    A `WeightStore` takes views of the rows for what travels, under any policy and any system; what stays on the device
    is copied there. So weights are read (and, with a GPU, page-locked) once, however many policies are run, and a
    change of policy takes seconds. Rows hold what a policy keeps on the device as well: host memory must hold the
    whole model. Systems that stage their weights copy them from page-locked memory here, which costs the copy as much
    as from other memory.

    Parameters
    ----------
    checkpoint : Checkpoint
        Of the whole model, not of a process' part under tensor parallelism.
    pinned : bool
        Lock the rows, so that a GPU can copy from them.
    threads : int, optional
        Layers that are read at a time; by default one per core.
    progress : callable, optional
        Called with (layers done, layers in all).

    Raises
    ------
    InvalidValue
        If the checkpoint is a process' part.
    DoesNotFit
        If so much memory cannot be locked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        pinned: bool,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if checkpoint.family.shard.world > 1:
            raise InvalidValue("weights that are kept for several runs are a whole model's; leave --tp out.")
        self.checkpoint, self.pinned = checkpoint, pinned
        layers = range(checkpoint.model.num_layers)
        self._outer: dict[str, torch.Tensor] = {}
        checkpoint.read_dense(None, lambda name, tensor: self._outer.update({name: tensor.clone()}))
        if pinned:
            torch.cuda.init()  # before any other thread asks for the device
        # Reading gives the interpreter's lock away, so that threads fill memory side by side.
        self._layers: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        with ThreadPoolExecutor(min(threads or core_count(), len(layers)), initializer=_alone) as pool:
            for row in pool.map(self._read, layers):
                self._layers.append(row)
                if progress:
                    progress(len(self._layers), len(layers))
        torch.set_num_threads(torch.get_num_threads())  # for threads to come: they take what was set last

    def _read(self, layer: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A layer's row, and its dense tensors: matrices are views of the row."""
        family, ffn = self.checkpoint.family, self.checkpoint.local.layers[layer].ffn
        shapes = {name: shape for name, shape in family.dense_shapes(layer).items() if len(shape) > 1}
        experts = ffn.experts_parameters
        size = experts + sum(math.prod(shape) for shape in shapes.values())
        row = host_tensor((size,), self.checkpoint.dtype, pinned=self.pinned)
        self.checkpoint.read_experts(layer, row[:experts])
        whole = LayerWeights(ffn, tuple(shapes.items()), size)
        dense = whole.matrices(row, row[:0])

        def keep(name: str, tensor: torch.Tensor) -> None:
            if name in dense:
                dense[name].copy_(tensor)
            else:
                dense[name] = tensor.clone()

        self.checkpoint.read_dense(layer, keep)
        return row, dense

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(row.nbytes for row, _ in self._layers)

    def row(self, layer: int) -> torch.Tensor:
        """A layer's experts and then its matrices."""
        return self._layers[layer][0]

    def dense(self, layer: int | None) -> dict[str, torch.Tensor]:
        """Every dense tensor of a layer, or of none, by its name on disk."""
        return self._outer if layer is None else self._layers[layer][1]

    def check(self, checkpoint: Checkpoint, *, ranked: bool = False, locked: bool = False) -> None:
        """Refuse, with one line, a run that these weights cannot serve.

        Parameters
        ----------
        checkpoint : Checkpoint
            The run's.
        ranked : bool
            Whether the run wants experts in the order of their popularity.
        locked : bool
            Whether the run's device copies from the rows.
        """
        if checkpoint is not self.checkpoint:
            raise InvalidValue(
                f"the weights in host memory are those of {self.checkpoint.model.name}, read before; "
                f"this run is of another checkpoint ({checkpoint.model.name})."
            )
        if ranked:
            raise InvalidValue("weights that are kept for several runs lie in the model's order; leave popularity out.")
        if locked and not self.pinned:
            raise InvalidValue("the weights in host memory are not page-locked, and the device copies from there.")


def _alone() -> None:
    """One thread for the kernels of a reader: the pool is what runs side by side."""
    torch.get_num_threads()  # a thread's first call takes over the count of another
    torch.set_num_threads(1)
