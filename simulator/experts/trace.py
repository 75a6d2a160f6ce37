"""Routing traces: which experts every token chose in every MoE layer, and how tokens came in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm.errors import InvalidConfig, InvalidValue

__all__ = ["RoutingTrace"]

_FORMAT = "hrm-routing-1"
_MOST_EXPERTS = 65536


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingTrace:
    """Expert ids by token and MoE layer.

    Examples
    --------
    >>> trace = RoutingTrace(experts=[[[1, 2]], [[0, 2]], [[0, 3]]], num_experts=4, batch_starts=[0, 2])
    >>> trace
    <RoutingTrace: 3 tokens, 1 layer, top-2 of 4 experts, 2 batches>
    >>> [batch.tolist() for batch in trace.active(layer=0)]
    [[0, 1, 2], [0, 3]]
    """

    experts: np.ndarray
    """[tokens, layers, k], unsigned integers."""
    num_experts: int
    batch_starts: np.ndarray | None = None
    """[batches]: first token of every batch as it was run, beginning with 0. None: not known."""
    layers: tuple[int, ...] = ()
    """Number of every MoE layer in its model; by default 0, 1, ..."""
    name: str = ""
    """Where it comes from: a model, a file, a seed."""

    def __post_init__(self) -> None:
        try:
            given = np.asarray(self.experts)
        except ValueError:
            raise InvalidValue("'experts' must be [tokens, layers, k]: rows of different lengths.") from None
        if given.ndim != 3 or not given.size:
            raise InvalidValue(f"'experts' must be [tokens, layers, k], none of them 0: shape {given.shape}")
        if not 1 <= self.num_experts <= _MOST_EXPERTS:
            raise InvalidValue(f"'num_experts' must be between 1 and {_MOST_EXPERTS}: {self.num_experts}")
        if given.dtype.kind not in "iu":
            raise InvalidValue(f"'experts' must be integers: {given.dtype}")
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= self.num_experts:
            token, layer, choice = np.argwhere((given < 0) | (given >= self.num_experts))[0]
            raise InvalidValue(
                f"expert id {given[token, layer, choice]} is not in 0..{self.num_experts - 1} "
                f"(first bad id: token {token}, layer {layer})."
            )
        narrow = np.uint8 if self.num_experts <= 256 else np.uint16
        experts = np.ascontiguousarray(given, dtype=narrow)
        _check_distinct(experts)
        experts.flags.writeable = False
        object.__setattr__(self, "experts", experts)
        layers = tuple(int(n) for n in self.layers) or tuple(range(experts.shape[1]))
        if len(layers) != experts.shape[1]:
            raise InvalidValue(f"'layers' names {len(layers)} layers, 'experts' has {experts.shape[1]}.")
        object.__setattr__(self, "layers", layers)
        if self.batch_starts is not None:
            starts = np.asarray(self.batch_starts)
            rising = starts.ndim == 1 and starts.dtype.kind in "iu" and len(starts) and starts[0] == 0
            if not rising or not (np.diff(starts.astype(np.int64)) > 0).all() or starts[-1] >= len(experts):
                raise InvalidValue(
                    f"'batch_starts' must be integers that rise from 0 to less than {len(experts)} tokens."
                )
            starts = starts.astype(np.int64)
            starts.flags.writeable = False
            object.__setattr__(self, "batch_starts", starts)

    @property
    def num_tokens(self) -> int:
        """Tokens in the trace."""
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """Experts that every token chooses."""
        return int(self.experts.shape[2])

    def starts(self, batch: int | None = None) -> np.ndarray:
        """First token of every batch of `batch` tokens (the last may be shorter), or of the batches as they were run.

        Raises
        ------
        InvalidValue
            No size is given and the trace does not know its batches.
        """
        if batch is None:
            if self.batch_starts is None:
                raise InvalidValue("this trace has no batch boundaries; say how many tokens make a batch.")
            return self.batch_starts
        if batch < 1:
            raise InvalidValue(f"'batch' must be >= 1: {batch}")
        return np.arange(0, self.num_tokens, batch, dtype=np.int64)

    def active(self, *, layer: int, batch: int | None = None) -> Iterator[np.ndarray]:
        """The experts that each batch uses, in increasing id; `layer` counts MoE layers."""
        starts = self.starts(batch)
        for start, stop in zip(starts, [*starts[1:], self.num_tokens], strict=True):
            yield np.unique(self.experts[start:stop, layer])

    def counts(self, batch: int | None = None) -> np.ndarray:
        """Choices that fall on every expert, [batches, layers, E]."""
        starts = self.starts(batch)
        of = np.zeros(self.num_tokens, dtype=np.int64)
        of[starts[1:]] = 1
        of = of.cumsum()
        counts = np.empty((len(starts), self.num_layers, self.num_experts), dtype=np.int64)
        for layer in range(self.num_layers):
            flat = of[:, None] * self.num_experts + self.experts[:, layer]
            whole = np.bincount(flat.ravel(), minlength=len(starts) * self.num_experts)
            counts[:, layer] = whole.reshape(len(starts), self.num_experts)
        return counts

    def popularity(self) -> np.ndarray:
        """Share of all choices that fall on every expert, [layers, E]; every row adds up to 1."""
        counts = self.counts(self.num_tokens)[0]
        return counts / counts.sum(axis=1, keepdims=True)

    def split(self, share: float = 0.5) -> tuple[RoutingTrace, RoutingTrace]:
        """The first part and the rest, cut between batches where those are known."""
        if self.batch_starts is None:
            cut = round(share * self.num_tokens)
        else:
            cut = int(self.batch_starts[min(len(self.batch_starts) - 1, round(share * len(self.batch_starts)))])
        if not 0 < cut < self.num_tokens:
            raise InvalidValue(f"a trace of {self.num_tokens} tokens cannot be cut at {share:.0%}.")
        return self[:cut], self[cut:]

    def __getitem__(self, tokens: slice) -> RoutingTrace:
        """Some consecutive tokens."""
        start, stop, step = tokens.indices(self.num_tokens)
        if step != 1 or stop <= start:
            raise InvalidValue(f"a trace is cut into runs of tokens: {tokens}")
        starts = self.batch_starts
        if starts is not None:
            inside = starts[(starts > start) & (starts < stop)] - start
            starts = np.concatenate([[0], inside])
        return RoutingTrace(
            experts=self.experts[start:stop], num_experts=self.num_experts, batch_starts=starts, layers=self.layers,
            name=self.name,
        )  # fmt: skip

    # -- other ways to a trace ---------------------------------------------------------------------

    @classmethod
    def from_router_logits(
        cls,
        logits: Sequence[Any],
        top_k: int,
        *,
        batch_starts: Sequence[int] | None = None,
        name: str = "",
    ) -> RoutingTrace:
        """What a forward pass with ``output_router_logits=True`` returned.

        Parameters
        ----------
        logits : sequence of array or tensor
            ``outputs.router_logits`` of a transformers model: one per layer, [tokens, E] or [batch, sequence, E];
            None or an empty one for layers without experts.
        top_k : int
            Experts per token; those with the greatest logits, greatest first.
        batch_starts : sequence of int, optional
            First token of every batch. By default the whole pass is one batch.
        name : str, optional
            Where it comes from.

        Examples
        --------
        >>> layer = np.array([[0.1, 2.0, 1.0], [3.0, 0.0, 4.0]])
        >>> RoutingTrace.from_router_logits((None, layer), top_k=2).experts.tolist()
        [[[1, 2]], [[2, 0]]]
        """
        chosen: list[np.ndarray] = []
        layers: list[int] = []
        num_experts = 0
        for layer, tensor in enumerate(logits):
            values = _as_array(tensor)
            if values is None:
                continue
            if values.ndim < 2 or values.dtype.kind not in "fiu":
                raise InvalidValue(f"router logits of layer {layer} must be [tokens, E] numbers: shape {values.shape}")
            values = values.reshape(-1, values.shape[-1])
            num_experts = num_experts or values.shape[1]
            if values.shape[1] != num_experts or (chosen and len(values) != len(chosen[0])):
                first = (len(chosen[0]) if chosen else len(values), num_experts)
                raise InvalidValue(f"router logits of layer {layer} are {values.shape}, of earlier layers {first}.")
            if not 1 <= top_k <= num_experts:
                raise InvalidValue(f"'top_k' must be between 1 and {num_experts} experts: {top_k}")
            if np.isnan(values).any():
                raise InvalidValue(f"router logits of layer {layer} hold NaN.")
            chosen.append(np.argsort(-values.astype(np.float64), axis=1, kind="stable")[:, :top_k])
            layers.append(layer)
        if not chosen:
            raise InvalidValue("no layer has router logits; run the model with output_router_logits=True.")
        starts = np.zeros(1, dtype=np.int64) if batch_starts is None else np.asarray(batch_starts)
        return cls(
            experts=np.stack(chosen, axis=1),
            num_experts=num_experts,
            batch_starts=starts,
            layers=tuple(layers),
            name=name,
        )

    @classmethod
    def concatenate(cls, traces: Sequence[RoutingTrace], *, name: str = "") -> RoutingTrace:
        """Traces of one model one after the other, for instance of successive forward passes.

        Batches stay as they are; a trace that does not know its batches counts as one.
        """
        if not traces:
            raise InvalidValue("there is no trace to put together.")
        first = traces[0]
        kind = (first.num_layers, first.top_k, first.num_experts)
        starts, at = [], 0
        for index, trace in enumerate(traces):
            here = (trace.num_layers, trace.top_k, trace.num_experts)
            if here != kind:
                raise InvalidValue(f"trace {index} has (layers, k, E) = {here}, the first has {kind}.")
            own = np.zeros(1, dtype=np.int64) if trace.batch_starts is None else trace.batch_starts
            starts.append(own + at)
            at += trace.num_tokens
        return cls(
            experts=np.concatenate([trace.experts for trace in traces]),
            num_experts=first.num_experts,
            batch_starts=np.concatenate(starts),
            layers=first.layers,
            name=name or first.name,
        )

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a compressed file of columns (numpy's npz): ids layer by layer, batch starts, and a line about them."""
        path = Path(path)
        about = {"format": _FORMAT, "num_experts": self.num_experts, "layers": self.layers, "name": self.name}
        starts = np.zeros(0, dtype=np.int64) if self.batch_starts is None else self.batch_starts
        columns: dict[str, Any] = {"about": np.array(json.dumps(about)), "batch_starts": starts}
        # Layer by layer, choice by choice: neighbours are alike, so that it packs well.
        columns["experts"] = np.ascontiguousarray(self.experts.transpose(1, 2, 0))
        with open(path, "wb") as file:
            np.savez_compressed(file, **columns)
        return path

    @classmethod
    def load(cls, path: str | Path, *, num_experts: int | None = None) -> RoutingTrace:
        """Read a file of `save`, or JSON lines.

        Parameters
        ----------
        path : path
            JSON lines: one token per line, ``{"tok": 1, "layers": [[ids of layer 0], [ids of layer 1], ...]}``, as
            https://github.com/sqliteai/warp publishes them.
        num_experts : int, optional
            For JSON lines, which do not say; by default the next power of two that holds every id.

        Raises
        ------
        InvalidConfig
            Neither of the two, or damaged; the line is named.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                head = file.read(2)
        except OSError as error:
            raise InvalidConfig(f"cannot read the trace {str(path)!r}: {error.strerror}.") from None
        trace = cls._load_columns(path) if head == b"PK" else cls._load_lines(path, num_experts)
        if num_experts is not None and trace.num_experts != num_experts:
            raise InvalidConfig(f"{str(path)!r} is a trace of {trace.num_experts} experts, not of {num_experts}.")
        return trace

    @classmethod
    def _load_columns(cls, path: Path) -> RoutingTrace:
        try:
            with np.load(path, allow_pickle=False) as columns:
                about = json.loads(str(columns["about"]))
                experts, starts = columns["experts"].transpose(2, 0, 1), columns["batch_starts"]
            if about["format"] != _FORMAT:
                raise ValueError(f"format {about['format']!r}, expected {_FORMAT!r}")
            num_experts, layers, name = (
                int(about["num_experts"]),
                tuple(int(n) for n in list(about["layers"])),
                str(about["name"]),
            )
        except (OSError, ValueError, KeyError, EOFError, TypeError, OverflowError) as error:
            raise InvalidConfig(f"{str(path)!r} is not a whole routing trace: {error}.") from None
        except Exception as error:  # zipfile and zlib have errors of their own
            raise InvalidConfig(f"{str(path)!r} is damaged: {error}.") from None
        try:
            return cls(
                experts=experts,
                num_experts=num_experts,
                batch_starts=starts if len(starts) else None,
                layers=layers,
                name=name,
            )
        except (ValueError, TypeError) as error:
            raise InvalidConfig(f"the trace {str(path)!r} is damaged: {error}") from None

    @classmethod
    def _load_lines(cls, path: Path, num_experts: int | None) -> RoutingTrace:
        rows: list[list[list[int]]] = []
        shape: tuple[int, int] | None = None
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                rows.append(_row(line, f"{str(path)!r}, line {number}", shape, num_experts or _MOST_EXPERTS))
                shape = shape or (len(rows[0]), len(rows[0][0]))
        if not rows:
            raise InvalidConfig(f"the trace {str(path)!r} has no tokens.")
        experts = np.array(rows, dtype=np.int64)
        if num_experts is None:
            num_experts = 1 << int(experts.max()).bit_length()
        return cls(experts=experts, num_experts=num_experts, name=path.name)

    def __repr__(self) -> str:
        batches = "" if self.batch_starts is None else f", {_several(len(self.batch_starts), 'batch', 'batches')}"
        name = f" {self.name!r}" if self.name else ""
        return (
            f"<RoutingTrace{name}: {_several(self.num_tokens, 'token')}, {_several(self.num_layers, 'layer')}, "
            f"top-{self.top_k} of {_several(self.num_experts, 'expert')}{batches}>"
        )


def _several(count: int, one: str, more: str | None = None) -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _check_distinct(experts: np.ndarray) -> None:
    """No token chooses an expert of a layer twice."""
    k = experts.shape[2]
    if k < 2:
        return
    if k <= 16:
        # Few choices: comparing pairs needs neither a sorted copy nor much time.
        for i in range(k - 1):
            for j in range(i + 1, k):
                same = experts[:, :, i] == experts[:, :, j]
                if same.any():
                    token, layer = np.argwhere(same)[0]
                    raise _twice(int(experts[token, layer, i]), token, layer)
        return
    ordered = np.sort(experts, axis=2)
    same = ordered[:, :, 1:] == ordered[:, :, :-1]
    if same.any():
        token, layer, choice = np.argwhere(same)[0]
        raise _twice(int(ordered[token, layer, choice]), token, layer)


def _twice(expert: int, token: Any, layer: Any) -> InvalidValue:
    return InvalidValue(f"token {token} chooses expert {expert} twice in layer {layer}.")


def _as_array(tensor: Any) -> np.ndarray | None:
    """A tensor of any library as an array; None if there is nothing in it."""
    if tensor is None:
        return None
    for step in ("detach", "float", "cpu"):
        if hasattr(tensor, step):
            tensor = getattr(tensor, step)()
    values = np.asarray(tensor)
    return values if values.size else None


def _row(line: str, where: str, shape: tuple[int, int] | None, num_experts: int) -> list[list[int]]:
    """One token's ids by layer."""
    try:
        rows: list[list[int]] = json.loads(line)["layers"]
        if not isinstance(rows, list) or any(type(e) is not int for ids in rows for e in ids):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidConfig(f'{where}: expected {{"tok": n, "layers": [[expert ids], ...]}}.') from None
    if not rows or not rows[0]:
        raise InvalidConfig(f"{where}: no expert ids.")
    layers_here, k = shape or (len(rows), len(rows[0]))
    if len(rows) != layers_here:
        raise InvalidConfig(f"{where}: {len(rows)} layers, the lines before have {layers_here}.")
    for layer, ids in enumerate(rows):
        if len(ids) != k:
            raise InvalidConfig(f"{where}: layer {layer} has {len(ids)} expert ids, others have {k}.")
        for e in ids:
            if not 0 <= e < num_experts:
                raise InvalidConfig(f"{where}: expert id {e} of layer {layer} is not in 0..{num_experts - 1}.")
        if len(set(ids)) < k:
            raise InvalidConfig(f"{where}: layer {layer} names an expert twice: {ids}.")
    return rows
