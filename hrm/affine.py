"""Quantities that are linear in the two shares of a policy: r_w (weights) and r_c (KV cache) on the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["KV_ON_GPU", "KV_STREAMED", "WEIGHTS_ON_GPU", "WEIGHTS_STREAMED", "Affine", "is_zero"]


@dataclass(frozen=True, slots=True)
class Affine:
    """``constant + w·r_w + c·r_c``; the coefficients are numbers or arrays over a grid.

    Examples
    --------
    >>> (8.0 * WEIGHTS_STREAMED + 1.0).at(0.25, 0.0)
    7.0
    """

    constant: Any
    w: Any = 0.0
    c: Any = 0.0

    __array_ufunc__ = None  # array * Affine is our product, not an array of them

    def at(self, weights_on_gpu: Any, kv_on_gpu: Any) -> Any:
        """Value for given shares."""
        value = self.constant
        # Zero coefficients are common, and arrays are large.
        if not is_zero(self.w):
            value = value + self.w * weights_on_gpu
        if not is_zero(self.c):
            value = value + self.c * kv_on_gpu
        return value

    def __add__(self, other: Any) -> Affine:
        if isinstance(other, Affine):
            return Affine(self.constant + other.constant, _add(self.w, other.w), _add(self.c, other.c))
        return Affine(self.constant + other, self.w, self.c)

    __radd__ = __add__

    def __mul__(self, factor: Any) -> Affine:
        return Affine(
            self.constant * factor,
            0.0 if is_zero(self.w) else self.w * factor,
            0.0 if is_zero(self.c) else self.c * factor,
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Affine:
        return self * (1.0 / divisor)


def is_zero(value: Any) -> bool:
    """True for the number 0, which a term without that share has; an array is never called zero."""
    return np.ndim(value) == 0 and bool(value == 0.0)


def _add(a: Any, b: Any) -> Any:
    if is_zero(a):
        return b
    return a if is_zero(b) else a + b


WEIGHTS_ON_GPU, WEIGHTS_STREAMED = Affine(0.0, 1.0), Affine(1.0, -1.0)
KV_ON_GPU, KV_STREAMED = Affine(0.0, 0.0, 1.0), Affine(1.0, 0.0, -1.0)
