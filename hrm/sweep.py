"""Plans for a whole grid of models, machines and workloads, in parallel, as one table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hrm.errors import HrmError, InvalidConfig, InvalidValue
from hrm.hardware import Hardware
from hrm.model import MoEModel
from hrm.search import plan
from hrm.workload import Workload

__all__ = ["plan_grid"]

_CHUNK = 16
"""Plans per task of a worker: long enough to be worth sending, short enough to lose little."""

Key = tuple[str, str, str]


def plan_grid(
    models: MoEModel | str | Sequence[MoEModel | str],
    hardware: Hardware | str | Sequence[Hardware | str],
    workloads: Workload | str | Sequence[Workload | str],
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
        Worker processes of the default backend; -1 is one per core. A backend set around the call decides
        for itself.
    out : path, optional
        A ``.jsonl`` file that gets each row as soon as it is known. Rows that it holds already are not
        planned again, so that a sweep that was interrupted goes on where it stopped.
    progress : callable, optional
        Called with the number of rows done since the last call.
    **options
        For `hrm.plan`; by default ``resolution="coarse"``.

    Returns
    -------
    pandas.DataFrame
        One row per combination, in order: names, policy, prediction, memory, bound; where nothing fits, the
        reason in ``error`` and no numbers.

    Examples
    --------
    >>> frame = plan_grid("mixtral-8x7b", ["gcp-t4-1x", "gcp-l4-1x"], "77,32", n_jobs=1)
    >>> frame[["hardware", "bottleneck"]].shape
    (2, 2)
    """
    import pandas as pd
    from joblib import Parallel, delayed

    options = {"resolution": "coarse"} | options
    axes: list[list[Any]] = [
        [MoEModel.from_catalog(x) if isinstance(x, str) else x for x in _several(models)],
        [Hardware.from_catalog(x) if isinstance(x, str) else x for x in _several(hardware)],
        [Workload.parse(x) if isinstance(x, str) else x for x in _several(workloads)],
    ]
    for name, axis in zip(("models", "hardware", "workloads"), axes, strict=True):
        if not axis:
            raise InvalidValue(f"{name!r} of a sweep must not be empty.")
        labels = [_label(item) for item in axis]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise InvalidValue(f"{name!r} of a sweep must have different names: {twice!r} occurs twice.")
    store = None if out is None else Path(out)
    done = _read(store, options) if store is not None else {}
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
                _append(store, rows, options)
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


def _several(items: Any) -> list[Any]:
    if isinstance(items, str | MoEModel | Hardware | Workload) or not isinstance(items, Iterable):
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
    row |= dict(zip(("model", "hardware", "workload"), _key(job), strict=True))
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


def _read(store: Path, options: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """Rows of an earlier, interrupted sweep with the same options."""
    if not store.exists():
        return {}
    rows: dict[Key, dict[str, Any]] = {}
    for number, row in _lines(store):
        if row.get("options") != _plain(options):
            raise InvalidConfig(
                f"{str(store)!r}, line {number}, was made with other options: {row.get('options')}; use another file."
            )
        del row["options"]
        rows[row["model"], row["hardware"], row["workload"]] = row
    return rows


def _lines(store: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = store.read_text()
    # A kill may have cut the last line; it is planned again.
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        store.write_text(whole)
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidConfig(f"{str(store)!r}, line {number}, is not JSON: {error}.") from None


def _append(store: Path, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    with store.open("a") as file:
        file.writelines(json.dumps(row | {"options": _plain(options)}) + "\n" for row in rows)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(options.items()))
