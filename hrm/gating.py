"""Gates by name, and the memory that each needs to bring tokens to experts and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hrm.errors import InvalidValue, UnknownName
from hrm.model import MoEModel
from hrm.pipeline import FFN_CHUNK_ROWS

__all__ = [
    "GATINGS",
    "GATING_VARIANTS",
    "Gate",
    "GatingName",
    "capacity_of",
    "check_capacity_factor",
    "check_gating",
    "peak_bytes",
]

GatingName = Literal["static", "tutel", "dynamic"]
GATINGS: tuple[GatingName, ...] = ("static", "tutel", "dynamic")
"""All gates; the first two give every expert the same number of rows."""
GATING_VARIANTS = ("static", "tutel", "tutel-adaptive", "dynamic")
"""Gates as they are compared: "tutel" with a fixed capacity, and with that of the fullest expert."""


def check_gating(name: str) -> str:
    """`name`; raises `UnknownName` with the nearest gate if there is none of that name."""
    if name not in GATINGS:
        raise UnknownName.of("gating", name, GATINGS)
    return name


def check_capacity_factor(factor: float) -> float:
    """`factor` as a float; raises `InvalidValue` unless it is a fraction of the tokens."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise InvalidValue(
            f"'capacity_factor' must be above 0 and at most 1, the fraction of a batch's tokens that one expert takes: "
            f"{factor!r}"
        )
    return float(factor)


def capacity_of(factor: float, tokens: Any) -> Any:
    """Rows of every expert, C·S rounded up; whole for a whole number of tokens, else an array.

    Examples
    --------
    >>> capacity_of(0.05, 60), capacity_of(0.05, 61), capacity_of(0.07, 100)
    (3, 4, 7)
    """
    # 0.07 * 100 is a little more than 7.
    rows = np.ceil(factor * np.asarray(tokens) - 1e-9)
    return int(rows) if rows.ndim == 0 else rows


def peak_bytes(
    name: str,
    tokens: Any,
    *,
    num_experts: int,
    top_k: int,
    hidden: int,
    expert_width: int,
    fullest: Any,
    dropped: Any = 0,
    itemsize: float = 4,
) -> Any:
    """Activations of one call at the fullest moment, answers included, the input not; experts run one by one.

    Parameters
    ----------
    name : str
        One of `GATINGS`.
    tokens : int or array
        S.
    num_experts, top_k, hidden
        E, k, H.
    expert_width : int
        Elements that an expert holds for each of its rows while it computes.
    fullest : int or array
        Rows of every expert where all have the same number; for dynamic gating those of the fullest.
    dropped : int
        Choices beyond the capacity.
    itemsize : float
        Bytes per element.

    Returns
    -------
    int or array
        Bytes.
    """
    choices, out = tokens * top_k, tokens * hidden
    rows = choices if name == "dynamic" else num_experts * fullest
    buffer, kept = rows * hidden, (choices - dropped) * hidden
    experts = np.minimum(FFN_CHUNK_ROWS, fullest) * expert_width
    # Of index tensors a gate holds per_choice bytes: places, tokens and orders of 8 bytes each, and flags.
    phases: tuple[Any, ...]
    if name == "static":
        per_choice, mask = 10, tokens * rows
        one_hot = choices * (num_experts + fullest)
        phases = (2 * mask + one_hot, 2 * mask + buffer, mask + buffer + experts, mask + buffer + out)
    elif name == "tutel":
        per_choice = 35
        phases = (buffer + kept, buffer + experts, buffer + kept + out)
    else:
        per_choice = 16
        phases = (buffer + experts, buffer + out)
    most = phases[0]
    for phase in phases[1:]:
        most = np.maximum(most, phase)
    return most * itemsize + per_choice * choices


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate as planning sees it."""

    name: str
    """One of `GATINGS`."""
    capacity_factor: float | None = None
    """C: the share of a micro-batch's tokens that one expert takes. None: as many as the fullest expert gets."""

    def bytes(self, model: MoEModel, tokens: Any) -> Any:
        """Most bytes that masks, buffers and experts need at once for a micro-batch, beside the kernels' workspace.

        An adaptive capacity is taken to be all tokens, which it is where all choose the same expert; experts that lie
        elsewhere count as if they were here.

        Parameters
        ----------
        model : MoEModel
            Shapes of one GPU's part.
        tokens : int or array
            Most tokens of a micro-batch, in prefill or decode.
        """
        most: Any = 0
        fixed = self.name != "dynamic" and self.capacity_factor is not None
        fullest = capacity_of(self.capacity_factor or 1.0, tokens) if fixed else tokens
        for layer in model.kinds:
            ffn = layer.ffn
            if not ffn.routed:
                continue
            need = peak_bytes(
                self.name,
                tokens,
                num_experts=ffn.num_experts,
                top_k=ffn.top_k,
                hidden=ffn.hidden_size,
                expert_width=4 * ffn.intermediate_size + ffn.hidden_size,
                fullest=fullest,
                itemsize=model.dtype_bytes,
            )
            most = np.maximum(most, need)
        return most

    def __str__(self) -> str:
        share = self.capacity_factor
        return f"{self.name} gating" + (f" (capacity {share:g} of the tokens)" if share is not None else "")
