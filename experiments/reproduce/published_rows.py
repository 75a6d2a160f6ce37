"""Published throughputs and kernel latencies as typed rows, from this project's files or from a user's own."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hrm.errors import HrmError, InvalidConfig, UnknownName
from hrm.hardware import Hardware
from hrm.model import MoEModel
from hrm.systems import SYSTEMS as TRAITS
from hrm.units import MAX_SIZE, brief
from hrm.workload import Workload

__all__ = [
    "JUDGED",
    "KERNELS",
    "SPLITS",
    "SYSTEMS",
    "KernelCell",
    "PeerPrediction",
    "PublishedRow",
    "kernel_cells",
    "peer_predictions",
    "read_rows",
    "system_label",
    "throughput_rows",
]

SYSTEMS = {name: TRAITS[name].title for name in ("moe-lightning", "flexgen", "flexgen-c", "deepspeed-zero")}
"""Published systems by the names that files use, with the paper's."""

SPLITS = ("calibration", "prediction", "second run", "repeats Fig. 7")
JUDGED = ("calibration", "prediction")
"""Splits whose errors count; the others show a run that is counted elsewhere."""

KERNELS = ("cpu_gqa_attention", "kv_cache_h2d", "gpu_moe_ffn")

_FOLDER = Path(__file__).resolve().parent.parent / "published"
_NEEDED = ("model", "hardware", "workload", "system", "padded", "gen_len", "throughput_tok_s")
_Item = TypeVar("_Item")


def system_label(system: str, padded: bool) -> str:
    """The paper's name of a system; "(p)" says that MoE-Lightning's prompts were padded.

    Examples
    --------
    >>> system_label("moe-lightning", True)
    'MoE-Lightning(p)'
    """
    return SYSTEMS[system] + ("(p)" if padded and system == "moe-lightning" else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One measured run: what ran on what, and how many tokens per second it generated."""

    setting: str
    """The paper's name of model and machine, S1 to S9."""
    model: str
    """Catalog name, or a config's path."""
    hardware: str
    """Catalog name, or a hardware file's path."""
    workload: str
    """As `hrm.Workload.parse` takes it; `gen_len` of the row is the one that ran."""
    system: str
    """A key of `SYSTEMS`."""
    padded: bool
    """Every prompt as long as the longest."""
    gen_len: int
    throughput_tok_s: float
    """Generated tokens per second of prefill and decode."""
    total_time_s: float | None = None
    batch_size: int | None = None
    """Sequences per batch, None where it was not published; so with the sizes below."""
    micro_batch_size: int | None = None
    num_micro_batches: int | None = None
    source: str = ""
    note: str = ""
    split: str = "calibration"
    """One of `SPLITS`."""

    @property
    def label(self) -> str:
        """The system as the paper names it."""
        return system_label(self.system, self.padded)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCell:
    """One point of Fig. 9: seconds of a kernel, or of a transfer, of one layer."""

    setting: str
    model: str
    hardware: str
    kernel: str
    """One of `KERNELS`."""
    micro_batch_size: int
    context_len: int | None
    """Tokens in each sequence's KV cache; None for the FFN, which has none."""
    latency_s: float
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerPrediction:
    """What another cost model said for a run whose throughput is known."""

    setting: str
    workload: str
    gen_len: int
    system: str
    padded: bool
    predictor: str
    predicted_tok_s: float
    measured_tok_s: float
    note: str = ""

    @property
    def label(self) -> str:
        """The system as the paper names it."""
        return system_label(self.system, self.padded)


class _Line:
    """A line of a table, which knows where it stands."""

    def __init__(self, where: str, cells: dict[str, str]) -> None:
        self.where, self.cells = where, cells

    def text(self, column: str) -> str:
        return self.cells.get(column, "").strip()

    def fail(self, why: str) -> InvalidConfig:
        return InvalidConfig(f"{self.where}: {why}")

    def needed(self, column: str) -> str:
        if not self.text(column):
            raise self.fail(f"{column!r} is empty.")
        return self.text(column)

    def number(self, column: str) -> float:
        text = self.needed(column)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise self.fail(f"{column!r} must be a number > 0: {text!r}")
        return value

    def count(self, column: str) -> int:
        text = self.needed(column)
        short = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_SIZE))
        if not (short and 1 <= int(text) <= MAX_SIZE):
            raise self.fail(f"{column!r} must be a whole number from 1 to {MAX_SIZE}: {brief(text)}")
        return int(text)

    def flag(self, column: str) -> bool:
        text = self.needed(column).lower()
        if text not in ("true", "false"):
            raise self.fail(f"{column!r} must be true or false: {text!r}")
        return text == "true"

    def known(self, column: str, names: Collection[str]) -> str:
        """A name of a closed list."""
        name = self.needed(column)
        if name not in names:
            raise UnknownName(f"{self.where}: {UnknownName.of(column, name, names)}")
        return name

    def loadable(self, column: str, load: Callable[[str], Any]) -> str:
        """A name that `load` accepts."""
        name = self.needed(column)
        try:
            load(name)
        except HrmError as error:
            raise type(error)(f"{self.where}: {error}") from None
        return name

    def optional(self, column: str, read: Callable[[str], _Item]) -> _Item | None:
        return read(column) if self.text(column) else None


