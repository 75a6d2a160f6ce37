"""Hugging Face Accelerate as a peer: its own offload hooks, with the weights that they fetch counted and paced.

Accelerate's `cpu_offload` takes a mapping from names to host tensors. Before a module runs, its hook asks this mapping
for the module's weights and puts them on the execution device; afterwards it drops them. `disk_offload` is the same
function with a mapping that reads files. So the mapping is the one place through which all weights pass, and nothing
else of Accelerate or transformers is touched.

With a GPU the mapping hands out host tensors as they are, and Accelerate copies them. Without one Accelerate would copy
nothing, as the execution device is the host: there the mapping copies each tensor through the paced link that the
executor's own lanes use, into memory of a device heap, and the hook takes that copy. Memory of dropped copies is used
again, as by the caching allocator of a GPU. The KV cache and all activations stay on the device, as Accelerate has it.

One thing is changed in the peer's favour: experts are computed by transformers' ``grouped_mm`` all the time. To decode,
`generate` would switch to ``batched_mm`` on anything but a CPU, and takes an offloaded model for that. It copies an
expert's weights for every token, which leaves memory for few prompts, and without a GPU is several times slower.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from executor.checkpoint import Checkpoint
from executor.lanes import PacedLink
from executor.machine import core_count
from hrm.errors import DoesNotFit
from hrm.units import format_bytes

__all__ = ["PEERS", "PROBE_PASSES", "Peer", "PeerRun"]

PEERS = ("accelerate-cpu", "accelerate-disk")
"""`cpu_offload` and `disk_offload`."""

PROBE_PASSES = 4
"""Passes of all weights that `Peer.largest_batch` takes unless it proves its answer."""

_PROBE_BATCHES = (2, 8)
_MOST_TRIES = 5


class DeviceHeap:
    """Bytes in use on the device, and their peak; without a GPU also where fetched weights lie."""

    def __init__(self) -> None:
        self.used = self.peak = 0
        self._free: dict[int, list[np.ndarray]] = {}

    def add(self, size: int) -> None:
        """Count `size` bytes more, or fewer."""
        self.used += size
        self.peak = max(self.peak, self.used)

    def reset_peak(self) -> None:
        """Forget the peak."""
        self.peak = self.used

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Memory for a tensor of the shape and type of `like`, counted until nothing refers to it any more."""
        size = like.nbytes
        kept = self._free.setdefault(size, [])
        buffer = kept.pop() if kept else np.zeros(size, dtype=np.uint8)
        # The tensor's storage holds this view; when it lets go, the buffer can be taken again.
        view = buffer[:]
        weakref.finalize(view, self._give, buffer)
        self.add(size)
        return torch.from_numpy(view).view(like.dtype).view(like.shape)

    def _give(self, buffer: np.ndarray) -> None:
        self._free[buffer.nbytes].append(buffer)
        self.add(-buffer.nbytes)


class FetchedWeights(Mapping[str, torch.Tensor]):
    """Host weights by name; what is asked for is counted and, without a GPU, travels over the link.

    Parameters
    ----------
    host : mapping
        Where weights lie: a state dict, or Accelerate's loader of files.
    heap : DeviceHeap or None
        Where they travel to; None where Accelerate copies them to a GPU itself.
    """

    def __init__(self, host: Mapping[str, torch.Tensor], heap: DeviceHeap | None) -> None:
        self._host, self._heap = host, heap
        self.link = PacedLink(None)
        self.fetched_bytes = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        source = self._host[name]
        self.fetched_bytes += source.nbytes
        if self._heap is None:
            return source
        target = self._heap.empty(source)
        # As on the executor's lanes: a link with a pace is one thread's work; as fast as copies go takes all.
        threads = torch.get_num_threads()
        if self.link.bandwidth is not None:
            torch.set_num_threads(1)
        self.link.copy(target, source.contiguous())
        torch.set_num_threads(threads)
        return target

    def __iter__(self) -> Iterator[str]:
        return iter(self._host)

    def __len__(self) -> int:
        return len(self._host)


