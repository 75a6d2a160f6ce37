"""Results of long measurements as JSON lines, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["OutOfTime", "Records", "commit", "say"]

_KEEP_S = 6 * 3600.0


class OutOfTime(Exception):
    """What comes next would pass the time budget of a command."""


class Records:
    """What has ended, one JSON line each; lines that were made under other conditions are left out.

    Parameters
    ----------
    path : Path
        The file; it need not be there.
    conditions : dict
        What two runs must share for the results of one to count in the other.
    keep_s : float
        Seconds for which a line counts.
    """

    def __init__(self, path: Path, conditions: dict[str, Any], *, keep_s: float = _KEEP_S) -> None:
        self._path, self._conditions = path, json.loads(json.dumps(conditions, default=str))
        self.rows: list[dict[str, Any]] = []
        for _, row in self._lines():
            if row is None or "written" not in row:
                continue  # the line that a kill cut short
            if row.get("conditions") == self._conditions and time.time() - row["written"] < keep_s:
                self.rows.append({key: value for key, value in row.items() if key not in ("conditions", "written")})

    def _lines(self) -> list[tuple[str, dict[str, Any] | None]]:
        """Lines of the file, as they are and parsed."""
        found: list[tuple[str, dict[str, Any] | None]] = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            found.append((line, row if isinstance(row, dict) else None))
        return found

    def find(self, **keys: Any) -> dict[str, Any] | None:
        """The row with these entries; of several the last one, which was made because the others did not do."""
        rows = reversed(self.rows)
        return next((row for row in rows if all(row.get(key) == value for key, value in keys.items())), None)

    def add(self, **row: Any) -> dict[str, Any]:
        """Keep a row, on disk before this returns."""
        self.rows.append(row)
        line = json.dumps(row | {"conditions": self._conditions, "written": time.time()}) + "\n"
        with self._path.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else "\n" + line  # after one that a kill cut short
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
        return row

    def finish(self) -> None:
        """Forget these conditions' rows on disk: the next call measures anew."""
        kept = [line for line, row in self._lines() if row is not None and row.get("conditions") != self._conditions]
        if kept:
            self._path.write_text("\n".join(kept) + "\n")
        else:
            self._path.unlink(missing_ok=True)


def commit() -> str | None:
    """The commit of the checkout that this code lies in, marked if files differ from it; None without one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
