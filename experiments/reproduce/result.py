"""What reproducing a figure gives: its numbers, its drawing, and rows that set them beside what was published."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm.errors import InvalidConfig

__all__ = ["COLUMNS", "Progress", "Reproduced", "published", "row", "rows_frame"]

Progress = Callable[[int, int], None]

COLUMNS = ("setting", "system", "workload", "gen_len", "published", "predicted", "error", "split")
_PUBLISHED = Path(__file__).resolve().parent.parent / "published"


@dataclass(frozen=True)
class Reproduced:
    """A figure of a paper, made here."""

    name: str
    title: str
    frame: Any
    """pandas.DataFrame: the numbers that are drawn."""
    draw: Callable[[Any], Any]
    """Draws on a matplotlib Figure and returns its axes."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Published beside predicted, under the keys of `COLUMNS`."""
    note: str = ""
    """What differs from the paper, and why."""
    size: tuple[float, float] = (9.0, 5.5)

    def figure(self) -> Any:
        """A matplotlib figure with the drawing, which needs no display."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, layout="constrained")
        self.draw(figure)
        return figure

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``<name>.csv``, ``<name>.png`` and, where there are rows, ``<name>-published.csv``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{self.name}.csv", folder / f"{self.name}.png"]
        self.frame.to_csv(files[0], index=False)
        self.figure().savefig(files[1], dpi=150)
        if self.rows:
            files.append(folder / f"{self.name}-published.csv")
            rows_frame(self.rows).to_csv(files[-1], index=False)
        return files

    def _repr_html_(self) -> str:
        return f"<p>{self.title}</p>" + self.frame.to_html(float_format=lambda x: f"{x:.4g}", index=False)


def row(
    setting: str,
    system: str,
    *,
    published: float,
    predicted: float,
    split: str,
    workload: str = "",
    gen_len: int | None = None,
) -> dict[str, Any]:
    """A row under the keys of `COLUMNS`; the error is relative to what was published.

    Examples
    --------
    >>> round(row("S2", "HRM", published=80.0, predicted=82.0, split="formula")["error"], 3)
    0.025
    """
    values = (setting, system, workload, gen_len, published, predicted, predicted / published - 1, split)
    return dict(zip(COLUMNS, values, strict=True))


def rows_frame(rows: Iterable[dict[str, Any]]) -> Any:
    """Rows as a table."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(COLUMNS))


def published(table: str, figure: str) -> dict[str, float]:
    """Numbers of one figure from ``experiments/published/<table>.csv``, by quantity; lines with # say where from."""
    path = _PUBLISHED / f"{table}.csv"
    try:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    except OSError as error:
        raise InvalidConfig(f"cannot read published numbers {str(path)!r}: {error.strerror}.") from None
    return {item["quantity"]: float(item["value"]) for item in csv.DictReader(lines) if item["figure"] == figure}