class AllocationWatch(TorchDispatchMode):
    """Counts the memory of all tensors that torch's operators make, as long as they live.

    Without a GPU nothing else tells how much memory activations and KV cache take. Temporaries within an operator are
    not seen.
    """

    def __init__(self, heap: DeviceHeap) -> None:
        super().__init__()
        self._heap = heap
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if _is_real(x)}
        for tensor in tree_leaves(result):
            if _is_real(tensor):
                storage = _storage(tensor)
                key = storage._cdata
                if key not in known and key not in self._live:
                    self._live.add(key)
                    size = storage.nbytes()
                    self._heap.add(size)
                    weakref.finalize(storage, self._dropped, key, size)
        return result

    def _dropped(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._heap.add(-size)


def _is_real(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type != "meta"


def _storage(x: torch.Tensor) -> Any:
    return x.untyped_storage()


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    """Answers and measurements of one run."""

    outputs: list[list[int]]
    seconds: float
    prefill_s: float
    fetched_bytes: int
    peak_device_bytes: int | None
    """Without a GPU only where allocations were watched."""


class Peer:
    """transformers' own model of a checkpoint under Accelerate's hooks.

    Parameters
    ----------
    checkpoint : Checkpoint
    kind : {"accelerate-cpu", "accelerate-disk"}
        Where weights lie: in host memory, or in files. Files that were just written are in the page cache.
    device : torch.device
        Where modules run. Without a GPU they use all cores.
    folder : Path
        Where ``accelerate-disk`` keeps its files or their index.
    """

    def __init__(self, checkpoint: Checkpoint, kind: str, *, device: torch.device, folder: Path) -> None:
        from accelerate import cpu_offload

        self.checkpoint, self.kind, self.device = checkpoint, kind, device
        self.cuda = device.type == "cuda"
        self.heap = DeviceHeap()
        if kind == "accelerate-cpu":
            self._model = _load(checkpoint)
            host: Mapping[str, torch.Tensor] = self._model.state_dict()
        else:
            self._model, host = _on_disk(checkpoint, folder)
        self._model.set_experts_implementation("grouped_mm")
        self._model._optimize_model_for_decode = contextlib.nullcontext
        self.weights = FetchedWeights(host, None if self.cuda else self.heap)
        cpu_offload(self._model, execution_device=device, state_dict=self.weights)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        gen_len: int,
        *,
        batch_size: int,
        bandwidth: float | None = None,
        watch: bool = False,
    ) -> PeerRun:
        """Answer prompts greedily with `model.generate`, padded on the left, batch by batch in order of arrival.

        Parameters
        ----------
        bandwidth : float or None
            Bytes/s of the paced link where there is no GPU.
        watch : bool
            Take the peak of device memory where there is no GPU; slows the run down a little.
        """
        torch.set_num_threads(core_count())
        self.weights.link, self.weights.fetched_bytes = PacedLink(bandwidth), 0
        self.heap.reset_peak()
        outputs: list[list[int]] = []
        whole = prefill = 0.0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        watching = watch and not self.cuda
        with AllocationWatch(self.heap) if watching else contextlib.nullcontext():
            for first in range(0, len(prompts), batch_size):
                seconds, first_token, tokens = self._batch(prompts[first : first + batch_size], gen_len)
                whole, prefill = whole + seconds, prefill + first_token
                outputs += tokens
        gc.collect()
        peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else self.heap.peak if watching else None
        return PeerRun(
            outputs=outputs,
            seconds=whole,
            prefill_s=prefill,
            fetched_bytes=self.weights.fetched_bytes,
            peak_device_bytes=peak,
        )

    def _batch(self, prompts: Sequence[Sequence[int]], gen_len: int) -> tuple[float, float, list[list[int]]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        ids, mask = ids.to(self.device), mask.to(self.device)
        first_token: list[float] = []

        def clock(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if not first_token:
                self._synchronise()
                first_token.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        self._synchronise()
        started = time.perf_counter()
        with torch.no_grad():
            full = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=gen_len,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[clock],
            )
        self._synchronise()
        ended = time.perf_counter()
        return ended - started, first_token[0] - started, full[:, longest:].tolist()

    def _synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def largest_batch(
        self, prompts: Sequence[Sequence[int]], gen_len: int, device_memory: int, *, prove: bool
    ) -> tuple[int, int]:
        """Most prompts at once that fit the budget, spread evenly over the batches; and their peak in bytes.

        Two small batches of the longest prompts tell what a prefill and a decode step need, affine in the batch; the
        KV cache that grows from there is added.

        Parameters
        ----------
        prove : bool
            Run a batch of that size to its end with its allocations watched, and take less if it passed the budget.

        Raises
        ------
        DoesNotFit
            If not even one prompt fits.
        """
        by_length = sorted(prompts, key=len, reverse=True)
        small = min(_PROBE_BATCHES[0], len(prompts))
        large = min(_PROBE_BATCHES[1], len(prompts))
        peaks = [self._peak(by_length[:n], min(2, gen_len)) for n in (small, large)]
        slope = (peaks[1] - peaks[0]) / (large - small) if large > small else peaks[0] / small
        grows = max(0, gen_len - 2) * self.checkpoint.model.kv_token_bytes * self.checkpoint.model.num_layers
        base = peaks[0] - small * slope
        most = math.floor((device_memory - base) / (slope + grows))
        need = base + slope + grows
        if most < 1:
            raise DoesNotFit(
                f"{self.kind} needs about {format_bytes(need)} of device memory for one prompt, the budget is "
                f"{format_bytes(device_memory)}."
            )
        batch = _even(len(prompts), most)
        if not prove:
            return batch, math.floor(base + batch * (slope + grows))
        for _ in range(_MOST_TRIES):
            peak = self._peak(by_length[:batch], gen_len)
            if peak <= device_memory:
                return batch, peak
            most = min(batch - 1, math.floor(batch * (device_memory - base) / (peak - base)))
            if most < 1:
                break
            batch = _even(len(prompts), most)
        raise DoesNotFit(f"no batch of {self.kind} was found that keeps to {format_bytes(device_memory)}.")

    def _peak(self, prompts: Sequence[Sequence[int]], gen_len: int) -> int:
        run = self.run(prompts, gen_len, batch_size=len(prompts), watch=True)
        assert run.peak_device_bytes is not None
        return run.peak_device_bytes


def _even(count: int, most: int) -> int:
    """Batch size that spreads `count` prompts over as few batches as `most` at a time need."""
    return math.ceil(count / math.ceil(count / most))


def _load(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(checkpoint.path), dtype=checkpoint.dtype)
    return model.eval()


def _on_disk(checkpoint: Checkpoint, folder: Path) -> tuple[Any, Mapping[str, torch.Tensor]]:
    """A model without weights, and Accelerate's loader of its files: those of `disk_offload`, or the checkpoint's own.

    A checkpoint with stacked experts has the tensors that modules hold: an index is all that Accelerate needs.
    """
    from accelerate import init_empty_weights
    from accelerate.utils import OffloadedWeightsLoader, offload_state_dict
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=checkpoint.dtype).eval()
    if checkpoint.family.stacked:
        names = checkpoint.expected()
        index = {n: {"safetensors_file": str(checkpoint.entries[n].file), "weight_name": n} for n in names}
        return model, OffloadedWeightsLoader(index=index)
    if not (folder / "index.json").exists() or set(model.state_dict()) - set(_index(folder)):
        offload_state_dict(str(folder), _load(checkpoint).state_dict())
    return model, OffloadedWeightsLoader(save_folder=str(folder))


def _index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return index