def _lines(path: Path, columns: Collection[str], needed: Collection[str]) -> Iterator[_Line]:
    """Lines of a CSV file under its header, without comments (#) and blank ones."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidConfig(f"cannot read {str(path)!r}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidConfig(f"{str(path)!r} is not a text file in UTF-8.") from None
    header: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        try:
            cells = next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise InvalidConfig(f"{where}: not a line of CSV: {error}.") from None
        if not header:
            header = [cell.strip() for cell in cells]
            _check_header(header, where, columns, needed)
            continue
        if len(cells) != len(header):
            raise InvalidConfig(f"{where}: {len(cells)} values under {len(header)} columns.")
        yield _Line(where, dict(zip(header, cells, strict=True)))
    if not header:
        raise InvalidConfig(f"{str(path)!r} is empty; its first line names the columns: {', '.join(columns)}.")


def _check_header(header: list[str], where: str, columns: Collection[str], needed: Collection[str]) -> None:
    for name in header:
        if name not in columns:
            raise InvalidConfig(f"{where}: {UnknownName.of('column', name, columns)}")
    if len(set(header)) < len(header):
        raise InvalidConfig(f"{where}: a column is named twice: {', '.join(header)}.")
    missing = [name for name in needed if name not in header]
    if missing:
        raise InvalidConfig(f"{where}: missing columns: {', '.join(missing)}.")


def _names(kind: type) -> list[str]:
    return [item.name for item in fields(kind)]


def read_rows(path: str | Path) -> list[PublishedRow]:
    """Measured runs from a CSV file of the form of ``experiments/published/throughput.csv``.

    Parameters
    ----------
    path : str or Path
        The first line that is neither blank nor a comment (#) names the columns: the fields of `PublishedRow`, of which
        model, hardware, workload, system, padded, gen_len and throughput_tok_s must be there and filled. An empty or
        missing setting becomes "model on hardware", an empty or missing split "calibration".

    Returns
    -------
    list of PublishedRow

    Raises
    ------
    InvalidConfig
        A missing, unknown or doubled column, or a bad value; the message names file and line.
    UnknownName
        A system, split, model, machine or workload that is not known.
    """
    path = Path(path)
    # A file repeats its few names on every line.
    models, machines, workloads = cache(MoEModel.from_catalog), cache(Hardware.from_catalog), cache(Workload.parse)
    rows = []
    for line in _lines(path, _names(PublishedRow), _NEEDED):
        model, hardware = line.loadable("model", models), line.loadable("hardware", machines)
        row = PublishedRow(
            setting=line.text("setting") or f"{model} on {hardware}",
            model=model,
            hardware=hardware,
            workload=line.loadable("workload", workloads),
            system=line.known("system", SYSTEMS),
            padded=line.flag("padded"),
            gen_len=line.count("gen_len"),
            throughput_tok_s=line.number("throughput_tok_s"),
            total_time_s=line.optional("total_time_s", line.number),
            batch_size=line.optional("batch_size", line.count),
            micro_batch_size=line.optional("micro_batch_size", line.count),
            num_micro_batches=line.optional("num_micro_batches", line.count),
            source=line.text("source"),
            note=line.text("note"),
            split=line.known("split", SPLITS) if line.text("split") else "calibration",
        )
        size, part, count = row.batch_size, row.micro_batch_size, row.num_micro_batches
        if size and part and (part > size or (count and part * count < size)):
            raise line.fail(f"micro-batches of {part} do not make up a batch of {size}.")
        rows.append(row)
    if not rows:
        raise InvalidConfig(f"{str(path)!r} holds no rows.")
    return rows


@cache
def _published_throughputs() -> tuple[PublishedRow, ...]:
    return tuple(read_rows(_FOLDER / "throughput.csv"))


def throughput_rows(source: str | None = None, split: str | None = None) -> list[PublishedRow]:
    """Throughputs published in MoE-Lightning, in the order of the file.

    Parameters
    ----------
    source : str, optional
        How the row's source begins, e.g. ``"Fig. 7"`` or ``"Tab. 4"``.
    split : str, optional
        One of `SPLITS`.

    Examples
    --------
    >>> [row.throughput_tok_s for row in throughput_rows("Fig. 8")]
    [34.037, 36.235, 29.672, 25.865]
    """
    if split is not None and split not in SPLITS:
        raise UnknownName.of("split", split, SPLITS)
    rows = _published_throughputs()
    return [row for row in rows if row.source.startswith(source or "") and split in (None, row.split)]


def kernel_cells(path: str | Path | None = None) -> list[KernelCell]:
    """The points of Fig. 9 of MoE-Lightning, or of a file of the same form."""
    names = _names(KernelCell)
    return [
        KernelCell(
            setting=line.needed("setting"),
            model=line.needed("model"),
            hardware=line.needed("hardware"),
            kernel=line.known("kernel", KERNELS),
            micro_batch_size=line.count("micro_batch_size"),
            context_len=None if line.text("kernel") == "gpu_moe_ffn" else line.count("context_len"),
            latency_s=line.number("latency_s"),
            source=line.text("source"),
        )
        for line in _lines(Path(path or _FOLDER / "kernel_latency.csv"), names, names[:-1])
    ]


def peer_predictions(path: str | Path | None = None) -> list[PeerPrediction]:
    """What FlexGen's cost model and the authors' HRM predicted for published runs, or a file of the same form."""
    names = _names(PeerPrediction)
    return [
        PeerPrediction(
            setting=line.needed("setting"),
            workload=line.needed("workload"),
            gen_len=line.count("gen_len"),
            system=line.known("system", SYSTEMS),
            padded=line.flag("padded"),
            predictor=line.needed("predictor"),
            predicted_tok_s=line.number("predicted_tok_s"),
            measured_tok_s=line.number("measured_tok_s"),
            note=line.text("note"),
        )
        for line in _lines(Path(path or _FOLDER / "peer_predictions.csv"), names, names[:-1])
    ]
