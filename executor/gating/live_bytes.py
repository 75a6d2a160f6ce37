"""Bytes of tensors that a piece of code holds at its fullest, operator by operator."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "peak_bytes"]


class LiveBytes(TorchDispatchMode):
    """Counts the storage of every tensor that operators of the block make, for as long as anybody holds it.

    What was there before the block is not counted, and neither is scratch memory inside an operator. The same on
    every device; no allocator's rounding and no caching are in it.

    Examples
    --------
    >>> x = torch.ones(1000)
    >>> with LiveBytes() as live:
    ...     y = (x + 1).mul_(2).sum()
    >>> live.peak, live.now
    (4004, 4)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then count what is new."""
        kwargs = kwargs or {}
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor)._cdata not in given:
                self._count(_storage(tensor))
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes that `call` holds at its fullest beyond what was there before, its result included."""
    with LiveBytes() as live:
        call()
    return live.peak
