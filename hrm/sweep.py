"""Plans for a whole grid of models, machines and workloads, in parallel, as one table."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from hrm.errors import HrmError, InvalidConfig, InvalidValue, UnknownName
from hrm.hardware import RATE_SETS, Hardware
from hrm.model import MoEModel
from hrm.search import plan
from hrm.units import brief
from hrm.workload import Workload

__all__ = ["MAX_JOBS", "plan_grid"]

MAX_JOBS = 256
"""Most processes that a sweep starts."""

_CHUNK = 16
"""Plans per task of a worker: long enough to be worth sending, short enough to lose little."""

Key = tuple[str, str, str]


def plan_grid(
    models: MoEModel | str | Path | Sequence[MoEModel | str | Path],
    hardware: Hardware | str | Path | Sequence[Hardware | str | Path],
    workloads: Workload | str | Path | Sequence[Workload | str | Path],
    *,
    n_jobs: int = -1,
    out: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Any:
    """Plan every combination of models, machines and workloads.

    Work is spread with joblib, so that ``with joblib.parallel_config(backend="dask")`` (or Ray's) around the
    call takes it beyond one machine.

    Parameters
    ----------
    models, hardware, workloads : objects, or catalog names and paths; one or several of each
    n_jobs : int
        Worker processes of the default backend, at most `MAX_JOBS`; -1 is one per core. A backend set
        around the call decides for itself.
    out : path, optional
        A ``.jsonl`` file that gets each row as soon as it is known. Rows that it holds already are not
        planned again, so that a sweep that was interrupted goes on where it stopped. A file whose rows were made
        with other options, or for another model, machine or workload of the same name, is refused.
    progress : callable, optional
        Called with the number of rows done since the last call.
    **options
        For `hrm.plan`; by default ``resolution="coarse"``.

    Returns
    -------
    pandas.DataFrame
        One row per combination, in order: names, policy, prediction, memory, bound; where nothing fits, the
        reason in ``error`` and no numbers.

    Raises
    ------
    InvalidValue
        For an option that `hrm.plan` does not have, or what is no model, machine or workload.
    UnknownName
        For a name that is in no catalog.
    InvalidConfig
        For an `out` that is not a file of this sweep; it is left alone.

    Examples
    --------
    >>> frame = plan_grid("mixtral-8x7b", ["gcp-t4-1x", "gcp-l4-1x"], "77,32", n_jobs=1)
    >>> frame[["hardware", "bottleneck"]].shape
    (2, 2)
    """
    import pandas as pd
    from joblib import Parallel, delayed

    _check(n_jobs, options)
    options = {"resolution": "coarse"} | options
    axes: list[list[Any]] = [
        [_item("models", x, MoEModel, MoEModel.from_catalog) for x in _several(models)],
        [_item("hardware", x, Hardware, Hardware.from_catalog) for x in _several(hardware)],
        [_item("workloads", x, Workload, Workload.parse) for x in _several(workloads)],
    ]
    for name, axis in zip(("models", "hardware", "workloads"), axes, strict=True):
        if not axis:
            raise InvalidValue(f"{name!r} of a sweep must not be empty.")
        labels = [_label(item) for item in axis]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise InvalidValue(f"{name!r} of a sweep must have different names: {twice!r} occurs twice.")
    store = None if out is None else Path(out)
    digests = _digests(axes)
    done = _read(store, options, digests) if store is not None else {}
    jobs = [job for job in itertools.product(*axes) if _key(job) not in done]
    if progress and done:
        progress(len(done))
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
    # Results come as they are ready, in order, so that what is finished can be kept.
    worker = delayed(_plan_chunk)
    results = Parallel(n_jobs=n_jobs, return_as="generator")(worker(chunk, options) for chunk in chunks)
    try:
        for rows in results:
            if store is not None:
                _append(store, rows, options, digests)
            done |= {(row["model"], row["hardware"], row["workload"]): row for row in rows}
            if progress:
                progress(len(rows))
    finally:
        results.close()
    order = [done[_key(job)] for job in itertools.product(*axes)]
    return pd.DataFrame(order, columns=_COLUMNS)


_COLUMNS = [
    "model",
    "hardware",
    "workload",
    "throughput_tok_s",
    "prefill_s",
    "decode_s",
    "layer_s",
    "bottleneck",
    "bound_tok_s",
    "batch_size",
    "micro_batch_size",
    "num_micro_batches",
    "attention_on_gpu",
    "ffn_on_gpu",
    "weights_on_gpu",
    "kv_on_gpu",
    "gpu_bytes",
    "cpu_bytes",
    "efficiency",
    "evaluated",
    "seconds",
    "error",
]

_AXES = ("model", "hardware", "workload")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_AXES, "bottleneck", "efficiency"), (str,)),
    **dict.fromkeys(("attention_on_gpu", "ffn_on_gpu"), (bool,)),
}
"""Types of a row's values; the others are numbers."""
_ROW_START = b'{"model": "'


def _check(n_jobs: int, options: dict[str, Any]) -> None:
    whole = isinstance(n_jobs, int) and not isinstance(n_jobs, bool)
    if not whole or not (n_jobs == -1 or 1 <= n_jobs <= MAX_JOBS):
        raise InvalidValue(f"'n_jobs' must be -1 (one per core) or 1 to {MAX_JOBS}: {brief(n_jobs)}")
    parameters = inspect.signature(plan).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise InvalidValue(f"unknown option {name!r} of a sweep; known: {', '.join(sorted(known))}.")
    efficiency = options.get("efficiency")
    if efficiency is not None and efficiency not in RATE_SETS:
        raise UnknownName.of("efficiency", str(efficiency), RATE_SETS)


def _item(axis: str, item: Any, kind: type, read: Callable[[str], Any]) -> Any:
    if isinstance(item, str | Path):
        return read(str(item))
    if not isinstance(item, kind):
        raise InvalidValue(f"{axis!r} of a sweep must be names, paths or {kind.__name__} objects: {brief(item)}")
    return item


def _several(items: Any) -> list[Any]:
    if isinstance(items, str | Path | MoEModel | Hardware | Workload) or not isinstance(items, Iterable):
        return [items]
    return list(items)


def _label(item: Any) -> str:
    if not isinstance(item, Workload):
        return str(item.name)
    padded = ",padded" if item.padded else ""
    return item.name if item.name.endswith(f",{item.gen_len}") else f"{item.name},gen{item.gen_len}{padded}"


def _key(job: Sequence[Any]) -> Key:
    return (_label(job[0]), _label(job[1]), _label(job[2]))


def _plan_chunk(jobs: list[tuple[MoEModel, Hardware, Workload]], options: dict[str, Any]) -> list[dict[str, Any]]:
    return [_row(job, options) for job in jobs]


def _row(job: tuple[MoEModel, Hardware, Workload], options: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_COLUMNS)
    row |= dict(zip(_AXES, _key(job), strict=True))
    try:
        found = plan(*job, **options)
    except HrmError as error:
        return row | {"error": str(error)}
    data = found.to_dict()
    predicted, policy, memory = data["predicted"], data["policy"], data["memory"]
    row |= {name: predicted[name] for name in _COLUMNS if name in predicted}
    row |= {name: policy[name] for name in _COLUMNS if name in policy}
    row |= {name: memory[name] for name in ("gpu_bytes", "cpu_bytes")}
    row |= {"bound_tok_s": found.bound_tok_s, "efficiency": found.rate_set}
    return row | {"evaluated": found.evaluated, "seconds": found.seconds}


def _digests(axes: Sequence[Sequence[Any]]) -> list[dict[str, str]]:
    """Of each axis, what its items are beside their names: equal for equal items, by label."""
    try:
        version = importlib.metadata.version("moe-hrm")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return [{_label(item): _digest(item, version) for item in axis} for axis in axes]


def _digest(item: Any, version: str) -> str:
    if isinstance(item, Hardware):
        # Facts say when and where a file was made, and the order of sets in it means nothing.
        item = replace(item, facts={}, rate_sets=dict(sorted(item.rate_sets.items())))
    return hashlib.sha256(f"{version} {item!r}".encode()).hexdigest()[:16]


def _row_digest(key: Key, digests: Sequence[dict[str, str]]) -> dict[str, str]:
    return {axis: digests[i][key[i]] for i, axis in enumerate(_AXES)}


def _read(store: Path, options: dict[str, Any], digests: Sequence[dict[str, str]]) -> dict[Key, dict[str, Any]]:
    """Rows of this sweep that an earlier, interrupted one left; what a kill cut is removed.

    The file is changed only once all of it is known to be a sweep with the same options, machines, models and
    workloads. Rows that are not of this sweep stay there and are not returned.
    """
    if not store.exists():
        return {}
    rows: dict[Key, dict[str, Any]] = {}
    *lines, tail = store.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{str(store)!r}, line {number},"
        row = _parse(line, where)
        if row.pop("options") != _plain(options):
            raise InvalidConfig(f"{where} was made with other options; use another file.")
        digest = row.pop("digest")
        key = (row["model"], row["hardware"], row["workload"])
        if any(key[i] not in known for i, known in enumerate(digests)):
            continue
        for axis, now in _row_digest(key, digests).items():
            if digest.get(axis) != now:
                raise InvalidConfig(
                    f"{where} was made for another {row[axis]!r} (the {axis} or the version of this package has "
                    f"changed since); use another file."
                )
        rows[key] = row
    if tail:
        if tail[: len(_ROW_START)] != _ROW_START[: len(tail)]:
            raise InvalidConfig(f"{str(store)!r}, line {len(lines) + 1}, is not a row of a sweep; use another file.")
        # A kill may have cut the last line; it is planned again.
        with store.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
    return rows


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{where} is not text: {error}; use another file.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{where} is not JSON: {error}; mend the line or use another file.") from None
    if not isinstance(row, dict):
        raise InvalidConfig(f"{where} is not a row of a sweep but {brief(row)}; use another file.")
    expected = {*_COLUMNS, "options", "digest"}
    for name in sorted(expected ^ set(row)):
        what = "has an unknown key" if name in row else "lacks"
        raise InvalidConfig(f"{where} {what} {name!r}; use another file.")
    failed = isinstance(row["error"], str)
    for name, value in row.items():
        if name in ("options", "digest"):
            kinds: tuple[type, ...] = (dict,)
        elif name == "error":
            kinds = (str, NoneType)
        elif name not in _AXES and failed:
            kinds = (NoneType,)
        else:
            kinds = _TYPES.get(name, (int, float))
        if type(value) not in kinds:
            words = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "null")
            raise InvalidConfig(f"{where} needs {words} as {name!r}, not {brief(value)}; use another file.")
    return row


def _append(store: Path, rows: list[dict[str, Any]], options: dict[str, Any], digests: list[dict[str, str]]) -> None:
    lines = []
    for row in rows:
        digest = _row_digest((row["model"], row["hardware"], row["workload"]), digests)
        lines.append(json.dumps(row | {"digest": digest, "options": _plain(options)}) + "\n")
    with store.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(sorted(options.items())), default=str))
    return plain
